"""A contestant that decodes nothing: for tests of those who call it."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import Final

from tests.benchmarks.contestants.base import Contestant, Output, main
from tests.benchmarks.workload import Request

CRASHES_AT: Final = 13  # as the output's length


class Toy(Contestant):
    """Answers at once; says on standard output what a library might, and ends when asked for 13 tokens."""

    settle_s = 0.0

    def __init__(self, args: argparse.Namespace) -> None:
        if args.model == "missing":
            raise FileNotFoundError("there is no such model")
        self.info = {"threads": args.threads}

    def batch(self, requests: Sequence[Request], max_running: int) -> list[Output]:
        return [self.stream(request) for request in requests]

    def stream(self, request: Request) -> Output:
        sys.stdout.write("not a line of JSON\n")
        if request.max_tokens == CRASHES_AT:
            sys.stderr.write("out of luck\n")
            sys.stderr.flush()
            os._exit(3)
        return Output([1] * request.max_tokens, [time.perf_counter()] * request.max_tokens)


if __name__ == "__main__":
    main(Toy)
