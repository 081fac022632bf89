"""`torchrelay generate` and `chat`: what is sent, and what is shown."""

from __future__ import annotations

import json
from pathlib import Path

import grpc

from tests.unit.torchrelay.cli.conftest import Command
from tests.unit.torchrelay.toy import GENERATION_ID, Break, Failure
from torchrelay.v1 import generation_pb2 as pb

TEXT = "w0 w1 w2 w3 w4 "


def test_generate_writes_text_to_stdout_and_figures_to_stderr(run: Command) -> None:
    result = run("generate", "What is it?", "--max-tokens", "5", "--stop", "x", "--stop", "y", "-t", "0", "--seed", "3")
    assert result.stdout == TEXT + "\n"
    figures = f"5 tokens | queue 2 ms | first token 100 ms | 40.0 tok/s | finish: stop | {GENERATION_ID}"
    assert result.stderr.strip() == figures
    (request,) = (request for request in run.toy.requests if isinstance(request, pb.StreamGenerateRequest))
    assert request.config == pb.GenerationConfig(max_tokens=5, stop=["x", "y"], temperature=0, seed=3)
    assert [part.text for message in request.input.chat.messages for part in message.parts] == ["What is it?"]


def test_generate_passes_on_every_parameter(run: Command) -> None:
    options = """
        --min-tokens 1 --min-length 2 --max-length 30 --ignore-eos --stop-token-id 3 --typical-p 0.9
        --epsilon-cutoff 0.1 --eta-cutoff 0.2 --top-h 0.3 --presence-penalty -1 --frequency-penalty 1 --bad-word x
        --bad-words-ids 4,5 --bad-words-ids 6 --logit-bias 7=-1.5 --sequence-bias 8,9=2 --suppress-token 10
        --begin-suppress-token 11 --exponential-decay-length-penalty 12,1.5 --forced-eos-token-id 13
        --forced-bos-token-id 14 --encoder-repetition-penalty 1.2 --encoder-no-repeat-ngram-size 3
    """
    run("generate", "hi", *options.split())
    (request,) = (request for request in run.toy.requests if isinstance(request, pb.StreamGenerateRequest))
    assert request.config == pb.GenerationConfig(
        min_tokens=1, min_length=2, max_length=30, ignore_eos=True, stop_token_ids=[3], typical_p=0.9,
        epsilon_cutoff=0.1, eta_cutoff=0.2, top_h=0.3, presence_penalty=-1, frequency_penalty=1, bad_words=["x"],
        bad_words_ids=[pb.TokenIds(ids=[4, 5]), pb.TokenIds(ids=[6])], logit_bias={7: -1.5},
        sequence_bias=[pb.SequenceBias(token_ids=[8, 9], bias=2)], suppress_tokens=[10], begin_suppress_tokens=[11],
        exponential_decay_length_penalty=pb.ExponentialDecay(start=12, factor=1.5), forced_eos_token_id=13,
        forced_bos_token_id=14,
        encoder_repetition_penalty=1.2, encoder_no_repeat_ngram_size=3,
    )  # fmt: skip
    for option, value in (("--logit-bias", "7"), ("--sequence-bias", "7,=1"), ("--bad-words-ids", "x")):
        assert option in run("generate", "hi", option, value, status=2).stderr


def test_generate_has_a_text_translated_or_summarized(run: Command) -> None:
    def sent(*options: str) -> pb.GenerationInput:
        run("generate", "hi", *options)
        return run.toy.requests[-1].input  # type: ignore[union-attr]

    both = pb.TranslationInput(text="hi", source_language="en_XX", target_language="ro_RO")
    assert sent("--translate-to", "ro_RO", "--translate-from", "en_XX") == pb.GenerationInput(translation=both)
    own = pb.TranslationInput(text="hi", truncation=pb.TRUNCATION_START)
    assert sent("--translate-to", "", "--truncate", "start") == pb.GenerationInput(translation=own)
    cut = pb.SummarizationInput(text="hi", truncation=pb.TRUNCATION_END)
    assert sent("--summarize", "--truncate", "end") == pb.GenerationInput(summarization=cut)
    assert sent("--summarize").summarization == pb.SummarizationInput(text="hi")
    for options, named in (
        (["--summarize", "--translate-to", "de"], "--translate-to"),
        (["--truncate", "end"], "--truncate"),
        (["--summarize", "--system", "be kind"], "--system"),
    ):
        assert named in run("generate", "hi", *options, status=2).stderr


