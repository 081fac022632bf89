from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import records
from common.generation import EventBody, FinishReason, JobBody, OutputDelta, SamplingParams, Usage
from common.jobs import CommitResult, ItemKind, LogEvent, LostReason, ReplyItem
from common.tasks import (
    Answer,
    Answers,
    ClassifyTask,
    Embeddings,
    EmbedTask,
    EncodedText,
    Entities,
    Entity,
    Labels,
    LabelScore,
    Ranking,
    pack_ids,
)

deltas = st.builds(
    OutputDelta,
    output_index=st.integers(0, 3),
    first_token_index=st.integers(0, 10**6),
    token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=4).map(tuple),
    text=st.text(max_size=10),
    logprobs=st.lists(st.floats(max_value=0, allow_nan=False), max_size=4).map(tuple),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    stop_match=st.none() | st.text(max_size=5) | st.integers(0, 10**6),
)
RESULTS = [
    Embeddings(2, (bytes(8), bytes(range(8)))),
    Labels(((LabelScore("POSITIVE", 0.75), LabelScore("négatif", 0.25)), ())),
    Ranking(((3, 0.5), (0, -1.25))),
    Entities(((Entity("LOC", 0.5, 0, 6, "Berlin"),), ())),
    Answers((Answer(0.125, 3, 5, "in"), Answer(0.0625, 0, 0, ""))),
]
bodies = st.builds(
    EventBody,
    deltas=st.lists(deltas, max_size=3).map(tuple),
    usage=st.none() | st.builds(Usage, st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9)),
    result=st.none() | st.sampled_from(RESULTS),
)


@given(st.binary(min_size=8, max_size=8), st.integers(1, 10**9), st.integers(1, 10**9), bodies)
def test_a_log_entry_and_its_copy_in_a_reply_are_read_back_whole(
    chain_hash: bytes, epoch: int, sequence: int, body: EventBody
) -> None:
    entry = records.encode_entry(chain_hash, epoch, sequence, body)
    assert records.event_from_fields([b"e", entry]) == LogEvent(chain_hash, epoch, sequence, body)
    assert entry[2:10] == chain_hash  # where the scripts look for it
    name = b"m.aaaaaaaaaaaaaaaaaaaaaaaaaa"
    packed = b"\xdc\x00\x01\x95\xd9" + bytes([len(name)]) + name + entry  # as commit.lua puts it together
    assert records.items_from_entry(packed) == [ReplyItem(name.decode(), chain_hash, epoch, sequence, body)]


def test_a_job_s_task_is_read_back_and_one_of_a_later_version_is_left_to_it() -> None:
    text = EncodedText(pack_ids([1, 2, 70_000]), bytes([0, 0, 1]))
    for task in (EmbedTask((text,), 12, normalize=False), ClassifyTask((text, text), top_k=3)):
        body = JobBody(prompt_token_ids=(), sampling=SamplingParams(max_tokens=0), task=task)
        stored = records.encode_body(body)
        assert records._decode_body(stored) == body
        assert body.num_prompt_tokens == 3 * len(task.texts)
    later = msgspec.msgpack.decode(stored)
    later["task"][0] = "caption"
    with pytest.raises(records.UnknownParameters, match="task"):
        records._decode_body(msgspec.msgpack.encode(later))
    later["task"] = ["embed", "no texts"]
    with pytest.raises(msgspec.ValidationError):
        records._decode_body(msgspec.msgpack.encode(later))


def test_a_terminal_entry_has_its_kind_and_reason() -> None:
    entry = records.encode_entry(bytes(8), 3, 4, EventBody())
    event = records.event_from_fields([b"e", entry, b"k", b"F", b"y", b"LOG_LIMIT"])
    assert (event.kind, event.reason) == (ItemKind.FAILED, "LOG_LIMIT")


def test_fields_of_a_later_version_are_left_out() -> None:
    entry = records.encode_entry(bytes(8), 3, 4, EventBody())
    assert records.event_from_fields([b"e", entry, b"zz", b"later"]) == records.event_from_fields([b"e", entry])
    ended = records.event_from_fields([b"e", entry, b"k", b"D", b"y", b"", b"zz", b"later"])
    assert (ended.kind, ended.reason) == (ItemKind.DONE, "")


def test_an_empty_reply_entry_has_no_items() -> None:
    assert records.items_from_entry(b"\xdc\x00\x00") == []


def test_a_damaged_reply_entry_is_an_error() -> None:
    with pytest.raises(msgspec.DecodeError):
        records.items_from_entry(b"\xdc\x00\x01\x95")


def test_a_commit_reply_names_what_was_lost_and_what_waits() -> None:
    reply = [[b"m.x", b"cancelled", b"m.y", b"taken"], 1, 0, 5, 2]
    expected = {"m.x": LostReason.CANCELLED, "m.y": LostReason.TAKEN}
    assert records.commit_from_reply(reply) == CommitResult(expected, (0, 5, 2), True)
