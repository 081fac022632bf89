"""The record of calls: whole, bounded to ids, counts and digests, and kept when files move."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from structlog.testing import capture_logs

from common import errors
from gateway import audit
from gateway.audit import Audit, AuditFile
from gateway.identity.caller import Caller
from gateway.interceptors.guard import Guard
from tests.unit.gateway.test_guard import Toy, authenticate, get, read, serving
from torchrelay.v1 import generation_pb2 as pb


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_a_call_is_recorded_with_its_caller_and_its_end(path: Path) -> None:
    toy = Toy()

    async def noting(request: Any, context: Any) -> pb.GetGenerationResponse:
        audit.note(generation_id=request.generation_id)
        if request.generation_id == "absent":
            raise errors.GenerationNotFound
        audit.mark("generation.accepted")
        return pb.GetGenerationResponse()

    toy.get = noting
    known, absent = (pb.GetGenerationRequest(generation_id=name).SerializeToString() for name in ("g1", "absent"))
    async with serving(toy, Guard(authenticate, audit=Audit(AuditFile(path)))) as channel:
        await get(channel, known)
        for call in (get(channel, absent), get(channel, metadata=())):
            with pytest.raises(grpc.aio.AioRpcError):
                await call
        await read(channel)
    accepted, ended, refused, unknown, streamed = lines_of(path)
    assert accepted["event"] == "generation.accepted"
    assert (accepted["tenant"], accepted["credential"], accepted["by"], accepted["generation_id"]) == (
        "acme",
        "k1",
        "api_key",
        "g1",
    )
    assert (ended["event"], ended["status"]) == ("call", "OK")
    assert ended["method"].endswith("/GetGeneration")
    assert ended["peer"].startswith("ipv4:127.0.0.1:")
    assert ended["ms"] >= 0
    assert (refused["status"], refused["reason"], refused["generation_id"]) == (
        "NOT_FOUND",
        "REQUEST_NOT_FOUND",
        "absent",
    )
    assert (unknown["status"], unknown["reason"]) == ("UNAUTHENTICATED", "CREDENTIALS_MISSING")
    assert "tenant" not in unknown
    assert streamed["status"] == "OK"
    assert streamed["method"].endswith("/StreamGenerate")


async def test_a_bug_is_recorded_by_its_name_alone(path: Path) -> None:
    toy = Toy()

    async def fail(request: Any, context: Any) -> pb.GetGenerationResponse:
        raise ValueError("what a caller wrote")

    toy.get = fail
    async with serving(toy, Guard(authenticate, audit=Audit(AuditFile(path)))) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await get(channel)
    (line,) = lines_of(path)
    assert (line["status"], line["reason"]) == ("INTERNAL", "ValueError")
    assert "wrote" not in json.dumps(line)


def test_a_file_that_was_moved_away_is_begun_anew(path: Path) -> None:
    now = [0.0]
    file = AuditFile(path, lambda: now[0])
    file.write("one")
    path.rename(path.with_suffix(".1"))
    file.write("two")
    now[0] = 6
    file.write("three")
    assert path.with_suffix(".1").read_text() == "one\ntwo\n"
    assert path.read_text() == "three\n"
    assert path.stat().st_mode & 0o777 == 0o600
    file.close()


def test_operators_calls_are_in_the_log() -> None:
    record_of = Audit(to_log=True)
    with capture_logs() as logs:
        record = record_of.begin("/torchrelay.admin.v1beta1.ApiKeyService/RevokeApiKey", "ipv4:127.0.0.1:5")
        record.caller = Caller("ops", "k9")
        audit.note(target_key="k1")
        record_of.end(record, "OK")
    assert [(line["event"], line["credential"], line["target_key"], line["status"]) for line in logs] == [
        ("audit", "k9", "k1", "OK")
    ]
