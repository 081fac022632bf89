"""Values that are not as they should be are refused; what is printed after an install is true."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.deploy import settings
from tests.deploy.builders import model
from tests.deploy.charts import ROOT, ChartError, Rendered
from tests.deploy.conftest import Render


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"gateways": {}}, "gateways"),
        ({"gateway": {"replica": 3}}, "replica"),
        ({"gateway": {"replicas": "3"}}, "replicas"),
        ({"gateway": {"env": {"TORCHRELAY_WORKER_DTYPE": "auto"}}}, "TORCHRELAY_WORKER_DTYPE"),
        ({"models": [model(quantisation="int8")]}, "quantisation"),
        ({"models": [model(dtype="float16")]}, "dtype"),
        ({"models": [model(autoscaling={"enable": True})]}, "enable"),
        ({"models": [{"name": "no-source"}]}, "source"),
        ({"models": [model("white space")]}, "name"),
        ({"valkey": {"maxmemory": "1 GB"}}, "maxmemory"),
        ({"tracing": {"sampleRatio": 2}}, "sampleRatio"),
        ({"logLevel": "LOUD"}, "logLevel"),
        ({"networkPolicy": {"clients": [{}]}}, "clients"),
    ],
)
def test_a_value_that_is_unknown_or_impossible_is_refused_by_name(render: Render, values: Any, named: str) -> None:
    with pytest.raises(ChartError, match=named):
        render(**values)


def test_every_variable_is_one_that_the_programs_read_and_accept(examples: dict[str, Rendered]) -> None:
    for rendered in examples.values():
        assert settings.unread(rendered) == []
        assert settings.refused(rendered) == []


def test_the_values_of_the_readme_are_valid(render: Render) -> None:
    text = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"cat > values.yaml <<'EOF'\n(.*?)\nEOF\n", text, re.S)
    rendered = render(**yaml.safe_load(example))
    assert rendered.names("Deployment") == {
        "demo-torchrelay-gateway", "demo-torchrelay-worker-llama-3-1-8b", "demo-torchrelay-worker-all-minilm-l6-v2"
    }  # fmt: skip
    assert settings.unread(rendered) == []
    assert settings.refused(rendered) == []


def test_notes_say_where_to_call_and_how_to_get_a_key(render: Render) -> None:
    notes = render(models=[model("llama")]).notes
    assert "demo-torchrelay-gateway.serving.svc:50051 (gRPC, plaintext)" in notes
    assert "dns:///demo-torchrelay-gateway-headless.serving.svc:50051" in notes
    assert "exec deploy/demo-torchrelay-gateway -c gateway -- torchrelay bootstrap" in notes
    assert "--model llama" in notes
    assert "There is no model yet" not in notes


def test_notes_follow_what_is_switched_on(render: Render) -> None:
    notes = render(
        gateway={"tls": {"secretName": "tls"}, "openai": {"enabled": True}, "admin": {"enabled": True}},
        bootstrap={"enabled": True},
    ).notes
    assert "(gRPC, TLS)" in notes
    assert "https://demo-torchrelay-gateway.serving.svc:8080/v1" in notes
    assert "get secret demo-torchrelay-first-admin" in notes
    assert "port-forward svc/demo-torchrelay-gateway-admin" in notes
    assert "plaintext" not in notes


def test_names_in_the_notes_are_names_of_what_there_is(render: Render) -> None:
    rendered = render(gateway={"admin": {"enabled": True}}, bootstrap={"enabled": True})
    assert {"demo-torchrelay-gateway", "demo-torchrelay-gateway-admin"} <= rendered.names("Service")
    assert "demo-torchrelay-gateway-headless" in rendered.names("Service")
    assert "demo-torchrelay-first-admin" in rendered.names("Secret")
