from __future__ import annotations

from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.builders_engine import make_pool
from worker.engine.blocks import BlockPool, OutOfBlocks, PrefixMatch


def hashes_of(pool: BlockPool, tokens: range | list[int], salt: bytes = b"") -> list[bytes]:
    hashes: list[bytes] = []
    pool.extend_hashes(hashes, array("i", tokens), len(tokens) // pool.block_size, salt)
    return hashes


def fill(pool: BlockPool, tokens: range | list[int], salt: bytes = b"") -> list[int]:
    """Compute the full blocks of these tokens and return them, still referenced."""
    hashes = hashes_of(pool, tokens, salt)
    block_ids = pool.allocate(len(hashes))
    for block_id, block_hash in zip(block_ids, hashes, strict=True):
        pool.register(block_id, block_hash)
    pool.settle()
    return block_ids


def test_all_but_the_scratch_block_are_handed_out_once() -> None:
    pool = make_pool(8)
    assert sorted(pool.allocate(8)) == list(range(1, 9))
    with pytest.raises(OutOfBlocks, match="1 blocks asked for, 0 free"):
        pool.allocate(1)


def test_a_pool_needs_a_block_beside_the_scratch_block() -> None:
    with pytest.raises(ValueError, match="num_blocks is 1"):
        BlockPool(1, 16)


def test_a_prefix_is_found_block_by_block() -> None:
    pool = make_pool()
    block_ids = fill(pool, range(12))
    assert pool.match(hashes_of(pool, range(12))).block_ids == tuple(block_ids)
    assert pool.match(hashes_of(pool, [*range(8), 99, 99, 99, 99])).block_ids == tuple(block_ids[:2])
    assert pool.match(hashes_of(pool, [99, *range(1, 12)])).block_ids == ()


def test_equal_tokens_behind_another_prefix_are_another_block() -> None:
    pool = make_pool()
    fill(pool, [*range(4), *range(4)])
    assert len(set(hashes_of(pool, [0, 1, 2, 3] * 3))) == 3


def test_salts_keep_tenants_and_models_apart() -> None:
    pool = make_pool(salt=b"ab")
    fill(pool, range(8), b"c")
    assert pool.match(hashes_of(pool, range(8), b"c")).block_ids != ()
    assert pool.match(hashes_of(pool, range(8), b"d")).block_ids == ()
    assert hashes_of(make_pool(salt=b"a"), range(8), b"bc") != hashes_of(pool, range(8), b"c")


def test_a_block_that_is_still_being_written_is_pending_until_the_step_is_done() -> None:
    pool = make_pool()
    hashes = hashes_of(pool, range(8))
    block_ids = pool.allocate(2)
    pool.register(block_ids[0], hashes[0])
    pool.settle()
    pool.register(block_ids[1], hashes[1])
    assert pool.match(hashes) == PrefixMatch((block_ids[0],), is_pending=True)
    pool.settle()
    assert pool.match(hashes) == PrefixMatch(tuple(block_ids))


def test_a_failed_step_leaves_nothing_to_hit() -> None:
    pool = make_pool()
    hashes = hashes_of(pool, range(8))
    for block_id, block_hash in zip(pool.allocate(2), hashes, strict=True):
        pool.register(block_id, block_hash)
    pool.discard_pending()
    assert pool.match(hashes) == PrefixMatch()


def test_released_blocks_stay_findable_until_they_are_needed() -> None:
    pool = make_pool(4)
    block_ids = fill(pool, range(8))
    pool.release(block_ids)
    assert pool.num_free_blocks == 4
    assert pool.match(hashes_of(pool, range(8))).block_ids == tuple(block_ids)
    pool.allocate(3)  # two that were never used, then the tail of the prefix
    assert pool.match(hashes_of(pool, range(8))).block_ids == (block_ids[0],)


def test_the_least_recently_used_prefix_goes_first() -> None:
    pool = make_pool(4)
    first, second = fill(pool, range(8)), fill(pool, range(10, 18))
    pool.release(first)
    pool.release(second)
    pool.acquire(first)
    pool.release(first)
    pool.allocate(2)
    assert pool.match(hashes_of(pool, range(8))).block_ids == tuple(first)
    assert pool.match(hashes_of(pool, range(10, 18))).block_ids == ()


def test_a_shared_block_is_free_when_the_last_sequence_gives_it_back() -> None:
    pool = make_pool(4)
    block_ids = fill(pool, range(8))
    pool.acquire(block_ids)
    pool.release(block_ids)
    assert pool.num_free_blocks == 2
    pool.release(block_ids)
    assert pool.num_free_blocks == 4


def test_of_equal_blocks_the_first_stays_the_known_one() -> None:
    pool = make_pool()
    first = fill(pool, range(4))
    second = fill(pool, range(4))
    assert pool.match(hashes_of(pool, range(4))).block_ids == tuple(first)
    pool.release(second)
    pool.release(first)
    pool.check_integrity()


def test_forgotten_blocks_are_not_found() -> None:
    pool = make_pool()
    block_ids = fill(pool, range(8))
    pool.release(block_ids)
    pool.forget(block_ids)
    assert pool.match(hashes_of(pool, range(8))) == PrefixMatch()
    pool.check_integrity()


def test_without_a_prefix_cache_nothing_is_ever_found() -> None:
    pool = make_pool(enable_prefix_cache=False)
    assert hashes_of(pool, range(8)) == []


def test_releasing_twice_is_noticed() -> None:
    pool = make_pool()
    block_ids = pool.allocate(1)
    pool.release(block_ids)
    with pytest.raises(AssertionError, match="released more often than taken"):
        pool.release(block_ids)


def test_a_lost_block_is_noticed() -> None:
    pool = make_pool()
    pool._free.pop()
    with pytest.raises(AssertionError, match="a block is lost"):
        pool.check_integrity()


def test_a_block_that_is_counted_otherwise_than_held_is_noticed() -> None:
    pool = make_pool()
    block_ids = pool.allocate(2)
    pool.share(block_ids[1:])
    pool.check_integrity([block_ids, block_ids[1:]])
    with pytest.raises(AssertionError, match="held"):
        pool.check_integrity([block_ids])


def test_without_a_free_block_none_is_replaced() -> None:
    pool = make_pool(2)
    block_ids = pool.allocate(2)
    pool.share(block_ids)
    with pytest.raises(OutOfBlocks):
        pool.replace(block_ids[0])
    pool.check_integrity([block_ids, block_ids])


class PoolMachine(RuleBasedStateMachine):
    """Sequences take, share, fill and give back blocks in any order; a model remembers what each holds."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.pool = make_pool(num_blocks, block_size=2)
        self.held: list[tuple[list[int], list[int]]] = []  # tokens and blocks of each sequence

    @rule(tokens=st.lists(st.integers(0, 1), min_size=2, max_size=8), fail=st.booleans())
    def admit(self, tokens: list[int], fail: bool) -> None:
        tokens = tokens[: len(tokens) // 2 * 2]
        hashes = hashes_of(self.pool, tokens)
        match = self.pool.match(hashes)
        assert not match.is_pending
        num_new = len(hashes) - len(match.block_ids)
        if num_new > self.pool.num_free_blocks - self.pool.num_unreferenced(match.block_ids):
            return
        self.pool.acquire(match.block_ids)
        block_ids = [*match.block_ids, *self.pool.allocate(num_new)]
        for block_id, block_hash in list(zip(block_ids, hashes, strict=True))[len(match.block_ids) :]:
            self.pool.register(block_id, block_hash)
        if fail:
            self.pool.discard_pending()
        else:
            self.pool.settle()
        self.held.append((tokens, block_ids))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        tokens, block_ids = data.draw(st.sampled_from(self.held))
        self.pool.share(block_ids)
        self.held.append((tokens, list(block_ids)))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        """Replace a sequence's last block, as if it were partly full."""
        _, block_ids = data.draw(st.sampled_from(self.held))
        num_holders = sum(block_ids[-1] in others for _, others in self.held)
        assert self.pool.is_shared(block_ids[-1]) == (num_holders > 1)
        if num_holders > 1 and self.pool.num_free_blocks:
            copy = self.pool.replace(block_ids[-1])
            assert not any(copy in others for _, others in self.held)
            block_ids[-1] = copy

    @precondition(lambda self: self.held)
    @rule(data=st.data(), forget=st.booleans())
    def leave(self, data: st.DataObject, forget: bool) -> None:
        _, block_ids = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        if forget:
            self.pool.forget(block_ids)
        self.pool.release(block_ids)

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        self.pool.check_integrity(block_ids for _, block_ids in self.held)
        num_held = len({block_id for _, block_ids in self.held for block_id in block_ids})
        assert self.pool.num_free_blocks == self.pool.num_usable_blocks - num_held

    @invariant()
    def blocks_are_shared_only_by_equal_prefixes(self) -> None:
        prefix_of: dict[int, list[int]] = {}
        for tokens, block_ids in self.held:
            for i, block_id in enumerate(block_ids):
                assert prefix_of.setdefault(block_id, tokens[: 2 * i + 2]) == tokens[: 2 * i + 2]


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
