"""Random numbers by counting instead of by state: the noise of a token depends on what it is, not on when it is drawn.

Each draw is a hash of (seed, output index, position of the new token in its sequence, token id). So a sequence gets the
same noise alone, in any batch, after a preemption and on another worker. Only 32-bit integer arithmetic is used up to
the last two logarithms, so the bits are the same on every device:

    key    = splitmix64 over seed, output index and position     two 32-bit words a, b per row
    hash   = mix(mix(token_id * 0x9E3779B1 + a) ^ b)               mix: the finaliser of MurmurHash3
    u      = (hash + 0.5) / 2**32                                  hash read as unsigned
    noise  = -log(-log(u))                                         Gumbel(0, 1)

The largest of log-probability plus noise is a sample of the distribution (the Gumbel-max trick). Indexing the noise by
token id makes it independent of how candidates are found and sorted.
"""

from __future__ import annotations

from typing import Final

import torch

_MASK64: Final = (1 << 64) - 1
_GOLDEN64: Final = 0x9E3779B97F4A7C15


def _signed(word: int) -> int:
    """A 32-bit word as torch.int32 holds it."""
    return word - (1 << 32) if word >= 1 << 31 else word


_GOLDEN32: Final = _signed(0x9E3779B1)
_MIX1: Final = _signed(0x85EBCA6B)
_MIX2: Final = _signed(0xC2B2AE35)
_SIGN: Final = _signed(0x80000000)


def _splitmix64(state: int) -> int:
    """The output function of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    state = (state + _GOLDEN64) & _MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
    return state ^ (state >> 31)


def row_key(seed: int, output_index: int, position: int) -> tuple[int, int]:
    """The two words (signed 32-bit) that stand for one draw."""
    word = _splitmix64(_splitmix64(_splitmix64(seed & _MASK64) ^ output_index) ^ position)
    return _signed(word & 0xFFFFFFFF), _signed(word >> 32)


def _mix(word: torch.Tensor) -> torch.Tensor:
    """In place. int32 products wrap; an arithmetic shift followed by a mask is a logical one."""
    word ^= (word >> 16) & 0xFFFF
    word *= _MIX1
    word ^= (word >> 13) & 0x7FFFF
    word *= _MIX2
    word ^= (word >> 16) & 0xFFFF
    return word


def ordered_hash(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Hash token ids under the keys of their rows.

    `keys` [num_rows, 2] int32, `token_ids` int32, [num_rows, n] or [n]. Returns [num_rows, n] int32: the unsigned hash
    less 2**31, so that a larger number is a larger u.
    """
    word = token_ids * _GOLDEN32 + keys[:, :1]
    word = _mix(word)
    word ^= keys[:, 1:]
    word = _mix(word)
    word ^= _SIGN
    return word


def gumbel(hashes: torch.Tensor) -> torch.Tensor:
    """The noise of these hashes, float64; between -3.1 and 22.9."""
    u = (hashes.double() + (2.0**31 + 0.5)) * 2.0**-32
    return -torch.log(-torch.log(u))


def least_hash(noise: torch.Tensor) -> torch.Tensor:
    """The inverse of `gumbel`, rounded down: a hash whose noise is larger is not less. float64 to int32."""
    u = torch.exp(-torch.exp(-noise))
    # Without rounding up there is a whole hash of margin for the error of the exponentials.
    word = torch.floor(u * 2.0**32 - 0.5) - 2.0**31
    return word.clamp(min=-(2.0**31), max=2.0**31 - 1).to(torch.int32)
