"""The command, against a server on a socket: data on stdout, the rest on stderr, and errors that say what to do."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
import typer
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from typer.testing import CliRunner

from tests.unit.torchrelay.cli.conftest import Command
from tests.unit.torchrelay.toy import GENERATION_ID, KEY, Break, Failure
from torchrelay.admin.v1beta1 import api_key_pb2, fleet_pb2
from torchrelay.cli.connection import Connection, credentials_file
from torchrelay.cli.output import explain, size
from torchrelay.client import RelayError, Tls
from torchrelay.v1 import generation_pb2 as pb
from torchrelay.v1 import model_pb2

TEXT = "w0 w1 w2 w3 w4 "
VERBS = (
    "generate", "chat", "models", "models list", "models show", "models check", "keys", "keys create", "keys list",
    "keys rotate", "keys revoke", "tenants", "tenants set", "tenants list", "tenants delete", "usage",
    "dead-letters", "dead-letters list", "dead-letters retry", "dead-letters purge",
    "top", "ps", "queue", "drain", "cancel", "erase",
    "embed", "classify", "entities", "answer", "rerank",
    "batch", "batch run", "batch list", "batch get", "batch results", "batch cancel", "batch delete",
    "bench", "bench compare", "bench plot", "version", "serve", "gateway", "bootstrap", "worker", "acl",
    "config", "config show", "config check", "doctor", "logs", "logs set", "logs list", "logs reset",
)  # fmt: skip


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


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("heuristic", pb.EARLY_STOPPING_HEURISTIC),
        ("when-full", pb.EARLY_STOPPING_WHEN_FULL),
        ("never", pb.EARLY_STOPPING_NEVER),
    ],
)
def test_a_search_is_asked_for_as_it_is_written(run: Command, option: str, value: pb.EarlyStopping.ValueType) -> None:
    options = ("--num-beams", "4", "--length-penalty", "-0.5", "--early-stopping", option, "--renormalize-logits")
    run("generate", "hi", "--raw", *options)
    assert run.toy.requests[-1].config == pb.GenerationConfig(
        num_beams=4, length_penalty=-0.5, early_stopping=value, renormalize_logits=True
    )


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
