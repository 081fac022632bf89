"""The command, against a server on a socket: data on stdout, the rest on stderr, and errors that say what to do."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from typer.testing import CliRunner

from tests.unit.torchrelay.toy import GENERATION_ID, KEY, Break, Failure, Toy
from torchrelay.admin.v1beta1 import api_key_pb2, fleet_pb2
from torchrelay.cli.bench import make_prompt, percentiles
from torchrelay.cli.connection import Connection, credentials_file
from torchrelay.cli.main import make_app
from torchrelay.cli.output import explain, size
from torchrelay.client import RelayError, Tls
from torchrelay.v1 import generation_pb2 as pb
from torchrelay.v1 import model_pb2

TEXT = "w0 w1 w2 w3 w4 "
VERBS = (
    "generate", "chat", "models", "models list", "models show", "models check", "keys", "keys create", "keys list",
    "keys rotate", "keys revoke", "tenants", "tenants set", "tenants list", "tenants delete", "usage",
    "dead-letters", "dead-letters list", "dead-letters retry", "dead-letters purge", "ps", "cancel", "erase",
    "bench", "version", "serve", "gateway", "bootstrap", "worker", "acl",
)  # fmt: skip


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    return make_app()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Without the variables and files of whoever runs the tests."""
    for name in (
        "ADDRESS",
        "ADMIN_ADDRESS",
        "API_KEY",
        "ADMIN_KEY",
        "TOKEN",
        "TLS_CA",
        "TLS_CERT",
        "TLS_KEY",
        "INSECURE",
    ):
        monkeypatch.delenv(f"TORCHRELAY_{name}", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


class Command:
    """Runs the command against the toy."""

    def __init__(self, app: typer.Typer, toy: Toy) -> None:
        self._app = app
        self.toy = toy

    def __call__(self, *args: str, status: int = 0, stdin: str | None = None) -> Any:
        env = {"TORCHRELAY_ADDRESS": self.toy.address, "TORCHRELAY_ADMIN_ADDRESS": self.toy.address}
        result = CliRunner(env=env).invoke(self._app, args, input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == status, result.output
        return result

    def objects(self, *args: str) -> list[Any]:
        """Each line of stdout as JSON."""
        return [json.loads(line) for line in self(*args).stdout.splitlines()]


@pytest.fixture
def run(app: typer.Typer, toy: Toy) -> Command:
    return Command(app, toy)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(run: Command, verb: str) -> None:
    help_text = run(*verb.split(), "--help").stdout
    assert "Usage:" in help_text
    assert "Traceback" not in help_text


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [(0, "-"), (1, "0.0 MB"), (325_793_984, "325.8 MB"), (999_999_999, "1000.0 MB"), (16_060_522_496, "16.1 GB")],
)
def test_sizes_are_in_powers_of_a_thousand(num_bytes: int, shown: str) -> None:
    assert size(num_bytes) == shown


def test_the_command_alone_shows_its_verbs(run: Command) -> None:
    shown = run(status=2).output
    assert all(verb.split()[0] in shown for verb in VERBS)


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
        --encoder-repetition-penalty 1.2 --encoder-no-repeat-ngram-size 3
    """
    run("generate", "hi", *options.split())
    (request,) = (request for request in run.toy.requests if isinstance(request, pb.StreamGenerateRequest))
    assert request.config == pb.GenerationConfig(
        min_tokens=1, min_length=2, max_length=30, ignore_eos=True, stop_token_ids=[3], typical_p=0.9,
        epsilon_cutoff=0.1, eta_cutoff=0.2, top_h=0.3, presence_penalty=-1, frequency_penalty=1, bad_words=["x"],
        bad_words_ids=[pb.TokenIds(ids=[4, 5]), pb.TokenIds(ids=[6])], logit_bias={7: -1.5},
        sequence_bias=[pb.SequenceBias(token_ids=[8, 9], bias=2)], suppress_tokens=[10], begin_suppress_tokens=[11],
        exponential_decay_length_penalty=pb.ExponentialDecay(start=12, factor=1.5), forced_eos_token_id=13,
        encoder_repetition_penalty=1.2, encoder_no_repeat_ngram_size=3,
    )  # fmt: skip
    for option, value in (("--logit-bias", "7"), ("--sequence-bias", "7,=1"), ("--bad-words-ids", "x")):
        assert option in run("generate", "hi", option, value, status=2).stderr


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


def test_without_a_name_there_must_be_one_model(run: Command) -> None:
    run.toy.models.append(model_pb2.Model(name="other"))
    result = run("generate", "hi", status=2)
    assert "several models are served: tiny, other" in result.stderr
    assert result.stdout == ""
    assert run("generate", "hi", "--model", "other").stdout == TEXT + "\n"
    run.toy.models = []
    assert "no model is registered yet" in run("generate", "hi", status=2).stderr


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (
            Failure(grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_MISSING"),
            ["no API key", "torchrelay keys create", "--api-key"],
        ),
        (Failure(grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID"), ["check --api-key or TORCHRELAY_API_KEY"]),
        (Failure(grpc.StatusCode.PERMISSION_DENIED, "METHOD_NOT_ALLOWED"), ["this key may not do that: what happened"]),
        (Failure(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"), ["what happened; `torchrelay models list`"]),
        (Failure(grpc.StatusCode.NOT_FOUND, "REQUEST_NOT_FOUND"), ["error: what happened\n"]),
        (Failure(grpc.StatusCode.FAILED_PRECONDITION, "NO_CHAT_TEMPLATE"), ["error: what happened\n"]),
        (
            Failure(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "QUEUE_FULL",
                details=(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=2, nanos=500_000_000)),),
            ),
            ["what happened; try again in 2.5 s"],
        ),
        (Failure(grpc.StatusCode.RESOURCE_EXHAUSTED), ["error: what happened\n"]),
        (Failure(grpc.StatusCode.DEADLINE_EXCEEDED, "QUEUE_DEADLINE"), ["out of time: what happened"]),
        (
            Failure(
                grpc.StatusCode.INVALID_ARGUMENT,
                "FIELD_OUT_OF_RANGE",
                details=(
                    error_details_pb2.BadRequest(
                        field_violations=[
                            error_details_pb2.BadRequest.FieldViolation(field="config.top_p", description="above [0]")
                        ]
                    ),
                ),
            ),
            ["the request was refused: what happened", "config.top_p: above [0]"],
        ),
        (Failure(grpc.StatusCode.INTERNAL, "WORKER_FAILED"), ["INTERNAL WORKER_FAILED: what happened"]),
        (Failure(grpc.StatusCode.ABORTED, "SUPERSEDED"), ["ABORTED SUPERSEDED: what happened"]),
        (Failure(grpc.StatusCode.UNIMPLEMENTED), ["UNIMPLEMENTED: what happened"]),
    ],
    ids=lambda value: f"{value.code.name}-{value.reason}" if isinstance(value, Failure) else "",
)
def test_every_refusal_says_what_to_do(run: Command, failure: Failure, expected: list[str]) -> None:
    run.toy.always = failure
    for command in (("models", "list"), ("generate", "hi"), ("ps",), ("cancel", "g1"), ("models", "show", "tiny")):
        result = run(*command, status=1)
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        for part in expected:
            assert part in result.stderr
        if failure.reason:
            assert f"reason {failure.reason}, detail d" in result.stderr


def test_an_error_in_the_middle_names_the_generation(run: Command) -> None:
    run.toy.breaks = [Break(3, Failure(grpc.StatusCode.INTERNAL, "WORKER_FAILED"))]
    result = run("generate", "hi", status=1)
    assert result.stdout == "w0 w1 "
    assert f"generation {GENERATION_ID}" in result.stderr


def test_a_server_that_is_not_there_is_said_soon(app: typer.Typer) -> None:
    started = datetime.now(UTC)
    result = CliRunner().invoke(app, ["generate", "hi", "--address", "127.0.0.1:1"])
    assert result.exit_code == 1
    assert "nothing answers at 127.0.0.1:1; start a server with `torchrelay serve`, or set --address" in result.stderr
    assert datetime.now(UTC) - started < timedelta(seconds=10)
    result = CliRunner().invoke(app, ["ps", "--admin-address", "127.0.0.1:1"])
    assert (
        "nothing answers at 127.0.0.1:1; start a server with `torchrelay serve`, or set --admin-address"
        in result.stderr
    )


def test_a_back_end_that_does_not_answer_is_not_a_wrong_address() -> None:
    error = RelayError(grpc.StatusCode.UNAVAILABLE, "the queue does not answer", reason="BACKEND_UNAVAILABLE")
    assert "the gateway at a:1 answered; its back-end did not" in explain(error, "a:1")


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


def test_models_are_listed_and_shown(run: Command) -> None:
    run.toy.models[0].adapters.add(name="polite", rank=8)
    run.toy.models[0].adapters.add(name="terse", rank=8)
    run.toy.models.append(model_pb2.Model(name="a [red]name[/]", state=model_pb2.MODEL_STATE_COLD))
    lines = run("models", "list").stdout.splitlines()
    assert lines[0].split() == [
        *("NAME", "STATE", "WORKERS", "QUEUED", "CONTEXT", "DTYPE", "WEIGHTS", "SIZE", "ATTENTION", "ADAPTERS"),
        "REVISION",
    ]
    cells = [
        "tiny",
        "ready",
        "1",
        "0",
        "64",
        "float32",
        "int8",
        "1.5",
        "GB",
        "cpu_ext",
        "polite,",
        "terse",
        "0123456789ab",
    ]
    assert lines[1].split() == cells
    assert lines[2].startswith("a [red]name[/]  cold")
    assert [model["name"] for model in run.objects("models", "list", "--json")] == ["tiny", "a [red]name[/]"]
    assert 'name: "tiny"' in run("models", "show", "tiny").stdout
    assert run.objects("models", "show", "tiny", "--json")[0]["context_length"] == 64
    assert "`torchrelay models list`" in run("models", "show", "nothing", status=1).stderr


def test_keys_are_made_listed_and_revoked(run: Command) -> None:
    assert run("keys", "create", "acme", "--name", "for [tests", "--expires-in-days", "2").stdout == "tr_new\n"
    left = run.toy.requests[-1].expire_time.ToDatetime(UTC) - datetime.now(UTC)
    assert timedelta(days=1.9) < left < timedelta(days=2.1)
    old = api_key_pb2.ApiKey(key_id="k2", tenant="acme")
    old.revoke_time.GetCurrentTime()
    late = api_key_pb2.ApiKey(key_id="k3", tenant="other")
    late.expire_time.FromDatetime(datetime(2020, 1, 1, tzinfo=UTC))
    run.toy.api_keys += [old, late]
    rows = [line.split() for line in run("keys", "list").stdout.splitlines()]
    assert [row[:3] for row in rows[1:]] == [
        ["k1", "acme", "active"],
        ["k2", "acme", "revoked"],
        ["k3", "other", "expired"],
    ]
    assert "for [tests" in run("keys", "list").stdout
    assert [key["key_id"] for key in run.objects("keys", "list", "--json")] == ["k1", "k2", "k3"]
    assert run.objects("keys", "create", "acme", "--json")[0]["secret"] == "tr_new"
    revoked = run("keys", "revoke", "k1")
    assert (revoked.stdout, revoked.stderr) == ("", "revoked k1 of acme\n")
    assert run.objects("keys", "revoke", "k1", "--json")[0]["key_id"] == "k1"


@pytest.mark.parametrize("days", ["-1", "0", "1e300", "nan"])
def test_a_key_cannot_expire_at_no_time(run: Command, days: str) -> None:
    assert "--expires-in-days" in run("keys", "create", "acme", "--expires-in-days", days, status=2).stderr


def test_generations_and_workers_in_flight(run: Command) -> None:
    waiting = fleet_pb2.GenerationInfo(
        generation_id="g1", model="tiny", tenant="acme", state=pb.GENERATION_STATE_QUEUED, place=2
    )
    waiting.create_time.FromDatetime(datetime.now(UTC) - timedelta(minutes=3))
    run.toy.generations = [waiting]
    result = run("ps")
    assert result.stdout.splitlines()[1].split() == ["g1", "tiny", "acme", "queued", "#2", "0", "0", "3", "min", "ago"]
    assert result.stderr == "2 more\n"
    assert run.objects("ps", "--json")[0]["generation_id"] == "g1"
    run.toy.workers = [fleet_pb2.Worker(worker_id="w1", model="tiny", num_blocks=8, num_free_blocks=6, num_running=3)]
    assert "25%" in run("ps", "--workers").stdout
    assert "3 run, 0 wait" in run("ps", "--workers").stdout
    assert run.objects("ps", "--workers", "--json")[0]["worker_id"] == "w1"


def make_letter(generation_id: str) -> fleet_pb2.DeadLetter:
    letter = fleet_pb2.DeadLetter(
        generation_id=generation_id,
        model="tiny",
        tenant="acme",
        reason=fleet_pb2.DEAD_LETTER_REASON_ATTEMPTS_EXHAUSTED,
        num_claims=3,
        prompt_tokens=17,
        num_events=1,
    )
    letter.end_time.FromDatetime(datetime.now(UTC) - timedelta(hours=2))
    return letter


def test_dead_letters_are_listed_over_pages(run: Command) -> None:
    run.toy.dead_letters = [make_letter(f"g{number}") for number in range(3)]
    result = run("dead-letters", "list")
    assert result.stdout.splitlines()[1].split() == [
        "g0", "tiny", "acme", "attempts_exhausted", "3", "17", "1", "2", "h", "ago",
    ]  # fmt: skip
    assert len(result.stdout.splitlines()) == 4
    assert result.stderr == ""
    assert [letter["generation_id"] for letter in run.objects("dead-letters", "list", "--json")] == ["g0", "g1", "g2"]
    assert run("dead-letters", "list", "--limit", "2").stderr == "3 in all\n"


def test_dead_letters_are_retried_and_purged(run: Command) -> None:
    run.toy.dead_letters = [make_letter("g1")]
    result = run("dead-letters", "retry", "g1", "g2", status=1)
    assert result.stdout == "g1 retried as g1-new\ng2 not_found\n"
    assert run("dead-letters", "purge", "--model", "tiny").stdout == "g1 purged\n"
    assert run.toy.requests[-1].model == "tiny"
    assert run.objects("dead-letters", "purge", "g1", "--json")[0]["outcome"] == "DEAD_LETTER_OUTCOME_PURGED"


@pytest.mark.parametrize("verb", ["retry", "purge"])
def test_letters_are_named_or_all_of_a_model(run: Command, verb: str) -> None:
    for arguments in ((), ("g1", "--model", "tiny")):
        assert "either generations or --model" in run("dead-letters", verb, *arguments, status=2).stderr


def test_cancel_says_the_state_of_each(run: Command) -> None:
    assert run("cancel", "g1", "g2").stdout == "g1 cancelled\ng2 cancelled\n"
    assert run.objects("cancel", "g1", "--json") == [{"generation_id": "g1", "state": "cancelled"}]


def test_bench_reports_each_level(run: Command) -> None:
    reports = run.objects("bench", "-c", "1,2", "-r", "2", "--json")
    assert [report["concurrency"] for report in reports] == [1, 2]
    assert [report["num_requests"] for report in reports] == [2, 4]
    for report in reports:
        assert report["model"] == "tiny"
        assert report["num_errors"] == 0
        assert report["output_tokens"] == 5 * report["num_requests"]
        assert set(report["ttft_ms"]) == set(report["itl_ms"]) == set(report["e2e_ms"]) == {"mean", "p50", "p90", "p99"}
    table = run("bench", "-c", "1", "-r", "1").stdout.splitlines()
    assert table[0].startswith("CALLERS")
    assert table[1].split()[:3] == ["1", "1", "0"]


def test_bench_counts_errors_and_fails(run: Command) -> None:
    run.toy.breaks = [Break(0, Failure(grpc.StatusCode.INTERNAL, "WORKER_FAILED"))]
    result = run("bench", "-c", "1", "-r", "2", "--json", status=1)
    report = json.loads(result.stdout)
    assert (report["num_requests"], report["num_errors"], report["errors"]) == (1, 1, {"WORKER_FAILED": 1})


@pytest.mark.parametrize("levels", ["", "0", "1,x", "-1", "1,,2"])
def test_bench_takes_positive_numbers(run: Command, levels: str) -> None:
    assert "--concurrency" in run("bench", "-c", levels, status=2).stderr


def test_percentiles_are_nearest_ranks() -> None:
    assert percentiles([]) == {}
    assert percentiles([0.003]) == {"mean": 3.0, "p50": 3.0, "p90": 3.0, "p99": 3.0}
    hundred = [number / 1000 for number in range(100, 0, -1)]
    assert percentiles(hundred) == {"mean": 50.5, "p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert percentiles([0.001, 0.002, 0.003]) == {"mean": 2.0, "p50": 2.0, "p90": 3.0, "p99": 3.0}


def test_prompts_of_a_benchmark_have_their_length_and_differ() -> None:
    rng = random.Random(1)
    first, second = make_prompt(20, rng), make_prompt(20, rng)
    assert len(first.split()) == len(second.split()) == 20
    assert first != second


def test_version_names_client_and_server(run: Command) -> None:
    found = dict(line.split() for line in run("version").stdout.splitlines())
    assert set(found) == {"torchrelay-client", "torchrelay"}
    assert run.objects("version", "--json") == [found]


def test_the_development_key_is_used_on_loopback_alone(run: Command, home: Path) -> None:
    assert credentials_file() == home / "torchrelay" / "credentials"
    run("models", "list")
    assert run.toy.keys[-1] == ""
    credentials_file().parent.mkdir()
    credentials_file().write_text(f"{KEY}\n")
    run("models", "list")
    assert run.toy.keys[-1] == f"Bearer {KEY}"
    run("models", "list", "--api-key", "tr_own")
    assert run.toy.keys[-1] == "Bearer tr_own"
    for address in ("10.0.0.7:50051", "gateway:50051", "dns:///localhost:50051"):
        assert Connection(address, None).key() is None
        assert Connection(address, "tr_own").key() == "tr_own"
    credentials_file().write_text("\n")
    assert Connection("127.0.0.1:1", None).key() is None


def test_a_token_is_sent_instead_of_a_key(run: Command, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    credentials_file().parent.mkdir()
    credentials_file().write_text(f"{KEY}\n")
    run("models", "list", "--token", "a.b.c")
    assert run.toy.keys[-1] == "Bearer a.b.c"
    monkeypatch.setenv("TORCHRELAY_TOKEN", "d.e.f")
    run("generate", "hi")
    assert run.toy.keys[-1] == "Bearer d.e.f"
    assert "not both" in run("models", "list", "--api-key", "tr_own", status=2).stderr


def test_the_development_key_is_not_sent_beside_a_certificate() -> None:
    assert Connection("127.0.0.1:1", None, Tls(cert_file="c", key_file="k")).key() is None


@pytest.mark.parametrize("verb", [("models", "list"), ("ps",), ("keys", "list")], ids=str)
def test_certificates_of_callers_come_whole_and_can_be_read(run: Command, home: Path, verb: tuple[str, ...]) -> None:
    assert "belong together" in run(*verb, "--tls-cert", "x.pem", status=2).stderr
    (home / "x.pem").write_text("")
    found = run(*verb, "--tls-cert", str(home / "x.pem"), "--tls-key", str(home / "absent"), status=2)
    assert "cannot be read" in found.stderr
