"""The script of the bootstrap Job, against an API that answers as Kubernetes does, over TLS."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme

SCRIPT = Path(__file__).parents[2] / "deploy" / "chart" / "files" / "bootstrap.py"
TOKEN = "a-token"


class Api(ThreadingHTTPServer):
    """Keeps one Secret; `failures` writes that are not dry runs fail first."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data: dict[str, str] = {}
        self.writes: list[str] = []
        self.failures = 0
        self.may_write = True
        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        authority.cert_pem.write_to_path(folder / "ca.crt")
        (folder / "token").write_text(TOKEN)
        (folder / "namespace").write_text("serving\n")


class Handler(BaseHTTPRequestHandler):
    server: Api

    def do_GET(self) -> None:
        self._answer(200, {"data": self.server.data})

    def do_PATCH(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["Content-Type"] == "application/merge-patch+json"
        query = self.path.partition("?")[2]
        self.server.writes.append(query)
        if not self.server.may_write:
            self._answer(403, {"reason": "Forbidden"})
        elif not query and self.server.failures:
            self.server.failures -= 1
            self._answer(503, {})
        else:
            if not query:
                self.server.data |= body["stringData"]
            self._answer(200, {})

    def _answer(self, status: int, body: Any) -> None:
        right = self.headers["Authorization"] == f"Bearer {TOKEN}"
        right = right and self.path.startswith("/api/v1/namespaces/serving/secrets/first-admin")
        self.send_response(status if right else 401)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with Api(tmp_path) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(api: Api, folder: Path, command: str = 'echo "tr_of_$2"') -> subprocess.CompletedProcess[str]:
    """Run the script beside a `torchrelay` that does as it is told, and leaves word of it."""
    program = folder / "bin" / "torchrelay"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/called\n{command}\n')
    program.chmod(0o700)
    host, port = api.server_address[:2]
    env = {"PATH": f"{program.parent}:{os.environ['PATH']}", "SERVICE_ACCOUNT_DIR": str(folder)}
    env |= {"KUBERNETES_SERVICE_HOST": str(host), "KUBERNETES_SERVICE_PORT": str(port)}
    arguments = [sys.executable, str(SCRIPT), "first-admin", "operators"]
    return subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_the_key_goes_into_the_secret_and_nowhere_else(api: Api, tmp_path: Path) -> None:
    done = run(api, tmp_path)
    assert done.returncode == 0, done.stderr
    assert api.data == {"key": "tr_of_operators"}
    assert api.writes == ["dryRun=All", ""]
    assert "tr_of" not in done.stdout + done.stderr


def test_a_key_that_is_there_stays(api: Api, tmp_path: Path) -> None:
    api.data = {"key": "old"}
    assert run(api, tmp_path).returncode == 0
    assert api.data == {"key": "old"}
    assert not (tmp_path / "called").exists()


def test_no_key_is_made_that_could_not_be_stored(api: Api, tmp_path: Path) -> None:
    api.may_write = False
    assert run(api, tmp_path).returncode != 0
    assert not (tmp_path / "called").exists()


def test_an_api_that_is_away_for_a_moment_loses_no_key(api: Api, tmp_path: Path) -> None:
    api.failures = 2
    assert run(api, tmp_path).returncode == 0
    assert api.data == {"key": "tr_of_operators"}
    assert (tmp_path / "called").read_text().splitlines() == ["bootstrap operators"]


def test_a_refusal_is_shown_and_nothing_is_stored(api: Api, tmp_path: Path) -> None:
    done = run(api, tmp_path, "echo 'error: made already' >&2; exit 1")
    assert done.returncode == 1
    assert "made already" in done.stderr
    assert api.data == {}
