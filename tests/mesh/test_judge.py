"""The judge of `make mesh` sees each law broken once, and Envoy takes the configuration as what it is meant to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mesh.callers import Result, Task, without_key
from tests.mesh.envoy import Tls, config
from tests.mesh.judge import Stored, judge
from torchrelay.v1 import generation_pb2 as pb
from torchrelay.v1 import model_pb2

OWNER = "mesh.0123456789abcdef:acme"
ONE, OTHER = "10.0.0.1:1", "10.0.0.2:1"


def results() -> list[Result]:
    """Four calls that went well, the last of them in two parts."""
    found = [Result(Task(n, (1, 2), (7, 8, n)), f"id-{n}", (7, 8, n), served_by=[ONE]) for n in range(4)]
    found[-1].resumed_by = [(ONE, OTHER), (OTHER, OTHER)]
    return found


def stored(**usage: int) -> Stored:
    good = {f"generations:{OWNER}": 4, f"completion_tokens:{OWNER}": 12, f"prompt_tokens:{OWNER}": 8}
    return Stored(good | usage, 4)


def test_a_run_in_which_nothing_is_wrong() -> None:
    verdict = judge(results(), stored(), "acme", least_elsewhere=1)
    assert verdict.violations == {}
    assert (verdict.num_right, verdict.num_resumes, verdict.num_resumes_elsewhere) == (4, 2, 1)
    assert verdict.by_kind == {"unary": 2, "stream": 1, "generate": 1}


def _set(index: int, **changes: object) -> Callable[[list[Result]], None]:
    def change(found: list[Result]) -> None:
        found[index] = replace(found[index], **changes)  # type: ignore[arg-type]

    return change


@pytest.mark.parametrize(
    ("change", "law"),
    [
        (_set(0, error="UNAVAILABLE"), "every call ends well"),
        (_set(0, token_ids=(7, 8)), "every call ends well"),
        (_set(0, token_ids=(7, 8, 0, 0)), "every call ends well"),
        (_set(0, generation_id="id-1"), "each key has its own generation"),
        (_set(0, generation_id=""), "each key has its own generation"),
        (_set(3, resumed_by=[(ONE, ONE)]), "streams resume on the other gateway"),
    ],
    ids=range(6),
)
def test_what_callers_saw_is_held_to_the_law(change: Callable[[list[Result]], None], law: str) -> None:
    found = results()
    change(found)
    assert list(judge(found, stored(), "acme", least_elsewhere=1).violations) == [law]


@pytest.mark.parametrize(
    ("kept", "laws"),
    [
        (Stored(stored().usage, 5), ["each generation is executed once"]),
        (stored(**{f"generations:{OWNER}": 5}), ["each generation is metered once"]),
        (stored(**{f"generations:{OWNER}": 3}), ["each generation is metered once"]),
        (stored(**{f"completion_tokens:{OWNER}": 15}), ["each token is metered once"]),
        (stored(**{"prompt_tokens:mesh.0123456789abcdef:root": 1}), ["only the certificate's tenant is charged"]),
        (stored(**{"prompt_tokens:cert.0123456789abcdef:acme": 1}), ["only the certificate's tenant is charged"]),
    ],
    ids=range(6),
)
def test_what_is_stored_is_held_to_the_law(kept: Stored, laws: list[str]) -> None:
    assert list(judge(results(), kept, "acme", least_elsewhere=1).violations) == laws


def test_the_mutant_takes_the_key_and_nothing_else() -> None:
    request = pb.GenerateRequest(model="tiny", idempotency_key="k")
    assert without_key(request) == pb.GenerateRequest(model="tiny")
    assert request.idempotency_key == "k"
    other = model_pb2.ListModelsRequest(page_token="x")
    assert without_key(other) is other


def test_the_proxy_is_a_mesh_s() -> None:
    made = config(1, [ONE, OTHER], Tls(Path("c"), Path("k"), Path("a")))
    (listener,), (cluster,) = made["static_resources"]["listeners"], made["static_resources"]["clusters"]
    (chain,) = listener["filter_chains"]
    manager = chain["filters"][0]["typed_config"]
    assert chain["transport_socket"]["typed_config"]["require_client_certificate"] is True
    assert manager["forward_client_cert_details"] == "SANITIZE_SET"
    retry = manager["route_config"]["virtual_hosts"][0]["routes"][0]["route"]["retry_policy"]
    assert retry == {"retry_on": "connect-failure,refused-stream,unavailable,cancelled", "num_retries": 2}
    assert len(cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]) == 2
