from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.engine.lookup import PromptLookup


def make_lookup(token_ids: list[int], num_prompt_tokens: int | None = None, *ngrams: int) -> PromptLookup:
    ids = array("i", token_ids)
    lookup = PromptLookup(ids, len(ids) if num_prompt_tokens is None else num_prompt_tokens, *(ngrams or (1, 3)))
    lookup.catch_up()
    return lookup


def test_the_guess_is_what_followed_the_latest_tokens_before() -> None:
    assert make_lookup([1, 2, 3, 4, 5, 9, 1, 2, 3]).draft(3).tolist() == [4, 5, 9]


def test_a_longer_match_is_believed_before_a_later_one() -> None:
    assert make_lookup([1, 2, 3, 4, 7, 3, 5, 1, 2, 3]).draft(1).tolist() == [4]
    assert make_lookup([7, 2, 3, 4, 6, 3, 5, 1, 2, 3]).draft(1).tolist() == [4]


def test_of_equal_matches_the_latest_is_believed() -> None:
    assert make_lookup([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3]).draft(1).tolist() == [5]


def test_a_sequence_without_repetition_gives_no_guess() -> None:
    lookup = make_lookup([1, 2, 3, 4])
    assert (lookup.chances(4), lookup.draft(4).tolist()) == ([], [])


def test_matches_shorter_than_asked_for_give_no_guess() -> None:
    assert make_lookup([1, 2, 3, 4, 2, 3], None, 2, 3).draft(1).tolist() == [4]
    assert make_lookup([1, 2, 3, 4, 9, 3], None, 2, 3).draft(1).tolist() == []


def test_a_periodic_text_is_guessed_beyond_its_end() -> None:
    assert make_lookup([5, 5]).draft(4).tolist() == [5, 5, 5, 5]
    assert make_lookup([9, 1, 2, 3, 1, 2]).draft(7).tolist() == [3, 1, 2, 3, 1, 2, 3]


def test_the_first_token_is_a_follower_of_nothing() -> None:
    assert make_lookup([0, 0, 7, 0]).draft(1).tolist() == [7]  # no n-gram begins before the text


def plain_guess(ids: list[int], num_drafts: int, min_ngram: int, max_ngram: int) -> list[int]:
    """The rule by rescanning: the latest earlier place of the longest n-gram at the end."""
    for n in range(min(max_ngram, len(ids)), min_ngram - 1, -1):
        for start in range(len(ids) - n - 1, -1, -1):
            if ids[start : start + n] == ids[-n:]:
                text = list(ids)
                for i in range(num_drafts):
                    text.append(text[start + n + i])
                return text[len(ids) :]
    return []


@given(
    ids=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    num_prompt_tokens=st.integers(0, 40),
    ngrams=st.sampled_from([(1, 3), (2, 2), (1, 1), (2, 4)]),
    num_drafts=st.integers(1, 8),
)
def test_a_lookup_that_grows_with_its_sequence_guesses_as_a_scan_of_the_whole(
    ids: list[int], num_prompt_tokens: int, ngrams: tuple[int, int], num_drafts: int
) -> None:
    growing = array("i", ids[:1])
    lookup = PromptLookup(growing, num_prompt_tokens, *ngrams)
    for end in range(1, len(ids) + 1):
        growing.extend(ids[len(growing) : end])
        if end % 3 == 0 or end == len(ids):  # several tokens at once as well as single ones
            lookup.catch_up()
            guess = plain_guess(ids[:end], num_drafts, *ngrams)
            assert lookup.draft(num_drafts).tolist() == guess
            assert len(lookup.chances(num_drafts)) == len(guess)


def test_guesses_that_were_right_are_likelier_and_wrong_ones_less_likely() -> None:
    fresh = make_lookup([1, 2, 3] * 8)
    right = make_lookup([1, 2, 3] * 8, 3)
    wrong = make_lookup([1, 1, 2, 1, 3, 1, 4, 1, 5, 1, 6, 1, 7, 1], 1)
    assert right.chances(1)[0] > 0.9 > fresh.chances(1)[0]
    assert wrong.chances(1)[0] < 0.1 < make_lookup([1, 1]).chances(1)[0]


def test_what_is_learnt_depends_on_the_tokens_alone() -> None:
    ids = [1, 2, 3, 1, 2, 4, 1, 2, 4, 4, 1, 2]
    at_once = make_lookup(ids, 2)
    growing = array("i")
    lookup = PromptLookup(growing, 2, 1, 3)
    for token_id in ids:
        growing.append(token_id)
        lookup.catch_up()
    assert lookup.chances(5) == at_once.chances(5)


def test_a_prompt_teaches_nothing() -> None:
    assert make_lookup([1, 2] * 20).chances(3) == make_lookup([1, 2] * 3).chances(3)


def test_each_draft_makes_the_match_longer() -> None:
    chances = make_lookup([1, 5, 6, 7, 8, 2, 1]).chances(4)  # a match of one token, then of two, then of three
    assert chances == pytest.approx([0.15, 0.15 * 0.3, 0.15 * 0.3 * 0.45, 0.15 * 0.3 * 0.45**2])
