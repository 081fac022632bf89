"""A contestant's side of a measurement: an engine in a process of its own, told by lines of JSON what to run.

Every engine is one small script with one class: `batch` decodes many requests together, `stream` one with the time of
each token. It is run by the interpreter of its own environment, so this module needs the standard library only:

    python -m tests.benchmarks.contestants.vllm_cpu --model DIR --workload FILE

    first line out   {"ready_s", "first_token_s", "info", "peak_memory_mb"}
    line in          {"workload": "W1", "variant": 0} and optionally num_requests, max_running, first_token_id;
                     or {"first_token": 0, "first_token_id": 5}: of W2's variant; or {"score": 16}
    line out         {"figures", "others_cpu", "cpu_us_per_token", "peak_memory_mb", "token_ids"};
                     or {"first_token_ms"}; or {"scores"}

The process ends at the end of its input.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.processes import OthersShare, cpu_s, descendants, peak_memory_mb, seconds_since_start
from tests.benchmarks.workload import MAX_RUNNING, Request, Workload

KV_CACHE_MIB: Final = 1024  # of every engine that can be told: memory is compared too
_SHORT_SETTLE_S: Final = 0.1
NUM_COMPARED: Final = 8  # outputs of W1 whose ids are compared with the reference


@dataclass(slots=True)
class Output:
    """What one request gave. `times` are `time.perf_counter()` of each token, or empty where the engine hides them."""

    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    called: float | None = None  # when, by the same clock, where that is later than the run's own start


@dataclass(frozen=True, slots=True)
class Score:
    """How an engine predicts one window: for each position from the middle on, the token that follows it."""

    logprobs: list[float]  # of the text's own next token, natural logarithm
    best: list[int]  # the most probable token


class Contestant:
    """An engine under measurement. A subclass loads its model in `__init__(args)`."""

    info: dict[str, Any]  # versions and settings, for the report
    settle_s = 1.0  # after a pause: what fell due meanwhile is done first, such as the renewal of leases

    def batch(self, requests: Sequence[Request], max_running: int) -> list[Output]:
        """Decode requests that all arrive now, at most `max_running` at a time (32 where the engine fixes it)."""
        raise NotImplementedError

    def stream(self, request: Request) -> Output:
        """Decode one request, with the time of each token."""
        raise NotImplementedError

    def score(self, windows: Sequence[list[int]]) -> list[Score]:
        """Predict the second half of each window, token by token, from the text before. Not every engine can."""
        raise NotImplementedError(f"{type(self).__name__} does not tell the probability of a given token")

    def pids(self) -> list[int]:
        """Processes that are the engine's."""
        return [os.getpid(), *descendants()]

    def cpu_parts(self) -> dict[str, float]:
        """CPU seconds so far, by part of the system."""
        return {"all": sum(cpu_s(pid) for pid in self.pids())}

    def close(self) -> None:
        """End what would outlive this process."""


# -- one run ---------------------------------------------------------------------------------------------------------


def run(contestant: Contestant, name: str, requests: Sequence[Request], max_running: int) -> dict[str, Any]:
    """Run one variant of a workload and return what is said of it."""
    before = contestant.cpu_parts()
    with OthersShare(contestant.pids) as others:
        started = time.perf_counter()
        outputs = [contestant.stream(requests[0])] if name == "W2" else contestant.batch(requests, max_running)
        elapsed_s = time.perf_counter() - started
    check(requests, outputs)
    num_tokens = sum(request.max_tokens for request in requests)
    cpu_us = {part: (used - before[part]) * 1e6 / num_tokens for part, used in contestant.cpu_parts().items()}
    return {
        "figures": figures(name, requests, outputs, started, elapsed_s),
        "others_cpu": others.share,
        "cpu_us_per_token": cpu_us,
        "peak_memory_mb": peak_memory_mb(contestant.pids()),
        "token_ids": [output.token_ids for output in outputs[:NUM_COMPARED]] if name == "W1" else [],
    }


def check(requests: Sequence[Request], outputs: Sequence[Output]) -> None:
    """Raise ValueError where an engine decoded less or more than it was asked for: its figures would mean nothing."""
    for request, output in zip(requests, outputs, strict=True):
        if len(output.token_ids) != request.max_tokens:
            raise ValueError(f"asked for {request.max_tokens} tokens, got {len(output.token_ids)}")


