"""The parts of `torchrelay serve` that need no model."""

from __future__ import annotations

import asyncio
import json
import shlex
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from google.protobuf import json_format
from structlog.testing import capture_logs

from common.api_keys import ApiKeys
from common.banner import banner
from common.embedded import EmbeddedServer, EmbeddedServerError
from common.redis import connect
from common.serve import (
    Child,
    ChildRefusedError,
    Supervisor,
    _metrics_addresses,
    check_address,
    data_dir_of,
    prepare,
    serve,
    without_password,
)
from common.settings import RedisSettings
from common.startup import CANNOT_START
from torchrelay.cli.connection import credentials_file
from torchrelay.v1 import classification_pb2 as cpb
from torchrelay.v1 import embedding_pb2 as epb
from torchrelay.v1 import generation_pb2 as pb
from torchrelay.v1 import model_pb2

MODEL = model_pb2.Model(name="tiny", family="llama", dtype="float32", context_length=64)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def test_data_is_kept_where_the_system_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert data_dir_of(tmp_path) == tmp_path
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert data_dir_of(None) == Path("/data/torchrelay")
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert data_dir_of(None) == Path("/home/somebody/.local/share/torchrelay")


def line_with(shown: str, beginning: str) -> list[str]:
    """The words of the command that begins so, over its continued lines."""
    joined = shown.replace("\\\n", " ")
    return shlex.split(next(line for line in joined.splitlines() if line.strip().startswith(beginning)))


def test_the_banner_s_lines_can_be_pasted() -> None:
    shown = banner(
        MODEL,
        "127.0.0.1:50051",
        "127.0.0.1:50052",
        "127.0.0.1:8000",
        ["127.0.0.1:9464", "127.0.0.1:9465"],
        "tr_key",
        ".venv/bin/torchrelay",
    )
    assert "metrics  http://127.0.0.1:9464/metrics http://127.0.0.1:9465/metrics\n" in shown
    question = "What is the capital of France?"
    assert line_with(shown, ".venv/bin/torchrelay") == [".venv/bin/torchrelay", "generate", question]
    words = line_with(shown, "grpcurl")
    assert words[:4] == ["grpcurl", "-plaintext", "-H", "authorization: Bearer tr_key"]
    assert words[-2:] == ["127.0.0.1:50051", "torchrelay.v1.GenerationService/StreamGenerate"]
    assert '"model": "tiny"' in words[5]
    words = line_with(shown, "curl")
    assert words[1] == "http://127.0.0.1:8000/v1/chat/completions"
    assert json.loads(words[-1])["messages"] == [{"role": "user", "content": question}]
    for part in ("http://127.0.0.1:8000/v1", "127.0.0.1:50052", "llama, float32, context 64", str(credentials_file())):
        assert part in shown


@pytest.mark.parametrize(
    ("fields", "verb", "request_", "openai_path"),
    [
        ({"tasks": [model_pb2.TASK_EMBED]}, "embed", epb.EmbedRequest, "embeddings"),
        ({"tasks": [model_pb2.TASK_CLASSIFY, model_pb2.TASK_RERANK]}, "classify", cpb.ClassifyRequest, ""),
        ({"tasks": [model_pb2.TASK_CLASSIFY_TOKENS]}, "entities", cpb.ClassifyTokensRequest, ""),
        ({"tasks": [model_pb2.TASK_ANSWER_QUESTION]}, "answer", cpb.AnswerQuestionRequest, ""),
        (
            {"tasks": [model_pb2.TASK_GENERATE, model_pb2.TASK_TRANSLATE], "languages": ["de", "en"]},
            "generate",
            pb.StreamGenerateRequest,
            "",
        ),
        ({"tasks": [model_pb2.TASK_GENERATE, model_pb2.TASK_SUMMARIZE]}, "generate", pb.StreamGenerateRequest, ""),
    ],
)
def test_the_banner_s_lines_fit_the_model_s_tasks(
    fields: dict[str, Any], verb: str, request_: Any, openai_path: str
) -> None:
    model = model_pb2.Model(name="m", family="bert", dtype="float32", context_length=64, **fields)
    shown = banner(model, "127.0.0.1:7000", "127.0.0.1:7001", "127.0.0.1:7002", [""], "tr_key", "torchrelay")
    words = line_with(shown, "torchrelay")
    assert words[1:4] == [verb, "--address", "127.0.0.1:7000"]
    called = line_with(shown, "grpcurl")
    request = json_format.Parse(called[5], request_())
    assert request.model == "m"
    if "languages" in fields:
        assert request.input.translation.target_language == "en"
        assert words[4:8] == ["--translate-from", "de", "--translate-to", "en"]
    service, method = called[-1].removeprefix("torchrelay.v1.").split("/")
    assert method in (request_.__name__.removesuffix("Request"),)
    assert service.endswith("Service")
    if openai_path:
        curl = line_with(shown, "curl")
        assert curl[1] == f"http://127.0.0.1:7002/v1/{openai_path}"
        assert json.loads(curl[-1])["model"] == "m"
    else:
        assert "curl http" not in shown


