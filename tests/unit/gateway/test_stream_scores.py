"""Wherever a stream breaks, it and a resumed one together say the whole: the prompt's scores, then tokens."""

from __future__ import annotations

import random
import sys
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from common.generation import EventBody, FinishReason, OutputDelta, PromptScores, ToolCallDelta
from common.jobs import ItemKind, JobState, LogEvent
from gateway.delivery import _bytes_of
from gateway.progress import LogPosition
from tests.builders_gateway import GENERATION_ID, TENANT, OneJobQueue, chained, factory_for, item_of, open_stream
from torchrelay.v1 import generation_pb2 as pb


def scored_log(rng: random.Random) -> list[LogEvent]:
    """Parts of scores, the last of them in the event of the first token or before it; then tokens."""
    bodies: list[tuple[int, EventBody]] = []
    first = 1
    for _ in range(rng.randrange(1, 5)):
        count = rng.randrange(1, 4)
        scores = PromptScores(first, tuple(-0.5 * (first + i) for i in range(count)), (1,) * count)
        bodies.append((1, EventBody(prompt_scores=scores)))
        first += count
    num_tokens = rng.randrange(0, 4)
    for index in range(num_tokens):
        body = EventBody((OutputDelta(0, index, (index,), "x"),))
        if index == 0 and rng.random() < 0.6:
            body = EventBody(body.deltas, None, bodies.pop()[1].prompt_scores)
        bodies.append((1, body))
    bodies.append((1, EventBody((OutputDelta(0, num_tokens, finish_reason=FinishReason.LENGTH),))))
    return chained(bodies, ItemKind.DONE)


async def read(
    log: list[LogEvent], rng: random.Random, position: LogPosition | None = None, *, copied: bool
) -> list[pb.GenerationEvent]:
    """A stream behind a position, of copies or of the log."""
    queue = OneJobQueue(log, JobState.DONE, num_visible=len(log), page=rng.randrange(1, 4))
    hub, factory = factory_for(queue, max_pending=64)
    if copied:
        stream = open_stream(factory, position, num_outputs=1)
        hub.dispatch(item_of(event) for event in log)
    else:
        after, digest = (position.sequence, position.chain_hash) if position is not None else (0, b"")
        page = await queue.read_log(GENERATION_ID, TENANT, after, digest or b"")
        stream = open_stream(factory, position, num_outputs=1, attachment=page)
    return [event async for event in stream.events()]


def heard(events: list[pb.GenerationEvent], first_token_index: int = 0) -> tuple[dict[int, float], list[int]]:
    """Scores by index in the prompt, and tokens, each once."""
    scores: dict[int, float] = {}
    tokens: list[int] = []
    for event in events:
        for index, logprob in enumerate(event.prompt_scores.logprobs, event.prompt_scores.first_token_index):
            assert not tokens, "scores come before tokens"
            assert scores.setdefault(index, logprob) == logprob
        for delta in event.deltas.deltas:
            assert delta.first_token_index == first_token_index + len(tokens), "a gap or a repetition"
            tokens += delta.token_ids
    return scores, tokens


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False), st.booleans())
async def test_a_resumed_stream_goes_on_where_any_event_ended(rng: random.Random, copied: bool) -> None:
    log = scored_log(rng)
    expected_scores: dict[int, float] = {}
    expected_tokens: list[int] = []
    for entry in log:
        assert isinstance(entry.body, EventBody)
        if entry.body.prompt_scores is not None:
            found = entry.body.prompt_scores
            expected_scores |= dict(enumerate(found.logprobs, found.first_token_index))
        expected_tokens += [token_id for delta in entry.body.deltas for token_id in delta.token_ids]
    events = await read(log, rng, copied=copied)
    assert heard(events) == (expected_scores, expected_tokens)
    for cut in range(1, len(events)):
        last = events[cut - 1]
        position = LogPosition(last.sequence, last.chain_hash or None) if last.sequence else LogPosition()
        rest = await read(log, rng, position, copied=False)
        before = heard(events[:cut])
        after = heard(rest, len(before[1]))
        assert before[0] | after[0] == expected_scores
        assert not before[1] or not after[0], "no score behind a token"
        assert before[1] + after[1] == expected_tokens
    sequences = [event.sequence for event in events]
    assert sequences == sorted(sequences)


ALTERNATIVES = tuple((i, -1.0) for i in range(20))
LARGE: dict[str, Any] = {
    "token_ids": tuple(range(1000, 2000)),
    "text": "語" * 1000,
    "logprobs": tuple(-0.5 - i for i in range(1000)),
    "top_logprobs": (ALTERNATIVES,) * 100,
    "ranks": tuple(range(1000, 2000)),
    "reasoning_text": "\N{GRINNING FACE}" * 1000,
    "tool_calls": tuple(ToolCallDelta(i, f"name{i}", '{"a": 1}' * 10) for i in range(100)),
}


def memory_of(value: object) -> int:
    """Bytes of a value and what it holds, each object once."""
    seen: dict[int, object] = {}
    todo = [value]
    while todo:
        one = todo.pop()
        if id(one) not in seen:
            seen[id(one)] = one
            is_struct = isinstance(one, msgspec.Struct)
            todo += one if isinstance(one, tuple) else msgspec.structs.astuple(one) if is_struct else ()  # type: ignore[type-var]
    return sum(map(sys.getsizeof, seen.values()))


def test_what_waits_is_counted_with_all_that_it_holds() -> None:
    """None of it may let a slow caller's events take more memory than they are allowed."""
    grows = {field.name for field in msgspec.structs.fields(OutputDelta) if field.default in ((), "")}
    assert grows == set(LARGE)
    for name, value in LARGE.items():
        body = EventBody((msgspec.structs.replace(OutputDelta(0, 0), **{name: value}),))
        assert _bytes_of(item_of(chained([(1, body)])[0])) >= memory_of(body), name
    scores = PromptScores(1, LARGE["logprobs"], LARGE["ranks"], (ALTERNATIVES,) * 1000)
    scored = item_of(chained([(1, EventBody(prompt_scores=scores))])[0])
    assert _bytes_of(scored) >= memory_of(scores)
