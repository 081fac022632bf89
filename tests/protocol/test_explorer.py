"""The explorer on toy systems with a known violation, a known livelock, and none."""

from __future__ import annotations

from collections.abc import Iterator

from tests.protocol.explorer import LIVENESS, Explorer, Violation


def steps_of_a_counter(state: int) -> Iterator[tuple[str, int]]:
    """0 to 9; 4 may fall into 20, from where it only goes round."""
    if state < 9:
        yield "count", state + 1
    if state == 4:
        yield "slip", 20
    if state in (20, 21):
        yield "turn", 41 - state


def never(_: int) -> tuple[str, str] | None:
    return None


def above_six(state: int) -> tuple[str, str] | None:
    return ("at most six", f"it is {state}") if 6 < state < 20 else None


def is_nine(state: int) -> bool:
    return state == 9


def test_a_violation_is_found_with_the_shortest_way_to_it() -> None:
    def may_jump(state: int) -> Iterator[tuple[str, int]]:
        yield from steps_of_a_counter(state)
        if state == 2:
            yield "jump", 6

    found = Explorer(may_jump, above_six, is_nine, max_states=100).explore(0).violation
    assert found == Violation("at most six", "it is 7", ("count", "count", "jump", "count"))
    assert str(found).splitlines() == [
        "at most six: it is 7",
        "   1. count",
        "   2. count",
        "   3. jump",
        "   4. count",
    ]


def test_a_state_that_breaks_a_law_in_the_beginning_is_found() -> None:
    found = Explorer(steps_of_a_counter, above_six, is_nine, max_states=100).explore(7).violation
    assert found == Violation("at most six", "it is 7", ())


def test_a_livelock_is_found() -> None:
    result = Explorer(steps_of_a_counter, never, is_nine, max_states=100).explore(0)
    assert result.violation is not None
    assert result.violation.property == LIVENESS
    assert result.violation.trace == ("count", "count", "count", "count", "slip")
    assert (result.num_states, result.is_complete) == (12, True)


def test_a_dead_end_is_found() -> None:
    def may_fall(state: int) -> Iterator[tuple[str, int]]:
        if state == 0:
            yield "leap", 9
            yield "fall", 1

    found = Explorer(may_fall, never, is_nine, max_states=9).explore(0).violation
    assert found == Violation(LIVENESS, "from here no way leads to the goal", ("fall",))


def test_a_way_round_that_can_be_left_is_no_livelock() -> None:
    def round_and_out(state: int) -> Iterator[tuple[str, int]]:
        yield "on", (state + 1) % 9
        if state == 0:
            yield "out", 9

    result = Explorer(round_and_out, never, is_nine, max_states=100).explore(3)
    assert (result.violation, result.num_states, result.num_steps, result.depth) == (None, 10, 11, 8)


def test_beyond_the_limit_nothing_is_claimed() -> None:
    result = Explorer(steps_of_a_counter, never, is_nine, max_states=5).explore(0)
    assert (result.violation, result.num_states, result.is_complete) == (None, 5, False)
