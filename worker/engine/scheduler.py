"""The scheduler: which sequences compute how many tokens in the next step, and whose blocks are taken back.

Pure: it knows token counts and block ids, no tensors and no clock. One step is `plan`, the launch of the forward pass,
then `finish_step` (or `fail_step`): what is planned next is computed behind it, whether that has ended or not.

Nothing starves. What runs follows one static order (priority, arrival): the first in it can always preempt all others,
a sequence alone always fits (the engine refuses longer ones), so it runs to its end. What waits is admitted by
priority, in it the tenants by turns (see `fairness.py`: nobody's turn is put off for ever), but for a bounded number
of times that a sequence with a cached prefix goes before its turn (see `admission.py`); and one that waits is never
overtaken for want of blocks by one behind it in that order.

Outputs of one request that begin at its prompt wait with the first of them, whose `forks` they are, and hold nothing.
When its prompt is computed they are forked: they share its blocks, and its logits give their first tokens too. Whoever
then writes into a block that others hold gets a copy of it (see `blocks.py`); the copies stand in the plan.

Beams of one request (`SequenceGroup`) stand side by side in the order, and so are planned, and preempted, together.
Places for all of them are kept from the admission of their root on.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Final

from worker.engine.admission import admission_order
from worker.engine.blocks import BlockPool, PrefixMatch
from worker.engine.cost import StepBudget
from worker.engine.fairness import TenantService, fair_order
from worker.engine.plan import BlockCopy, Chunk, DraftRow, Plan
from worker.engine.seq2seq.source import SourceBlocks
from worker.engine.sequence import OrderKey, Sequence, SequenceGroup
from worker.engine.settings import EngineSettings
from worker.engine.speculation import Speculator

__all__ = ["MAX_SCORED_ROWS", "BlockCopy", "Chunk", "DraftRow", "Plan", "Scheduler"]

MAX_SCORED_ROWS: Final = 64  # of prompts, in one step: their logits take as much memory as those of decodes
_LOOKAHEAD: Final = 64  # waiting sequences whose prefixes are looked up before every step


def held_blocks(sequence: Sequence) -> Iterable[int]:
    """All blocks that a sequence holds: of its tokens and of its source."""
    return chain(sequence.block_ids, sequence.source_block_ids)


def _order(sequence: Sequence) -> OrderKey:
    return sequence.order


class Scheduler:
    """Owns the sequences: running ones hold blocks, waiting ones hold none. Both lists are kept in scheduling order."""

    def __init__(
        self, settings: EngineSettings, pool: BlockPool, budget: StepBudget, speculator: Speculator | None = None
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._sources = SourceBlocks(pool)
        self._budget = budget
        self._speculator = speculator
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._num_unforked = 0  # sequences that wait for their parents' prompts
        self._copies: list[BlockCopy] = []  # of the step being planned
        self._num_score_rows = 0  # that it may still have
        self._service = TenantService()
        self.num_preemptions = 0
        self.num_prompt_tokens = 0  # of all sequences ever admitted
        self.num_cached_prompt_tokens = 0  # of these, found in the prefix cache

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + self._num_unforked

    def sequences(self) -> Iterator[Sequence]:
        for sequence in chain(self._running, self._waiting):
            yield sequence
            yield from sequence.forks

    def add(self, sequence: Sequence, forks: Iterable[Sequence] = ()) -> None:
        """Queue a sequence. It must fit the pool when alone, or it would wait for ever.

        `forks` have the same tokens, and are to begin when these are computed.
        """
        assert self._pool.num_blocks_for(sequence.num_tokens) <= self._pool.num_usable_blocks, sequence
        sequence.forks = list(forks)
        for fork in sequence.forks:
            fork.parent = sequence
        self._num_unforked += len(sequence.forks)
        self._service.enter(sequence, self._waiting)
        insort(self._waiting, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not, and give its blocks back. Not between `plan` and `finish_step`."""
        if sequence.parent is not None:
            self._detach(sequence)
            return
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self._stop_running(sequence)
        self._service.leave(sequence)
        if sequence.forks:
            heir, *others = sequence.forks
            heir.num_scored_tokens = sequence.num_scored_tokens
            for fork in list(sequence.forks):
                self._detach(fork)
            self.add(heir, others)

    def _detach(self, fork: Sequence) -> None:
        assert fork.parent is not None
        fork.parent.forks.remove(fork)
        fork.parent = None
        self._num_unforked -= 1

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Begin `child`, which shares `parent`'s blocks: it has those tokens, and one more at most.

        Without a place for it, it waits like one that was preempted. Not between `plan` and `finish_step`.
        """
        assert child.num_tokens - parent.num_computed_tokens <= 1, child
        if child.parent is not None:
            self._detach(child)
        child.num_hit_tokens = parent.num_hit_tokens
        self._service.join(child)
        if self._num_places(with_forks=False) >= self._settings.max_num_seqs:
            insort(self._waiting, child, key=_order)
            return
        self._share_blocks(parent, child)
        insort(self._running, child, key=_order)

    def _share_blocks(self, parent: Sequence, child: Sequence) -> None:
        block_ids = parent.block_ids[: self._pool.num_blocks_for(parent.num_computed_tokens)]
        self._pool.share(block_ids)
        child.block_ids = block_ids
        child.block_hashes = parent.block_hashes[: parent.num_computed_tokens // self._pool.block_size]
        child.num_computed_tokens = parent.num_computed_tokens
        self._sources.share(parent, child)

    def regroup(self, group: SequenceGroup, children: Iterable[tuple[Sequence, Sequence]]) -> None:
        """Let `children`, each behind the member that it continues, maybe itself, take the places of the members.

        New ones share that member's blocks; members that nobody continues give theirs back. Not between `plan` and
        `finish_step`.
        """
        pairs = list(children)
        heirs = [child for _, child in pairs]
        assert 0 < len(heirs) <= group.size, f"{len(heirs)} beams in {group.size} places"
        for parent, child in pairs:
            if child is not parent:
                self._share_blocks(parent, child)
                insort(self._running, child, key=_order)
        for member in group.members:
            if member not in heirs:
                self._running.remove(member)
                self._release(member)
        group.members = heirs

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it is recomputed from its token ids when there is room again.

        A beam takes all its group along, whose root waits then.
        """
        group = sequence.group
        if group is not None:
            held = (block_id for member in group.members for block_id in held_blocks(member))
            group.num_lost_blocks = len(set(held))
        self._stop_running(sequence)
        insort(self._waiting, sequence.leader, key=_order)
        self.num_preemptions += 1

    def _stop_running(self, sequence: Sequence) -> None:
        group = sequence.group
        for member in [sequence] if group is None else group.members:
            self._running.remove(member)
            self._release(member)
        if group is not None:
            group.members = [group.root]

    def expired(self, now: float) -> list[Sequence]:
        """Sequences whose deadline is over; of a group its root alone."""
        over = (s.leader for s in self.sequences() if s.deadline is not None and s.deadline <= now)
        return list(dict.fromkeys(over))

    # -- plan -----------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """Choose the next step's tokens and give them their blocks.

        Decodes first, so that a long prompt never stalls a stream; prefills share the rest of the token budget, cut to
        chunks (Sarathi-Serve, arXiv:2403.02310). Prefills got all their blocks on admission, so only a decode can find
        the pool empty; the last sequence in order then gives way. Drafts take what all others leave.
        """
        self._copies, self._num_score_rows = [], MAX_SCORED_ROWS
        chunks = self._plan_decodes()
        num_decodes = len(chunks)
        budget = self._budget.most_tokens(num_decodes) - num_decodes
        for sequence in self._running:
            if sequence.num_uncomputed_tokens > 1 and self._most_tokens(sequence, budget) > 0:
                chunks.append(self._chunk(sequence, budget))
                budget -= chunks[-1].num_tokens
        self._admit(chunks, budget)
        if self._speculator is not None:
            self._add_drafts(chunks, num_decodes, self._speculator)
        return Plan(tuple(chunks), sum(chunk.num_tokens for chunk in chunks), tuple(self._copies))

    def _plan_decodes(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in [s for s in self._running if s.num_uncomputed_tokens == 1 and not s.awaits_end]:
            if sequence.block_ids and self._make_room(sequence):
                chunks.append(self._chunk(sequence, 1))
        return chunks

    def _make_room(self, sequence: Sequence) -> bool:
        """Give a decode, and all its group, blocks of their own for their next tokens. False when it had to give way.

        The victim is last in order, and decodes are planned in order: it never stands in this step's plan already.
        """
        together = [sequence] if sequence.group is None else sequence.group.members
        while self._num_blocks_to_write(together) > self._pool.num_free_blocks:
            self.preempt(self._running[-1])
            if not sequence.block_ids:
                return False
        for member in together:
            self._give_block(member)
        return True

    def _num_blocks_to_write(self, decodes: list[Sequence]) -> int:
        """How many blocks these need so that each writes its next token into one of its own."""
        pool = self._pool
        num_missing, shared = 0, Counter[int]()
        for sequence in decodes:
            index = sequence.num_computed_tokens // pool.block_size
            if index == len(sequence.block_ids):
                num_missing += 1
            elif pool.is_shared(sequence.block_ids[index]):
                shared[sequence.block_ids[index]] += 1
        # Where all owners are among them, the last one keeps the block.
        return num_missing + sum(min(count, pool.num_owners(block_id) - 1) for block_id, count in shared.items())

    def _give_block(self, sequence: Sequence) -> None:
        pool, block_ids = self._pool, sequence.block_ids
        index = sequence.num_computed_tokens // pool.block_size
        if index == len(block_ids):
            block_ids.extend(pool.allocate(1))
        elif pool.is_shared(source := block_ids[index]):
            block_ids[index] = pool.replace(source)
            self._copies.append(BlockCopy(source, block_ids[index]))

    def _num_places(self, *, with_forks: bool = True) -> int:
        """Of the places that sequences can run in, those taken, or kept for beams, and for forks."""
        groups = {sequence.group for sequence in self._running if sequence.group is not None}
        singles = (s for s in self._running if s.group is None)
        num_singles = sum(1 + (len(s.forks) if with_forks else 0) for s in singles)
        return num_singles + sum(group.size for group in groups)

    def _admit(self, chunks: list[Chunk], budget: int) -> None:
        """Start waiting sequences while tokens, places and blocks last. Places are kept for those to be forked."""
        num_places = self._settings.max_num_seqs - self._num_places()
        if budget == 0 or not self._waiting or num_places <= 0:
            return
        pool = self._pool
        turns = fair_order(self._waiting, self._service.counters)
        rank = {sequence: place for place, sequence in enumerate(turns)}
        first_unfit: Sequence | None = None
        for sequence in self._admission_order(turns):
            if budget == 0 or num_places <= 0:
                return
            if first_unfit is not None and rank[sequence] > rank[first_unfit]:
                continue  # it may want the blocks that the one before it waits for
            if sequence.first_row_to_score is not None and not self._num_score_rows:
                continue  # others' prompts are scored in this step
            if sequence.num_pending:  # preempted by this very plan
                first_unfit = first_unfit or sequence
                continue
            match = self._match(sequence)
            group = sequence.group
            if group is not None and group.size > num_places:
                first_unfit = sequence
                continue
            if match.is_pending:
                continue  # this very step computes the next block: cheaper to wait for it than to do it twice
            source = self._sources.match(sequence)
            if source.is_pending:
                continue
            num_new = pool.num_blocks_for(sequence.num_tokens) - len(match.block_ids)
            num_new += self._sources.num_blocks(sequence) - len(source.block_ids)
            found = (*match.block_ids, *source.block_ids)
            num_available = pool.num_free_blocks - pool.num_unreferenced(found)
            # One block stays free for each running sequence, or the newcomer would soon be preempted again. This also
            # keeps a sequence preempted in this very plan from taking its blocks straight back. So does one for each
            # fork and beam, as far as others run: alone it begins in any case. Beams that were preempted would be once
            # more where they were.
            num_own = len(sequence.forks) if group is None else max(group.size - 1, group.num_lost_blocks - num_new)
            num_spare = len(self._running) and sum(1 + len(s.forks) for s in self._running) + num_own
            if num_new + num_spare > num_available:
                first_unfit = sequence
                continue
            pool.acquire(match.block_ids)
            sequence.block_ids.extend(match.block_ids)
            self._sources.take(sequence, source)
            sequence.block_ids.extend(pool.allocate(pool.num_blocks_for(sequence.num_tokens) - len(match.block_ids)))
            sequence.num_computed_tokens = len(match.block_ids) * pool.block_size
            self._waiting.remove(sequence)
            if sequence.num_hit_tokens is None:
                num_tokens = sequence.num_uncomputed_tokens + sequence.num_source_tokens_to_read
                self._service.admit(sequence, num_tokens, self._waiting)
            self._count_prompt(sequence)
            self._count_overtaken(sequence, turns)
            insort(self._running, sequence, key=_order)
            num_places -= 1 + len(sequence.forks) if group is None else group.size
            chunks.append(self._chunk(sequence, budget))
            # A source is read in one step, however long it is; but no other begins in that step then.
            budget = max(0, budget - chunks[-1].num_tokens - chunks[-1].num_source_tokens)

    def _admission_order(self, turns: list[Sequence]) -> list[Sequence]:
        if len(turns) < 2 or self._settings.max_overtakings == 0:
            return turns
        num_cached_blocks = {s: len(self._match(s).block_ids) for s in turns[:_LOOKAHEAD]}
        return admission_order(turns, num_cached_blocks, self._settings.max_overtakings)

    def _match(self, sequence: Sequence) -> PrefixMatch:
        """The blocks that it need not compute. The last token always is: its logits are what it came for.

        So are the prompt's tokens whose logits are to be scored.
        """
        first_row = sequence.first_row_to_score
        num_sharable = (sequence.num_tokens - 1 if first_row is None else first_row) // self._pool.block_size
        self._pool.extend_hashes(sequence.block_hashes, sequence.token_ids, num_sharable, sequence.cache_salt)
        return self._pool.match(sequence.block_hashes[:num_sharable])

    def _count_overtaken(self, admitted: Sequence, turns: list[Sequence]) -> None:
        """Those that wait for a block of this very step are not overtaken: they would not be admitted anyway."""
        for sequence in turns:
            if sequence is admitted:
                break
            is_before = sequence.priority == admitted.priority and not sequence.block_ids
            if is_before and not self._match(sequence).is_pending and not self._sources.match(sequence).is_pending:
                sequence.num_overtaken += 1

    def _add_drafts(self, chunks: list[Chunk], num_decodes: int, speculator: Speculator) -> None:
        """Let decodes draft. Logits of drafts take places of sequences that are not there: never more rows of logits
        than max_num_seqs.
        """
        num_rows = sum(chunk.num_tokens for chunk in chunks)
        max_drafts = min(
            self._budget.most_tokens(num_decodes) - num_rows, self._settings.max_num_seqs - len(self._running)
        )
        drafts = speculator.draft([chunk.sequence for chunk in chunks[:num_decodes]], num_rows, max_drafts)
        for index, token_ids in drafts.items():
            sequence = chunks[index].sequence
            num_missing = self._pool.num_blocks_for(sequence.num_tokens + len(token_ids)) - len(sequence.block_ids)
            sequence.block_ids.extend(self._pool.allocate(min(max(num_missing, 0), self._pool.num_free_blocks)))
            fitting = token_ids[: len(sequence.block_ids) * self._pool.block_size - sequence.num_tokens]
            chunks[index] = Chunk(sequence, 1 + len(fitting), is_last=True, drafts=fitting)

    def _count_prompt(self, sequence: Sequence) -> None:
        if sequence.num_hit_tokens is None:  # later admissions follow a preemption and hit what they left themselves
            sequence.num_hit_tokens = sequence.num_computed_tokens
            if sequence.source is not None:
                sequence.num_hit_tokens = len(sequence.source.token_ids) * sequence.is_source_computed
            self.num_prompt_tokens += sequence.num_input_tokens
            self.num_cached_prompt_tokens += min(sequence.num_hit_tokens, sequence.num_input_tokens)

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk:
        num_tokens = min(sequence.num_uncomputed_tokens, self._most_tokens(sequence, budget))
        self._register(sequence, num_tokens)
        self._sources.register(sequence)
        num_scored_rows, first_row = 0, sequence.first_row_to_score
        if first_row is not None:
            start = sequence.num_computed_tokens
            end = min(start + num_tokens, sequence.num_prompt_tokens - 1)  # the last one's give the first new token
            num_scored_rows = max(0, end - max(start, first_row))
            self._num_score_rows -= num_scored_rows
        is_last = num_tokens == sequence.num_uncomputed_tokens
        return Chunk(sequence, num_tokens, is_last, num_scored_rows=num_scored_rows)

    def _most_tokens(self, sequence: Sequence, budget: int) -> int:
        """Tokens that it may compute now: of those to be scored, no more than there are rows for."""
        first_row = sequence.first_row_to_score
        if first_row is None:
            return budget
        return min(budget, max(0, first_row - sequence.num_computed_tokens) + self._num_score_rows)

    def would_draft(self, sequences: tuple[Sequence, ...]) -> bool:
        """Whether it is worth waiting for these sequences' tokens, so as to guess on from them."""
        return self._speculator is not None and self._speculator.would_draft(sequences)

    def register_known(self, sequence: Sequence) -> None:
        """A token became known that was pending: announce the block that it was the last one to fill."""
        if sequence.num_computed_tokens and sequence.num_computed_tokens % self._pool.block_size == 0:
            self._register(sequence, 0, since=sequence.num_computed_tokens - 1)
            self._pool.settle()  # it is computed before whatever is launched from now on

    def _register(self, sequence: Sequence, num_tokens: int, since: int | None = None) -> None:
        """Announce the blocks that computing this many more tokens fills, or has filled since. A block with a pending
        token is announced later.
        """
        block_size, num_known = self._pool.block_size, sequence.num_tokens - sequence.num_pending
        first = (sequence.num_computed_tokens if since is None else since) // block_size
        end = min(sequence.num_computed_tokens + num_tokens, num_known) // block_size
        if end > first:
            self._pool.extend_hashes(sequence.block_hashes, sequence.token_ids, end, sequence.cache_salt)
            for block_id, block_hash in zip(
                sequence.block_ids[first:end], sequence.block_hashes[first:end], strict=False
            ):
                self._pool.register(block_id, block_hash)

    # -- after the step -------------------------------------------------------------------------------------------

    def finish_step(self, plan: Plan) -> None:
        """The plan was launched: its keys and values will be in the cache before anything planned later reads them.

        Those of drafts count from `accept_drafts`.
        """
        for chunk in plan.chunks:
            chunk.sequence.num_computed_tokens += chunk.num_tokens - len(chunk.drafts)
            chunk.sequence.is_source_computed = chunk.sequence.source is not None
            if chunk.is_last:
                self._service.generate(chunk.sequence, 1 + len(chunk.sequence.forks))
        self._pool.settle()

    def accept_drafts(self, sequence: Sequence, num_drafts: int) -> None:
        """The first `num_drafts` drafts of the step just finished, maybe none, became tokens of their sequence.

        Call it once the tokens are appended, for each sequence that had drafts.
        """
        self._register(sequence, num_drafts)
        self._service.generate(sequence, num_drafts)
        sequence.num_computed_tokens += num_drafts
        self._pool.settle()
        self._give_back_spare(sequence)

    def take_back(self, sequence: Sequence) -> None:
        """What a step computed of its last token is void: that token is another one."""
        sequence.num_computed_tokens -= 1

    def fail_step(self, plan: Plan) -> None:
        """The plan was not computed. Sequences keep their blocks; the same tokens are planned again."""
        self._pool.discard_pending()
        for chunk in plan.chunks:
            if chunk.drafts:
                self._give_back_spare(chunk.sequence)

    def fail_copies(self, plan: Plan) -> list[Sequence]:
        """The plan's copies were not made, and so its step failed: what was to read them is computed again.

        Returns what will need copies then too.
        """
        targets = {copy.target for copy in plan.copies}
        needy = []
        for chunk in plan.chunks:
            if not targets.isdisjoint(chunk.sequence.block_ids):
                self.preempt(chunk.sequence)
                if chunk.sequence.group is not None:
                    needy.append(chunk.sequence.leader)
        return needy

    def check_integrity(self) -> None:
        """Raise AssertionError when blocks are lost, or counted otherwise than sequences hold them."""
        self._pool.check_integrity(held_blocks(sequence) for sequence in self.sequences())
        assert self._num_unforked == sum(sequence.parent is not None for sequence in self.sequences())
        for group in {sequence.group for sequence in self.sequences() if sequence.group is not None}:
            beams = [sequence for sequence in self.sequences() if sequence.group is group]
            assert set(beams) == set(group.members), f"{len(beams)} of {len(group.members)} beams are there"
            assert beams == [group.root] or set(beams) <= set(self._running), "beams wait"

    def forget_blocks(self, sequence: Sequence) -> None:
        """Let nobody hit what this sequence computed."""
        self._pool.forget(held_blocks(sequence))

    def _give_back_spare(self, sequence: Sequence) -> None:
        """Free blocks that only drafts needed: another sequence may want them before this one does."""
        num_blocks = self._pool.num_blocks_for(sequence.num_computed_tokens)
        self._pool.release(sequence.block_ids[num_blocks:])
        del sequence.block_ids[num_blocks:]

    def _release(self, sequence: Sequence) -> None:
        self._pool.release(sequence.block_ids)
        self._sources.release(sequence)
        sequence.block_ids = type(sequence.block_ids)("i")
        sequence.num_computed_tokens = 0
