"""`make images`: builds the images of gateway and CPU worker, starts both from their archives and has a model answer.

Needs root, debootstrap and buildah, no container engine. The base is Debian with its own Python; wheels are fetched
outside and given to the build, as where there is no package index: the Dockerfiles are what everybody builds with.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from common.embedded import EmbeddedServer
from tests.deploy import wheels
from tests.deploy.buildah import Container, Storage
from tests.deploy.charts import ROOT
from tests.ports import free_port
from torchrelay.client import Client
from worker.engine.demo import demo_model_dir

OUT: Final = ROOT / "build" / "images"
IMAGES: Final = {"gateway": "deploy/images/gateway.Dockerfile", "worker": "deploy/images/worker.Dockerfile"}
MODEL: Final = "smollm2-135m-instruct"
_BASE: Final = "localhost/torchrelay-base"
_SUITE: Final = "bookworm"
_MIRROR: Final = "http://deb.debian.org/debian"
_LOCKS: Final = ("requirements-build.lock", "requirements-gateway.lock", "requirements-worker.lock")
_UID: Final = "10001"
_CONTENTS: Final = (
    "import importlib.util as u, shutil as s; print(u.find_spec('torch') is not None, s.which('g++'), s.which('pip'))"
)
_START_S: Final = 180.0
_STOP_S: Final = 60.0


class ImageFault(Exception):
    """An image is not as it should be."""


def missing() -> list[str]:
    """What this machine lacks."""
    found = [] if os.geteuid() == 0 else ["root (it makes a Debian and runs chroots)"]
    for name in ("debootstrap", "buildah"):
        if shutil.which(name) is None:
            found.append(f"{name} (Debian: apt-get install {name})")
    return found


def make_base(storage: Storage) -> None:
    """A Debian with Python and nothing else, as an image."""
    if storage.has(_BASE):
        return
    folder = OUT / "base"
    rootfs, archive = folder / "rootfs", folder / "rootfs.tar"
    if not archive.exists():
        shutil.rmtree(folder, ignore_errors=True)
        rootfs.mkdir(parents=True)
        packages = "python3,python3-venv,ca-certificates"
        with (folder / "debootstrap.log").open("w") as log:
            command = ["debootstrap", "--variant=minbase", f"--include={packages}", _SUITE, str(rootfs), _MIRROR]
            subprocess.run(command, check=True, stdout=log, stderr=log)
        subprocess.run(["tar", "-C", str(rootfs), "-cf", str(archive), "."], check=True)
        shutil.rmtree(rootfs)
    context = folder / "context"
    context.mkdir(exist_ok=True)
    (context / "Containerfile").write_text("FROM scratch\nADD rootfs.tar /\n")
    (context / "rootfs.tar").unlink(missing_ok=True)
    (context / "rootfs.tar").hardlink_to(archive)
    storage.build(_BASE, context, log=OUT / "base.log")


def python_of_base(storage: Storage) -> str:
    """Its version, such as 3.11.2."""
    container = storage.open(storage.call("from", "--pull-never", _BASE))
    version = container.run("python3", "-c", "import platform; print(platform.python_version())")
    storage.call("rm", container.name)
    return version


def build(storage: Storage, torch_version: str, torch_index: str) -> dict[str, float]:
    """Build both images and write their archives; return how long each took, in seconds."""
    make_base(storage)
    python = python_of_base(storage)
    folder = OUT / "wheels"
    wheels.fetch([ROOT / lock for lock in _LOCKS], python, folder)
    wheels.fetch_torch(torch_version, torch_index, python, folder)
    revision = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    seconds = {}
    for name, dockerfile in IMAGES.items():
        started = time.monotonic()
        arguments = [f"BASE={_BASE}", "PIP_NO_INDEX=1", f"REVISION={revision}"]
        if name == "worker":
            arguments.append(f"TORCH_VERSION={torch_version}")
        tag = f"localhost/torchrelay-{name}"
        storage.build(
            tag,
            ROOT,
            *("-f", str(ROOT / dockerfile), "--build-context", f"wheels={folder}"),
            *(word for argument in arguments for word in ("--build-arg", argument)),
            log=OUT / f"{name}.log",
        )
        storage.export(tag, OUT / f"{name}.tar")
        seconds[name] = round(time.monotonic() - started, 1)
    return seconds


def check_contents(name: str, container: Container) -> None:
    """What holds of an image before it runs. Raises ImageFault."""
    if container.config["User"].partition(":")[0] != _UID or container.run("id", "-u") != _UID:
        raise ImageFault(f"{name} does not run as user {_UID}")
    found = container.run("/opt/torchrelay/bin/python", "-c", _CONTENTS).split()
    if found != [str(name == "worker"), "None", "None"]:
        raise ImageFault(f"{name}: torch, compiler and pip are {' '.join(found)}")
    if name == "gateway" and not container.run("torchrelay", "acl", "gateway").startswith("user default reset off\n"):
        raise ImageFault("the gateway's image does not write users for the queue's server, as the chart has it do")
    labels = container.config["Labels"]
    for key in ("title", "version", "revision", "licenses", "source"):
        if not labels.get(f"org.opencontainers.image.{key}"):
            raise ImageFault(f"{name} has no label {key}")


@dataclass
class Service:
    """A container's own command, running; its log in a file."""

    name: str
    container: Container
    process: subprocess.Popen[bytes]
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_until_ready(self, port: int) -> float:
        """Wait for its /readyz; return the seconds. Raises ImageFault."""
        started = time.monotonic()
        while time.monotonic() < started + _START_S:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2):
                return round(time.monotonic() - started, 1)
            time.sleep(0.2)
        raise ImageFault(f"{self.name} is not ready:\n{self.log[-3000:]}")

    def stop(self) -> None:
        """SIGTERM to its first process, as Kubernetes does. Raises ImageFault if it does not end well."""
        pid = int((self.container.root / "tmp" / "pid").read_text())
        os.kill(pid, signal.SIGTERM)
        try:
            status = self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            raise ImageFault(f"{self.name} does not end after SIGTERM:\n{self.log[-3000:]}") from None
        if status != 0:
            raise ImageFault(f"{self.name} ended with status {status}:\n{self.log[-3000:]}")


