"""What can be said of chart, images and compose without rendering them: names, versions, comments, examples."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement

from common.settings import variables_of
from tests.deploy import checks
from tests.deploy.charts import CHART, ROOT, value_sets
from tests.deploy.settings import OTHERS, READ_BY, refused_values
from tests.deploy.wheels import entries, wanted
from tests.supply.sbom import normal

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = (CHART / "values.yaml").read_text()
COMPOSE = yaml.safe_load(checks.COMPOSE.read_text())
KNOWN = OTHERS.union(*(variables_of(settings) for classes in READ_BY.values() for settings in classes))


def test_default_values_and_every_example_are_valid() -> None:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    for values in (yaml.safe_load(VALUES), *value_sets().values()):
        assert [error.message for error in validator.iter_errors(values)] == []


def properties(schema: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Each object of the schema that has properties, by its path."""
    while "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
    if "properties" in schema:
        yield path, schema
        for name, inner in schema["properties"].items():
            yield from properties(inner, (*path, name))
    if "items" in schema:
        yield from properties(schema["items"], (*path, "*"))


def test_the_schema_knows_every_value_and_refuses_all_others() -> None:
    values = yaml.safe_load(VALUES)
    for path, schema in properties(SCHEMA):
        assert schema["additionalProperties"] is False, path
        found: Any = values
        for step in path:
            found = found.get(step) if isinstance(found, dict) else None
        if isinstance(found, dict):
            assert set(found) == set(schema["properties"]) - {"global"}, path
    model = SCHEMA["$defs"]["model"]["properties"]
    assert set(model) - {"name", "source"} == set(values["modelDefaults"])


# Kubernetes' own words, and groups that are explained where they first stand.
SPEAK_FOR_THEMSELVES = frozenset(
    (
        *("image", "repository", "tag", "digest", "pullPolicy", "resources", "requests", "limits"),
        *("podAnnotations", "podLabels", "nodeSelector", "tolerations", "affinity", "priorityClassName"),
        *("enabled", "minReplicas", "maxReplicas", "maxUnavailable", "labels", "annotations", "extraVolumeMounts"),
    )
)


def test_every_value_has_a_comment() -> None:
    bare = []
    for before, line in pairwise(VALUES.splitlines()):
        name = re.match(r" *(\w+):", line)
        if name and name[1] not in SPEAK_FOR_THEMSELVES and not before.lstrip().startswith("#"):
            bare.append(line)
    assert bare == []


def test_templates_set_only_variables_that_something_reads() -> None:
    text = "".join(path.read_text() for path in (CHART / "templates").glob("*"))
    names = set(re.findall(r'"(TORCHRELAY_[A-Z0-9_]+[A-Z0-9])"', text))
    assert len(names) > 30
    assert names <= KNOWN


def test_versions_are_those_of_the_project() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (version, version)
    for dockerfile in checks.IMAGES.glob("*.Dockerfile"):
        assert f"ARG VERSION={version}" in dockerfile.read_text()
    images = [service["image"] for service in COMPOSE["services"].values() if "build" in service]
    assert images == [f"torchrelay-gateway:{version}", f"torchrelay-worker:{version}"]


def test_the_workers_image_takes_the_torch_that_is_tested() -> None:
    tested = re.search(r"^TORCH_VERSION \?= (\S+)", (ROOT / "Makefile").read_text(), re.M)
    assert tested is not None
    assert f"ARG TORCH_VERSION={tested[1]}\n" in (checks.IMAGES / "worker.Dockerfile").read_text()
    index = re.search(r"^TORCH_CPU_INDEX \?= (\S+)", (ROOT / "Makefile").read_text(), re.M)
    assert index is not None
    assert f"ARG TORCH_INDEX={index[1]}\n" in (checks.IMAGES / "worker.Dockerfile").read_text()


