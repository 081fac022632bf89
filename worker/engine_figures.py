"""The engine's own figures, read when Prometheus asks: nothing is spent on them in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from common.registry import ModelCard
from worker.engine.types import EngineStats


class EngineFigures(Collector):
    """Figures of one engine. `memory` returns used and all bytes of its device; called from the scraper's threads."""

    def __init__(
        self,
        card: ModelCard,
        device: str,
        version: str,
        stats: Callable[[], EngineStats],
        memory: Callable[[], tuple[int, int]],
    ) -> None:
        self._card = card
        self._device = device
        self._version = version
        self._stats = stats
        self._memory = memory

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        used, total = self._memory()
        used_blocks = stats.num_blocks - stats.num_free_blocks
        yield self._gauge("num_requests_running", "Sequences that are decoded together.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Sequences that this worker holds without blocks.", stats.num_waiting)
        yield self._gauge(
            "kv_cache_usage_perc",
            "Share of the KV cache in use, 0 to 1; blocks kept for prefix hits count as free.",
            used_blocks / stats.num_blocks if stats.num_blocks else 0.0,
        )
        yield self._gauge("kv_cache_blocks", "Blocks of the KV cache.", stats.num_blocks)
        yield self._gauge("kv_cache_block_size", "Tokens in one block.", stats.block_size)
        yield self._gauge("device_memory_used_bytes", "Memory in use: of the GPU, or this process on a CPU.", used)
        yield self._gauge(
            "device_memory_bytes", "All memory of the GPU, or of the host that this process may use.", total
        )
        yield self._counter("engine_steps", "Steps of the engine.", stats.num_steps)
        yield self._counter("num_preemptions", "Sequences set aside and computed again later.", stats.num_preemptions)
        yield self._counter("prompt_tokens", "Tokens of prompts, computed or found in the cache.", stats.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", stats.generated_tokens)
        yield self._counter(
            "prefix_cache_queries", "Prompt tokens looked for in the prefix cache.", stats.prompt_tokens
        )
        yield self._counter("prefix_cache_hits", "Of those, found there.", stats.cached_prompt_tokens)
        info = GaugeMetricFamily(
            "torchrelay_worker_info",
            "What this worker serves; always 1.",
            labels=["model_name", "model_revision", "device", "version", "dtype"],
        )
        card = self._card
        info.add_metric([card.name, card.revision, self._device, self._version, card.dtype], 1)
        yield info

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"torchrelay_{name}", text, labels=["model_name"])
        family.add_metric([self._card.name], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"torchrelay_{name}", text, labels=["model_name"])
        family.add_metric([self._card.name], value)
        return family
