"""Writes the Grafana dashboard, deploy/chart/files/dashboard.json: `make dashboard`.

Rows and panels are data here, and their places on the page are worked out; the file is what Grafana imports, and what
the chart ships. Each query is run by `make monitoring` against a real Prometheus.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

FILE: Final = Path(__file__).parent / "chart" / "files" / "dashboard.json"

_WIDTH: Final = 24  # of Grafana's grid
_PANEL_WIDTH: Final = 8
_PANEL_HEIGHT: Final = 8
_MODEL: Final = 'model_name=~"$model"'
_RATE: Final = "[$__rate_interval]"
_REFUSED: Final = 'grpc_code="RESOURCE_EXHAUSTED"'


@dataclass(frozen=True)
class Panel:
    """A graph: each query with what its lines are called."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    description: str = ""


def rate(metric: str, labels: str = _MODEL) -> str:
    return f"rate({metric}{{{labels}}}{_RATE})"


def quantiles(histogram: str, labels: str = _MODEL, *, by: str = "") -> tuple[tuple[str, str], ...]:
    """Return median, 95th and 99th percentile of a histogram, over all processes."""
    groups = ", ".join(filter(None, ("le", by)))
    name = f" {{{{{by}}}}}" if by else ""
    return tuple(
        (f"histogram_quantile({share}, sum by ({groups}) ({rate(histogram + '_bucket', labels)}))", f"p{percent}{name}")
        for share, percent in ((0.5, 50), (0.95, 95), (0.99, 99))
    )


def p95(histogram: str, name: str, labels: str = _MODEL) -> tuple[str, str]:
    return (f"histogram_quantile(0.95, sum by (le) ({rate(histogram + '_bucket', labels)}))", name)


