"""Gateways: addresses, probes, certificates, identity, and time to drain."""

from __future__ import annotations

import pytest

from tests.deploy.charts import ChartError
from tests.deploy.conftest import Render


def test_by_default_two_gateways_stand_behind_a_balanced_and_a_headless_service(render: Render) -> None:
    rendered = render()
    assert rendered.get("Deployment", "gateway")["spec"]["replicas"] == 2
    assert rendered.get("Service", "gateway")["spec"]["type"] == "ClusterIP"
    assert rendered.get("Service", "gateway-headless")["spec"]["clusterIP"] == "None"
    assert "demo-torchrelay-gateway-admin" not in rendered.names("Service")
    assert rendered.names("HorizontalPodAutoscaler") == set()
    assert rendered.get("PodDisruptionBudget", "gateway")["spec"]["maxUnavailable"] == 1


@pytest.mark.parametrize(("pre_stop", "drain"), [(5, 20), (0, 0), (30, 600)])
def test_a_pod_is_killed_only_after_pause_and_drain(render: Render, pre_stop: int, drain: int) -> None:
    container = render(gateway={"preStopSeconds": pre_stop, "drainSeconds": drain}).container("Deployment", "gateway")
    assert container.pod["spec"]["terminationGracePeriodSeconds"] >= pre_stop + drain + 10
    assert container.env["TORCHRELAY_GATEWAY_DRAIN_S"] == str(drain)
    assert container.spec["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", str(pre_stop)]


def test_probes_ask_the_health_port_by_name_of_what_is_meant(render: Render) -> None:
    container = render().container("Deployment", "gateway")
    probes = {name: container.spec[f"{name}Probe"]["grpc"] for name in ("startup", "liveness", "readiness")}
    assert {name: probe["service"] for name, probe in probes.items()} == {
        "startup": "liveness", "liveness": "liveness", "readiness": "readiness"
    }  # fmt: skip
    port = int(container.env["TORCHRELAY_GATEWAY_HEALTH_ADDRESS"].rpartition(":")[2])
    assert {probe["port"] for probe in probes.values()} == {port}