def figures(
    name: str, requests: Sequence[Request], outputs: Sequence[Output], started: float, elapsed_s: float
) -> dict[str, float]:
    """Return the figures of a run: rates in tokens per second, times in milliseconds."""
    if name == "W2":
        times = outputs[0].times
        return {
            "ttft_ms": (times[0] - (outputs[0].called or started)) * 1e3,
            "itl_ms": (times[-1] - times[0]) * 1e3 / (len(times) - 1),
        }
    num_prompt_tokens = sum(len(request.prompt) for request in requests)
    if name == "W3":
        return {"prompt_tok_s": num_prompt_tokens / elapsed_s}
    num_tokens = sum(request.max_tokens for request in requests)
    rates = {"out_tok_s": num_tokens / elapsed_s, "total_tok_s": (num_tokens + num_prompt_tokens) / elapsed_s}
    if all(output.times for output in outputs):
        gaps = [b - a for output in outputs for a, b in zip(output.times, output.times[1:], strict=False)]
        rates["ttft_p50_ms"] = statistics.median(output.times[0] - started for output in outputs) * 1e3
        rates["itl_p50_ms"] = statistics.median(gaps) * 1e3
        rates["itl_p99_ms"] = sorted(gaps)[int(len(gaps) * 0.99)] * 1e3
    return rates


# -- the process -----------------------------------------------------------------------------------------------------


def main(
    load: Callable[[argparse.Namespace], Contestant],
    add_arguments: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> None:
    """Run a contestant until its input ends."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--model", required=True, help="what the engine loads: a folder, or a file")
    parser.add_argument("--workload", type=Path, required=True, help="file written by tests.benchmarks.workload")
    parser.add_argument("--threads", type=int, required=True, help="threads that compute")
    add_arguments(parser)
    args = parser.parse_args()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to standard output what is no reply
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(args.threads)}
    workload = Workload.parse(args.workload.read_text())

    def reply(line: dict[str, Any]) -> None:
        replies.write(json.dumps(line) + "\n")
        replies.flush()

    contestant = load(args)
    ready_s = seconds_since_start()
    contestant.stream(Request(workload.warm_up[0].prompt, 1))
    first_token_s = seconds_since_start()
    contestant.batch(workload.warm_up, MAX_RUNNING)
    reply(
        {
            "ready_s": ready_s,
            "first_token_s": first_token_s,
            "info": contestant.info,
            "peak_memory_mb": peak_memory_mb(contestant.pids()),
        }
    )
    status = 1
    try:
        for line in sys.stdin:
            reply(obey(contestant, workload, json.loads(line)))
        status = 0
    except Exception:  # noqa: BLE001 - whatever it is, it is this engine's, and its log tells
        traceback.print_exc()
    finally:
        contestant.close()
        sys.stderr.flush()
        os._exit(status)  # threads of some engines would keep the process


def obey(contestant: Contestant, workload: Workload, order: dict[str, Any]) -> dict[str, Any]:
    """Run what an order asks for, and return its answer."""
    if "score" in order:
        try:
            scores = contestant.score(workload.windows[: order["score"]])
        except NotImplementedError as error:
            return {"unable": str(error)}
        return {"scores": [{"logprobs": score.logprobs, "best": score.best} for score in scores]}
    warm_up = Request(workload.warm_up[0].prompt, 2)
    if "first_token" in order:
        prompt = workload.runs["W2"][order["first_token"]][0].prompt
        request = Request([order["first_token_id"], *prompt[1:]], 2)
        return {"first_token_ms": first_token_ms(contestant, request, warm_up)}
    requests = workload.runs[order["workload"]][order["variant"]]
    time.sleep(contestant.settle_s)
    contestant.stream(warm_up)  # after a pause its threads have slept, and other engines have used the caches
    requests = requests[: order.get("num_requests") or len(requests)]
    if "first_token_id" in order:
        requests = [Request([order["first_token_id"], *request.prompt[1:]], request.max_tokens) for request in requests]
    return run(contestant, order["workload"], requests, order.get("max_running") or MAX_RUNNING)


def first_token_ms(contestant: Contestant, request: Request, warm_up: Request) -> float:
    """Return the milliseconds to the first token of a call directly behind one to warm up.

    The contestant has hardly been paused. Nothing is looked up in between: a pause of some milliseconds is enough for
    a machine's other guests to take the caches.
    """
    time.sleep(_SHORT_SETTLE_S)
    contestant.stream(warm_up)
    started = time.perf_counter()
    output = contestant.stream(request)
    check([request], [output])
    return figures("W2", [request], [output], started, 0.0)["ttft_ms"]
