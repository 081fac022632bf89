"""The chart, rendered as a release would be, and what stands in it, by kind and name."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import yaml

ROOT: Final = Path(__file__).parents[2]
CHART: Final = Path(os.environ.get("DEPLOY_CHART") or ROOT / "deploy" / "chart")  # another one is a damaged copy
EXAMPLES: Final = ROOT / "deploy" / "examples"
RELEASE: Final = "demo"
NAMESPACE: Final = "serving"

Manifest = dict[str, Any]


class ChartError(Exception):
    """The chart refuses the values, or does not render."""


def tools_dir() -> Path | None:
    """The programs' folder of the venv that DEPLOY_TOOLS names; None outside of `make deploy-check`."""
    named = os.environ.get("DEPLOY_TOOLS")
    return Path(named) if named else None


def value_sets() -> dict[str, dict[str, Any]]:
    """The example values, by what their files are called."""
    files = sorted(EXAMPLES.glob("values-*.yaml"))
    return {file.stem.removeprefix("values-"): yaml.safe_load(file.read_text()) or {} for file in files}


@dataclass(frozen=True, slots=True)
class Container:
    """A container and the pod and manifest that it is part of."""

    manifest: Manifest
    pod: Mapping[str, Any]
    spec: Mapping[str, Any]

    @property
    def env(self) -> dict[str, Any]:
        """Its variables: a value, or where it comes from."""
        return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in self.spec.get("env", ())}

    @property
    def mounts(self) -> dict[str, str]:
        """Names of volumes by where they are mounted."""
        return {mount["mountPath"]: mount["name"] for mount in self.spec.get("volumeMounts", ())}

    def __str__(self) -> str:
        return f"{label(self.manifest)}/{self.spec['name']}"


@dataclass(frozen=True, slots=True)
class Rendered:
    """All manifests of a release."""

    manifests: list[Manifest] = field(default_factory=list)
    notes: str = ""

    def all(self, kind: str) -> list[Manifest]:
        return [manifest for manifest in self.manifests if manifest["kind"] == kind]

    def names(self, kind: str) -> set[str]:
        return {manifest["metadata"]["name"] for manifest in self.all(kind)}

    def get(self, kind: str, name: str) -> Manifest:
        """The one of that kind whose name is the release's prefix and `name`."""
        full = f"{RELEASE}-torchrelay{'-' if name else ''}{name}"
        found = [manifest for manifest in self.all(kind) if manifest["metadata"]["name"] == full]
        assert len(found) == 1, f"{kind} {full}: {len(found)} of {sorted(self.names(kind))}"
        return found[0]

    def pods(self) -> Iterator[tuple[Manifest, Mapping[str, Any]]]:
        """Each manifest that makes pods, with the pod's template."""
        for manifest in self.manifests:
            template = manifest.get("spec", {}).get("template")
            if manifest["kind"] in ("Deployment", "StatefulSet", "Job") and template is not None:
                yield manifest, template

    def containers(self) -> Iterator[Container]:
        for manifest, template in self.pods():
            for group in ("initContainers", "containers"):
                for spec in template["spec"].get(group) or ():
                    yield Container(manifest, template, spec)

    def container(self, kind: str, name: str) -> Container:
        """The first container of what `get` finds."""
        manifest = self.get(kind, name)
        template = manifest["spec"]["template"]
        return Container(manifest, template, template["spec"]["containers"][0])


def label(manifest: Manifest) -> str:
    return f"{manifest['kind']} {manifest['metadata']['name']}"


class Helm:
    """Renders charts, by a process of its own. Use as a context manager."""

    def __init__(self, tools: Path) -> None:
        self._tools = tools

    def __enter__(self) -> Self:
        server = Path(__file__).with_name("render_server.py")
        self._process = subprocess.Popen(
            [str(self._tools / "python"), "-I", str(server)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.__exit__(kind, error, at)  # closes its input, and waits for its end

    def render(self, values: Mapping[str, Any] | None = None, chart: Path = CHART) -> Rendered:
        """Raises ChartError."""
        answer = self._ask("render", values, chart)
        if "error" in answer:
            raise ChartError(answer["error"])
        files: dict[str, str] = answer["files"]
        notes = next((text for path, text in files.items() if path.endswith("NOTES.txt")), "")
        found = []
        for path, text in sorted(files.items()):
            if path.endswith(".yaml"):
                found += [manifest for manifest in _load(path, text) if manifest]
        return Rendered(found, notes)

    def lint(self, values: Mapping[str, Any] | None = None, chart: Path = CHART) -> list[str]:
        """What Helm's linter finds, but for remarks."""
        answer = self._ask("lint", values, chart)
        if "error" in answer:
            return [answer["error"]]
        remarks = [f"{m['path']}: {m['error']}" for m in answer["messages"] if m["severity"] > 1]
        return [*remarks, *map(str, answer["errors"])]

    def _ask(self, what: str, values: Mapping[str, Any] | None, chart: Path) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        request = {
            "what": what, "chart": str(chart), "values": dict(values or {}), "name": RELEASE, "namespace": NAMESPACE
        }  # fmt: skip
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise RuntimeError("the process that renders has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose maps hold no key twice: a parser would take the last and lose the others."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]  # type: ignore[no-untyped-call]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise ChartError(f"{node.start_mark}: {', '.join(map(str, twice))} stands there twice")
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _load(path: str, text: str) -> list[Manifest]:
    try:
        return list(yaml.load_all(text, _UniqueKeys))
    except yaml.YAMLError as error:
        raise ChartError(f"{path} is no YAML: {error}") from error
