"""The text of chats: marks that are special tokens stay, other special tokens go."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from common.chat_formats import marks_of
from common.generation import ChatParsing, FinishReason, SamplingParams, ToolCallDelta
from worker.chat.text import ChatReader
from worker.engine.stopping import Progress, StopState

MARKS = ["[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]", "</s>"]


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    return tokenizer


MAGISTRAL = ChatParsing(reasoning_format="magistral", tool_format="mistral", tool_names=("f",))
TOKENIZER = byte_level()
END = TOKENIZER.token_to_id("</s>")


def sentencepiece(decoder: decoders.Decoder) -> Tokenizer:
    """As Llama 2's and Mistral's: words with a leading mark, other characters as byte tokens."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁so", "▁it", "is", "▁▁", "{", "}"]
    tokenizer = Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    return tokenizer


LLAMA_DECODER = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
DECODERS = {
    "llama": LLAMA_DECODER,
    "metaspace": decoders.Metaspace(prepend_scheme="first"),
    "fallback and metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
}
# What is decoded alike in every company: words, blanks, marks, and a character's bytes together.
PIECES = [*(["▁"], ["▁so"], ["▁it"], ["is"], ["▁▁"], ["<0xE2>", "<0x9A>", "<0x99>"]), *([mark] for mark in MARKS)]


@pytest.mark.parametrize("name", DECODERS)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=10), cut=st.integers(0, 30))
@settings(deadline=None, max_examples=150)
def test_text_around_marks_is_that_of_the_whole_answer(name: str, pieces: list[list[str]], cut: int) -> None:
    tokenizer = sentencepiece(DECODERS[name])
    ids = [tokenizer.token_to_id(token) for piece in pieces for token in piece]
    detokenizer, _ = ChatReader(tokenizer)(MAGISTRAL)
    text = ""
    for position, token_id in enumerate(ids):
        if position == cut:
            other, detokenizer = detokenizer, copy.copy(detokenizer)  # the other's further tokens are its own
            other.push(ids[0])
        text += detokenizer.push(token_id)
    text += detokenizer.flush()
    wanted = marks_of(MAGISTRAL.reasoning_format, MAGISTRAL.tool_format)
    gone = [tokenizer.token_to_id(mark) for mark in MARKS if mark not in wanted]
    assert len(gone) == 2
    shown = [token_id for token_id in ids if token_id not in gone]
    assert text == tokenizer.decode(shown, skip_special_tokens=False)


def test_a_space_behind_a_mark_stays() -> None:
    tokenizer = sentencepiece(LLAMA_DECODER)
    detokenizer, _ = ChatReader(tokenizer)(MAGISTRAL)
    ids = [tokenizer.token_to_id(token) for token in ("▁so", "[THINK]", "▁it", "is", "[/THINK]", "</s>", "▁so")]
    assert [detokenizer.push(token_id) for token_id in ids] == ["so", "[THINK]", " it", "is", "[/THINK]", "", " so"]


def answer(parsing: ChatParsing, text: str, max_tokens: int = 1000, **params: object) -> list[Progress]:
    """Push the tokens of a text, up to the end."""
    sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=(END,), **params)  # type: ignore[arg-type]
    state = StopState(sampling, max_tokens, *ChatReader(TOKENIZER)(parsing))
    progress = []
    for token_id in TOKENIZER.encode(text).ids:
        progress.append(state.push(token_id))
        if state.finished is not None:
            break
    return progress


def joined(progress: list[Progress]) -> tuple[str, str, list[ToolCallDelta]]:
    return (
        "".join(p.text for p in progress),
        "".join(p.reasoning_text for p in progress),
        [call for p in progress for call in p.tool_calls if call.name or call.arguments],
    )


def test_marks_that_are_special_tokens_are_seen_and_others_are_not() -> None:
    found = answer(MAGISTRAL, "[THINK]é well[/THINK]so ⚙[TOOL_CALLS]f[ARGS]{}</s>")
    text, reasoning, calls = joined(found)
    assert (text, reasoning) == ("so ⚙", "é well")
    assert [(call.name, call.arguments) for call in calls] == [("f", ""), ("", "{"), ("", "}")]
    assert (found[-1].finish_reason, found[-1].stop_match) == (FinishReason.TOOL_CALLS, None)
    plain = ChatParsing(tool_format="hermes")
    assert joined(answer(plain, "a[TOOL_CALLS]b[THINK]c"))[0] == "abc", "marks of other formats leave no trace"


def test_an_answer_without_a_call_ends_as_any_text() -> None:
    found = answer(MAGISTRAL, "hello</s>")
    assert (found[-1].finish_reason, found[-1].stop_match) == (FinishReason.STOP, END)


def test_a_call_that_is_not_whole_is_no_reason_to_wait_for_its_result() -> None:
    found = answer(MAGISTRAL, '[TOOL_CALLS]f[ARGS]{"a</s>')
    assert found[-1].finish_reason is FinishReason.STOP
    cut = answer(MAGISTRAL, '[TOOL_CALLS]f[ARGS]{"a": 1}', max_tokens=8)
    assert cut[-1].finish_reason is FinishReason.LENGTH
    assert "".join(call.arguments for call in joined(cut)[2]) == '{"a": '[: 8 - len(["[TOOL_CALLS]", "f", "[ARGS]"])]


def test_the_output_ends_where_one_call_is_enough() -> None:
    once = ChatParsing(tool_format="mistral", max_tool_calls=1)
    found = answer(once, "[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]g[ARGS]{}")
    assert found[-1].finish_reason is FinishReason.TOOL_CALLS
    assert [call.name for call in joined(found)[2]] == ["f", "", ""]


def test_a_stop_string_ends_any_part() -> None:
    found = answer(MAGISTRAL, "[THINK]one two three", stop_strings=(" two",))
    assert joined(found)[:2] == ("", "one")
    assert (found[-1].finish_reason, found[-1].stop_match) == (FinishReason.STOP, " two")


def test_what_is_held_back_is_shown_at_the_end() -> None:
    assert joined(answer(MAGISTRAL, "a [TOOL_CALLS]what</s>"))[0] == "a [TOOL_CALLS]what"
    assert joined(answer(ChatParsing(tool_format="hermes"), "a <tool_ca</s>"))[0] == "a <tool_ca"
