"""What `top` and `queue` show: from a snapshot of the fleet to tables. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from torchrelay.admin.v1beta1 import fleet_pb2 as pb
from torchrelay.cli import output
from torchrelay.cli.fleet_rates import Rates
from torchrelay.v1 import generation_pb2, model_pb2

_WIDE = 110  # columns from which all is shown
_STALE_S = 10.0  # a report that is older than a worker's lease
_SHORT_ID = 8
_HEADING_LINES = 3  # of a part: a blank one, its title, those of its columns
_GAP = 2  # between columns


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of a table; `is_wide` ones are left out of a narrow terminal, those with a `least` width may shrink."""

    title: str
    is_number: bool = True
    is_wide: bool = False
    least: int | None = None


@dataclass(frozen=True, slots=True)
class Frame:
    """A picture of the fleet. `note` says why it does not move."""

    snapshot: pb.FleetSnapshot
    rates: Rates = field(default_factory=Rates)
    note: str = ""

    def render(self, width: int, height: int) -> RenderableType:
        """Return the picture for a terminal of so many columns and lines."""
        is_wide = width >= _WIDE
        parts = [
            _Part("Workers", _WORKER_COLUMNS, self._workers(), weight=4),
            _Part("Queues", _MODEL_COLUMNS, self._models(), weight=2),
            _Part("Waiting, by tenant", _TENANT_COLUMNS, tenants_of(self.snapshot), weight=2, is_optional=True),
            _Part("Longest running", _GENERATION_COLUMNS, self._generations(), weight=3, is_optional=True),
        ]
        parts = [part for part in parts if part.rows or not part.is_optional]
        head = self._head()
        lines = height - len(head.plain.splitlines()) - _HEADING_LINES * len(parts)
        shares = share_out([max(1, len(part.rows)) for part in parts], [part.weight for part in parts], lines)
        shown = (part.render(width, share, is_wide=is_wide) for part, share in zip(parts, shares, strict=True))
        return Group(head, *(piece for pieces in shown for piece in pieces))

    def _head(self) -> Text:
        snapshot = self.snapshot
        per_s = [self.rates.generated_per_s(worker.worker_id) for worker in snapshot.workers]
        known = [rate for rate in per_s if rate is not None]
        waiting = sum(one.num_waiting for model in snapshot.models for one in model.classes)
        head = Text(no_wrap=True, overflow="ellipsis")
        head.append("torchrelay", "bold cyan")
        head.append(f" {snapshot.gateway.version or '-'}  ")
        head.append(f"{snapshot.time.ToDatetime():%H:%M:%S} UTC  ", "dim")
        head.append(f"{sum(known):,.0f} tok/s" if known else "- tok/s", "bold green")
        head.append(f"  {snapshot.num_running} running, {waiting} waiting, {snapshot.gateway.num_streams} streams here")
        if self.note:
            head.append(f"\n{self.note}", "bold yellow")
        return head

    def _workers(self) -> list[list[Text]]:
        return [self._worker(worker) for worker in self.snapshot.workers]

    def _worker(self, worker: pb.Worker) -> list[Text]:
        rate = self.rates.generated_per_s(worker.worker_id)
        used = worker.num_blocks - worker.num_free_blocks
        kv = used / worker.num_blocks if worker.num_blocks else None
        age_s = _seconds_between(worker.report_time, self.snapshot.time) if worker.HasField("report_time") else None
        leaving = worker.draining or worker.drain_requested_by
        memory = output.size(worker.memory_used_bytes)
        if worker.memory_total_bytes:
            memory += f" of {output.size(worker.memory_total_bytes)}"
        return [
            Text(worker.worker_id[:_SHORT_ID], "yellow" if leaving else ""),
            Text(worker.model),
            Text(worker.device or "-"),
            Text(str(worker.num_running)),
            Text(str(worker.num_waiting)),
            _share(kv),
            Text(short(worker.last_step_time)),
            Text("-" if rate is None else f"{rate:,.0f}"),
            Text(short(worker.time_to_first_token_p50) if worker.HasField("time_to_first_token_p50") else "-"),
            Text(short(worker.time_to_first_token_p95) if worker.HasField("time_to_first_token_p95") else "-"),
            _share(worker.busy_ratio if worker.HasField("busy_ratio") else None),
            Text(memory),
            _age(age_s),
            Text(_leaving(worker), "yellow"),
        ]

    def _models(self) -> list[list[Text]]:
        return [_model(model) for model in self.snapshot.models]

    def _generations(self) -> list[list[Text]]:
        return [
            [
                Text(info.generation_id.rpartition(".")[2][:_SHORT_ID]),
                Text(info.model),
                Text(info.tenant),
                Text(info.worker_id[:_SHORT_ID]),
                Text(str(info.usage.prompt_tokens)),
                Text(str(info.usage.completion_tokens)),
                Text(str(info.num_claims)),
                Text(short_s(_seconds_between(info.create_time, self.snapshot.time))),
            ]
            for info in self.snapshot.generations
        ]


