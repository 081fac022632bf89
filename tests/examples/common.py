"""What the examples share: arguments, a client, the comparison, and word that weights are random."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # the served model may share these cores

import torch

from torchrelay.client import Client

RANDOM_MARK: Final = "RANDOM_WEIGHTS"  # a file of this name lies beside weights that mean nothing
TOLERANCE: Final = 1e-4  # of scores, in float32


@dataclass(slots=True)
class Example:
    """One run of one script."""

    client: Client
    model: str  # for transformers
    name: str  # for requests
    openai_url: str
    key: str
    num_different: int = 0

    def say(self, what: str, value: object) -> None:
        sys.stdout.write(f"{what}: {value}\n")

    def check(self, what: str, ours: object, theirs: object) -> None:
        """Compare an answer with transformers' own; numbers may differ by what float32 rounds."""
        equal = _close(ours, theirs)
        self.num_different += not equal
        sys.stdout.write(f"  {'equal to' if equal else 'DIFFERENT FROM'} transformers: {what}\n")
        if not equal:
            sys.stdout.write(f"    ours   {ours}\n    theirs {theirs}\n")


def _close(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return abs(ours - theirs) <= TOLERANCE
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(_close, ours, theirs))
    return bool(ours == theirs)


def main(description: str | None, run: Callable[[Example], None]) -> None:
    """Read the arguments, run a script, and exit: 0 if all was as transformers has it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="what is served: a directory or a Hub id")
    parser.add_argument("--name", default="", help="its name there; default: the last part of --model")
    parser.add_argument("--address", default="127.0.0.1:50051")
    parser.add_argument("--openai-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--key", default=os.environ.get("TORCHRELAY_API_KEY", ""))
    args = parser.parse_args()
    if (Path(args.model) / RANDOM_MARK).exists():
        sys.stdout.write(
            "The weights are random: what is answered means nothing, but it must be what transformers says.\n"
        )
    torch.manual_seed(0)
    with Client(args.address, api_key=args.key or None, insecure=True) as client, torch.inference_mode():
        name = args.name or args.model.rstrip("/").rsplit("/", 1)[-1]
        example = Example(client, args.model, name, args.openai_url, args.key)
        run(example)
    sys.exit(1 if example.num_different else 0)
