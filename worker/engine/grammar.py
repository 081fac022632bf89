"""What constrains outputs, as the engine sees it: matchers that follow tokens, and masks of those that may come next.

A row's mask is int32 [ceil(vocab_size / 32)]: token t may come next if bit t % 32 of word t // 32 is set. Masks are
filled on a thread of their own while the forward pass runs; the sampler applies them before everything that depends on
the tokens' rank (`sampler.py`). A matcher's state is a function of the output's token ids: a takeover pushes the
emitted ones once more.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from common.generation import StructuredOutput

TokenMask = npt.NDArray[np.int32]


class GrammarFailure(Exception):
    """The output cannot go on; `args[0]` is the machine-readable reason."""


class Matcher(Protocol):
    """Follows one output."""

    @property
    def failure(self) -> str | None:
        """Why it follows no further."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether the text matches and nothing may follow."""
        ...

    def push(self, token_id: int) -> None:
        """Take the next token. Raises GrammarFailure for one that may not come here."""
        ...


@runtime_checkable
class Grammar(Protocol):
    """A compiled constraint."""

    def matcher(self) -> Matcher:
        """Return one at the beginning of an output."""
        ...


class GrammarCompiler(Protocol):
    """Makes grammars for one model. Thread-safe."""

    def compile(self, spec: StructuredOutput) -> Grammar:
        """Return the constraint, compiled or kept from before. Raises GrammarFailure."""
        ...

    def fill(self, matchers: Rows[Matcher], masks: TokenMask) -> None:
        """Write the masks [len(matchers), words]; a matcher that fails says so, and its row means nothing."""
        ...


class Constrained(Protocol):
    """What a row of logits belongs to."""

    @property
    def matcher(self) -> Matcher | None: ...


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Masks of the rows of logits that have one."""

    rows: list[int]  # ascending
    words: TokenMask  # [len(rows), ceil(vocab_size / 32)]

    def allows(self, place: int, token_id: int) -> bool:
        """Whether the mask at a place of `rows` has a token; never one that stands for an invalid row."""
        return token_id >= 0 and bool(self.words[place, token_id >> 5] >> (token_id & 31) & 1)

    def of(self, rows: list[int]) -> TokenMasks:
        """The masks of some rows of logits, which are from then on counted by their place in `rows`."""
        at = {row: k for k, row in enumerate(self.rows)}
        kept = [(k, at[row]) for k, row in enumerate(rows) if row in at]
        return TokenMasks([k for k, _ in kept], self.words[[place for _, place in kept]])


class MaskFiller:
    """Fills the masks of a step beside its forward pass."""

    def __init__(self, compiler: GrammarCompiler, vocab_size: int) -> None:
        self._compiler = compiler
        self._num_words = -(-vocab_size // 32)
        self._thread = ThreadPoolExecutor(1, "masks")

    def begin(self, rows: Rows[Constrained]) -> Future[TokenMasks] | None:
        """Begin with the masks of a step's rows of logits; None if no row has one.

        Until the result is there, nobody else may touch the matchers.
        """
        constrained = [(i, row.matcher) for i, row in enumerate(rows) if row.matcher is not None]
        if not constrained:
            return None
        return self._thread.submit(self._fill, [i for i, _ in constrained], [matcher for _, matcher in constrained])

    def _fill(self, rows: list[int], matchers: list[Matcher]) -> TokenMasks:
        words = np.full((len(rows), self._num_words), -1, dtype=np.int32)
        self._compiler.fill(matchers, words)
        return TokenMasks(rows, words)