def test_an_autoscaler_takes_the_number_of_gateways_into_its_hands(render: Render) -> None:
    rendered = render(gateway={"autoscaling": {"enabled": True, "minReplicas": 3, "maxReplicas": 9}})
    assert "replicas" not in rendered.get("Deployment", "gateway")["spec"]
    scaler = rendered.get("HorizontalPodAutoscaler", "gateway")["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (3, 9)
    assert scaler["scaleTargetRef"]["name"] == "demo-torchrelay-gateway"


def test_plaintext_is_said_aloud_and_can_be_forbidden(render: Render) -> None:
    assert render().container("Deployment", "gateway").env["TORCHRELAY_GATEWAY_INSECURE"] == "true"
    with pytest.raises(ChartError, match=r"gateway\.plaintext is false: give gateway\.tls\.secretName"):
        render(gateway={"plaintext": False})
    encrypted = render(gateway={"plaintext": False, "tls": {"secretName": "tls"}})
    assert "TORCHRELAY_GATEWAY_INSECURE" not in encrypted.container("Deployment", "gateway").env


def test_certificates_are_mounted_where_the_settings_look_for_them(render: Render) -> None:
    tls = {"secretName": "tls", "clientCertificates": "required"}
    container = render(gateway={"tls": tls}).container("Deployment", "gateway")
    volumes = {volume["name"]: volume.get("secret") for volume in container.pod["spec"]["volumes"]}
    for name in ("TLS_CERT_FILE", "TLS_KEY_FILE", "TLS_CLIENT_CA_FILE"):
        folder, _, file = container.env[f"TORCHRELAY_GATEWAY_{name}"].rpartition("/")
        secret = volumes[container.mounts[folder]]
        assert secret["secretName"] == "tls"
        assert file in [item["path"] for item in secret["items"]]
    assert container.env["TORCHRELAY_GATEWAY_CLIENT_CERTIFICATES"] == "required"
    assert "TORCHRELAY_GATEWAY_MTLS_ADDRESS" not in container.env


def test_optional_client_certificates_have_a_port_of_their_own(render: Render) -> None:
    tls = {"secretName": "tls", "clientCertificates": "optional", "clientCaSecretName": "callers"}
    rendered = render(gateway={"tls": tls})
    container = rendered.container("Deployment", "gateway")
    assert container.env["TORCHRELAY_GATEWAY_MTLS_ADDRESS"] == "0.0.0.0:50054"
    ports = {port["name"] for port in rendered.get("Service", "gateway")["spec"]["ports"]}
    assert ports == {"grpc", "grpc-mtls"}
    ca = next(volume for volume in container.pod["spec"]["volumes"] if volume["name"] == "client-ca")
    assert ca["secret"]["secretName"] == "callers"


def test_client_certificates_without_tls_are_refused(render: Render) -> None:
    with pytest.raises(ChartError, match=r"clientCertificates needs gateway\.tls\.secretName"):
        render(gateway={"tls": {"clientCertificates": "required"}})


def test_tokens_need_an_audience_and_their_keys_come_from_one_place(render: Render) -> None:
    with pytest.raises(ChartError, match=r"auth\.jwt\.audience is needed"):
        render(auth={"jwt": {"issuer": "https://issuer"}})
    jwt = {"issuer": "https://issuer", "audience": ["a", "b"], "jwksSecretName": "keys"}
    container = render(auth={"jwt": jwt}).container("Deployment", "gateway")
    assert container.env["TORCHRELAY_AUTH_JWT_AUDIENCE"] == "a,b"
    assert container.env["TORCHRELAY_AUTH_JWKS_FILE"].rpartition("/")[0] in container.mounts
    with pytest.raises(ChartError, match="exclude each other"):
        render(auth={"jwt": {**jwt, "jwksUrl": "https://issuer/keys"}})


def test_operators_port_is_on_loopback_until_it_is_asked_for(render: Render) -> None:
    name = "TORCHRELAY_GATEWAY_ADMIN_ADDRESS"
    assert render().container("Deployment", "gateway").env[name] == "127.0.0.1:50052"
    opened = render(gateway={"admin": {"enabled": True}})
    assert opened.container("Deployment", "gateway").env[name] == "0.0.0.0:50052"
    assert opened.get("Service", "gateway-admin")["spec"]["ports"][0]["port"] == 50052


def test_the_http_door_is_there_when_it_is_asked_for(render: Render) -> None:
    assert "TORCHRELAY_GATEWAY_OPENAI_ADDRESS" not in render().container("Deployment", "gateway").env
    opened = render(gateway={"openai": {"enabled": True}})
    assert opened.container("Deployment", "gateway").env["TORCHRELAY_GATEWAY_OPENAI_ADDRESS"] == "0.0.0.0:8080"
    ports = {port["port"]: port["appProtocol"] for port in opened.get("Service", "gateway")["spec"]["ports"]}
    assert ports == {50051: "kubernetes.io/h2c", 8080: "http"}


def test_meshes_are_told_the_protocol_and_tls_is_not_called_plaintext(render: Render) -> None:
    def protocol(**gateway: object) -> str | None:
        ports = render(gateway=gateway).get("Service", "gateway")["spec"]["ports"]
        found: str | None = ports[0].get("appProtocol")
        return found

    assert protocol() == "kubernetes.io/h2c"
    assert protocol(service={"appProtocol": "grpc"}) == "grpc"
    assert protocol(tls={"secretName": "tls"}) is None


def test_an_operators_own_settings_win(render: Render) -> None:
    container = render(
        gateway={"env": {"TORCHRELAY_GATEWAY_MAX_CALLS": 64, "TORCHRELAY_GATEWAY_REFLECTION": True}},
        env={"TORCHRELAY_QUEUE_RETENTION_MS": 3600000},
        logLevel="WARNING",
    ).container("Deployment", "gateway")
    assert container.env["TORCHRELAY_GATEWAY_MAX_CALLS"] == "64"
    assert container.env["TORCHRELAY_GATEWAY_REFLECTION"] == "true"
    assert container.env["TORCHRELAY_QUEUE_RETENTION_MS"] == "3600000"  # not 3.6e+06
    assert container.env["TORCHRELAY_LOG_LEVEL"] == "WARNING"


def test_a_digest_is_taken_instead_of_a_tag(render: Render) -> None:
    digest = "sha256:" + "0" * 64
    image = {"repository": "registry/gateway", "tag": "1.2", "digest": digest}
    assert (
        render(gateway={"image": image}).container("Deployment", "gateway").spec["image"]
        == f"registry/gateway@{digest}"
    )
    tagged = render(gateway={"image": {"tag": "1.2"}}).container("Deployment", "gateway")
    assert tagged.spec["image"] == "torchrelay-gateway:1.2"


def test_encryption_keys_are_mounted_and_named(render: Render) -> None:
    container = render(encryption={"secretName": "keys", "acceptPlaintext": True}).container("Deployment", "gateway")
    assert container.env["TORCHRELAY_ENCRYPTION_KEYS_FILE"].rpartition("/")[0] in container.mounts
    assert container.env["TORCHRELAY_ENCRYPTION_ACCEPT_PLAINTEXT"] == "true"
    plain = render().container("Deployment", "gateway")
    assert not [name for name in plain.env if name.startswith("TORCHRELAY_ENCRYPTION")]


def test_the_budget_of_disruptions_can_be_left_out(render: Render) -> None:
    assert render(gateway={"podDisruptionBudget": {"enabled": False}}).names("PodDisruptionBudget") == set()
