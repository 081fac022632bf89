"""The README's picture of `torchrelay bench`: a real run against a gateway and a worker of the demo model."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.builders_system import running_system

MODEL = "smollm2-135m-instruct"
MAX_BYTES = 100_000
COMMAND = [sys.executable, "-c", "from torchrelay.cli.main import main; main()", "bench"]


def measure(folder: Path, rates: str, duration: str) -> Path:
    """Run the command against a system of its own in a folder, and return the file of the run."""
    saved = folder / "run.json.gz"
    with running_system(folder) as system:
        gateway = system.add_gateway()
        system.add_worker(
            "demo", MODEL, TORCHRELAY_WORKER_DTYPE="bfloat16", TORCHRELAY_ENGINE_KV_CACHE_BYTES=str(256 << 20)
        )
        asyncio.run(system.ready(MODEL))
        options = ["--rate", rates, "--duration", duration, "--warmup", "2", "--prompt-words", "16-128"]
        options += ["--slo", "ttft=1s,tpot=50ms", "--ignore-eos", "--output", str(saved)]
        env = os.environ | {"TORCHRELAY_ADDRESS": gateway.address, "TORCHRELAY_API_KEY": system.key}
        subprocess.run([*COMMAND, *options], env=env, check=True, timeout=1800)
    return saved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where bench.png is written")
    parser.add_argument("--rates", default="1,2,3,4,6")
    parser.add_argument("--duration", default="15s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved = measure(folder, args.rates, args.duration)
        subprocess.run([*COMMAND, "plot", str(saved), "--output", str(folder / "pictures")], check=True)
        picture = (folder / "pictures" / "bench.png").read_bytes()
    if len(picture) >= MAX_BYTES:
        sys.exit(f"bench.png has {len(picture)} bytes, and {MAX_BYTES} is too much for a repository")
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "bench.png").write_bytes(picture)
    print(json.dumps({"file": str(args.folder / "bench.png"), "bytes": len(picture)}))  # noqa: T201


if __name__ == "__main__":
    main()
