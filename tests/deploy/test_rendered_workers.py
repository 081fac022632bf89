"""Workers: a Deployment for each model, its source, its GPU, its probes, its registration and its scaling."""

from __future__ import annotations

from typing import Any

import pytest

from tests.deploy.builders import HUB, model
from tests.deploy.charts import ChartError
from tests.deploy.conftest import Render

WORKER = "worker-tiny"
REGISTER = "tiny-register"


def test_without_models_there_is_nothing_of_workers(render: Render) -> None:
    rendered = render()
    assert rendered.names("Deployment") == {"demo-torchrelay-gateway"}
    assert rendered.all("Job") == []
    assert "demo-torchrelay-worker" not in rendered.names("ServiceAccount")
    assert "There is no model yet" in rendered.notes


def test_each_model_has_a_worker_that_selects_its_own_pods(render: Render) -> None:
    rendered = render(models=[model("one"), model("two.b")])
    assert rendered.names("Deployment") == {
        "demo-torchrelay-gateway", "demo-torchrelay-worker-one", "demo-torchrelay-worker-two-b"
    }  # fmt: skip
    selectors = [
        rendered.get("Deployment", f"worker-{name}")["spec"]["selector"]["matchLabels"] for name in ("one", "two-b")
    ]
    labels = [
        rendered.get("Deployment", f"worker-{name}")["spec"]["template"]["metadata"]["labels"]
        for name in ("one", "two-b")
    ]
    matches = [[selector.items() <= label.items() for label in labels] for selector in selectors]
    assert matches == [[True, False], [False, True]]
    assert rendered.container("Deployment", "worker-two-b").env["TORCHRELAY_WORKER_MODEL_NAME"] == "two.b"


def test_models_whose_names_are_one_in_kubernetes_are_refused(render: Render) -> None:
    with pytest.raises(ChartError, match=r'"a\.b" and "a-b" would both be called'):
        render(models=[model("a.b"), model("a-b")])


