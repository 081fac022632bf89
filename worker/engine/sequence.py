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
from worker.engine.seq2seq.source import Source

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
        "group",
        "history",
        "is_source_computed",
        "lookup",
        "matcher",
        "num_computed_tokens",
        "num_hit_tokens",
        "num_memory_failures",
        "num_overtaken",
        "num_pending",
        "num_prompt_tokens",
        "num_scored_tokens",
        "order",
        "output_index",
        "parent",
        "priority",
        "request_id",
        "sampling",
        "source",
        "source_block_ids",
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
        history: TokenHistory | None = None,
        adapter: Adapter | None = None,
        source: Source | None = None,
    ) -> None:
        """`history` is that of these tokens, where there is one already."""
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
        self.source: Final = source  # `cache_salt` stands for it too
        self.order: Final[OrderKey] = (priority, arrival, output_index)
        # Arrays of C ints: a slice is hashed and copied into a batch without touching single Python ints.
        self.token_ids: array[int] = array("i", prompt_token_ids)
        self.num_prompt_tokens: Final = len(self.token_ids)
        self.token_ids.extend(emitted)
        self.history = history
        if history is None and TokenHistory.is_needed(sampling):
            source_ids = None if source is None else source.token_ids
            self.history = TokenHistory(sampling, self.token_ids[: self.num_prompt_tokens], source_ids)
            self.history.extend(self.token_ids[self.num_prompt_tokens :])
        self.matcher: Final = matcher  # masks its next token; its output's StopState pushes the tokens
        self.lookup: PromptLookup | None = None  # made when it first may draft
        self.block_ids: array[int] = array("i")
        self.block_hashes: list[bytes] = []
        self.source_block_ids: array[int] = array("i")
        self.is_source_computed = False
        self.num_computed_tokens = 0
        self.num_hit_tokens: int | None = None  # found in the prefix cache when first admitted; None before
        # Outputs of the same request that begin where this one's prompt ends: they take its blocks and logits then.
        self.forks: list[Sequence] = []
        self.parent: Sequence | None = None  # while this one is such an output: whose `forks` it is in
        self.group: SequenceGroup | None = None  # of a beam
        # Of the prompt, where its log-probabilities are asked for, as many as are reported; the first token has none.
        self.num_scored_tokens: int | None = None
        self.num_memory_failures = 0
        self.num_overtaken = 0  # behind it in its priority's order, and admitted while this one waited
        self.num_pending = 0  # 1 while the last of `token_ids` is but the place of a token that is chosen, yet unknown

    def hold_place(self) -> None:
        """Be as if the next output token were known: the step that computes it can be planned."""
        assert not self.num_pending, self
        assert self.history is None, "what follows would depend on the token itself"
        self.token_ids.append(0)
        self.num_pending = 1

    def append(self, token_id: int) -> None:
        """Take the next output token, if need be in the place that is held for it."""
        if self.num_pending:
            self.token_ids[-1] = token_id
            self.num_pending = 0
            return
        self.token_ids.append(token_id)
        if self.history is not None:
            self.history.extend((token_id,))

    def branch(self) -> Sequence:
        """Return another beam of its group with the same tokens, and no blocks yet."""
        other = Sequence(
            self.request_id,
            self.token_ids[: self.num_prompt_tokens],
            self.sampling,
            output_index=self.output_index,
            emitted=self.token_ids[self.num_prompt_tokens :],
            cache_salt=self.cache_salt,
            priority=self.priority,
            arrival=self.arrival,
            deadline=self.deadline,
            tenant=self.tenant,
            weight=self.weight,
            history=self.history and self.history.copy(),
            source=self.source,
        )
        other.group = self.group
        return other

    @property
    def num_input_tokens(self) -> int:
        """What the caller gave: the source, where there is one, and else the prompt."""
        return self.num_prompt_tokens if self.source is None else len(self.source.token_ids)

    @property
    def num_source_tokens_to_read(self) -> int:
        """Of its source, before its own tokens can be computed: all or none."""
        return len(self.source.token_ids) if self.source is not None and not self.is_source_computed else 0

    @property
    def leader(self) -> Sequence:
        """What stands for it: of a beam the root of its group, else itself."""
        return self if self.group is None else self.group.root

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def awaits_end(self) -> bool:
        """Whether the pending token is the last one that there can be."""
        return self.num_pending > 0 and self.num_output_tokens >= self.sampling.max_tokens

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


class SequenceGroup:
    """The beams of one request: they take part in a step together or not at all.

    They begin as one, `root`, with the prompt alone, and begin anew with it after a preemption: nothing of them is sent
    before they are done. All have its place in the order.
    """

    __slots__ = ("members", "num_lost_blocks", "root", "size")

    def __init__(self, root: Sequence, size: int) -> None:
        self.root: Final = root
        self.size: Final = size  # places that are kept for it; never more members
        self.members = [root]
        self.num_lost_blocks = 0  # held by all together when they were preempted last
        root.group = self
