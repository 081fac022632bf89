"""The protocol in small systems keeps every law in every reachable state; with a guard taken out it does not."""

from __future__ import annotations

import pytest

from tests.protocol.configurations import QUICK, explore
from tests.protocol.model import Config, Protocol
from tests.protocol.mutants import MUTANTS, Mutant
from tests.protocol.properties import LAWS, SERVER_LAWS
from tests.protocol.scripts import Shard
from tests.protocol.state import Budget, Entry, Job, Server, State

MAX_STATES = 60_000


@pytest.mark.parametrize("name", QUICK)
def test_every_reachable_state_keeps_every_law(name: str) -> None:
    result = explore(Protocol(QUICK[name]), max_states=MAX_STATES)
    assert result.violation is None, f"\n{result.violation}"
    assert result.is_complete


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.make.__name__)
def test_a_protocol_without_a_guard_breaks_its_law(mutant: Mutant) -> None:
    assert explore(Protocol(mutant.config), max_states=MAX_STATES).violation is None
    violation = explore(mutant.make(mutant.config), max_states=MAX_STATES).violation
    assert violation is not None, "the mutant was not found"
    assert violation.property == mutant.law, f"\n{violation}"


def test_the_laws_are_those_of_the_protocol() -> None:
    names = {name.partition(" ")[0] for name in (*LAWS, *SERVER_LAWS)}
    assert names >= {f"I{number}" for number in range(1, 11)}


# -- what the exploration rests on: that the model's scripts answer as the real ones do

FIRST = Entry(1, 1, "", (7,), 1)
RUNNING = Job(
    0, 0, "R", epoch=3, n=1, epochs=((1, 0), (3, 1)), worker=0, gateway=0, attach_id=1, claims=2,
    log=(Entry(1, 0, "T", (), 0), FIRST, Entry(3, 1, "T", (7,), 0)),
)  # fmt: skip


def make_shard(job: Job) -> tuple[Protocol, Shard]:
    protocol = Protocol(Config(Budget()))
    shard = Shard(Server((job,), streams=((), ())))
    if job.state == "R":
        shard.records[job.worker, job.id] = protocol.run_record(job)
    return protocol, shard


@pytest.mark.parametrize(
    ("after", "chain", "status"),
    [
        (0, (), "OK"),
        (1, (7,), "OK"),
        (1, None, "OK"),
        (1, (8,), "RESULT_LOST"),  # another output than ours
        (2, (7, 8), "RESULT_LOST"),  # who has its hash has seen what is not there any more
        (2, None, "OUT_OF_RANGE"),
    ],
)
def test_attach_answers_for_every_position(after: int, chain: tuple[int, ...] | None, status: str) -> None:
    protocol, shard = make_shard(RUNNING)
    found = protocol.attach(shard, 0, 1, after, chain, 2)
    assert found.status == status
    if status == "OK":
        assert found.events == (FIRST,)[after:]
        assert (shard.jobs[0].gateway, shard.records[0, 0].gateway) == (1, 1)
        assert shard.streams[0] is not None
        assert [item.entry.kind for item in shard.streams[0]] == ["S"]
    else:
        assert shard.close() == make_shard(RUNNING)[1].close()


def test_attach_to_what_does_not_exist() -> None:
    protocol, shard = make_shard(RUNNING)
    assert protocol.attach(shard, 5, 1, 0, None, 2).status == "NOT_FOUND"


def test_an_action_is_readable() -> None:
    protocol = Protocol(Config(Budget(lost=1)))
    state: State = protocol.initial()
    for action in ("client 0 asks gateway 0", "worker 0 claims 1"):
        state = dict(protocol.successors(state))[action]
    assert "worker 0 commits job 0: tokens 0.0, the reply is lost" in dict(protocol.successors(state))