@contextlib.contextmanager
def running(name: str, container: Container, env: Mapping[str, str], mounts: Mapping[Path, str]) -> Iterator[Service]:
    """Run an image's command as it is; kill it at the end, if it still runs."""
    path = OUT / f"{name}-run.log"
    # A chroot has no process ids of its own: the shell leaves what it becomes.
    command = ["sh", "-c", 'echo $$ > /tmp/pid && exec "$@"', "sh", *container.command]
    with path.open("wb") as log:
        arguments = container.arguments(command, env=env, mounts=mounts)
        process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            yield Service(name, container, process, path)
        finally:
            if process.poll() is None:
                with contextlib.suppress(OSError, ValueError):
                    os.kill(int((container.root / "tmp" / "pid").read_text()), signal.SIGKILL)
                process.wait(_STOP_S)


def readable_model() -> Path:
    """A copy of the demo model that the images' user may read, as a volume of models is."""
    folder = OUT / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(demo_model_dir(), folder)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def serve(gateway: Container, worker: Container) -> dict[str, Any]:
    """Run both against a Valkey of this machine, and have a client stream. Raises ImageFault."""
    mark = OUT / "started"
    mark.touch()
    queue_port, port, gateway_monitor, worker_monitor, admin_port = (free_port() for _ in range(5))
    queue = EmbeddedServer(OUT / "queue", port=queue_port)
    queue.start()
    shared = {"TORCHRELAY_REDIS_URL": f"redis://127.0.0.1:{queue_port}/0", "TORCHRELAY_LOG_FORMAT": "json"}
    of_gateway = {
        "TORCHRELAY_GATEWAY_ADDRESS": f"127.0.0.1:{port}",
        "TORCHRELAY_GATEWAY_ADMIN_ADDRESS": f"127.0.0.1:{admin_port}",
        "TORCHRELAY_GATEWAY_METRICS_ADDRESS": f"127.0.0.1:{gateway_monitor}",
    }
    of_worker = {
        "TORCHRELAY_WORKER_MODEL": f"/models/{MODEL}",
        "TORCHRELAY_WORKER_METRICS_ADDRESS": f"127.0.0.1:{worker_monitor}",
        "HF_HUB_OFFLINE": "1",
    }
    models = {readable_model(): f"/models/{MODEL}"}
    try:
        with (
            running("gateway", gateway, {**shared, **of_gateway}, {}) as front,
            running("worker", worker, {**shared, **of_worker}, models) as back,
        ):
            found: dict[str, Any] = {"gateway_ready_s": front.wait_until_ready(gateway_monitor)}
            found["worker_ready_s"] = back.wait_until_ready(worker_monitor)
            # By the image's own command, as an operator's `kubectl exec` does.
            made = gateway.arguments(
                ["torchrelay", "keys", "create", "images"],
                env={"TORCHRELAY_ADMIN_ADDRESS": f"127.0.0.1:{admin_port}"},
                mounts={},
            )
            key = subprocess.check_output(made, text=True).strip()
            found["text"] = ask(f"127.0.0.1:{port}", key)
            if "Paris" not in found["text"]:
                raise ImageFault(f"the capital of France is said to be {found['text']!r}")
            ready = next(json.loads(line) for line in back.log.splitlines() if '"engine.ready"' in line)
            found |= {"attention": ready["attention"], "compiled": ready["compiled"]}
            if (ready["attention"], ready["compiled"]) != ("cpu_ext", True):
                raise ImageFault(f"the worker does not use the kernels of its image: {ready}")
            back.stop()
            front.stop()
    finally:
        queue.stop()
        shutil.rmtree(OUT / "queue", ignore_errors=True)
    for name, container in (("gateway", gateway), ("worker", worker)):
        if written := container.written_since(mark, "/tmp/", "/run/", "/etc/hosts", "/etc/resolv.conf"):
            raise ImageFault(f"{name} has written outside of /tmp, which a read-only root forbids: {written[:5]}")
    return found


