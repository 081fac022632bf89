"""Labels of tokens as entities of a text. Pure.

The strategies are those of transformers' token classification pipeline (`pipelines/token_classification.py`), which
reads B- and I- prefixes: an entity goes on with the next token (or word) of its label, unless that begins with B-.
What an entity's text is comes from the caller's text, by its offsets: it holds no marks of subwords.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from common.tasks import Aggregation, Entity, TokenSpans
from worker.tasks.labels import Array, softmax


@dataclass(frozen=True, slots=True)
class _Piece:
    """A token or a word with its label."""

    label: str
    score: float
    start: int
    end: int

    @property
    def tag(self) -> str:
        return self.label[2:] if self.label.startswith(("B-", "I-")) else self.label

    @property
    def begins(self) -> bool:
        return self.label.startswith("B-")


def find_entities(
    logits: Array,
    spans: TokenSpans,
    source: str,
    labels: Sequence[str],
    aggregation: Aggregation,
    ignored: Collection[str],
) -> tuple[Entity, ...]:
    """Return the entities of a text, of logits [num_tokens, num_labels]; those of `ignored` labels are left out."""
    starts, ends = (np.frombuffer(data, dtype="<i4") for data in (spans.starts, spans.ends))
    of_text = np.flatnonzero(starts >= 0)
    scores = softmax(logits.astype(np.float64))[of_text]
    starts, ends = starts[of_text], ends[of_text]
    if aggregation in (Aggregation.NONE, Aggregation.SIMPLE):
        groups = [range(i, i + 1) for i in range(len(of_text))]
    else:
        begins = np.frombuffer(spans.is_word_start, dtype=np.uint8)[of_text]
        groups = _words(begins)
    pieces = [
        _piece(scores[group.start : group.stop], labels, aggregation, int(starts[group[0]]), int(ends[group[-1]]))
        for group in groups
    ]
    found = _grouped(pieces) if aggregation is not Aggregation.NONE else [(piece.label, [piece]) for piece in pieces]
    return tuple(
        Entity(
            label,
            float(np.mean([piece.score for piece in parts])),
            parts[0].start,
            parts[-1].end,
            source[parts[0].start : parts[-1].end],
        )
        for label, parts in found
        if label not in ignored
    )


def _words(begins: npt.NDArray[np.uint8]) -> list[range]:
    """Return the tokens of each word; the first token begins one in any case."""
    firsts = [i for i, flag in enumerate(begins) if flag or i == 0]
    return [range(*bounds) for bounds in pairwise([*firsts, len(begins)])]


def _piece(
    scores: npt.NDArray[np.float64], labels: Sequence[str], aggregation: Aggregation, start: int, end: int
) -> _Piece:
    """Label a word by the scores [num_tokens, num_labels] of its tokens."""
    match aggregation:
        case Aggregation.AVERAGE:
            chosen = scores.mean(0)
        case Aggregation.MAX:
            chosen = scores[int(scores.max(-1).argmax())]
        case _:
            chosen = scores[0]
    best = int(chosen.argmax())
    return _Piece(labels[best], float(chosen[best]), start, end)


def _grouped(pieces: Sequence[_Piece]) -> list[tuple[str, list[_Piece]]]:
    groups: list[tuple[str, list[_Piece]]] = []
    for piece in pieces:
        if groups and groups[-1][1][-1].tag == piece.tag and not piece.begins:
            groups[-1][1].append(piece)
        else:
            # As the pipeline has it, all before the first dash is taken for a prefix.
            groups.append((piece.label.split("-", 1)[-1], [piece]))
    return groups
