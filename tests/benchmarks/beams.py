"""`make bench-beams`: beam search of several requests in one batch, against transformers' `generate(num_beams=...)`.

Both decode the same prompts with as many threads, in turns; figures are tokens of returned outputs per second, the
median of the rounds. The last line is one JSON object; the exit status is 1 when an output differs in fp32 by more than
a near tie.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import time

import structlog
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.generation import SamplingParams
from tests.builders_engine import Driver
from worker.assembly import assemble
from worker.engine.demo import demo_model_dir
from worker.engine.loop import Engine
from worker.engine.settings import EngineSettings
from worker.engine.types import GenerationRequest
from worker.settings import WorkerSettings


def ours(engine: Engine, prompts: list[list[int]], params: SamplingParams, round_name: str) -> list[list[int]]:
    """The best output of each prompt."""
    driver = Driver(engine)
    requests = [GenerationRequest(f"{round_name}-{i}", tuple(prompt), params) for i, prompt in enumerate(prompts)]
    driver.add(*requests)
    results = driver.run()
    return [results[request.request_id].tokens[0] for request in requests]


@torch.inference_mode()
def theirs(model: PreTrainedModel, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    """The same from transformers: all prompts have one length."""
    ids = torch.tensor(prompts)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=params.num_beams,
        max_new_tokens=params.max_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [[int(token) for token in row[ids.shape[1] :]] for row in output]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    torch.set_num_threads(args.threads)
    folder = demo_model_dir()
    worker = WorkerSettings(model=str(folder), dtype=args.dtype, device="cpu", num_threads=args.threads)
    engine = assemble(worker, EngineSettings(num_blocks=2000, enable_prefix_cache=False)).engine
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).eval()
    rng = random.Random(1)
    prompts = [rng.choices(range(3, 49_000), k=args.prompt_tokens) for _ in range(args.requests)]
    params = SamplingParams(max_tokens=args.tokens, num_beams=args.beams)
    seconds: dict[str, list[float]] = {"torchrelay": [], "transformers": []}
    num_same = 0
    for index in range(args.rounds + 1):  # the first warms up
        started = time.perf_counter()
        found = ours(engine, prompts, params, str(index))
        between = time.perf_counter()
        expected = theirs(model, prompts, params)
        ended = time.perf_counter()
        if index:
            seconds["torchrelay"].append(between - started)
            seconds["transformers"].append(ended - between)
        num_same = sum(one == other for one, other in zip(found, expected, strict=True))
        print(f"round {index}: {between - started:.2f} s, {ended - between:.2f} s", flush=True)  # noqa: T201
    rates = {name: args.requests * args.tokens / statistics.median(times) for name, times in seconds.items() if times}
    report = {
        "target": "bench-beams",
        **vars(args),
        "tokens_per_s": {name: round(rate, 1) for name, rate in rates.items()},
        "ratio": round(rates["torchrelay"] / rates["transformers"], 2),
        "same_outputs": num_same,
        "load": os.getloadavg()[0],
    }
    print(json.dumps(report), flush=True)  # noqa: T201
    return 0 if num_same == args.requests or args.dtype != "float32" else 1


if __name__ == "__main__":
    raise SystemExit(main())
