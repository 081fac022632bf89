from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.preemption import MAX_PREEMPTIONS, Runner, choose_victims


def runner(
    name: str, priority: int, age: int, *, kv_tokens: int = 16, num_preemptions: int = 0, by_share: bool = False
) -> Runner:
    return Runner(name, priority, age, kv_tokens, num_preemptions, by_share)


def test_the_youngest_of_the_lowest_class_gives_way_first() -> None:
    runners = [runner("a", 2, 1), runner("b", 2, 2), runner("c", 1, 3), runner("d", 0, 4)]
    assert choose_victims(runners, places=1, kv_tokens=0) == ["b"]
    assert choose_victims(runners, places=1, kv_tokens=32) == ["b", "a"]
    assert choose_victims(runners, places=3, kv_tokens=0) == ["b", "a", "c"]


def test_nobody_gives_way_where_there_is_room_or_none_can_be_made() -> None:
    runners = [runner("a", 2, 1), runner("d", 0, 4, kv_tokens=1000)]
    assert choose_victims(runners, places=0, kv_tokens=-5) == []
    assert choose_victims(runners, places=1, kv_tokens=17) == []
    assert choose_victims(runners, places=2, kv_tokens=0) == []
    assert choose_victims([], places=1, kv_tokens=0) == []


@pytest.mark.parametrize("stays", [{"num_preemptions": MAX_PREEMPTIONS}, {"by_share": True}])
def test_what_has_given_way_often_or_runs_for_its_classs_share_stays(stays: dict[str, int]) -> None:
    runners = [runner("a", 1, 1), runner("b", 2, 2, **stays)]  # type: ignore[arg-type]
    assert choose_victims(runners, places=1, kv_tokens=0) == ["a"]


RUNNERS = st.lists(
    st.builds(
        runner,
        st.uuids().map(str),
        st.integers(0, 2),
        st.integers(0, 99),
        kv_tokens=st.integers(1, 64),
        num_preemptions=st.integers(0, MAX_PREEMPTIONS),
        by_share=st.booleans(),
    ),
    max_size=12,
)


@given(RUNNERS, st.integers(-2, 6), st.integers(-64, 300))
def test_just_enough_give_way(runners: list[Runner], places: int, kv_tokens: int) -> None:
    by_name = {one.generation_id: one for one in runners}
    victims = [by_name[name] for name in choose_victims(runners, places=places, kv_tokens=kv_tokens)]
    assert all(one.may_give_way and one.priority > 0 for one in victims)

    def is_enough(chosen: list[Runner]) -> bool:
        return len(chosen) >= places and sum(one.kv_tokens for one in chosen) >= kv_tokens

    if victims:
        assert is_enough(victims)
        assert not is_enough(victims[:-1])
        left = [one for one in runners if one.may_give_way and one not in victims]
        assert all((one.priority, one.age) <= (victims[-1].priority, victims[-1].age) for one in left)
    else:
        assert is_enough([]) or not is_enough([one for one in runners if one.may_give_way])
