from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from worker.engine.noise import gumbel, least_hash, ordered_hash, row_key

_M32 = 0xFFFFFFFF


def _mix_by_hand(word: int) -> int:
    word ^= word >> 16
    word = (word * 0x85EBCA6B) & _M32
    word ^= word >> 13
    word = (word * 0xC2B2AE35) & _M32
    return word ^ (word >> 16)


@given(
    key=st.tuples(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1)),
    token_ids=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=40),
)
def test_hash_is_the_documented_one(key: tuple[int, int], token_ids: list[int]) -> None:
    hashes = ordered_hash(torch.tensor([key], dtype=torch.int32), torch.tensor(token_ids, dtype=torch.int32))
    first, second = key[0] & _M32, key[1] & _M32
    expected = [_mix_by_hand(_mix_by_hand((t * 0x9E3779B1 + first) & _M32) ^ second) for t in token_ids]
    assert (hashes[0].long() + 2**31).tolist() == expected


def test_hash_never_changes() -> None:
    # A takeover by a newer release must draw the same tokens, so these numbers are fixed for good.
    assert row_key(0x0123456789ABCDEF, 1, 77) == (132047073, 898623209)
    hashes = ordered_hash(torch.tensor([row_key(42, 0, 5)], dtype=torch.int32), torch.arange(4, dtype=torch.int32))
    assert hashes.tolist() == [[-1643589549, 1597595208, 316277695, -1684040038]]


def test_keys_of_neighbouring_draws_differ() -> None:
    keys = {row_key(seed, output, position) for seed in range(20) for output in range(5) for position in range(200)}
    assert len(keys) == 20 * 5 * 200
    assert row_key(1, 0, 0) != row_key(1 << 40, 0, 0)  # all 64 bits of the seed count


def test_noise_is_gumbel_distributed_and_uncorrelated_over_positions() -> None:
    keys = torch.tensor([row_key(7, 0, position) for position in range(20_000)], dtype=torch.int32)
    uniform = (ordered_hash(keys, torch.tensor([3], dtype=torch.int32))[:, 0].double() + 2.0**31 + 0.5) / 2.0**32
    assert abs(uniform.mean() - 0.5) < 0.007  # 3.4 standard errors
    assert abs(uniform.var() - 1 / 12) < 0.003
    assert abs(torch.corrcoef(torch.stack([uniform[:-1], uniform[1:]]))[0, 1]) < 0.025
    noise = gumbel(ordered_hash(keys, torch.tensor([3, 4], dtype=torch.int32)))
    assert abs(noise.mean() - 0.5772) < 0.03
    assert abs(torch.corrcoef(noise.T)[0, 1]) < 0.025


@given(st.floats(-4, 24))
def test_no_larger_noise_has_a_hash_below_the_least(noise: float) -> None:
    threshold = int(least_hash(torch.tensor([noise], dtype=torch.float64)))
    near = [h for h in range(threshold - 2, threshold + 6) if -(2**31) <= h < 2**31]
    larger = gumbel(torch.tensor(near, dtype=torch.int32)) > noise
    assert all(h >= threshold for h, is_larger in zip(near, larger.tolist(), strict=True) if is_larger)


def test_extreme_hashes_give_finite_noise() -> None:
    assert gumbel(torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32)).isfinite().all()
