"""How items are run: what is waited for, by whose rights, and what is forgotten when."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import errors
from common.api_keys import ApiKey, ApiKeys
from common.batches import Owner
from common.grants import Grants, TenantPolicy
from common.job_queue import JobQueue
from common.tenants import Tenants
from gateway.batches.jobs import GenerationJobs, JobRunner
from gateway.batches.running import Bells, Forgetting, Owners, is_for_now, pause_s
from gateway.catalog import Catalog
from gateway.identity.caller import Caller
from torchrelay.v1 import generation_pb2


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Keys:
    """One key, which may end."""

    def __init__(self) -> None:
        self.grants = Grants()
        self.error: errors.ServingError | None = None
        self.num_asked = 0

    async def current(self, key_id: str) -> ApiKey:
        self.num_asked += 1
        if self.error is not None:
            raise self.error
        return ApiKey(
            key_id=key_id, tenant="acme", name="", last_four="", created_ms=0, grants=self.grants, quota_id="q1"
        )

    async def policy(self, tenant: str) -> TenantPolicy:
        return TenantPolicy(weight=3.0)


def owners(keys: Keys, clock: Clock) -> Owners:
    return Owners(cast(ApiKeys, keys), cast(Tenants, keys), clock)


OWNER = Owner("acme", "k1", grants=Grants(models=("old",)))


async def test_a_batch_has_the_rights_that_its_key_has_now() -> None:
    keys, clock = Keys(), Clock()
    found = owners(keys, clock)
    caller = await found.caller(OWNER)
    assert (caller.tenant, caller.key_id, caller.quota_id, caller.policy.weight) == ("acme", "k1", "q1", 3.0)
    assert caller.grants == keys.grants, "not those that it had when the batch was made"
    keys.error = errors.ApiKeyNotFound("no such API key")
    assert (await found.caller(OWNER)) is caller, "asked again only after a while"
    clock.now += 5.0
    for _ in range(3):
        with pytest.raises(errors.PermissionDenied) as denied:
            await found.caller(OWNER)
        assert denied.value.reason == "API_KEY_ENDED"
    assert keys.num_asked == 2
    keys.error, keys.grants = None, Grants(scopes=("generate",))
    clock.now += 5.0
    with pytest.raises(errors.PermissionDenied) as denied:
        await found.caller(OWNER)
    assert denied.value.metadata == {"scope": "batch"}


async def test_a_tokens_rights_are_those_that_it_bore_and_the_store_s_absence_is_no_refusal() -> None:
    keys, clock = Keys(), Clock()
    caller = await owners(keys, clock).caller(Owner("acme", "jwt.x", "jwt", "", Grants(models=("one",))))
    assert (caller.method, caller.grants.models, keys.num_asked) == ("jwt", ("one",), 0)
    keys.error = errors.BackendUnavailable("away")
    with pytest.raises(errors.BackendUnavailable):
        await owners(keys, clock).caller(OWNER)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.QueueFull("full"), True),
        (errors.RateLimited("spent", subject="s", limit=1, retry_after_ms=5), True),
        (errors.QuotaExceeded("spent", subject="s", limit=1), True),
        (errors.BackendFull("full"), True),
        (errors.BackendUnavailable("away"), True),
        (errors.ReplicationUnconfirmed("unknown"), True),
        (errors.ModelNotReady("loading"), True),
        (errors.InvalidRequest("bad"), False),
        (errors.ModelNotFound("none"), False),
        (errors.PermissionDenied("no"), False),
        (errors.FailedPrecondition("no"), False),
        (errors.BackendRefused("no"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_want_of_room_is_waited_for_and_nothing_else(error: errors.ServingError, expected: bool) -> None:
    assert is_for_now(error) is expected


@given(attempt=st.integers(0, 10_000), told_ms=st.integers(0, 10**9), seed=st.integers())
def test_pauses_double_to_their_bound_behind_what_the_error_says(attempt: int, told_ms: int, seed: int) -> None:
    error = errors.QueueFull("full", retry_after_ms=told_ms)
    pause = pause_s(attempt, error, random.Random(seed))
    least = min(30.0, told_ms / 1000)
    assert least <= pause <= least + min(30.0, 0.1 * 2 ** min(attempt, 16))


async def test_bells_wake_those_who_listen_to_that_batch_and_are_taken_down() -> None:
    bells = Bells()
    bells.ring("a")
    with bells.listening("a") as first, bells.listening("a") as second, bells.listening("b") as other:
        bells.ring("a")
        assert (first.is_set(), second.is_set(), other.is_set()) == (True, True, False)
    assert not bells._waiting


class Jobs:
    """Notes what is erased; may be away."""

    def __init__(self) -> None:
        self.erased: list[str] = []
        self.is_away = False

    async def delete(self, generation_id: str, tenant: str) -> None:
        if self.is_away:
            raise errors.BackendUnavailable("away")
        self.erased.append(f"{tenant} {generation_id}")
        if generation_id == "gone":
            raise errors.GenerationNotFound


async def test_jobs_are_erased_a_while_after_their_results_are_stored() -> None:
    jobs, clock = Jobs(), Clock()
    forgetting = Forgetting(cast(JobQueue, jobs), clock)
    forgetting.add("acme", "gone")
    clock.now = 30.0
    forgetting.add("acme", "g2")
    await forgetting.round()
    assert jobs.erased == []
    clock.now = 60.0
    jobs.is_away = True
    with pytest.raises(errors.BackendUnavailable):
        await forgetting.round()
    jobs.is_away = False
    await forgetting.round()
    await forgetting.round()
    assert jobs.erased == ["acme gone"]
    for number in range(3, 50):
        forgetting.add("acme", f"g{number}")
    clock.now = 1000.0
    await forgetting.round()
    assert jobs.erased == ["acme gone", *(f"acme g{number}" for number in range(2, 50))]


def test_owners_are_told_apart_by_all_that_they_are() -> None:
    owners_of_one_key: set[Any] = {OWNER, Owner("other", "k1"), Owner("acme", "k1", "jwt")}
    assert len(owners_of_one_key) == 3


class Models:
    """One model with two revisions."""

    def entry(self, name: str) -> Any:
        if name != "known":
            raise errors.ModelNotFound("no such model")
        return SimpleNamespace(card=SimpleNamespace(shard="new"))

    def earlier_shards(self, name: str) -> list[str]:
        self.entry(name)
        return ["old"]


class Found:
    """Notes where a key is looked for."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def find_by_key(self, shards: Any, tenant: str, key: str) -> str:
        self.asked.append((list(shards), tenant, key))
        return "old.g"


