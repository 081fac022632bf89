"""Tokens per second of each worker, from the differences of what its heartbeats count. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from torchrelay.admin.v1beta1 import fleet_pb2 as pb

_WINDOW_S = 10.0


@dataclass(frozen=True, slots=True)
class _Report:
    time_s: float
    generated: int


@dataclass(slots=True)
class Rates:
    """Remembers the reports of the last seconds; snapshots between two heartbeats repeat the same one."""

    _reports: dict[str, deque[_Report]] = field(default_factory=dict)

    def add(self, snapshot: pb.FleetSnapshot) -> None:
        """Take a snapshot in; workers that it does not name are forgotten."""
        known, self._reports = self._reports, {}
        for worker in snapshot.workers:
            reports = self._reports[worker.worker_id] = known.get(worker.worker_id, deque())
            moment = worker.report_time if worker.HasField("report_time") else snapshot.time
            report = _Report(moment.ToMilliseconds() / 1000, worker.generated_tokens)
            if not reports or report.time_s > reports[-1].time_s:
                reports.append(report)
            while len(reports) > 2 and reports[-1].time_s - reports[1].time_s >= _WINDOW_S:
                reports.popleft()

    def is_known(self, snapshot: pb.FleetSnapshot) -> bool:
        """Whether each worker has been heard of twice."""
        return all(self.generated_per_s(worker.worker_id) is not None for worker in snapshot.workers)

    def generated_per_s(self, worker_id: str) -> float | None:
        """Tokens that the worker generates in a second; None before its second report."""
        reports = self._reports.get(worker_id)
        if reports is None or len(reports) < 2:
            return None
        first, last = reports[0], reports[-1]
        return max(0.0, (last.generated - first.generated) / (last.time_s - first.time_s))
