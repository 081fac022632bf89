"""What a step costs, and how many tokens it may therefore compute. Pure; the measuring is in `probe.py`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from worker.engine.settings import EngineSettings

_EFFICIENT: Final = 1.02  # a larger step must save more than this on each row to be worth the wait of newcomers
_SLOWED_DOWN: Final = 2.0  # where decodes alone miss the target, what prefills may make of their step


@dataclass(frozen=True, slots=True)
class CostModel:
    """Milliseconds of a step by its number of rows (tokens computed): piecewise linear, never falling.

        ms  |              .      beyond: each row costs what a row of the last point does
            |          *
            |  *---*              measured
            +-------------------  rows

    Below the first point every step costs what the first does. Beyond the last one the line from the origin is an upper
    estimate, as rows only get cheaper by number: a flat stretch of small steps must not promise that large ones are
    free.
    """

    points: tuple[tuple[int, float], ...]  # (rows, ms), rows rising
    draft_overhead_ms: float = 0.0  # what a step with drafts costs beyond one of as many rows without

    @classmethod
    def fit(cls, measured_ms: Mapping[int, float], draft_overhead_ms: float = 0.0) -> CostModel:
        """Fit to at least one measured step, by number of rows.

        A step takes no longer than a larger one, and a disturbance only ever adds time: what was measured for fewer
        rows is cut to the least that was measured for more.
        """
        points: list[tuple[int, float]] = []
        least = float("inf")
        for num_rows in sorted(measured_ms, reverse=True):
            least = min(least, measured_ms[num_rows])
            points.append((num_rows, least))
        return cls(tuple(reversed(points)), max(0.0, draft_overhead_ms))

    def step_ms(self, num_rows: int) -> float:
        """Milliseconds of a step of this many rows."""
        points = self.points
        if num_rows <= points[0][0]:
            return points[0][1]
        if num_rows >= points[-1][0]:
            return points[-1][1] * num_rows / points[-1][0]
        right = bisect_right(points, (num_rows, 0.0))
        (rows_before, ms_before), (rows_after, ms_after) = points[right - 1], points[right]
        return ms_before + (ms_after - ms_before) * (num_rows - rows_before) / (rows_after - rows_before)

    def most_rows(self, ms: float, limit: int) -> int:
        """Rows of the largest step within this time, at most `limit`; 0 when not even one row is."""
        return bisect_right(range(1, limit + 1), ms, key=self.step_ms)

    def efficient_rows(self, limit: int) -> int:
        """The fewest rows, of the measured numbers and `limit`, at which a row costs nearly as little as at any."""
        candidates = [num_rows for num_rows, _ in self.points if num_rows < limit] + [limit]  # rising
        ms_per_row = {num_rows: self.step_ms(num_rows) / num_rows for num_rows in candidates}
        least = min(ms_per_row.values())
        return next(num_rows for num_rows in candidates if ms_per_row[num_rows] <= _EFFICIENT * least)


UNMEASURED: Final = CostModel(((1 << 30, 1.0),))  # every step costs the same


class StepBudget:
    """How many tokens a step may compute, so that prefills do not stall the sequences that decode.

    A `token_budget` in the settings holds for every step. Without one it follows from the cost model:

        step with decodes      as many rows as fit into `itl_target_ms`; but where decodes alone take more than half of
                               that, twice their time, since a prompt must get on too; and room for one block at least
        step without decodes   stalls nobody: as many rows as make a row cheap

    Splitting prompts so that decodes go on beside them is Sarathi-Serve's (arXiv:2403.02310).
    """

    def __init__(self, settings: EngineSettings, cost: CostModel) -> None:
        self._settings = settings
        self._cost = cost
        limit = settings.most_step_tokens
        self._without_decodes = max(
            cost.efficient_rows(limit), cost.most_rows(settings.itl_target_ms, limit), settings.max_num_seqs
        )

    def most_tokens(self, num_decodes: int) -> int:
        """Most tokens of a step in which this many sequences decode."""
        if self._settings.token_budget is not None:
            return self._settings.token_budget
        if num_decodes == 0:
            return self._without_decodes
        limit = self._settings.max_step_tokens
        target_ms = max(self._settings.itl_target_ms, _SLOWED_DOWN * self._cost.step_ms(num_decodes))
        return min(limit, max(self._cost.most_rows(target_ms, limit), num_decodes + self._settings.block_size))