def ask(address: str, key: str) -> str:
    """Have the model stream an answer."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    with Client(address, api_key=key) as client:
        return "".join(client.stream(messages, model=MODEL, max_tokens=24, temperature=0).text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch-version", required=True)
    parser.add_argument("--torch-index", required=True)
    parser.add_argument("--keep", action="store_true", help="keep buildah's storage: build/images/storage")
    parser.add_argument("--archives", action="store_true", help="build nothing: start what is in build/images")
    options = parser.parse_args()
    if lacking := missing():
        sys.stderr.write("make images needs " + ", ".join(lacking) + "\n")
        return 1
    OUT.mkdir(parents=True, exist_ok=True)
    built, fresh = Storage(OUT / "storage"), Storage(OUT / "fresh")
    report: dict[str, Any] = {"target": "images"}
    try:
        fresh.remove()
        if not options.archives:
            report["build_s"] = build(built, options.torch_version, options.torch_index)
        containers = {name: fresh.open_archive(OUT / f"{name}.tar") for name in IMAGES}
        for name, container in containers.items():
            check_contents(name, container)
        report["archive_mb"] = {name: round((OUT / f"{name}.tar").stat().st_size / 1e6) for name in IMAGES}
        report["unpacked_mb"] = {name: round(each.num_bytes() / 1e6) for name, each in containers.items()}
        report["base_mb"] = round((OUT / "base" / "rootfs.tar").stat().st_size / 1e6)
        report |= serve(containers["gateway"], containers["worker"])
        report["faults"] = []
    except (ImageFault, RuntimeError, subprocess.CalledProcessError) as error:
        sys.stderr.write(f"{error}\n")
        report["faults"] = [str(error).splitlines()[0]]
    finally:
        fresh.remove()
        if not options.keep:
            built.remove()
    sys.stdout.write(json.dumps(report) + "\n")
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
