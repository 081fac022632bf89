"""A request that is decoded by beam search: its beams as sequences, step by step, and its outputs at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from typing import TypeAlias

import torch

from common.generation import FinishReason, OutputDelta
from worker.engine.beam_scores import PlainRow, best_continuations
from worker.engine.beams import BeamSearch, Candidate, Hypothesis, best_candidates, num_candidates
from worker.engine.plan import DraftRow
from worker.engine.results import beam_delta
from worker.engine.sequence import Sequence, SequenceGroup
from worker.engine.stopping import StopState
from worker.engine.transfer import to_device

# Of each beam, the sums of log-probabilities of its best continuations, with their token ids.
Continuations: TypeAlias = list[list[tuple[float, int]]]


class BeamRequest:
    """Owns the search and, where outputs end at strings, the text of each beam."""

    def __init__(self, root: Sequence, new_text: Callable[[], StopState], new_stop: Callable[[], StopState]) -> None:
        """`new_stop` makes what follows an output; `new_text` the same for a beam, whose text is not taken apart."""
        self.group = SequenceGroup(root, root.sampling.num_beams)
        self.num_tokens = 0  # decoded, over all beams; those that a preemption made void count once
        self._new_text, self._new_stop = new_text, new_stop
        self._texts: list[StopState] = []
        self._search = BeamSearch(root.sampling)

    @property
    def is_done(self) -> bool:
        return self._search.is_done

    @property
    def _outputs(self) -> list[tuple[int, ...]]:
        return [tuple(beam.token_ids[beam.num_prompt_tokens :]) for beam in self.group.members]

    def begin_step(self) -> list[float]:
        """Return the sums of the members' log-probabilities so far. Where there is but the root, a search begins."""
        if self.group.members == [self.group.root]:
            self._search = BeamSearch(self.group.root.sampling)
            self._texts = [self._new_text()] if self.group.root.sampling.stop_strings else []
        return self._search.scores

    def advance(self, found: Continuations) -> list[tuple[Sequence, Sequence]]:
        """Take what was found for each member; return those that go on, each behind the member that it continues.

        They have their new tokens, but no blocks. None go on where the search is done.
        """
        members, sampling = self.group.members, self.group.root.sampling
        candidates = best_candidates(
            (Candidate(total, beam, token_id) for beam, best in enumerate(found) for total, token_id in best), sampling
        )
        texts: dict[Candidate, StopState] = {}
        if self._texts:
            for candidate in candidates:
                texts[candidate] = self._texts[candidate.beam].branch()
                texts[candidate].push(candidate.token_id)
        going = self._search.advance(candidates, [self._ends(c, texts) for c in candidates], self._outputs)
        self.num_tokens = max(self.num_tokens, self._search.num_tokens * sampling.num_beams)
        if self.is_done:
            return []
        self._texts = [texts[candidate] for candidate in going] if texts else []
        pairs: list[tuple[Sequence, Sequence]] = []
        continued = {self.group.root}  # stays as it is, to begin anew with
        for candidate in going:
            parent = members[candidate.beam]
            pairs.append((parent, parent.branch() if parent in continued else parent))
            continued.add(parent)
        for (_, child), candidate in zip(pairs, going, strict=True):
            child.append(candidate.token_id)
        return pairs

    def _ends(self, candidate: Candidate, texts: Mapping[Candidate, StopState]) -> bool:
        if texts:
            return texts[candidate].finished is not None
        sampling = self.group.root.sampling
        return candidate.token_id in sampling.stop_token_ids or self._search.num_tokens + 1 >= sampling.max_tokens

    def best(self, *, is_cut: bool) -> list[Hypothesis]:
        """Return the best sequences found, at most as many as there are outputs. `is_cut` counts beams as complete."""
        num_outputs = self.group.root.sampling.num_outputs
        if not is_cut:
            return list(self._search.finished[:num_outputs])
        is_lost = self.group.members == [self.group.root]  # by a preemption
        return self._search.cut([] if is_lost else self._outputs)[:num_outputs]

    def deltas(self, reason: FinishReason | None, echo_text: str) -> list[OutputDelta]:
        """Return all outputs whole, the best first; `reason` is why they end where the search is not done.

        Where there are fewer sequences than outputs, the rest are empty.
        """
        best: list[Hypothesis | None] = [*self.best(is_cut=reason is not None)]
        best += [None] * (self.group.root.sampling.num_outputs - len(best))
        return [beam_delta(index, found, self._new_stop(), reason, echo_text) for index, found in enumerate(best)]


def without_beams(rows: Rows[Sequence | DraftRow]) -> Rows[Sequence | DraftRow | PlainRow]:
    """Return what the sampler is to choose a token for: in the place of a beam, a row of which only validity counts."""
    if all(row.group is None for row in rows):
        return rows
    return [row if row.group is None else PlainRow(row.sampling, 0, row.num_tokens) for row in rows]


def continue_beams(
    logits: torch.Tensor, rows: Rows[Sequence | DraftRow], beams_of: Callable[[str], BeamRequest | None]
) -> dict[str, Continuations]:
    """Return the best continuations of the beams of each request that has rows among these.

    `logits` is [len(rows), vocab_size]; `beams_of` returns the request of an id.
    """
    places = {row: i for i, row in enumerate(rows) if row.group is not None}
    if not places:
        return {}
    found: dict[str, Continuations] = {row.request_id: [] for row in places if isinstance(row, Sequence)}
    requests = [request for request_id in found if (request := beams_of(request_id)) is not None]
    totals = [total for request in requests for total in request.begin_step()]
    beams = [beam for request in requests for beam in request.group.members]
    most = max(num_candidates(request.group.root.sampling) for request in requests)
    index = to_device([places[beam] for beam in beams], logits.device)
    for beam, best in zip(beams, best_continuations(logits[index], beams, totals, most), strict=True):
        found[beam.request_id].append(best)
    return found
