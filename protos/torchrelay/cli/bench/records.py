"""Runs in files: every request of every level, so that figures can be computed and drawn again."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torchrelay.cli.bench.samples import Failure, Level, Run, Sample
from torchrelay.cli.bench.slo import Slo

SCHEMA: Final = "torchrelay.bench/1"
_GZIP: Final = b"\x1f\x8b"
_WHAT_IT_IS = "is no run of `torchrelay bench --output`"


@dataclass(frozen=True, slots=True)
class Record:
    """One run: what was measured with what, and its levels."""

    about: Mapping[str, Any]  # time, command, versions, model, workload
    runs: Sequence[Run]
    slo: Slo | None = None
    target: float = 0.99  # the share of requests that has to meet the objectives

    @property
    def name(self) -> str:
        """What a picture calls it."""
        model = self.about.get("model", {})
        return " ".join(str(model[key]) for key in ("name", "weight_format") if model.get(key)) or "run"


def what_differs(one: Record, other: Record) -> Iterator[tuple[str, str, str]]:
    """Yield what keeps two runs from being of the same thing: what it is, and how it was in either."""
    for what, read in _CONDITIONS.items():
        before, after = read(one.about), read(other.about)
        if before != after:
            yield what, before or "not known", after or "not known"


def _model(about: Mapping[str, Any]) -> str:
    model = about.get("model", {})
    return " ".join(
        part for part in (model.get("name"), model.get("revision", "")[:12], model.get("weight_format")) if part
    )


def _load(about: Mapping[str, Any]) -> str:
    words = list(about.get("command", ()))
    if "--output" in words:
        at = words.index("--output")
        del words[at : at + 2]
    return " ".join(words)


_CONDITIONS: Final[Mapping[str, Callable[[Mapping[str, Any]], str]]] = {
    "model": _model,
    "number of workers": lambda about: str(about.get("model", {}).get("num_workers", "")),
    "workers' versions": lambda about: ", ".join(about.get("server_versions") or ()),
    "command": _load,
}


def write(path: Path, record: Record) -> None:
    """Write a run as JSON, compressed where the file's name ends in .gz. Raises OSError."""
    value = {
        "schema": SCHEMA,
        **record.about,
        "slo": record.slo.as_ms() if record.slo else None,
        "target": record.target,
        "levels": [_level_to_json(run, record.slo) for run in record.runs],
    }
    data = (json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def read(path: Path) -> Record:
    """Read a run. Raises ValueError that says what is wrong with the file."""
    try:
        data = path.read_bytes()
        value = json.loads(gzip.decompress(data) if data.startswith(_GZIP) else data)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    schema = value.get("schema") if isinstance(value, dict) else None
    if schema is None:
        raise ValueError(f"{path} {_WHAT_IT_IS}")
    if schema != SCHEMA:
        raise ValueError(f"{path} is of schema {schema}, and this version reads {SCHEMA}")
    try:
        return Record(
            about={key: each for key, each in value.items() if key not in ("schema", "slo", "target", "levels")},
            runs=[_level_from_json(level) for level in value["levels"]],
            slo=Slo.from_ms(value["slo"]) if value["slo"] else None,
            target=float(value["target"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} {_WHAT_IT_IS}: {type(error).__name__} {error}") from error


def _us(seconds: float) -> int:
    return round(seconds * 1e6)


def _level_to_json(run: Run, slo: Slo | None) -> dict[str, Any]:
    samples = run.samples
    return {
        "report": run.report(slo),
        "elapsed_us": _us(run.elapsed_s),
        "cpu_us": _us(run.cpu_s),
        "peak_in_flight": run.peak_in_flight,
        "loop_lags_us": [_us(lag) for lag in run.loop_lags_s],
        # Columns, one value per request.
        "samples": {
            "intended_us": [_us(sample.intended_s) for sample in samples],
            "lag_us": [_us(sample.lag_s) for sample in samples],
            "first_token_us": [_us(sample.first_token_s) for sample in samples],
            "total_us": [_us(sample.total_s) for sample in samples],
            "first_tokens": [sample.first_tokens for sample in samples],
            # Of each message behind the first: microseconds since the one before, and tokens.
            "messages": [[n for gap, tokens in sample.messages for n in (_us(gap), tokens)] for sample in samples],
            "input_tokens": [sample.input_tokens for sample in samples],
            "cached_input_tokens": [sample.cached_input_tokens for sample in samples],
            "queue_us": [None if sample.queue_s is None else _us(sample.queue_s) for sample in samples],
            "num_resumes": [sample.num_resumes for sample in samples],
            "num_takeovers": [sample.num_takeovers for sample in samples],
        },
        "failures": [[_us(f.intended_s), _us(f.lag_s), _us(f.total_s), f.reason] for f in run.failures],
    }


def _level_from_json(value: Mapping[str, Any]) -> Run:
    report, columns = value["report"], value["samples"]
    is_open = report["mode"] == "open"
    rows = zip(*(columns[name] for name in _COLUMNS), strict=True)
    return Run(
        Level(report["rate"] if is_open else report["concurrency"], is_open),
        elapsed_s=value["elapsed_us"] / 1e6,
        samples=[_sample_from_row(*row) for row in rows],
        failures=[Failure(at / 1e6, lag / 1e6, total / 1e6, reason) for at, lag, total, reason in value["failures"]],
        loop_lags_s=[lag / 1e6 for lag in value["loop_lags_us"]],
        cpu_s=value["cpu_us"] / 1e6,
        peak_in_flight=value["peak_in_flight"],
    )


_COLUMNS: Final = (
    "intended_us", "lag_us", "first_token_us", "total_us", "first_tokens", "messages", "input_tokens",
    "cached_input_tokens", "queue_us", "num_resumes", "num_takeovers",
)  # fmt: skip


def _sample_from_row(
    intended: int, lag: int, first: int, total: int, first_tokens: int, messages: Sequence[int], *others: Any
) -> Sample:
    inputs, cached, queue, resumes, takeovers = others
    return Sample(
        intended_s=intended / 1e6,
        lag_s=lag / 1e6,
        first_token_s=first / 1e6,
        total_s=total / 1e6,
        first_tokens=first_tokens,
        messages=[(gap / 1e6, tokens) for gap, tokens in zip(messages[::2], messages[1::2], strict=True)],
        input_tokens=inputs,
        cached_input_tokens=cached,
        queue_s=None if queue is None else queue / 1e6,
        num_resumes=resumes,
        num_takeovers=takeovers,
    )