def test_generate_names_an_adapter(run: Command) -> None:
    run("generate", "hi", "--adapter", "polite")
    assert run.toy.requests[-1].adapter == "polite"
    run("generate", "hi")
    assert run.toy.requests[-1].adapter == ""


def test_generate_goes_on_after_a_break(run: Command) -> None:
    run.toy.breaks = [Break(0), Break(2), Break(4, None)]
    assert run("generate", "hi").stdout == TEXT + "\n"


def test_generate_as_json_is_one_object(run: Command) -> None:
    result = run("generate", "hi", "--json")
    assert json.loads(result.stdout) == {
        "text": TEXT,
        "token_ids": [0, 1, 2, 3, 4],
        "finish_reason": "stop",
        "stop_match": 2,
        "generation_id": GENERATION_ID,
        "seed": 7,
        "usage": {"prompt_tokens": 3, "cached_prompt_tokens": 1, "completion_tokens": 5},
        "timings": {"queue_ms": 2.0, "time_to_first_token_ms": 100.0, "total_ms": 200.0, "num_takeovers": 0},
    }
    assert result.stderr == ""


def several_outputs() -> list[pb.GenerationEvent]:
    deltas = [pb.Delta(output_index=n, token_ids=[n], text=f"answer {n}", logprobs=[-0.5]) for n in range(2)]
    ends = [pb.OutputEnd(output_index=n, finish_reason=pb.FINISH_REASON_LENGTH) for n in range(2)]
    return [
        pb.GenerationEvent(sequence=1, deltas=pb.Deltas(deltas=deltas)),
        pb.GenerationEvent(sequence=2, finished=pb.Finished(outputs=ends)),
    ]


def test_several_outputs_are_all_shown(run: Command) -> None:
    run.toy.log = several_outputs()
    assert run("generate", "hi", "-n", "2").stdout == "answer 0\n---\nanswer 1\n"
    run.toy.reset()
    run.toy.log = several_outputs()
    (value,) = run.objects("generate", "hi", "-n", "2", "--logprobs", "--json")
    assert [output["text"] for output in value["outputs"]] == ["answer 0", "answer 1"]
    assert value["outputs"][1]["logprobs"] == [-0.5]
    assert "stop_match" not in value


def test_what_is_reported_of_tokens_and_prompt_is_in_the_json(run: Command) -> None:
    deltas = [
        pb.Delta(
            token_ids=[8],
            text="b",
            logprobs=[-0.5],
            ranks=[2],
            top_logprobs=[pb.TokenAlternatives(token_ids=[9], logprobs=[-0.25])],
        )
    ]
    parts = [
        pb.PromptScores(first_token_index=first, logprobs=[-0.5] * count, ranks=[first] * count)
        for first, count in ((1, 2), (3, 1), (3, 1))  # the last part came twice
    ]
    run.toy.log = [
        *(pb.GenerationEvent(sequence=1, prompt_scores=part) for part in parts),
        pb.GenerationEvent(sequence=2, deltas=pb.Deltas(deltas=deltas)),
        pb.GenerationEvent(
            sequence=3,
            finished=pb.Finished(outputs=[pb.OutputEnd(finish_reason=pb.FINISH_REASON_LENGTH, score=-0.5)]),
        ),
    ]
    options = ("--best-of", "2", "--top-logprobs", "1", "--prompt-logprobs", "0", "--include-stop", "--echo")
    (value,) = run.objects("generate", "hi", "--raw", "--logprobs", *options, "--max-tokens", "1", "--json")
    assert value["top_logprobs"] == [{"rank": 2, "alternatives": [[9, -0.25]]}]
    assert value["score"] == -0.5
    assert [score["rank"] for score in value["prompt_scores"]] == [1, 1, 3]
    assert run.toy.requests[-1].config == pb.GenerationConfig(
        max_tokens=1, logprobs=True, best_of=2, top_logprobs=1, prompt_logprobs=0, include_stop=True, echo=True
    )


def test_raw_text_goes_without_the_chat_template(run: Command) -> None:
    run("generate", "Once upon", "--raw")
    assert run.toy.requests[-1].input == pb.GenerationInput(text="Once upon")
    run.toy.reset()
    run.toy.models[0].has_chat_template = False
    run("generate", "-", stdin="from a pipe\n")
    assert run.toy.requests[-1].input == pb.GenerationInput(text="from a pipe\n")


