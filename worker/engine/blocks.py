"""The block pool: which KV blocks are free, shared or kept for later hits. Pure bookkeeping, no tensors.

A block is in exactly one of three places:

    free     no content worth keeping                       list, handed out first
    used     referenced by at least one sequence            reference count > 0
    cached   full, hashed, referenced by nobody             LRU, evicted when `free` is empty

A full block is known by the hash of everything up to its end: sha256(parent hash, its token ids). The parent of the
first block is a hash of the pool's salt (model, adapter, dtype) and the request's salt, so equal tokens of different
tenants or models never meet. Automatic prefix caching after PagedAttention (arXiv:2309.06180).

Sequences that continue one text share all of its blocks (`share`), also the last one while it is only partly full, and
until one of them writes there. That one first gets a block of its own (`replace`), into which whoever owns the tensors
copies the old one; who is left alone with a block writes in place. Copy-on-write, after PagedAttention.

A block is registered when the step that fills it is planned, but stays *pending* until that step is done: whoever hits
a pending block waits, so that nobody reads keys that are still being written. Blocks are immutable once full.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

SCRATCH_BLOCK: Final = 0  # padding rows write here; never handed out


class OutOfBlocks(Exception):
    """More blocks were asked for than are free; the caller checks `num_free_blocks` first."""


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The longest cached prefix of a token sequence."""

    block_ids: tuple[int, ...] = ()  # ready to be read
    is_pending: bool = False  # the next block exists, but the step in progress is still writing it


