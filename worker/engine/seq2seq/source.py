"""The blocks of sources: where the keys and values lie that decoders read of what an encoder read. Pure.

They are in the pool like all others, ceil(tokens / block_size) of them, and belong to every output and beam of their
request. They are known by a hash of the whole source, since each key depends on all of it: another request, or the same
one after a preemption or on its way back from another worker, finds all of them or computes all of them anew.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from worker.engine.blocks import BlockPool, PrefixMatch

if TYPE_CHECKING:
    from worker.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Source:
    """What the encoder reads for a request."""

    token_ids: array[int]
    digest: bytes

    @classmethod
    def of(cls, token_ids: Iterable[int]) -> Source | None:
        """None without tokens: there is no encoder then."""
        ids = array("i", token_ids)
        return cls(ids, hashlib.sha256(ids.tobytes()).digest()) if ids else None

    def salt(self, request_salt: bytes) -> bytes:
        """Return what keeps a decoder's blocks apart: they depend on the source."""
        return hashlib.sha256(b"source\0" + self.digest + request_salt).digest()


class SourceBlocks:
    """Gives sequences the blocks of their sources, and takes them back."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool: Final = pool

    def num_blocks(self, sequence: Sequence) -> int:
        return 0 if sequence.source is None else self._pool.num_blocks_for(len(sequence.source.token_ids))

    def match(self, sequence: Sequence) -> PrefixMatch:
        """Return the blocks of its source, if all of them are there; none if one is missing. Changes nothing."""
        match = self._pool.match(self._hashes(sequence))
        is_whole = len(match.block_ids) == self.num_blocks(sequence)
        return match if is_whole or match.is_pending else PrefixMatch()

    def take(self, sequence: Sequence, match: PrefixMatch) -> None:
        """Give a sequence that is admitted the blocks that `match` found, or else new ones, not computed yet."""
        if sequence.source is None:
            return
        if match.block_ids:
            self._pool.acquire(match.block_ids)
            sequence.source_block_ids.extend(match.block_ids)
        else:
            sequence.source_block_ids.extend(self._pool.allocate(self.num_blocks(sequence)))
        sequence.is_source_computed = bool(match.block_ids)

    def register(self, sequence: Sequence) -> None:
        """Announce the blocks that the step being planned will fill."""
        if sequence.num_source_tokens_to_read:
            for block_id, block_hash in zip(sequence.source_block_ids, self._hashes(sequence), strict=False):
                self._pool.register(block_id, block_hash)

    def share(self, parent: Sequence, child: Sequence) -> None:
        """Let a sequence of the same request read its parent's."""
        self._pool.share(parent.source_block_ids)
        child.source_block_ids = parent.source_block_ids[:]
        child.is_source_computed = parent.is_source_computed

    def release(self, sequence: Sequence) -> None:
        self._pool.release(sequence.source_block_ids)
        sequence.source_block_ids = array("i")
        sequence.is_source_computed = False

    def _hashes(self, sequence: Sequence) -> list[bytes]:
        """One for each block; none where nothing is to be found again."""
        source = sequence.source
        return [] if source is None else self._pool.hashes_of(self.num_blocks(sequence), sequence.cache_salt)
