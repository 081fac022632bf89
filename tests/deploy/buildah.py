"""Images without a daemon: buildah over a storage of its own, and containers in a chroot, which needs root alone."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_POLICY: Final = {"default": [{"type": "insecureAcceptAnything"}]}  # what is built here is nobody's to sign


@dataclass(frozen=True, slots=True)
class Storage:
    """Images and containers in one folder."""

    folder: Path

    @property
    def _command(self) -> list[str]:
        root, run = str(self.folder / "root"), str(self.folder / "run")
        return ["buildah", "--root", root, "--runroot", run, "--storage-driver", "vfs"]

    @property
    def _policy(self) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "policy.json"
        path.write_text(json.dumps(_POLICY))
        return str(path)

    def call(self, *arguments: str) -> str:
        """Run buildah; return what it prints. Raises CalledProcessError, with what it said on this process's stderr."""
        done = subprocess.run([*self._command, *arguments], check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout.strip()

    def has(self, tag: str) -> bool:
        return bool(self.call("images", "-q", "--filter", f"reference={tag}"))

    def build(self, tag: str, context: Path, *arguments: str, log: Path) -> None:
        """Build an image; its steps go to a log. Raises RuntimeError with the log's end."""
        command = [*self._command, "bud", "--isolation", "chroot", "--signature-policy", self._policy, "--pull-never"]
        with log.open("w") as output:
            done = subprocess.run(
                [*command, *arguments, "-t", tag, str(context)], stdout=output, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode:
            raise RuntimeError(f"{tag} was not built ({log}):\n" + "\n".join(log.read_text().splitlines()[-20:]))

    def export(self, tag: str, archive: Path) -> None:
        """Write an image as an OCI archive."""
        archive.unlink(missing_ok=True)
        self.call("push", "-q", "--signature-policy", self._policy, tag, f"oci-archive:{archive}")

    def open_archive(self, archive: Path) -> Container:
        """Take an image out of an archive, and make a container of it."""
        name = self.call("from", "--signature-policy", self._policy, f"oci-archive:{archive}")
        return self.open(name)

    def open(self, name: str) -> Container:
        """A container by its name, mounted."""
        config = json.loads(self.call("inspect", name))["OCIv1"]["config"]
        return Container(self, name, config, Path(self.call("mount", name)))

    def remove(self) -> None:
        """Remove all of it."""
        if self.folder.exists():
            self.call("rm", "--all")
            self.call("rmi", "--all", "--force")
            shutil.rmtree(self.folder)


@dataclass(frozen=True, slots=True)
class Container:
    """A container and its image's configuration; `root` is where its files are."""

    storage: Storage
    name: str
    config: Mapping[str, Any]
    root: Path

    @property
    def command(self) -> list[str]:
        """What the image runs if nothing else is asked."""
        return [*self.config["Entrypoint"], *self.config["Cmd"]]

    def arguments(self, command: Sequence[str], *, env: Mapping[str, str], mounts: Mapping[Path, str]) -> list[str]:
        """A program line that runs a command as the image's user. `mounts` are read-only, by folder of this machine."""
        options = [f"--env={name}={value}" for name, value in env.items()]
        options += [f"--volume={source}:{target}:ro" for source, target in mounts.items()]
        return [*self.storage._command, "run", "--isolation", "chroot", *options, self.name, "--", *command]

    def run(self, *command: str) -> str:
        """What a command prints. Raises CalledProcessError."""
        done = subprocess.run(
            self.arguments(command, env={}, mounts={}),
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    def num_bytes(self) -> int:
        """Room that its files take."""
        return int(subprocess.check_output(["du", "-sx", "--block-size=1", str(self.root)], text=True).split()[0])

    def written_since(self, moment: Path, *but: str) -> list[str]:
        """Files that are newer than a file of this machine, but for those below some folders."""
        found = subprocess.check_output(
            ["find", str(self.root), "-xdev", "-newer", str(moment), "-type", "f"], text=True
        )
        files = [f"/{Path(line).relative_to(self.root)}" for line in found.splitlines()]
        return sorted(file for file in files if not file.startswith(tuple(but)))
