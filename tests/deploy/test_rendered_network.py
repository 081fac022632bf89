"""Network policies: each pod has exactly the flows that it needs."""

from __future__ import annotations

import pytest

from tests.deploy.builders import EXTERNAL, HUB, model
from tests.deploy.charts import Rendered
from tests.deploy.conftest import Render
from tests.deploy.flows import Flow, flows, policies_of

DNS = {Flow("egress", "kube-system", 53)}
QUEUE = {Flow("egress", "valkey in serving", 6379)}
HTTPS = {Flow("egress", "0.0.0.0/0", 443), Flow("egress", "::/0", 443)}
CALLS = {Flow("ingress", "any namespace", 50051), Flow("ingress", "monitoring", 9464)}


def of(rendered: Rendered, kind: str, name: str) -> set[Flow]:
    return flows(rendered, rendered.get(kind, name)["spec"]["template"]["metadata"]["labels"])


def test_every_pod_of_every_example_is_denied_all_but_what_one_other_policy_allows(
    examples: dict[str, Rendered],
) -> None:
    for name, rendered in examples.items():
        used = set()
        for manifest, template in rendered.pods():
            chosen = {policy["metadata"]["name"] for policy in policies_of(rendered, template["metadata"]["labels"])}
            assert "demo-torchrelay-deny" in chosen, (name, manifest["metadata"]["name"])
            assert len(chosen) == 2, (name, manifest["metadata"]["name"], chosen)
            used |= chosen
        assert used == rendered.names("NetworkPolicy"), f"{name} has policies that select nothing"


def test_the_default_flows(render: Render) -> None:
    rendered = render(models=[model()])
    assert of(rendered, "Deployment", "gateway") == DNS | QUEUE | CALLS
    assert of(rendered, "Deployment", "worker-tiny") == DNS | QUEUE | {Flow("ingress", "monitoring", 9465)}
    assert of(rendered, "Job", "tiny-register") == DNS | QUEUE
    users = ("gateway in serving", "worker in serving", "register in serving")
    assert of(rendered, "StatefulSet", "valkey") == {Flow("ingress", user, 6379) for user in users}
    assert of(render(), "StatefulSet", "valkey") == {Flow("ingress", "gateway in serving", 6379)}


def test_the_hub_is_reached_only_for_models_that_come_from_it(render: Render) -> None:
    rendered = render(models=[model("hub", source=HUB), model("disk")])
    for kind, name in (("Deployment", "worker-hub"), ("Job", "hub-register")):
        assert of(rendered, kind, name) >= HTTPS
    for kind, name in (("Deployment", "worker-disk"), ("Job", "disk-register"), ("Deployment", "gateway")):
        assert not of(rendered, kind, name) & HTTPS


def test_an_issuers_keys_are_fetched_by_gateways_unless_they_are_mounted(render: Render) -> None:
    jwt = {"issuer": "https://issuer", "audience": ["a"]}
    assert of(render(auth={"jwt": jwt}), "Deployment", "gateway") >= HTTPS
    assert not of(render(auth={"jwt": {**jwt, "jwksSecretName": "keys"}}), "Deployment", "gateway") & HTTPS


@pytest.mark.parametrize(("endpoint", "port"), [("http://collector:4318", 4318), ("https://collector.svc/", 4317)])
def test_traces_leave_by_the_collectors_port(render: Render, endpoint: str, port: int) -> None:
    rendered = render(tracing={"endpoint": endpoint}, models=[model()])
    for name in ("gateway", "worker-tiny"):
        assert Flow("egress", "anywhere", port) in of(rendered, "Deployment", name)
    peer = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "telemetry"}}}]
    narrowed = render(tracing={"endpoint": endpoint}, networkPolicy={"otlp": peer})
    assert Flow("egress", "telemetry", port) in of(narrowed, "Deployment", "gateway")


def test_another_server_is_reached_where_it_is_said_to_be(render: Render) -> None:
    policy = {"redis": {"to": [{"ipBlock": {"cidr": "10.0.0.0/24"}}], "ports": [6380, 26379]}}
    rendered = render(redis=EXTERNAL, networkPolicy=policy, models=[model()])
    wanted = {Flow("egress", "10.0.0.0/24", 6380), Flow("egress", "10.0.0.0/24", 26379)}
    assert of(rendered, "Deployment", "gateway") == DNS | CALLS | wanted
    assert of(rendered, "Job", "tiny-register") == DNS | wanted


def test_operators_are_let_in_only_where_their_port_is_on_and_they_are_named(render: Render) -> None:
    peers = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "operations"}}}]
    on = {"admin": {"enabled": True}}
    flow = Flow("ingress", "operations", 50052)
    assert flow in of(render(gateway=on, networkPolicy={"operators": peers}), "Deployment", "gateway")
    for rendered in (render(gateway=on), render(networkPolicy={"operators": peers})):
        assert 50052 not in {flow.port for flow in of(rendered, "Deployment", "gateway")}


def test_callers_can_be_narrowed_and_reach_all_doors(render: Render) -> None:
    tls = {"secretName": "tls", "clientCertificates": "optional"}
    rendered = render(
        gateway={"openai": {"enabled": True}, "tls": tls},
        networkPolicy={"clients": [{"ipBlock": {"cidr": "10.9.0.0/16"}}]},
    )
    ports = {flow.port for flow in of(rendered, "Deployment", "gateway") if flow.peer == "10.9.0.0/16"}
    assert ports == {50051, 50054, 8080}


def test_a_meshs_control_plane_can_be_added(examples: dict[str, Rendered]) -> None:
    for name in ("gateway", "worker-smollm2-135m-instruct"):
        assert Flow("egress", "istio-system", 15012) in of(examples["mesh"], "Deployment", name)


def test_bootstrap_reaches_the_api_and_the_queue(render: Render) -> None:
    rendered = render(bootstrap={"enabled": True})
    api = {Flow("egress", "anywhere", 443), Flow("egress", "anywhere", 6443)}
    assert of(rendered, "Job", "bootstrap") == DNS | QUEUE | api
    assert Flow("ingress", "bootstrap in serving", 6379) in of(rendered, "StatefulSet", "valkey")


def test_policies_can_be_left_out(render: Render) -> None:
    assert render(networkPolicy={"enabled": False}, models=[model()]).all("NetworkPolicy") == []
