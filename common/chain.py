"""The hash chain over a generation's tokens, by which a receiver knows that an event continues what it already has.

A server that failed over may have lost the log's tail and written another one under the same event numbers. Each
event therefore carries h = first 8 bytes of SHA-256(previous h || its token ids); whoever holds h of event k accepts
event k+1 only if it was made on top of that h.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from hashlib import sha256
from typing import Final

from common.generation import OutputDelta

HASH_BYTES: Final = 8
GENESIS: Final = bytes(HASH_BYTES)  # h before the first event


def next_hash(previous: bytes, deltas: Iterable[OutputDelta]) -> bytes:
    """h of an event with these deltas; `previous` itself when they hold no token id.

    The ids enter as unsigned 32-bit little-endian integers, delta by delta in order. Raises OverflowError for an id
    that does not fit.
    """
    packed = array("I")
    for delta in deltas:
        packed.extend(delta.token_ids)
    if not packed:
        return previous
    if sys.byteorder == "big":
        packed.byteswap()
    return sha256(previous + packed.tobytes()).digest()[:HASH_BYTES]