class BlockPool:
    """Hands out, shares and takes back blocks. The only owner of block state."""

    def __init__(
        self, num_blocks: int, block_size: int, *, salt: bytes = b"", enable_prefix_cache: bool = True
    ) -> None:
        """`num_blocks` includes the scratch block."""
        if num_blocks < 2:
            raise ValueError(f"num_blocks is {num_blocks}, but a scratch block and at least one other are needed")
        self.block_size: Final = block_size
        self.num_usable_blocks: Final = num_blocks - 1
        self._salt = salt
        self._enable_prefix_cache = enable_prefix_cache
        self._free = list(range(num_blocks - 1, SCRATCH_BLOCK, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._ref_counts = [0] * num_blocks
        self._block_of_hash: dict[bytes, int] = {}
        self._hash_of_block: dict[int, bytes] = {}
        self._pending: set[int] = set()

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out now, cached ones included."""
        return len(self._free) + len(self._cached)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # -- hashes ---------------------------------------------------------------------------------------------------

    def extend_hashes(self, hashes: list[bytes], token_ids: array[int], num_blocks: int, request_salt: bytes) -> None:
        """Grow the hash chain of a sequence to its first `num_blocks` blocks."""
        if not self._enable_prefix_cache:
            return
        parent = hashes[-1] if hashes else self._root(request_salt)
        for index in range(len(hashes), num_blocks):
            start = index * self.block_size
            parent = hashlib.sha256(parent + token_ids[start : start + self.block_size].tobytes()).digest()
            hashes.append(parent)

    def hashes_of(self, num_blocks: int, salt: bytes) -> list[bytes]:
        """One for each block of what `salt` stands for as a whole; none where nothing is to be found again."""
        if not self._enable_prefix_cache:
            return []
        root = self._root(salt)
        return [hashlib.sha256(root + b"whole" + index.to_bytes(4, "little")).digest() for index in range(num_blocks)]

    def _root(self, request_salt: bytes) -> bytes:
        length = len(self._salt).to_bytes(8, "little")  # keeps (ab, c) apart from (a, bc)
        return hashlib.sha256(length + self._salt + request_salt).digest()

    def match(self, hashes: Iterable[bytes]) -> PrefixMatch:
        """Return the blocks that hold the longest known prefix. Changes nothing."""
        block_ids: list[int] = []
        for block_hash in hashes:
            block_id = self._block_of_hash.get(block_hash)
            if block_id is None:
                break
            if block_id in self._pending:
                return PrefixMatch(tuple(block_ids), is_pending=True)
            block_ids.append(block_id)
        return PrefixMatch(tuple(block_ids))

    def num_unreferenced(self, block_ids: Iterable[int]) -> int:
        """Of these, how many count as free now and would not after `acquire`."""
        return sum(1 for block_id in block_ids if self._ref_counts[block_id] == 0)

    # -- taking and giving back -----------------------------------------------------------------------------------

    def acquire(self, block_ids: Iterable[int]) -> None:
        """Share blocks that `match` returned."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._cached[block_id]
            self._ref_counts[block_id] += 1

    def allocate(self, num_blocks: int) -> list[int]:
        """Hand out blocks with nothing in them worth reading. Raises OutOfBlocks and then changes nothing."""
        if num_blocks > self.num_free_blocks:
            raise OutOfBlocks(f"{num_blocks} blocks asked for, {self.num_free_blocks} free")
        block_ids = [self._free.pop() if self._free else self._evict() for _ in range(num_blocks)]
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
        return block_ids

    def _evict(self) -> int:
        block_id, _ = self._cached.popitem(last=False)
        del self._block_of_hash[self._hash_of_block.pop(block_id)]
        return block_id

    def share(self, block_ids: Iterable[int]) -> None:
        """Let one more sequence hold blocks that are in use."""
        for block_id in block_ids:
            assert self._ref_counts[block_id] > 0, f"block {block_id} is in nobody's use"
            self._ref_counts[block_id] += 1

    def is_shared(self, block_id: int) -> bool:
        """Whether several sequences hold this block, so that none of them may write there."""
        return self._ref_counts[block_id] > 1

    def num_owners(self, block_id: int) -> int:
        """How many sequences hold this block."""
        return self._ref_counts[block_id]

    def replace(self, block_id: int) -> int:
        """Take a shared block from one of its sequences and return another one, into which it is to be copied.

        Raises OutOfBlocks and then changes nothing.
        """
        assert self.is_shared(block_id), f"block {block_id} has one owner"
        (copy,) = self.allocate(1)
        self._ref_counts[block_id] -= 1
        return copy

    def release(self, block_ids: Sequence[int]) -> None:
        """Give back a sequence's blocks, in its order.

        The tail becomes least recently used: a prefix is worth more than what stands behind it, which is unreachable
        without it.
        """
        for block_id in reversed(block_ids):
            self._ref_counts[block_id] -= 1
            assert self._ref_counts[block_id] >= 0, f"block {block_id} released more often than taken"
            if self._ref_counts[block_id] == 0:
                if block_id in self._hash_of_block:
                    self._cached[block_id] = None
                else:
                    self._free.append(block_id)

    # -- sharing --------------------------------------------------------------------------------------------------

    def register(self, block_id: int, block_hash: bytes) -> None:
        """Announce a block that the step being planned will fill. Of equal blocks the first one stays the known one."""
        if block_hash in self._block_of_hash or block_id in self._hash_of_block:
            return
        self._block_of_hash[block_hash] = block_id
        self._hash_of_block[block_id] = block_hash
        self._pending.add(block_id)

    def settle(self) -> None:
        """The planned step is done: what it filled can be read."""
        self._pending.clear()

    def discard_pending(self) -> None:
        """The planned step failed: what it was to fill is not there."""
        self.forget(list(self._pending))

    def forget(self, block_ids: Iterable[int]) -> None:
        """Make the content of these blocks unfindable, for instance because it holds NaN."""
        for block_id in block_ids:
            self._pending.discard(block_id)
            block_hash = self._hash_of_block.pop(block_id, None)
            if block_hash is None:
                continue
            del self._block_of_hash[block_hash]
            if block_id in self._cached:
                del self._cached[block_id]
                self._free.append(block_id)

    def check_integrity(self, held: Iterable[Iterable[int]] | None = None) -> None:
        """Raise AssertionError unless every block is in exactly one place.

        `held` are the block ids of every sequence there is: each block must then be counted as often as it is held.
        """
        used = {block_id for block_id, count in enumerate(self._ref_counts) if count > 0}
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert not used & free, f"used and free: {used & free}"
        assert not used & cached, f"used and cached: {used & cached}"
        assert not free & cached, f"free and cached: {free & cached}"
        assert SCRATCH_BLOCK not in used | free | cached, "the scratch block was handed out"
        assert len(used) + len(free) + len(cached) == self.num_usable_blocks, "a block is lost"
        assert cached <= self._hash_of_block.keys(), "a cached block without a hash cannot be found"
        assert not free & self._hash_of_block.keys(), "a free block can be found"
        assert {h: b for b, h in self._hash_of_block.items()} == self._block_of_hash, "the two indices differ"
        assert self._pending <= used, "a pending block belongs to nobody"
        if held is not None:
            holders = Counter(block_id for block_ids in held for block_id in block_ids)
            counted = {block_id: count for block_id, count in enumerate(self._ref_counts) if count > 0}
            assert holders == counted, f"held: {holders}, counted: {counted}"
