"""What tools of others say of what is in deploy/: each check returns its faults, a text each; none if all is well."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import jsonschema
import trustme
import yaml

from tests.deploy.charts import CHART, EXAMPLES, ROOT, Manifest, Rendered, label
from tests.mesh import envoy

KUBERNETES: Final = ("1.31", "1.37")  # the oldest that the chart takes, and the newest that the validator knows
SCHEMAS: Final = Path(__file__).with_name("schemas")
IMAGES: Final = ROOT / "deploy" / "images"
COMPOSE: Final = ROOT / "deploy" / "compose.yaml"

# What checkov is not asked, and why.
SKIPPED: Final[Mapping[str, str]] = {
    "CKV_K8S_15": "images have fixed tags or digests: to pull them always would tie every start to the registry",
    "CKV_K8S_35": "the settings read passwords from the environment; files of keys and certificates are mounted",
    "CKV_K8S_43": "the images are built by whoever installs the chart, who sets image.digest: a chart cannot know it",
}


class ToolMissing(Exception):
    """A program is not there; the message says what to install."""


def is_custom(manifest: Manifest) -> bool:
    """Whether its kind is an operator's, unknown to Kubernetes itself."""
    group = manifest["apiVersion"].rpartition("/")[0]
    return "." in group and not group.endswith(".k8s.io")


def kubernetes(tools: Path, rendered: Rendered, version: str) -> list[str]:
    """Kubernetes' own schemas, strictly: a field that they do not have is a fault."""
    with tempfile.TemporaryDirectory() as folder:
        files = write(Path(folder), [manifest for manifest in rendered.manifests if not is_custom(manifest)])
        program = tools / "kubernetes-validate"
        faults = run([str(program), "--strict", "--quiet", "-k", version, *map(str, files)])
        return [fault.replace(f"{folder}/", "") for fault in faults]


def custom_kinds(rendered: Rendered) -> list[str]:
    """Operators' kinds against schemas that know what the chart uses of them, and nothing else."""
    faults = []
    for manifest in filter(is_custom, rendered.manifests):
        path = SCHEMAS / f"{manifest['kind'].lower()}.json"
        if not path.exists():
            faults.append(f"{label(manifest)}: there is no {path.name} to hold it against")
            continue
        validator = jsonschema.Draft202012Validator(json.loads(path.read_text()))
        faults += [
            f"{label(manifest)}: {error.json_path}: {error.message}" for error in validator.iter_errors(manifest)
        ]
    return faults


def policies(tools: Path, rendered: Rendered) -> list[str]:
    """Checkov's policies for Kubernetes, but for those in SKIPPED."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), rendered.manifests)
        return policies_of_files(tools, Path(folder))


def policies_of_files(tools: Path, folder: Path) -> list[str]:
    """The same of manifests in files below a folder, all in one run."""
    command = [str(tools / "checkov"), "-d", str(folder), "--framework", "kubernetes", "--compact", "--quiet"]
    command += ["--skip-download", "-o", "json", "--skip-check", ",".join(SKIPPED)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    if not report.get("summary", {}).get("passed"):
        return [f"checkov has checked nothing: {done.stderr[-500:]}"]
    if report["summary"]["parsing_errors"]:
        return ["checkov could not read what was rendered"]
    failed = report["results"]["failed_checks"]
    return [f"{one['file_path']} {one['resource']}: {one['check_id']} {one['check_name']}" for one in failed]


def yaml_style(
    tools: Path, paths: Iterable[Path] = (CHART / "values.yaml", CHART / "Chart.yaml", EXAMPLES, COMPOSE)
) -> list[str]:
    """What yamllint says of the YAML that people read."""
    config = ROOT / "deploy" / ".yamllint.yaml"
    return run([str(tools / "yamllint"), "--strict", "-f", "parsable", "-c", str(config), *map(str, paths)])


def dockerfiles(tools: Path, paths: Iterable[Path] | None = None) -> list[str]:
    """What hadolint says. A line above an ignored rule must say why it is."""
    files = list(IMAGES.glob("*.Dockerfile")) if paths is None else list(paths)
    return run([str(tools / "hadolint"), "--no-color", *map(str, sorted(files))])


def rules(path: Path = CHART / "files" / "alerts.yaml") -> list[str]:
    """What promtool says of the alerts, where there are any. Raises ToolMissing."""
    if not path.exists():
        return []
    program = shutil.which("promtool")
    if program is None:
        raise ToolMissing("promtool is needed for alerts.yaml (Debian: apt-get install prometheus)")
    return run([program, "check", "rules", str(path)])


def proxy(install_into: Path, config: Path = EXAMPLES / "envoy" / "envoy.yaml") -> list[str]:
    """What Envoy itself says of the example's configuration, with certificates made for it."""
    program = envoy.install(install_into)
    authority = trustme.CA()
    server = authority.issue_cert("gateway.example.com")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server.cert_chain_pems[0].write_to_path(folder / "tls.crt")
        server.private_key_pem.write_to_path(folder / "tls.key")
        authority.cert_pem.write_to_path(folder / "ca.crt")
        text = config.read_text()
        if "/etc/envoy/tls" not in text:
            return [f"{config.name} has no certificates below /etc/envoy/tls"]
        (folder / "envoy.yaml").write_text(text.replace("/etc/envoy/tls", str(folder)))
        return run(
            [str(program), "--mode", "validate", "-l", "error", "-c", str(folder / "envoy.yaml")], all_output=False
        )


def write(folder: Path, manifests: Sequence[Manifest]) -> list[Path]:
    """Write each manifest into a file that is named after it; return the files."""
    files = []
    for manifest in manifests:
        file = folder / f"{manifest['kind']}-{manifest['metadata']['name']}.yaml"
        file.write_text(yaml.safe_dump(manifest, sort_keys=False))
        files.append(file)
    return files


def run(command: Sequence[str], *, all_output: bool = True) -> list[str]:
    """Run a program that prints faults and fails, or prints none and succeeds; return the faults."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return []
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if not all_output:
        lines = lines[-1:]
    return lines or [f"{Path(command[0]).name} failed with status {done.returncode} and said nothing"]


def reasons_for_ignoring(path: Path) -> list[str]:
    """Lines of a Dockerfile that ignore a rule of hadolint, without a comment above that says why."""
    lines = path.read_text().splitlines()
    faults = []
    for number, line in enumerate(lines):
        # DL3006 asks for a tag on `FROM ${BASE}`, whose default has one.
        if re.match(r"#\s*hadolint ignore=(?!DL3006$)", line) and not lines[number - 1].startswith("#"):
            faults.append(f"{path.name}:{number + 1}: says not why")
    return faults