def test_the_build_context_holds_what_the_images_copy() -> None:
    context = [
        line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    ]
    for entry in context:
        assert (ROOT / entry).exists()
    for dockerfile in checks.IMAGES.glob("*.Dockerfile"):
        for name in re.findall(r"requirements[\w-]*\.lock", dockerfile.read_text()):
            assert name in context


def pins(name: str) -> dict[str, str]:
    """Versions by name of what a lock holds."""
    matches = [re.match(r"([\w.-]+)==([^\s;]+)", line) for line in entries((ROOT / name).read_text())]
    return {normal(match[1]): match[2] for match in matches if match}


def test_a_gateways_lock_has_all_that_it_needs_and_nothing_of_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    client = tomllib.loads((ROOT / "protos" / "pyproject.toml").read_text())["project"]
    wanted_of = [*project["dependencies"], *client["dependencies"], *project["optional-dependencies"]["otel"]]
    needed = {normal(Requirement(line).name) for line in wanted_of} - {"torchrelay-client"}
    locked = pins("requirements-gateway.lock")
    assert needed <= set(locked)
    assert not {"torch", "transformers", "numpy", "triton"} & set(locked)


def test_images_hold_the_versions_that_are_tested_and_one_of_each() -> None:
    tested = pins("requirements-dev.lock") | pins("requirements.lock")
    for name in ("requirements-gateway.lock", "requirements-worker.lock", "requirements-build.lock"):
        own = pins(name)
        assert own == {package: tested.get(package) for package in own}, f"{name}: run make lock"
    of_cuda = [pins(f"requirements-{part}.lock") for part in ("gateway", "worker", "cuda", "worker-cuda")]
    for one in of_cuda:
        for other in of_cuda:
            assert {name: other[name] for name in one if name in other}.items() <= one.items()


def test_ignored_rules_of_dockerfiles_have_reasons() -> None:
    for dockerfile in checks.IMAGES.glob("*.Dockerfile"):
        assert checks.reasons_for_ignoring(dockerfile) == []


@pytest.mark.parametrize("name", ["gateway", "worker"])
def test_compose_sets_variables_that_are_read_and_accepted(name: str) -> None:
    env = COMPOSE["services"][name]["environment"]
    known = OTHERS.union(*(variables_of(settings) for settings in READ_BY[name]))
    assert set(env) <= known
    for settings in READ_BY[name]:
        assert refused_values(settings, env) == []


def test_compose_gives_services_no_more_than_they_need() -> None:
    for name, service in COMPOSE["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert service["healthcheck"]["test"], name
    published = {name: service["ports"] for name, service in COMPOSE["services"].items() if "ports" in service}
    assert published == {"gateway": ["127.0.0.1:50051:50051"]}
    assert COMPOSE["networks"]["queue"] == {"internal": True}


def test_compose_stops_a_service_only_after_its_drain() -> None:
    for name, prefix in (("gateway", "TORCHRELAY_GATEWAY_"), ("worker", "TORCHRELAY_WORKER_")):
        settings = next(one for one in READ_BY[name] if one.model_config.get("env_prefix") == prefix)
        drain = settings.model_fields["drain_s"].default
        assert int(COMPOSE["services"][name]["stop_grace_period"].removesuffix("s")) > drain + 10


def test_conditions_of_a_lock_are_settled_for_one_python() -> None:
    digest = "--hash=sha256:" + "0" * 64
    lock = f"always==1 \\\n    {digest}\nold==2 ; python_full_version < '3.11.3' \\\n    {digest} \\\n    {digest}\n"
    assert wanted(lock, "3.11.2") == [f"always==1 {digest}", f"old==2 {digest} {digest}"]
    assert wanted(lock, "3.12.0") == [f"always==1 {digest}"]


def test_the_wheel_of_the_project_holds_nothing_of_deploy() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert "deploy" not in build["packages"]


def test_each_skipped_policy_has_a_reason() -> None:
    assert all(re.fullmatch(r"CKV\w*_\d+", check) and len(reason) > 20 for check, reason in checks.SKIPPED.items())