def test_what_an_answer_must_match_is_sent(run: Command, tmp_path: Path) -> None:
    schema = '{"type": "object"}'
    (tmp_path / "schema.json").write_text(schema, encoding="utf-8")
    for args, wanted in [
        (("--json-schema", schema), pb.StructuredOutput(json_schema=schema)),
        (("--json-schema", str(tmp_path / "schema.json")), pb.StructuredOutput(json_schema=schema)),
        (("--regex", "a+"), pb.StructuredOutput(regex="a+")),
        (("--choice", "yes", "--choice", "no"), pb.StructuredOutput(choices=pb.Choices(values=["yes", "no"]))),
    ]:
        run("generate", "hi", *args)
        assert run.toy.requests[-1].config.structured_output == wanted
    run("generate", "hi")
    assert not run.toy.requests[-1].config.HasField("structured_output")
    assert "--choice" in run("generate", "hi", "--regex", "a", "--choice", "b", status=2).stderr
    assert "--json-schema" in run("generate", "hi", "--json-schema", str(tmp_path / "none.json"), status=2).stderr


def test_tools_are_sent_and_calls_and_reasoning_shown(run: Command, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}, {"name": "g"}]
    (tmp_path / "tools.json").write_text(json.dumps(tools), encoding="utf-8")
    for given in (json.dumps(tools), str(tmp_path / "tools.json")):
        run("generate", "hi", "--tools", given, "--tool-choice", "required")
        chat = run.toy.requests[-1].input.chat
        assert list(chat.tools) == [pb.Tool(name="f", parameters='{"type": "object"}'), pb.Tool(name="g")]
        assert chat.tool_choice.mode == pb.TOOL_CHOICE_MODE_REQUIRED
    pieces = [
        pb.Delta(reasoning_text="so ", tool_calls=[pb.ToolCallDelta(id="abcdefghi", name="f")]),
        pb.Delta(reasoning_text="be it", tool_calls=[pb.ToolCallDelta(arguments='{"a":')]),
        pb.Delta(tool_calls=[pb.ToolCallDelta(arguments=" 1}")]),
    ]
    run.toy.log = [
        *(pb.GenerationEvent(sequence=n, deltas=pb.Deltas(deltas=[piece])) for n, piece in enumerate(pieces, 1)),
        pb.GenerationEvent(
            sequence=4,
            finished=pb.Finished(outputs=[pb.OutputEnd(finish_reason=pb.FINISH_REASON_TOOL_CALLS)]),
        ),
    ]
    shown = run("generate", "hi", "--tools", json.dumps(tools))
    assert 'f({"a": 1})' in shown.stdout
    assert "so be it" in shown.stderr
    (value,) = run.objects("generate", "hi", "--tools", json.dumps(tools), "--json")
    assert value["tool_calls"] == [{"id": "abcdefghi", "name": "f", "arguments": '{"a": 1}'}]
    assert (value["reasoning"], value["finish_reason"]) == ("so be it", "tool_calls")
    for bad in ("nothing.json", "[1]", "{}"):
        assert "--tools" in run("generate", "hi", "--tools", bad, status=2).stderr
    assert "--tools" in run("generate", "hi", "--tools", json.dumps(tools), "--raw", status=2).stderr


def test_a_system_message_needs_a_template(run: Command) -> None:
    run("generate", "hi", "--system", "be kind")
    assert [m.role for m in run.toy.requests[-1].input.chat.messages] == [pb.ROLE_SYSTEM, pb.ROLE_USER]
    assert "--system" in run("generate", "hi", "--system", "be kind", "--raw", status=2).stderr


def test_chat_keeps_the_conversation_and_survives_an_error(run: Command) -> None:
    result = run("chat", "--system", "be kind", stdin="first\n\nsecond\n")
    assert result.stdout == (TEXT + "\n") * 2
    assert "Ctrl-D leaves" in result.stderr
    last = run.toy.requests[-1].input.chat.messages
    assert [message.role for message in last] == [
        pb.ROLE_SYSTEM, pb.ROLE_USER, pb.ROLE_ASSISTANT, pb.ROLE_USER,
    ]  # fmt: skip
    assert [message.parts[0].text for message in last] == ["be kind", "first", TEXT, "second"]


def test_chat_forgets_a_turn_that_failed(run: Command) -> None:
    run.toy.breaks = [Break(1, Failure(grpc.StatusCode.INTERNAL, "WORKER_FAILED"))]
    result = run("chat", stdin="first\nsecond\n")
    assert "WORKER_FAILED" in result.stderr
    assert [message.parts[0].text for message in run.toy.requests[-1].input.chat.messages] == ["second"]
