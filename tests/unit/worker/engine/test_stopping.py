from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.generation import FinishReason, SamplingParams
from worker.engine.stopping import Progress, StopState, StopStringFilter


class Letters:
    """A detokenizer of single characters; 0 is a byte that waits for the next token."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, token_id: int) -> str:
        if token_id == 0:
            self._held += "�"
            return ""
        text, self._held = self._held.replace("�", "é") + chr(token_id), ""
        return text

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def make_state(max_tokens: int = 100, **params: object) -> StopState:
    return StopState(SamplingParams(max_tokens=max_tokens, **params), max_tokens, Letters())  # type: ignore[arg-type]


def run(state: StopState, text: str) -> list[Progress]:
    """Push until the end."""
    progress = []
    for character in text:
        progress.append(state.push(ord(character)))
        if state.finished is not None:
            break
    return progress


def test_text_passes_at_once_when_no_stop_string_may_begin_in_it() -> None:
    assert [p.text for p in run(make_state(stop_strings=("xyz",)), "abc")] == ["a", "b", "c"]


def test_text_is_held_back_while_it_may_begin_a_stop_string() -> None:
    assert [p.text for p in run(make_state(stop_strings=("bcd",)), "abce")] == ["a", "", "", "bce"]


def test_text_ends_before_the_match() -> None:
    progress = run(make_state(stop_strings=("bcd",)), "abcde")
    assert progress[-1] == Progress("", FinishReason.STOP, "bcd")
    assert "".join(p.text for p in progress) == "a"
    assert len(progress) == 4


def test_text_ends_behind_the_match_where_it_is_included() -> None:
    progress = run(make_state(stop_strings=("bcd",), include_stop=True), "abcde")
    assert progress[-1] == Progress("bcd", FinishReason.STOP, "bcd")
    assert "".join(p.text for p in progress) == "abcd"
    assert StopStringFilter(["cd"], include=True).push("abcdef") == ("abcd", "cd")
    assert "".join(p.text for p in run(make_state(stop_strings=("é",), include_stop=True), "ab\0\0x")) == "abé"


def test_of_two_stop_strings_in_one_text_the_earlier_wins() -> None:
    assert StopStringFilter(["cd", "bcd"]).push("abcd") == ("a", "bcd")
    assert StopStringFilter(["b", "bc"]).push("abc") == ("a", "b")


def test_a_stop_string_that_overlaps_itself_is_found() -> None:
    assert [p.text for p in run(make_state(stop_strings=("aab",)), "aaab")] == ["", "", "a", ""]


def test_a_stop_id_ends_the_output_and_shows_what_was_held_back() -> None:
    progress = run(make_state(stop_strings=("bcd",), stop_token_ids=(ord("!"),)), "abc!")
    assert progress[-1] == Progress("bc", FinishReason.STOP, ord("!"))


def test_the_last_token_allowed_shows_what_was_held_back() -> None:
    progress = run(make_state(max_tokens=3, stop_strings=("bcd",)), "abcd")
    assert progress[-1] == Progress("bc", FinishReason.LENGTH)
    assert len(progress) == 3


def test_a_stop_string_completed_by_the_last_token_allowed_is_a_stop() -> None:
    assert run(make_state(max_tokens=3, stop_strings=("bc",)), "abc")[-1] == Progress("", FinishReason.STOP, "bc")


def test_an_incomplete_character_is_shown_at_the_end() -> None:
    state = make_state(max_tokens=2)
    state.push(ord("a"))
    assert state.push(0) == Progress("\ufffd", FinishReason.LENGTH)


def test_a_stop_string_completed_by_the_flush_is_found() -> None:
    state = make_state(max_tokens=2, stop_strings=("a\ufffd",))
    state.push(ord("a"))
    assert state.push(0) == Progress("", FinishReason.STOP, "a\ufffd")


def test_an_end_from_outside_shows_what_was_held_back() -> None:
    state = make_state(stop_strings=("abc",))
    run(state, "ab")
    assert state.end(FinishReason.TIME_LIMIT) == Progress("ab", FinishReason.TIME_LIMIT)


def test_nothing_follows_the_end() -> None:
    state = make_state(max_tokens=1)
    state.push(ord("a"))
    with pytest.raises(AssertionError, match="the output has ended"):
        state.push(ord("b"))
    with pytest.raises(AssertionError, match="the output has ended"):
        state.end(FinishReason.CANCELLED)


_letters = st.text("abc", max_size=30)
_stop_strings = st.lists(st.text("abc", min_size=1, max_size=5), max_size=3).map(tuple)


@given(text=_letters, stop_strings=_stop_strings)
def test_shown_text_is_the_text_before_the_stop_string_that_is_completed_first(
    text: str, stop_strings: tuple[str, ...]
) -> None:
    state = make_state(stop_strings=stop_strings)
    progress = run(state, text)
    shown = "".join(p.text for p in progress)
    ends = [(end, s) for s in stop_strings for end in range(len(text) + 1) if text[:end].endswith(s)]
    if ends:
        first_end = min(end for end, _ in ends)
        longest = max((s for end, s in ends if end == first_end), key=len)
        assert len(progress) == first_end
        assert shown == text[: first_end - len(longest)]
        assert progress[-1].stop_match == longest
    else:
        assert shown + state.end(FinishReason.CANCELLED).text == text


@given(text=_letters, stop_strings=_stop_strings)
def test_no_shown_text_ever_has_to_be_taken_back(text: str, stop_strings: tuple[str, ...]) -> None:
    # Whatever follows, the text of a longer run begins with the text of a shorter one.
    shown = ""
    for p in run(make_state(stop_strings=stop_strings), text):
        shown += p.text
        assert not any(s in shown for s in stop_strings)
        assert text.startswith(shown)


@given(text=_letters, stop_strings=_stop_strings, cut=st.integers(0, 30))
def test_a_replay_reaches_the_same_state(text: str, stop_strings: tuple[str, ...], cut: int) -> None:
    progress = run(make_state(stop_strings=stop_strings, max_tokens=25), text)
    resumed = make_state(stop_strings=stop_strings, max_tokens=25)
    run(resumed, text[:cut])
    if resumed.finished is None:
        assert run(resumed, text[cut:]) == progress[cut:]
    else:
        assert resumed.finished == progress[-1]


class TestBeforeMinTokens:
    def test_a_stop_string_is_ordinary_text(self) -> None:
        progress = run(make_state(stop_strings=("bc",), min_tokens=4), "abcdbc")
        assert "".join(p.text for p in progress) == "abcd"
        assert progress[-1] == Progress("", FinishReason.STOP, "bc")
        assert len(progress) == 6

    def test_one_that_is_begun_then_counts(self) -> None:
        progress = run(make_state(stop_strings=("bcd",), min_tokens=4), "abcd")
        assert [p.text for p in progress] == ["a", "", "", ""]
        assert progress[-1].stop_match == "bcd"

    def test_one_that_was_complete_then_does_not(self) -> None:
        progress = run(make_state(stop_strings=("bc", "bcde"), min_tokens=4), "abcdx")
        assert "".join(p.text for p in progress) == "abcdx"
        assert progress[-1].finish_reason is None

    def test_the_output_may_end_otherwise(self) -> None:
        state = make_state(stop_strings=("bc",), min_tokens=4)
        run(state, "ab")
        assert state.end(FinishReason.CANCELLED) == Progress("b", FinishReason.CANCELLED)

    @given(
        text=st.text("ab", max_size=14),
        stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
        min_tokens=st.integers(0, 12),
    )
    def test_the_first_one_that_is_complete_later_ends_it(self, text: str, stops: list[str], min_tokens: int) -> None:
        state = make_state(stop_strings=tuple(stops), min_tokens=min_tokens)
        shown = "".join(progress.text for progress in run(state, text))
        lengths = range(max(1, min_tokens), len(text) + 1)
        end = next((n for n in lengths if any(text[:n].endswith(stop) for stop in stops)), None)
        if end is None:
            assert state.finished is None
            assert shown + state.end(FinishReason.LENGTH).text == text
        else:
            assert state.finished is not None
            found = str(state.finished.stop_match)
            assert text[:end].endswith(found)
            assert len(found) == max(len(stop) for stop in stops if text[:end].endswith(stop)), (
                "the one that begins first"
            )
            assert shown == text[:end].removesuffix(found)
