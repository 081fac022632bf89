"""One output of one request, as the engine sees it: its token ids, how far they are computed, and its blocks."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Final, TypeAlias

from common.generation import SamplingParams
from worker.engine.adapters.types import Adapter
from worker.engine.grammar import Matcher
from worker.engine.history import TokenHistory
from worker.engine.lookup import PromptLookup

OrderKey: TypeAlias = tuple[int, int, int]


class Sequence:
    """Prompt and output token ids with their place in the KV cache.

    There is no prefill or decode state, only `num_computed_tokens` catching up with `num_tokens`: a takeover is a
    sequence that starts with output ids, a preemption sets `num_computed_tokens` back to 0, and neither needs a case of
    its own.

        token_ids   | prompt .............. | output ...... |
        in cache    | num_computed_tokens ........ |        ^ num_tokens
    """

    __slots__ = (
        "adapter",
        "arrival",
        "block_hashes",
        "block_ids",
        "cache_salt",
        "deadline",
        "forks",
        "history",
        "lookup",
        "matcher",
        "num_computed_tokens",
        "num_hit_tokens",
        "num_memory_failures",
        "num_overtaken",
        "num_prompt_tokens",
        "num_scored_tokens",
        "order",
        "output_index",
        "parent",
        "priority",
        "request_id",
        "sampling",
        "tenant",
        "token_ids",
        "weight",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Iterable[int],
        sampling: SamplingParams,
        *,
        output_index: int = 0,
        emitted: Iterable[int] = (),
        cache_salt: bytes = b"",
        priority: int = 0,
        arrival: int = 0,
        deadline: float | None = None,
        tenant: str = "",
        weight: float = 1.0,
        matcher: Matcher | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        self.request_id: Final = request_id
        self.output_index: Final = output_index
        self.sampling: Final = sampling
        self.cache_salt: Final = cache_salt
        self.priority: Final = priority
        self.arrival: Final = arrival
        self.deadline: Final = deadline
        self.tenant: Final = tenant
        self.weight: Final = weight
        self.adapter: Final = adapter  # `cache_salt` stands for it too
        self.order: Final[OrderKey] = (priority, arrival, output_index)
        # Arrays of C ints: a slice is hashed and copied into a batch without touching single Python ints.
        self.token_ids: array[int] = array("i", prompt_token_ids)
        self.num_prompt_tokens: Final = len(self.token_ids)
        self.token_ids.extend(emitted)
        self.history: TokenHistory | None = None
        if TokenHistory.is_needed(sampling):
            self.history = TokenHistory(sampling, self.token_ids[: self.num_prompt_tokens])
            self.history.extend(self.token_ids[self.num_prompt_tokens :])
        self.matcher: Final = matcher  # masks its next token; its output's StopState pushes the tokens
        self.lookup: PromptLookup | None = None  # made when it first may draft
        self.block_ids: array[int] = array("i")
        self.block_hashes: list[bytes] = []
        self.num_computed_tokens = 0
        self.num_hit_tokens: int | None = None  # found in the prefix cache when first admitted; None before
        # Outputs of the same request that begin where this one's prompt ends: they take its blocks and logits then.
        self.forks: list[Sequence] = []
        self.parent: Sequence | None = None  # while this one is such an output: whose `forks` it is in
        # Of the prompt, where its log-probabilities are asked for, as many as are reported; the first token has none.
        self.num_scored_tokens: int | None = None
        self.num_memory_failures = 0
        self.num_overtaken = 0  # behind it in its priority's order, and admitted while this one waited

    def append(self, token_id: int) -> None:
        """Take the next output token."""
        self.token_ids.append(token_id)
        if self.history is not None:
            self.history.extend((token_id,))

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def first_row_to_score(self) -> int | None:
        """The first token whose logits say what is not reported yet of the prompt; None where nothing is missing."""
        if self.num_scored_tokens is None or self.num_scored_tokens >= self.num_prompt_tokens:
            return None
        return self.num_scored_tokens - 1

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id!r}[{self.output_index}], {self.num_prompt_tokens}+{self.num_output_tokens} "
            f"tokens, {self.num_computed_tokens} computed, {len(self.block_ids)} blocks)"
        )