ROWS: Final[tuple[tuple[str, tuple[Panel, ...]], ...]] = (
    (
        "Traffic",
        (
            Panel(
                "Calls",
                "reqps",
                ((f"sum by (grpc_method) (rate(grpc_server_handled_total{_RATE}))", "{{grpc_method}}"),),
            ),
            Panel(
                "Calls that do not end with OK",
                "reqps",
                (
                    (
                        f'sum by (grpc_code) (rate(grpc_server_handled_total{{grpc_code!="OK"}}{_RATE})) or vector(0)',
                        "{{grpc_code}}",
                    ),
                ),
            ),
            Panel(
                "Refusals and failures by reason",
                "reqps",
                ((f"sum by (reason) (rate(torchrelay_call_errors_total{_RATE})) or vector(0)", "{{reason}}"),),
                "The reason in the ErrorInfo of the status; protos/REFERENCE.md says what each means and what to do.",
            ),
            Panel(
                "Tokens",
                "short",
                (
                    (f"sum({rate('torchrelay_generation_tokens_total')})", "generated /s"),
                    (f"sum({rate('torchrelay_prompt_tokens_total')})", "of prompts /s"),
                ),
            ),
            Panel(
                "Generations that ended",
                "reqps",
                (
                    (f"sum by (finished_reason) ({rate('torchrelay_request_success_total')})", "{{finished_reason}}"),
                    (f"sum by (reason) ({rate('torchrelay_request_failure_total')}) or vector(0)", "failed {{reason}}"),
                ),
            ),
            Panel(
                "Streams",
                "short",
                (
                    ("sum(torchrelay_streams_open)", "open"),
                    (f"sum by (kind) ({rate('torchrelay_streams_opened_total')})", "{{kind}} /s"),
                ),
                "Resumed: by ResumeGeneration, after a broken connection or a gateway's end.",
            ),
            Panel(
                "Requests at OpenAI's door",
                "reqps",
                (
                    (
                        f"sum by (grpc_code) (rate(torchrelay_openai_requests_total{_RATE})) or vector(0)",
                        "{{grpc_code}}",
                    ),
                ),
            ),
        ),
    ),
    (
        "Latency",
        (
            Panel(
                "Time to first token, as callers feel it",
                "s",
                quantiles("torchrelay_gateway_time_to_first_token_seconds"),
                "From the call's arrival at a gateway to its first token, the wait in the queue included.",
            ),
            Panel(
                "Between tokens, as callers feel it", "s", quantiles("torchrelay_gateway_inter_token_latency_seconds")
            ),
            Panel("Whole generation", "s", quantiles("torchrelay_e2e_request_latency_seconds")),
            Panel(
                "Where the time goes (p95)",
                "s",
                (
                    p95("torchrelay_request_queue_time_seconds", "queue"),
                    p95("torchrelay_request_prefill_time_seconds", "prefill"),
                    p95("torchrelay_request_decode_time_seconds", "decode"),
                ),
                "The slow generation is found here: what waits, what reads its prompt, what decodes.",
            ),
            Panel(
                "Time to first token by model (p95)",
                "s",
                (
                    (
                        "histogram_quantile(0.95, sum by (le, model_name) "
                        f"({rate('torchrelay_time_to_first_token_seconds_bucket')}))",
                        "{{model_name}}",
                    ),
                ),
            ),
            Panel(
                "Calls at the gateway, without streams (p95)",
                "s",
                (
                    (
                        "histogram_quantile(0.95, sum by (le, grpc_method) "
                        f'(rate(grpc_server_handling_seconds_bucket{{grpc_type="unary"}}{_RATE})))',
                        "{{grpc_method}}",
                    ),
                ),
            ),
            Panel(
                "Sizes (p95)",
                "short",
                (
                    p95("torchrelay_request_prompt_tokens", "tokens of a prompt"),
                    p95("torchrelay_request_generation_tokens", "tokens of an answer"),
                ),
            ),
        ),
    ),
    (
        "Saturation",
        (
            Panel(
                "Sequences",
                "short",
                (
                    (f"sum by (model_name) (torchrelay_num_requests_running{{{_MODEL}}})", "{{model_name}} running"),
                    (
                        f"sum by (model_name) (torchrelay_num_requests_waiting{{{_MODEL}}})",
                        "{{model_name}} without blocks",
                    ),
                ),
            ),
            Panel(
                "KV cache in use",
                "percentunit",
                ((f"torchrelay_kv_cache_usage_perc{{{_MODEL}}}", "{{model_name}} {{instance}}"),),
            ),
            Panel(
                "Prefix cache: prompt tokens found there",
                "percentunit",
                (
                    (
                        f"sum by (model_name) ({rate('torchrelay_prefix_cache_hits_total')}) / "
                        f"sum by (model_name) ({rate('torchrelay_prefix_cache_queries_total')})",
                        "{{model_name}}",
                    ),
                ),
            ),
            Panel("Step", "s", quantiles("torchrelay_step_duration_seconds")),
            Panel(
                "Batch",
                "short",
                (
                    (
                        f"sum by (model_name) ({rate('torchrelay_step_batch_size_sum')}) / "
                        f"sum by (model_name) ({rate('torchrelay_step_batch_size_count')})",
                        "{{model_name}} sequences a step",
                    ),
                    (
                        f"sum by (model_name) ({rate('torchrelay_iteration_tokens_sum')}) / "
                        f"sum by (model_name) ({rate('torchrelay_iteration_tokens_count')})",
                        "{{model_name}} tokens a step",
                    ),
                ),
            ),
            Panel(
                "Given up before the end",
                "reqps",
                (
                    (
                        f"sum by (model_name) ({rate('torchrelay_num_preemptions_total')})",
                        "{{model_name}} set aside by the engine",
                    ),
                    (f"sum by (reason) ({rate('torchrelay_jobs_dropped_total')}) or vector(0)", "{{reason}}"),
                ),
            ),
            Panel(
                "Processors",
                "percentunit",
                ((f"sum by (instance) (rate(process_cpu_seconds_total{_RATE}))", "{{instance}}"),),
                "Of one core; a gateway that nears 1 wants another beside it.",
            ),
            Panel("Memory", "bytes", (("sum by (instance) (process_resident_memory_bytes)", "{{instance}}"),)),
        ),
    ),
    (
        "Queue",
        (
            Panel(
                "Waiting",
                "short",
                (
                    (
                        f"max by (model_name, priority) (torchrelay_queue_jobs{{{_MODEL}}})",
                        "{{model_name}} {{priority}}",
                    ),
                ),
            ),
            Panel(
                "Age of the oldest",
                "s",
                (
                    (
                        f"max by (model_name, priority) (torchrelay_queue_oldest_age_seconds{{{_MODEL}}})",
                        "{{model_name}} {{priority}}",
                    ),
                ),
            ),
            Panel(
                "Expected wait",
                "s",
                ((f"max by (model_name) (torchrelay_queue_expected_wait_seconds{{{_MODEL}}})", "{{model_name}}"),),
                "What the worker pools are scaled by.",
            ),
            Panel(
                "Workers and what they hold",
                "short",
                (
                    (f"max by (model_name) (torchrelay_workers{{{_MODEL}}})", "{{model_name}} workers"),
                    (f"max by (model_name) (torchrelay_jobs_running{{{_MODEL}}})", "{{model_name}} generations"),
                ),
            ),
            Panel(
                "Claims",
                "reqps",
                ((f"sum by (kind) ({rate('torchrelay_claims_total')})", "{{kind}}"),),
                "A takeover is a generation that another worker had and lost: it died, hung, or was drained.",
            ),
            Panel(
                "Upkeep and dead letters",
                "short",
                (
                    (f"sum by (outcome) ({rate('torchrelay_upkeep_jobs_total')}) or vector(0)", "{{outcome}} /s"),
                    (f"max by (model_name) (torchrelay_dead_letters{{{_MODEL}}})", "{{model_name}} dead letters"),
                ),
            ),
        ),
    ),
    (
        "GPU and devices",
        (
            Panel(
                "Busy",
                "percentunit",
                ((rate("torchrelay_engine_busy_seconds_total"), "{{model_name}} {{instance}}"),),
                "Part of the time in steps. What the device itself says is in DCGM's exporter.",
            ),
            Panel(
                "Device memory",
                "percentunit",
                (
                    (
                        f"torchrelay_device_memory_used_bytes{{{_MODEL}}} / torchrelay_device_memory_bytes{{{_MODEL}}}",
                        "{{model_name}} {{instance}}",
                    ),
                ),
            ),
            Panel(
                "What serves",
                "short",
                (
                    (
                        f"count by (model_name, device, dtype, version) (torchrelay_worker_info{{{_MODEL}}})",
                        "{{model_name}} {{device}} {{dtype}} {{version}}",
                    ),
                    ("count by (version) (torchrelay_gateway_info)", "gateways {{version}}"),
                ),
            ),
        ),
    ),
    (
        "Redis",
        (
            Panel("Answers", "bool", (("min by (instance) (torchrelay_redis_up)", "{{instance}}"),)),
            Panel(
                "Memory in use, of maxmemory",
                "percentunit",
                (("max(torchrelay_redis_memory_used_ratio)", "used"),),
                "New work is refused from 80 % on (TORCHRELAY_QUEUE_MAX_MEMORY_SHARE).",
            ),
        ),
    ),
    (
        "Tenants",
        (
            Panel("Calls", "reqps", ((f"sum by (tenant) (rate(torchrelay_tenant_calls_total{_RATE}))", "{{tenant}}"),)),
            Panel(
                "Refused for quotas or a full queue",
                "reqps",
                (
                    (
                        f"sum by (tenant) ({rate('torchrelay_tenant_calls_total', _REFUSED)}) or vector(0)",
                        "{{tenant}}",
                    ),
                ),
            ),
            Panel(
                "Tokens",
                "short",
                ((f"sum by (tenant, kind) ({rate('torchrelay_tenant_tokens_total')})", "{{tenant}} {{kind}} /s"),),
            ),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana takes it."""
    return {
        "title": "torchrelay",
        "uid": "torchrelay",
        "tags": ["torchrelay"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_datasource(), _models()]},
        "panels": list(_panels()),
    }


def _panels() -> Iterable[dict[str, Any]]:
    top, number = 0, 0
    for title, panels in ROWS:
        number += 1
        yield {
            "type": "row",
            "id": number,
            "title": title,
            "collapsed": False,
            "panels": [],
            "gridPos": {"x": 0, "y": top, "w": _WIDTH, "h": 1},
        }
        top += 1
        for index, panel in enumerate(panels):
            number += 1
            column = index % (_WIDTH // _PANEL_WIDTH)
            if index and not column:
                top += _PANEL_HEIGHT
            yield _graph(panel, number, column * _PANEL_WIDTH, top)
        top += _PANEL_HEIGHT


def _graph(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "id": number,
        "title": panel.title,
        "description": panel.description,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {"x": x, "y": y, "w": _PANEL_WIDTH, "h": _PANEL_HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": {"fillOpacity": 10}}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {"refId": chr(ord("A") + index), "expr": query, "legendFormat": legend, "range": True}
            for index, (query, legend) in enumerate(panel.queries)
        ],
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _models() -> dict[str, Any]:
    return {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": "label_values(torchrelay_workers, model_name)", "refId": "models"},
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(dashboard(), indent=1) + "\n")
    sys.stderr.write(f"{FILE}: {sum(panel['type'] != 'row' for panel in dashboard()['panels'])} panels\n")