def test_a_gpu_is_requested_tolerated_and_used(render: Render) -> None:
    own = {"key": "team", "operator": "Exists"}
    container = render(models=[model(gpu=True, quantization="fp8", tolerations=[own])]).container("Deployment", WORKER)
    assert container.spec["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container.spec["resources"]["requests"]["nvidia.com/gpu"] == 1
    assert container.spec["image"] == "torchrelay-worker-cuda:0.1.0"
    assert container.env["TORCHRELAY_WORKER_DEVICE"] == "cuda"
    assert container.env["TORCHRELAY_WORKER_QUANTIZATION"] == "fp8"
    keys = [toleration["key"] for toleration in container.pod["spec"]["tolerations"]]
    assert keys == ["team", "nvidia.com/gpu"]
    assert container.manifest["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_a_slice_of_a_gpu_is_requested_by_its_name(render: Render) -> None:
    container = render(models=[model(gpu=True, gpuResource="nvidia.com/mig-1g.10gb")]).container("Deployment", WORKER)
    assert container.spec["resources"]["limits"]["nvidia.com/mig-1g.10gb"] == 1
    assert "nvidia.com/gpu" not in container.spec["resources"]["limits"]


def test_without_a_gpu_none_is_asked_for(render: Render) -> None:
    container = render(models=[model()]).container("Deployment", WORKER)
    assert set(container.spec["resources"]["limits"]) == {"cpu", "memory"}
    assert container.spec["image"] == "torchrelay-worker:0.1.0"
    assert container.env["TORCHRELAY_WORKER_DEVICE"] == "cpu"
    assert "tolerations" not in container.pod["spec"]


def test_what_needs_a_gpu_is_refused_without_one(render: Render) -> None:
    with pytest.raises(ChartError, match="tiny asks for int4, which needs gpu: true"):
        render(models=[model(quantization="int4")])


@pytest.mark.parametrize("seconds", [1, 5, 299, 300, 7200])
def test_a_start_may_take_as_long_as_was_said_and_not_much_longer(render: Render, seconds: int) -> None:
    rendered = render(models=[model(startupSeconds=seconds)])
    container = rendered.container("Deployment", WORKER)
    probe = container.spec["startupProbe"]
    assert probe["httpGet"] == {"path": "/readyz", "port": "metrics"}
    assert seconds <= probe["failureThreshold"] * probe["periodSeconds"] < seconds + 5
    assert container.manifest["spec"]["progressDeadlineSeconds"] > seconds


def test_a_worker_is_killed_only_after_its_drain(render: Render) -> None:
    for drain in (0, 20, 900):
        container = render(models=[model(drainSeconds=drain)]).container("Deployment", WORKER)
        assert container.pod["spec"]["terminationGracePeriodSeconds"] >= drain + 10
        assert container.env["TORCHRELAY_WORKER_DRAIN_S"] == str(drain)


def test_probes_ask_where_the_worker_answers(render: Render) -> None:
    container = render(models=[model()]).container("Deployment", WORKER)
    ports = {port["name"]: port["containerPort"] for port in container.spec["ports"]}
    assert container.env["TORCHRELAY_WORKER_METRICS_ADDRESS"] == f"0.0.0.0:{ports['metrics']}"
    assert container.spec["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "metrics"}
    assert container.spec["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "metrics"}


def volume(container: Any, path: str) -> dict[str, Any]:
    """What is mounted at a path."""
    name = container.mounts[path]
    found: dict[str, Any] = next(one for one in container.pod["spec"]["volumes"] if one["name"] == name)
    return found


def test_a_model_from_the_hub_is_fetched_with_its_token(render: Render) -> None:
    container = render(models=[model(source=HUB)]).container("Deployment", WORKER)
    assert container.env["TORCHRELAY_WORKER_MODEL"] == "org/model"
    assert container.env["TORCHRELAY_WORKER_REVISION"] == "abc"
    assert container.env["HF_TOKEN"] == {"secretKeyRef": {"name": "hub-token", "key": "token"}}
    assert "HF_HUB_OFFLINE" not in container.env
    assert container.env["HF_HOME"].startswith(container.env["XDG_CACHE_HOME"])
    assert "emptyDir" in volume(container, container.env["XDG_CACHE_HOME"])


def test_a_model_from_a_volume_is_mounted_read_only_and_the_hub_is_not_asked(render: Render) -> None:
    source = {"volumeClaim": {"name": "models", "path": "/family/tiny/"}}
    container = render(models=[model(source=source)]).container("Deployment", WORKER)
    assert container.env["TORCHRELAY_WORKER_MODEL"] == "/models/family/tiny"
    assert volume(container, "/models")["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
    assert container.env["HF_HUB_OFFLINE"] == "1"


def test_a_model_from_an_image_is_mounted(render: Render) -> None:
    source = {"image": {"reference": "registry/model:1"}}
    container = render(models=[model(source=source)]).container("Deployment", WORKER)
    assert container.env["TORCHRELAY_WORKER_MODEL"] == "/models"
    assert volume(container, "/models")["image"] == {"reference": "registry/model:1", "pullPolicy": "IfNotPresent"}


def test_a_model_of_an_init_image_is_copied_to_where_the_worker_reads_it(render: Render) -> None:
    source = {"initImage": {"reference": "registry/model:1", "path": "/weights", "size": "3Gi"}}
    rendered = render(models=[model(source=source)])
    for kind, name in (("Deployment", WORKER), ("Job", REGISTER)):
        container = rendered.container(kind, name)
        (copier,) = container.pod["spec"]["initContainers"]
        assert copier["command"] == ["cp", "-R", "/weights/.", "/models/model/"]
        assert container.env["TORCHRELAY_WORKER_MODEL"] == "/models/model"
        assert volume(container, "/models/model")["emptyDir"] == {"sizeLimit": "3Gi"}
        assert copier["volumeMounts"][0]["name"] == container.mounts["/models/model"]


@pytest.mark.parametrize("source", [{}, {**HUB, "image": {"reference": "x"}}, {"s3": {"bucket": "x"}}])
def test_a_model_has_exactly_one_known_source(render: Render, source: dict[str, Any]) -> None:
    with pytest.raises(ChartError, match="source"):
        render(models=[{"name": "tiny", "source": source}])


def test_values_of_a_model_win_over_the_defaults_also_where_they_are_false_or_zero(render: Render) -> None:
    rendered = render(
        models=[model(replicas=0, register=False, podDisruptionBudget={"enabled": False}), model("other")],
        modelDefaults={"replicas": 3, "dtype": "bfloat16"},
    )
    assert rendered.get("Deployment", WORKER)["spec"]["replicas"] == 0
    assert rendered.get("Deployment", "worker-other")["spec"]["replicas"] == 3
    assert rendered.names("Job") == {"demo-torchrelay-other-register"}
    assert rendered.names("PodDisruptionBudget") == {"demo-torchrelay-gateway", "demo-torchrelay-worker-other"}
    assert rendered.container("Deployment", WORKER).env["TORCHRELAY_WORKER_DTYPE"] == "bfloat16"


def test_large_numbers_reach_the_settings_as_integers(render: Render) -> None:
    container = render(models=[model(kvCacheBytes=17179869184, maxModelLen=131072)]).container("Deployment", WORKER)
    assert container.env["TORCHRELAY_ENGINE_KV_CACHE_BYTES"] == "17179869184"
    assert container.env["TORCHRELAY_ENGINE_MAX_MODEL_LEN"] == "131072"


def test_shared_memory_is_memory(render: Render) -> None:
    container = render(models=[model(sharedMemory="4Gi")]).container("Deployment", WORKER)
    assert volume(container, "/dev/shm")["emptyDir"] == {"medium": "Memory", "sizeLimit": "4Gi"}


def test_adapters_and_a_kept_cache_come_from_claims(render: Render) -> None:
    values = model(adaptersVolumeClaim="adapters", cache={"volumeClaim": "cache"})
    container = render(models=[values]).container("Deployment", WORKER)
    assert (
        volume(container, container.env["TORCHRELAY_WORKER_ADAPTERS_DIR"])["persistentVolumeClaim"]["readOnly"] is True
    )
    assert volume(container, "/var/cache/torchrelay")["persistentVolumeClaim"] == {"claimName": "cache"}


@pytest.mark.parametrize("source", [None, HUB, {"image": {"reference": "x:1", "path": "m"}}])
def test_a_registration_publishes_what_the_worker_serves(render: Render, source: dict[str, Any] | None) -> None:
    values = model(source=source, dtype="float32", gpu=True, env={"TORCHRELAY_WORKER_TOOL_FORMAT": "hermes"})
    rendered = render(models=[values])
    worker, job = rendered.container("Deployment", WORKER), rendered.container("Job", REGISTER)
    assert job.spec["args"] == ["models", "register", "--model", worker.env["TORCHRELAY_WORKER_MODEL"]]
    for name in ("MODEL_NAME", "DTYPE", "REVISION", "TOOL_FORMAT"):
        assert job.env.get(f"TORCHRELAY_WORKER_{name}") == worker.env.get(f"TORCHRELAY_WORKER_{name}")
    assert job.spec["image"] == worker.spec["image"]
    assert "nvidia.com/gpu" not in job.spec["resources"]["limits"]
    hook = job.manifest["metadata"]["annotations"]["helm.sh/hook"]
    assert hook == "post-install,post-upgrade"


def test_a_scaler_asks_for_this_models_wait_and_takes_the_number_into_its_hands(render: Render) -> None:
    scaling = {"enabled": True, "minReplicas": 0, "maxReplicas": 7, "targetWaitSeconds": 2.5, "cooldownSeconds": 60}
    rendered = render(models=[model("a.b", autoscaling=scaling), model("plain")])
    assert rendered.names("ScaledObject") == {"demo-torchrelay-worker-a-b"}
    assert "replicas" not in rendered.get("Deployment", "worker-a-b")["spec"]
    spec = rendered.get("ScaledObject", "worker-a-b")["spec"]
    assert spec["scaleTargetRef"]["name"] == "demo-torchrelay-worker-a-b"
    assert (spec["minReplicaCount"], spec["maxReplicaCount"], spec["cooldownPeriod"]) == (0, 7, 60)
    wait, running = spec["triggers"]
    query = 'max(torchrelay_queue_expected_wait_seconds{model_name="a.b", namespace="serving"})'
    assert wait["metadata"]["query"] == query
    assert wait["metadata"]["threshold"] == "2.5"
    assert wait["metadata"]["activationThreshold"] == "0"
    assert wait["metadata"]["ignoreNullValues"] == running["metadata"]["ignoreNullValues"] == "false"
    # Work in progress keeps the last worker, and asks for no second one.
    assert 'torchrelay_jobs_running{model_name="a.b"' in running["metadata"]["query"]
    assert float(running["metadata"]["threshold"]) > 10_000


def test_scaling_from_zero_needs_a_registered_model(render: Render) -> None:
    with pytest.raises(ChartError, match="tiny scales from zero, so it must be registered"):
        render(models=[model(register=False, autoscaling={"enabled": True, "minReplicas": 0})])
    with pytest.raises(ChartError, match="minReplicas above maxReplicas"):
        render(models=[model(autoscaling={"enabled": True, "minReplicas": 5, "maxReplicas": 4})])


def test_further_triggers_are_added(render: Render) -> None:
    extra = {"type": "cron", "metadata": {"start": "0 8 * * *", "end": "0 18 * * *", "desiredReplicas": "2"}}
    rendered = render(models=[model(autoscaling={"enabled": True, "extraTriggers": [extra]})])
    assert rendered.get("ScaledObject", WORKER)["spec"]["triggers"][-1] == extra