async def test_the_job_of_an_item_is_looked_for_in_every_revision_of_its_model() -> None:
    queue: Any = Found()
    unused: Any = None
    runner = JobRunner(queue, unused, unused, cast(Catalog, Models()), unused, unused)
    request = generation_pb2.GenerateRequest(model="known", idempotency_key="k")
    assert await runner.find(request, "acme") == "old.g"
    assert queue.asked == [(["new", "old"], "acme", "k")]
    request.model = "gone"
    assert await runner.find(request, "acme") is None


class Prepared:
    """Notes what a generation is made of."""

    async def unattended(self, request: Any, caller: Any) -> Any:
        return request


async def test_nothing_that_a_generation_is_asked_with_is_lost() -> None:
    request = generation_pb2.GenerateRequest()
    told = {"model": "m", "idempotency_key": "k", "priority": 2, "cache_salt": b"s", "adapter": "a"}
    for name, value in told.items():
        setattr(request, name, value)
    request.input.text = "x"
    request.config.max_tokens = 3
    request.time_limit.seconds = 4
    left = {field.name for field in request.DESCRIPTOR.fields} - {field.name for field, _ in request.ListFields()}
    assert left == {"disconnect_grace"}, "which no item may have"
    generations: Any = Prepared()
    submission: Any = await GenerationJobs(generations).prepare(request, Caller("acme", "k1"))
    of_request = {field.name: value for field, value in request.ListFields()}
    assert {field.name: value for field, value in submission.ListFields()} == of_request
