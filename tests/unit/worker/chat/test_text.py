"""The text of chats: marks that are special tokens stay, other special tokens go."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

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


TOKENIZER = byte_level()
END = TOKENIZER.token_to_id("</s>")


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


MAGISTRAL = ChatParsing(reasoning_format="magistral", tool_format="mistral", tool_names=("f",))


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