_WORKER_COLUMNS = (
    _Column("WORKER", is_number=False),
    _Column("MODEL", is_number=False, least=6),
    _Column("DEVICE", is_number=False, is_wide=True, least=6),
    _Column("RUN"),
    _Column("WAIT"),
    _Column("KV"),
    _Column("STEP"),
    _Column("TOK/S"),
    _Column("TTFT"),
    _Column("P95", is_wide=True),
    _Column("BUSY"),
    _Column("MEMORY", is_wide=True),
    _Column("AGE"),
    _Column("", is_number=False, least=5),
)
_MODEL_COLUMNS = (
    _Column("MODEL", is_number=False, least=6),
    _Column("REVISION", is_number=False, is_wide=True),
    _Column("STATE", is_number=False),
    _Column("WORKERS"),
    _Column("RUN"),
    _Column("HIGH"),
    _Column("NORMAL"),
    _Column("LOW"),
    _Column("OLDEST"),
    _Column("EXPECTED"),
    _Column("DEAD"),
)
_TENANT_COLUMNS = (
    _Column("TENANT", is_number=False, least=6),
    _Column("MODEL", is_number=False, least=6),
    _Column("PRIORITY", is_number=False),
    _Column("WAITING"),
    _Column("OLDEST"),
)
_GENERATION_COLUMNS = (
    _Column("GENERATION", is_number=False),
    _Column("MODEL", is_number=False, least=6),
    _Column("TENANT", is_number=False, least=6),
    _Column("WORKER", is_number=False),
    _Column("PROMPT"),
    _Column("TOKENS"),
    _Column("CLAIMS", is_wide=True),
    _Column("FOR"),
)

QUEUE_COLUMNS = ("MODEL", "PRIORITY", "TENANT", "WAITING", "OLDEST", "EXPECTED WAIT")


def queue_rows(snapshot: pb.FleetSnapshot) -> list[tuple[str, ...]]:
    """Return what waits: a line for each class of a model that has any, then one for each of its tenants."""
    rows: list[tuple[str, ...]] = []
    for model in snapshot.models:
        waiting = [one for one in model.classes if one.num_waiting]
        if not waiting:
            rows.append((model.model, "-", "-", "0", "-", "-"))
        for one in waiting:
            expected = short(one.expected_wait) if one.HasField("expected_wait") else "-"
            oldest = short(one.oldest_wait) if one.HasField("oldest_wait") else "-"
            priority = priority_name(one.priority)
            rows.append((model.model, priority, "all", str(one.num_waiting), oldest, expected))
            rows += [
                (model.model, priority, tenant.tenant, str(tenant.num_waiting), short(tenant.oldest_wait), "")
                for tenant in model.tenants
                if tenant.priority == one.priority
            ]
            if model.has_more_tenants:
                rows.append((model.model, priority, "... and more", "", "", ""))
    return rows


def tenants_of(snapshot: pb.FleetSnapshot) -> list[list[Text]]:
    """Return the tenants that wait, of all models, those first that have waited longest."""
    found = [(model.model, tenant) for model in snapshot.models for tenant in model.tenants]
    found.sort(key=lambda one: (-one[1].oldest_wait.ToMilliseconds(), one[1].tenant, one[0]))
    return [
        [
            Text(tenant.tenant),
            Text(model),
            Text(priority_name(tenant.priority)),
            Text(str(tenant.num_waiting)),
            Text(short(tenant.oldest_wait)),
        ]
        for model, tenant in found
    ]


def priority_name(priority: generation_pb2.Priority.ValueType) -> str:
    return generation_pb2.Priority.Name(priority).removeprefix("PRIORITY_").lower()


def short(duration: Duration) -> str:
    """Return a duration in its largest unit: "0.4 ms", "85 ms", "1.2 s", "3 min", "5 h", "2 d"."""
    return short_s(duration.ToMicroseconds() / 1e6)