def test_without_an_address_for_openai_s_clients_the_banner_names_none() -> None:
    shown = banner(MODEL, "127.0.0.1:50051", "127.0.0.1:50052", "", [""], "tr_key", "torchrelay")
    assert "openai" not in shown
    assert "/v1" not in shown.replace("torchrelay.v1", "")
    assert line_with(shown, "grpcurl")[-1] == "torchrelay.v1.GenerationService/StreamGenerate"


def test_no_address_for_openai_s_clients_is_nothing_to_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    monkeypatch.setattr("common.serve.check_address", lambda address, insecure: checked.append(address))
    monkeypatch.setattr(EmbeddedServer, "start", fail_to_start)
    monkeypatch.setattr("common.serve.signal.signal", lambda number, handler: None)  # the test run's own stay
    monkeypatch.setenv("GRPC_ENABLE_FORK_SUPPORT", "0")
    with pytest.raises(typer.Exit):
        serve(
            "demo",
            address="127.0.0.1:1",
            admin_address="127.0.0.1:2",
            openai_address="",
            metrics_address="",
            data_dir=tmp_path,
        )
    assert checked == ["127.0.0.1:1", "127.0.0.1:2"]


def test_a_child_is_the_installed_program_wherever_serve_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gateway").mkdir()
    (tmp_path / "gateway" / "__init__.py").write_text("raise SystemExit('not this one')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)  # that may name this folder
    child = Child("gateway", "gateway", {"TORCHRELAY_REDIS_URL": "nonsense://"})
    child.start()
    child.wait(time.monotonic() + 60)
    with pytest.raises(ChildRefusedError):  # for its address, which only ours looks at
        child.keep_running()


def fail_to_start(server: EmbeddedServer) -> None:
    raise EmbeddedServerError("not in this test")


def test_the_banner_names_another_address() -> None:
    shown = banner(MODEL, "127.0.0.1:7000", "127.0.0.1:7001", "127.0.0.1:7002", [""], "tr_key", "torchrelay")
    assert line_with(shown, "torchrelay")[1:4] == ["generate", "--address", "127.0.0.1:7000"]


def free_address(family: socket.AddressFamily, host: str) -> str:
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    return f"[{host}]:{port}" if family is socket.AF_INET6 else f"{host}:{port}"


def test_a_free_address_is_taken() -> None:
    check_address(free_address(socket.AF_INET, "127.0.0.1"), insecure=False)
    check_address(free_address(socket.AF_INET, "0.0.0.0"), insecure=True)
    if socket.has_ipv6:
        check_address(free_address(socket.AF_INET6, "::1"), insecure=False)


def test_a_taken_address_is_said_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(typer.BadParameter, match="another server may be running"):
            check_address(address, insecure=False)


@pytest.mark.parametrize(
    "address", ["", "50051", ":50051", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:65536"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not host:port"):
        check_address(address, insecure=False)


@pytest.mark.parametrize("address", ["0.0.0.0:50051", "[::]:50051", "10.0.0.7:50051"])
def test_plaintext_beyond_loopback_is_refused(address: str) -> None:
    with pytest.raises(typer.BadParameter, match="--insecure"):
        check_address(address, insecure=False)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisSettings]:
    with EmbeddedServer(tmp_path_factory.mktemp("queue")) as server:
        yield RedisSettings(url=server.url)


async def tenant_of(settings: RedisSettings, key: str) -> str:
    redis = connect(settings)
    try:
        return (await ApiKeys(redis).verify(key)).tenant
    finally:
        await redis.aclose()


async def test_a_development_key_is_made_once_for_this_user_alone(settings: RedisSettings) -> None:
    key, promise = await prepare(settings)
    path = credentials_file()
    assert path.read_text() == f"{key}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert await tenant_of(settings, key) == "dev"
    assert "survive" in promise
    assert (await prepare(settings))[0] == key


@pytest.mark.parametrize("content", ["", "tr_made_for_another_data_directory\n"])
async def test_a_key_that_does_not_work_is_replaced(settings: RedisSettings, content: str) -> None:
    path = credentials_file()
    path.parent.mkdir(parents=True)
    path.write_text(content)
    path.chmod(0o644)
    key, _ = await prepare(settings)
    assert path.read_text() == f"{key}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert await tenant_of(settings, key) == "dev"


def make_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> Child:
    """A child that runs some Python."""
    (tmp_path / "module_of_a_child.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Child("child", "module_of_a_child", {"FROM_THE_PARENT": "yes"})


def test_a_child_that_ends_is_started_again_later_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = make_child(tmp_path, monkeypatch, "import os; raise SystemExit(3 if os.environ['FROM_THE_PARENT'] else 4)")
    pauses = []
    with capture_logs() as logged:
        for _ in range(3):
            child.start()
            assert child.process is not None
            assert child.process.wait(20) == 3
            child.keep_running()
            assert child.process is None, "not at once"
            pauses.append(child.pause_s)
    assert pauses == [0.2, 0.4, 0.8]
    assert [entry["status"] for entry in logged] == [3, 3, 3]
    child.pause_s = 9.0
    child.start()
    assert child.process.wait(20) == 3
    child.keep_running()
    assert child.pause_s == 10.0
    child.restart_at = 0.0
    child.keep_running()
    assert child.process is not None
    assert child.process.wait(20) == 3


def test_a_child_that_says_it_never_can_is_not_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = make_child(tmp_path, monkeypatch, f"raise SystemExit({CANNOT_START})")
    child.start()
    assert child.process is not None
    child.process.wait(20)
    with pytest.raises(ChildRefusedError, match="child cannot start"):
        child.keep_running()


def test_all_children_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = "import time; print('up', flush=True); time.sleep(60)"
    gateway = make_child(tmp_path, monkeypatch, waits)
    worker = make_child(tmp_path, monkeypatch, waits)
    supervisor = Supervisor(None, gateway, [worker])
    supervisor.start()
    supervisor.stop()
    for child in supervisor.children():
        assert child.process is not None
        assert child.process.poll() is not None
    supervisor.stop()  # again does nothing


def test_a_child_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open('up', 'w').close(); time.sleep(60)"
    child = make_child(tmp_path, monkeypatch, code)
    monkeypatch.chdir(tmp_path)
    child.start()
    for _ in range(1000):
        if (tmp_path / "up").exists():
            break
        asyncio.run(asyncio.sleep(0.01))
    child.terminate()
    with capture_logs() as logged:
        child.wait(0.0)
    assert [entry["event"] for entry in logged] == ["child.killed"]
    assert child.process is not None
    assert child.process.poll() == -9


def test_children_run_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = make_child(tmp_path, monkeypatch, f"import sys; raise SystemExit(sys.executable != {sys.executable!r})")
    child.start()
    assert child.process is not None
    assert child.process.wait(20) == 0


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@host:6379/0", "redis://host:6379/0"),
        ("redis+sentinel://u:p@ss@h1:1,h2:2/main/0", "redis+sentinel://h1:1,h2:2/main/0"),
        ("unix:///run/queue.sock", "unix:///run/queue.sock"),
    ],
)
def test_a_password_is_not_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown


