"""The pause of a worker that cannot open what it claims."""

from __future__ import annotations

from common.claim_pause import FIRST_S, LONGEST_S, ClaimPause


def test_pauses_double_up_to_the_longest_and_begin_anew_after_a_success() -> None:
    now_s = 0.0
    pause = ClaimPause(lambda: now_s)
    assert pause.left_s == 0
    lengths = []
    for _ in range(6):
        lengths.append(pause.begin())
        assert pause.left_s == lengths[-1]
        now_s += lengths[-1]
        assert pause.left_s == 0
    assert lengths == [5, 10, 20, 40, LONGEST_S, LONGEST_S]
    pause.succeeded()
    assert pause.begin() == FIRST_S


def test_a_success_does_not_end_a_pause() -> None:
    pause = ClaimPause(lambda: 0.0)
    pause.begin()
    pause.succeeded()
    assert pause.left_s == FIRST_S
