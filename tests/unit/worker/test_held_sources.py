"""A job with a source, from its claim to the engine: what it reserves, what is decoded, and how it is taken over."""

from __future__ import annotations

from common.generation import EventBody, JobBody, OutputDelta, SamplingParams, Usage
from common.jobs import ClaimedJob, JobState, LogEvent
from tests.builders_engine import generate
from tests.unit.worker.engine.seq2seq.test_exactness import EOS, START, greedy, make_engine, request, source
from worker.engine.types import GenerationRequest
from worker.holdings import Holdings

PARAMS = SamplingParams(max_tokens=24, stop_token_ids=(EOS,))


def job(events: tuple[LogEvent, ...] = ()) -> ClaimedJob:
    return ClaimedJob(
        generation_id="g",
        epoch=2 if events else 1,
        sequence=len(events),
        chain_hash=bytes(8),
        remaining_ms=10**9,
        priority=1,
        attempts=0,
        tenant="t",
        usage=Usage(),
        body=JobBody(prompt_token_ids=(START,), sampling=PARAMS, source_token_ids=source(33)),
        events=events,
    )


def test_slots_of_the_source_are_reserved_beside_those_of_the_decoder() -> None:
    holdings = Holdings(16)
    holdings.add(job(), 0.0)
    # Three blocks of the source, one of what the decoder begins with, and one to write on in.
    assert holdings.reserved_kv_tokens == (3 + 1 + 1) * 16
    assert [runner.kv_tokens for runner in holdings.runners()] == [(3 + 1) * 16]


def test_a_claimed_job_is_decoded_and_counted_by_its_source() -> None:
    engine, holdings = make_engine("mbart"), Holdings(16)
    engine.add(holdings.add(job(), 0.0))
    events = []
    while engine.has_work:
        events += holdings.events([engine.step(0.0)])
    tokens = [token for event in events for delta in event.body.deltas for token in delta.token_ids]
    assert tokens == greedy("mbart", 33)
    assert events[-1].terminal is JobState.DONE
    assert events[-1].body.usage == Usage(33, 0, len(tokens))


def test_a_taken_over_job_goes_on_behind_what_was_emitted() -> None:
    emitted = tuple(greedy("mbart", 33)[:3])
    taken: GenerationRequest = Holdings(16).add(
        job((LogEvent(bytes(8), 1, 1, EventBody((OutputDelta(0, 0, emitted),))),)), 0.0
    )
    assert (taken.source_token_ids, taken.emitted) == (source(33), (emitted,))
    found = generate(make_engine("mbart"), taken, request(40))
    assert found[taken.request_id].tokens == [greedy("mbart", 33)]