def short_s(seconds: float) -> str:
    """As `short`, of seconds."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    if seconds >= 1:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    milliseconds = seconds * 1000
    return f"{milliseconds:.1f} ms" if 0 < milliseconds < 10 else f"{milliseconds:.0f} ms"


def _model(model: pb.FleetModel) -> list[Text]:
    counts = [one.num_waiting for one in model.classes] or [0, 0, 0]
    oldest = [one.oldest_wait.ToMilliseconds() / 1000 for one in model.classes if one.HasField("oldest_wait")]
    expected = [one.expected_wait.ToMilliseconds() / 1000 for one in model.classes if one.HasField("expected_wait")]
    state = model_pb2.ModelState.Name(model.state).removeprefix("MODEL_STATE_").lower()
    return [
        Text(model.model),
        Text(model.model_revision[:_SHORT_ID]),
        Text(state, "green" if model.state == model_pb2.MODEL_STATE_READY else "yellow"),
        Text(str(model.num_workers)),
        Text(str(model.num_running)),
        *(Text(str(count), "bold" if count else "dim") for count in counts),
        Text(short_s(max(oldest)) if oldest else "-"),
        Text(short_s(max(expected)) if expected else "-"),
        Text(str(model.num_dead_letters), "red" if model.num_dead_letters else "dim"),
    ]


def _leaving(worker: pb.Worker) -> str:
    if worker.drain_requested_by:
        return f"{'draining' if worker.draining else 'drain asked'} ({worker.drain_requested_by})"
    return "draining" if worker.draining else ""


def _share(value: float | None) -> Text:
    if value is None:
        return Text("-")
    return Text(f"{value:.0%}", "red" if value >= 0.95 else "yellow" if value >= 0.8 else "")


def _age(seconds: float | None) -> Text:
    if seconds is None:
        return Text("-")
    return Text(short_s(max(0.0, seconds)), "red" if seconds > _STALE_S else "")


def _seconds_between(start: Timestamp, end: Timestamp) -> float:
    return (end.ToMilliseconds() - start.ToMilliseconds()) / 1000


@dataclass(frozen=True, slots=True)
class _Part:
    """A table with its heading."""

    title: str
    columns: Sequence[_Column]
    rows: Sequence[Sequence[Text]]
    weight: int  # of its share of the lines
    is_optional: bool = False

    def render(self, width: int, max_lines: int, *, is_wide: bool) -> list[RenderableType]:
        """The first rows in so many lines below the heading; columns that nothing is in are left out."""
        if not self.rows:
            return [Text(""), Text(self.title, "bold"), Text(""), Text("none", "dim")]
        left_out = len(self.rows) - max_lines
        rows = self.rows if left_out <= 0 else self.rows[: max_lines - 1]
        shown = [
            index
            for index, column in enumerate(self.columns)
            if (is_wide or not column.is_wide) and (column.title or any(row[index].plain for row in rows))
        ]
        widths = fit(
            [max(len(self.columns[index].title), *(row[index].cell_len for row in rows)) for index in shown],
            [self.columns[index].least for index in shown],
            width - _GAP * (len(shown) - 1),
        )
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="dim")
        for index, column_width in zip(shown, widths, strict=True):
            column = self.columns[index]
            justify: Literal["left", "right"] = "right" if column.is_number else "left"
            table.add_column(column.title, justify=justify, no_wrap=True, overflow="ellipsis", width=column_width)
        for row in rows:
            table.add_row(*(row[index] for index in shown))
        parts: list[RenderableType] = [Text(""), Text(self.title, "bold"), table]
        if left_out > 0:
            parts.append(Text(f"... and {len(self.rows) - len(rows)} more", "dim"))
        return parts


def share_out(wanted: Sequence[int], weights: Sequence[int], available: int) -> list[int]:
    """Return how many lines each part gets: no more than it wants, two if it wants as many, the rest by weight."""
    shares = [
        min(want, max(2, available * weight // sum(weights))) for want, weight in zip(wanted, weights, strict=True)
    ]
    for index in reversed(range(len(wanted))):
        shares[index] += max(0, min(wanted[index] - shares[index], available - sum(shares)))
    return shares


def fit(wanted: Sequence[int], least: Sequence[int | None], available: int) -> list[int]:
    """Return the widths of columns: the widest of those that may shrink (`least` is not None) gives way first."""
    widths = list(wanted)
    while sum(widths) > available:
        elastic = [(widths[index], index) for index, low in enumerate(least) if low is not None and widths[index] > low]
        if not elastic:
            break
        widths[max(elastic)[1]] -= 1
    return widths
