"""The operators' calls on dead letters, over a real server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest

from common.dead_letters import DeadLetters
from common.errors import BackendUnavailable, InvalidRequest
from common.job_claims import JobClaims
from common.job_queue import JobQueue
from common.registry import ModelCard, ModelDirectory, ModelEntry, ModelRegistry
from common.settings import QueueSettings
from gateway.admin.fleet import FleetServicer
from gateway.catalog import Catalog
from tests.builders_common import FlakyRedis, make_job
from tests.integration.common.conftest import FAST_RETRY, SHARD
from tests.integration.common.test_dead_letters import fail
from torchrelay.admin.v1beta1 import fleet_pb2 as pb

CONTEXT: Any = None  # of the call; the methods do not look at it


@dataclass
class OneModelCatalog:
    """A catalog of one model, or of none once it is deleted."""

    is_registered: bool = True

    def all_entries(self) -> list[ModelEntry]:
        card = ModelCard(
            name="tiny", revision="r1", shard=SHARD, vocab_size=10, context_tokens=100, max_output_tokens=100
        )
        return [ModelEntry(card, 0)] if self.is_registered else []

    entries = all_entries


@pytest.fixture
def catalog() -> OneModelCatalog:
    return OneModelCatalog()


@pytest.fixture
def fleet(queue: JobQueue, gateway_redis: FlakyRedis, catalog: OneModelCatalog) -> FleetServicer:
    letters = DeadLetters(gateway_redis, QueueSettings(), retry=FAST_RETRY)
    return FleetServicer(cast(Any, catalog), queue, letters, num_streams=lambda: 3)


async def test_letters_come_in_pages_without_text(queue: JobQueue, claims: JobClaims, fleet: FleetServicer) -> None:
    ids = [await fail(queue, claims, prompt=(7,) * 5, echo=b"the config") for _ in range(5)]
    seen: list[pb.DeadLetter] = []
    request = pb.ListDeadLettersRequest(model="tiny", page_size=2)
    while True:
        response = await fleet.ListDeadLetters(request, CONTEXT)
        assert response.total_size == 5
        seen += response.dead_letters
        if not response.next_page_token:
            break
        request.page_token = response.next_page_token
    assert sorted(letter.generation_id for letter in seen) == sorted(ids)
    letter = seen[0]
    assert (letter.model, letter.model_revision, letter.tenant) == ("tiny", "r1", "acme")
    assert (letter.reason, letter.num_claims, letter.prompt_tokens, letter.num_events) == (
        pb.DEAD_LETTER_REASON_WORKER_FAILED, 1, 5, 1,
    )  # fmt: skip
    assert letter.end_time.ToMilliseconds() >= letter.create_time.ToMilliseconds() > 0
    assert b"the config" not in b"".join(letter.SerializeToString() for letter in seen)
    assert not (await fleet.ListDeadLetters(pb.ListDeadLettersRequest(model="other"), CONTEXT)).dead_letters


async def test_letters_are_retried_by_id(queue: JobQueue, claims: JobClaims, fleet: FleetServicer) -> None:
    failed, kept = await fail(queue, claims), await fail(queue, claims)
    waiting = (await queue.enqueue(SHARD, make_job())).generation_id
    request = pb.RetryDeadLettersRequest(generation_ids=[failed, waiting, "made up", failed])
    results = (await fleet.RetryDeadLetters(request, CONTEXT)).results
    assert [(result.generation_id, result.outcome) for result in results] == [
        (failed, pb.DEAD_LETTER_OUTCOME_RETRIED),
        (waiting, pb.DEAD_LETTER_OUTCOME_NOT_FOUND),
        ("made up", pb.DEAD_LETTER_OUTCOME_NOT_FOUND),
    ]
    inflight = {record.generation_id for record in await queue.list_inflight(SHARD)}
    assert inflight == {waiting, results[0].new_generation_id}
    letters = (await fleet.ListDeadLetters(pb.ListDeadLettersRequest(), CONTEXT)).dead_letters
    assert [letter.generation_id for letter in letters] == [kept]


async def test_all_letters_of_a_model_are_purged(queue: JobQueue, claims: JobClaims, fleet: FleetServicer) -> None:
    ids = [await fail(queue, claims) for _ in range(3)]
    results = (await fleet.PurgeDeadLetters(pb.PurgeDeadLettersRequest(model="tiny"), CONTEXT)).results
    assert {result.generation_id for result in results} == set(ids)
    assert {result.outcome for result in results} == {pb.DEAD_LETTER_OUTCOME_PURGED}
    assert not (await fleet.PurgeDeadLetters(pb.PurgeDeadLettersRequest(model="tiny"), CONTEXT)).results


async def test_what_belongs_to_a_model_that_is_gone_is_not_queued(
    queue: JobQueue, claims: JobClaims, fleet: FleetServicer, catalog: OneModelCatalog
) -> None:
    failed = await fail(queue, claims)
    catalog.is_registered = False
    request = pb.RetryDeadLettersRequest(generation_ids=[failed])
    (result,) = (await fleet.RetryDeadLetters(request, CONTEXT)).results
    assert result.outcome == pb.DEAD_LETTER_OUTCOME_NOT_FOUND
    purge = pb.PurgeDeadLettersRequest(generation_ids=[failed])
    (result,) = (await fleet.PurgeDeadLetters(purge, CONTEXT)).results
    assert result.outcome == pb.DEAD_LETTER_OUTCOME_PURGED


async def test_a_gateway_that_has_not_read_the_registry_calls_no_letter_unknown(
    queue: JobQueue, claims: JobClaims, gateway_redis: FlakyRedis
) -> None:
    failed = await fail(queue, claims)
    registry = ModelRegistry(gateway_redis, retry=FAST_RETRY)
    letters = DeadLetters(gateway_redis, QueueSettings(), retry=FAST_RETRY)
    fleet = FleetServicer(Catalog(ModelDirectory(registry, queue), registry), queue, letters, num_streams=lambda: 0)
    for request in (pb.RetryDeadLettersRequest(generation_ids=[failed]), pb.RetryDeadLettersRequest(model="tiny")):
        with pytest.raises(BackendUnavailable, match="has not read the registry"):
            await fleet.RetryDeadLetters(request, CONTEXT)
    (_, total) = await letters.newest([SHARD], 1)
    assert total == 1


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ({}, "FIELD_REQUIRED"),
        ({"generation_ids": ["g"], "model": "tiny"}, "FIELD_CONFLICT"),
        ({"generation_ids": ["g"] * 1001}, "FIELD_OUT_OF_RANGE"),
    ],
)
async def test_a_request_names_letters_or_a_model(fleet: FleetServicer, choice: dict[str, Any], reason: str) -> None:
    for call, request in (
        (fleet.RetryDeadLetters, pb.RetryDeadLettersRequest(**choice)),
        (fleet.PurgeDeadLetters, pb.PurgeDeadLettersRequest(**choice)),
    ):
        with pytest.raises(InvalidRequest) as caught:
            await call(cast(Any, request), CONTEXT)
        assert caught.value.reason == reason


@pytest.mark.parametrize("token", ["x", "1", f"x.{SHARD}.{'a' * 26}", "9" * 16 + ".g"])
async def test_a_foreign_page_token_is_refused(fleet: FleetServicer, token: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await fleet.ListDeadLetters(pb.ListDeadLettersRequest(page_token=token), CONTEXT)
    assert caught.value.metadata["field"] == "page_token"
