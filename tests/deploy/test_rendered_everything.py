"""What holds of everything in every example: rights, volumes, labels, names, and who finds whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from tests.deploy.builders import HUB, model
from tests.deploy.charts import Container, Rendered, label
from tests.deploy.conftest import Render

RECOMMENDED = ("name", "instance", "version", "part-of", "managed-by")


def containers(examples: dict[str, Rendered]) -> Iterator[Container]:
    for rendered in examples.values():
        yield from rendered.containers()


def test_no_container_may_do_what_it_does_not_need(examples: dict[str, Rendered]) -> None:
    for container in containers(examples):
        rights = container.spec["securityContext"]
        assert rights["allowPrivilegeEscalation"] is False, container
        assert rights["readOnlyRootFilesystem"] is True, container
        assert rights["capabilities"] == {"drop": ["ALL"]}, container
        assert rights["seccompProfile"] == {"type": "RuntimeDefault"}, container
        pod = container.pod["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True, container
        assert pod["securityContext"]["runAsUser"] >= 10_000, container
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod), container


def test_no_pod_is_given_a_token_and_each_account_exists(examples: dict[str, Rendered]) -> None:
    for rendered in examples.values():
        accounts = {account["metadata"]["name"]: account for account in rendered.all("ServiceAccount")}
        used = set()
        for manifest, template in rendered.pods():
            assert template["spec"]["automountServiceAccountToken"] is False, label(manifest)
            account = accounts[template["spec"]["serviceAccountName"]]
            assert account["automountServiceAccountToken"] is False
            used.add(account["metadata"]["name"])
        assert used == set(accounts)


def test_every_container_says_what_it_needs_and_what_it_may_take(examples: dict[str, Rendered]) -> None:
    for container in containers(examples):
        for kind in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(container.spec["resources"][kind]), container


def test_what_is_mounted_is_a_volume_and_each_volume_is_mounted(examples: dict[str, Rendered]) -> None:
    for rendered in examples.values():
        for manifest, template in rendered.pods():
            spec = template["spec"]
            volumes = {volume["name"] for volume in spec.get("volumes") or ()}
            volumes |= {claim["metadata"]["name"] for claim in manifest["spec"].get("volumeClaimTemplates") or ()}
            every = [*(spec.get("initContainers") or ()), *spec["containers"]]
            mounted = {mount["name"] for container in every for mount in container.get("volumeMounts") or ()}
            assert mounted == volumes, label(manifest)
            for container in every:
                paths = [mount["mountPath"] for mount in container.get("volumeMounts") or ()]
                assert len(set(paths)) == len(paths), label(manifest)


def test_programs_write_only_where_they_may(render: Render) -> None:
    rendered = render(models=[model("disk"), model("hub", source=HUB)])
    for container in rendered.containers():
        if container.spec["name"] not in ("worker", "register"):
            continue
        writable = [m["mountPath"] for m in container.spec["volumeMounts"] if not m.get("readOnly")]
        for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR"):
            assert any(f"{container.env[name]}/".startswith(f"{path}/") for path in writable), (container, name)


def test_everything_has_kubernetes_labels_and_a_name_of_its_own(examples: dict[str, Rendered]) -> None:
    for name, rendered in examples.items():
        for manifest in rendered.manifests:
            labels = manifest["metadata"]["labels"]
            assert {f"app.kubernetes.io/{key}" for key in RECOMMENDED} <= set(labels), label(manifest)
            assert manifest["metadata"]["namespace"] == "serving"
            assert all(len(value) <= 63 for value in labels.values()), label(manifest)
        counts = Counter(label(manifest) for manifest in rendered.manifests)
        assert {one: count for one, count in counts.items() if count > 1} == {}, name


def test_selectors_select_the_pods_that_are_meant(examples: dict[str, Rendered]) -> None:
    for rendered in examples.values():
        pods = [(manifest, template) for manifest, template in rendered.pods()]
        for manifest in rendered.manifests:
            spec = manifest.get("spec", {})
            if manifest["kind"] in ("Deployment", "StatefulSet"):
                own = spec["template"]["metadata"]["labels"]
                assert spec["selector"]["matchLabels"].items() <= own.items(), label(manifest)
            if manifest["kind"] in ("Deployment", "StatefulSet", "Service", "PodDisruptionBudget"):
                wanted = spec["selector"].get("matchLabels", spec["selector"])
                chosen = [label(of) for of, pod in pods if wanted.items() <= pod["metadata"]["labels"].items()]
                assert len(chosen) == 1, (label(manifest), chosen)


def test_services_lead_to_ports_that_are_open(examples: dict[str, Rendered]) -> None:
    for rendered in examples.values():
        for service in rendered.all("Service"):
            wanted = service["spec"]["selector"]
            (pod,) = [pod for _, pod in rendered.pods() if wanted.items() <= pod["metadata"]["labels"].items()]
            ports = {port["name"]: port["containerPort"] for one in pod["spec"]["containers"] for port in one["ports"]}
            for port in service["spec"]["ports"]:
                assert ports[port["targetPort"]] == port["port"], label(service)


def test_environments_name_nothing_twice(examples: dict[str, Rendered]) -> None:
    for container in containers(examples):
        names = [entry["name"] for entry in container.spec.get("env") or ()]
        assert len(set(names)) == len(names), container


def test_pods_are_spread_by_labels_that_they_have(examples: dict[str, Rendered]) -> None:
    for rendered in examples.values():
        for deployment in rendered.all("Deployment"):
            template = deployment["spec"]["template"]
            constraints = template["spec"]["topologySpreadConstraints"]
            assert "kubernetes.io/hostname" in [constraint["topologyKey"] for constraint in constraints]
            for constraint in constraints:
                assert constraint["labelSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


def test_names_stay_within_kubernetes_bounds(render: Render) -> None:
    values = {"fullnameOverride": "n" * 80, "bootstrap": {"enabled": True}, "gateway": {"admin": {"enabled": True}}}
    rendered = render(models=[model("m" * 100, autoscaling={"enabled": True})], **values)
    for manifest in rendered.manifests:
        assert len(manifest["metadata"]["name"]) <= 63, label(manifest)
        assert all(len(value) <= 63 for value in manifest["metadata"]["labels"].values()), label(manifest)
    counts = Counter(label(manifest) for manifest in rendered.manifests)
    assert set(counts.values()) == {1}


def test_common_labels_annotations_and_pull_secrets_reach_the_pods(render: Render) -> None:
    rendered = render(
        commonLabels={"team": "serving"},
        imagePullSecrets=["registry"],
        gateway={"podAnnotations": {"a": "b"}, "podLabels": {"c": "d"}, "nodeSelector": {"disk": "ssd"}},
        models=[model(priorityClassName="high", runtimeClassName="nvidia", affinity={"podAntiAffinity": {}})],
    )
    assert {manifest["metadata"]["labels"]["team"] for manifest in rendered.manifests} == {"serving"}
    for _, template in rendered.pods():
        assert template["spec"]["imagePullSecrets"] == [{"name": "registry"}]
    gateway = rendered.get("Deployment", "gateway")["spec"]["template"]
    assert gateway["metadata"]["annotations"] == {"a": "b"}
    assert gateway["metadata"]["labels"]["c"] == "d"
    assert gateway["spec"]["nodeSelector"] == {"disk": "ssd"}
    worker = rendered.get("Deployment", "worker-tiny")["spec"]["template"]["spec"]
    assert (worker["priorityClassName"], worker["runtimeClassName"]) == ("high", "nvidia")
    assert worker["affinity"] == {"podAntiAffinity": {}}