class FailingServer:
    """A server that has ended, and starts at the second try."""

    def __init__(self) -> None:
        self.is_running = False
        self.num_tries = 0

    def kill(self) -> None:
        pass

    def start(self) -> None:
        self.num_tries += 1
        if self.num_tries == 1:
            raise EmbeddedServerError("no space left")
        self.is_running = True


def test_a_server_that_cannot_start_again_is_tried_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = make_child(tmp_path, monkeypatch, "import time; time.sleep(60)")
    server = FailingServer()
    supervisor = Supervisor(server, child, [])  # type: ignore[arg-type]
    supervisor.start()
    try:
        with capture_logs() as logged:
            supervisor.tend()
            supervisor.tend()  # not at once again
            assert server.num_tries == 1
            supervisor.restart_server_at = 0.0
            supervisor.tend()
        assert server.is_running
        assert [entry["event"] for entry in logged] == ["server.ended", "server.not_started", "server.ended"]
    finally:
        child.terminate()
        child.wait(time.monotonic() + 10)


def test_workers_metrics_stand_behind_the_gateway_s() -> None:
    assert _metrics_addresses("[::1]:9464", 3) == ["[::1]:9464", "[::1]:9465", "[::1]:9466"]
    with pytest.raises(typer.BadParameter, match="9464x is not host:port"):
        _metrics_addresses("127.0.0.1:9464x", 2)
