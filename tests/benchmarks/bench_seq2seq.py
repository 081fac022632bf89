"""`make bench-seq2seq`: encoder-decoder requests in one batch, against transformers' batched `generate`.

Models have random weights in the shape of opus-mt (Marian) or t5-small: what is timed does not depend on them. Sources
differ in length, so transformers pads them; both decode the same number of tokens with as many threads, in turns.
Figures are medians of the rounds: new tokens per second from the first request's arrival to the last one's end, and
what it takes to read the sources alone. The last line is one JSON object; the exit status is 1 when an output differs
in fp32 by more than a near tie.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import structlog
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel

from common.generation import SamplingParams
from tests.builders_models import write_tokenizer
from worker.assembly import assemble
from worker.engine.settings import EngineSettings
from worker.engine.thread import StepEngine
from worker.engine.types import GenerationRequest
from worker.settings import WorkerSettings

_IDS: Final = {
    "forced_eos_token_id": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
_START: Final = 3
SHAPES: Final[dict[str, dict[str, Any]]] = {
    "marian": {
        "vocab_size": 58101,
        "d_model": 512,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "scale_embedding": True,
        "encoder_attention_heads": 8,
        "decoder_attention_heads": 8,
        "max_position_embeddings": 512,
        "encoder_ffn_dim": 2048,
        "decoder_ffn_dim": 2048,
        "activation_function": "swish",
    },
    "t5": {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
}
_NEAR_TIE: Final = 1e-3  # of logits whose spread is near 1


def make_model(family: str, folder: Path) -> PreTrainedModel:
    """Save a random model of the shape, and return it as transformers has it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SHAPES[family], **_IDS)
    module: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
    module.save_pretrained(folder)
    write_tokenizer(folder, chat_template=None)
    return module.eval()


def ours(engine: StepEngine, sources: list[list[int]], params: SamplingParams, name: str) -> list[list[int]]:
    requests = [
        GenerationRequest(f"{name}-{i}", (_START,), params, source_token_ids=tuple(source))
        for i, source in enumerate(sources)
    ]
    for request in requests:
        engine.add(request)
    outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}
    while engine.has_work:
        for output in engine.step(0.0).outputs:
            assert output.error is None, output
            for delta in output.deltas:
                outputs[output.request_id] += delta.token_ids
    return list(outputs.values())


@torch.inference_mode()
def theirs(model: PreTrainedModel, sources: list[list[int]], params: SamplingParams) -> list[list[int]]:
    longest = max(map(len, sources))
    ids = torch.tensor([source + [0] * (longest - len(source)) for source in sources])
    mask = torch.tensor([[1] * len(source) + [0] * (longest - len(source)) for source in sources])
    output = model.generate(
        ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=params.max_tokens, eos_token_id=None
    )
    return [[int(token) for token in row[1:]] for row in output]


@torch.inference_mode()
def is_near_tie(model: PreTrainedModel, source: list[int], expected: list[int], found: list[int]) -> bool:
    index = next(i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
    decoder = torch.tensor([[_START, *expected[:index]]])
    best, second = model(input_ids=torch.tensor([source]), decoder_input_ids=decoder).logits[0, -1].topk(2).values
    return float(best - second) < _NEAR_TIE


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=SHAPES, default="marian")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    rng = random.Random(7)
    params = SamplingParams(max_tokens=args.tokens)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(args.family, Path(folder))
        worker = WorkerSettings(
            model=folder, model_name="bench", dtype="float32", device="cpu", num_threads=args.threads
        )
        engine = assemble(worker, EngineSettings(num_blocks=2000)).engine
        torch.set_num_threads(args.threads)
        seconds: dict[str, list[float]] = {"torchrelay": [], "transformers": [], "sources alone": []}
        equal = num_outputs = near_ties = 0
        for turn in range(args.rounds + 1):  # the first one warms up
            sources = [[rng.randrange(4, 30_000) for _ in range(rng.randint(12, 96))] for _ in range(args.requests)]
            started = time.perf_counter()
            found = ours(engine, sources, params, f"all-{turn}")
            ended = time.perf_counter()
            expected = theirs(model, sources, params)
            after = time.perf_counter()
            fresh = [source[::-1] for source in sources]  # of the same lengths, and not known
            before_reading = time.perf_counter()
            ours(engine, fresh, SamplingParams(max_tokens=1), f"read-{turn}")
            reading = time.perf_counter() - before_reading
            times = f"{ended - started:.2f} s, {after - ended:.2f} s, sources {reading:.2f} s"
            sys.stdout.write(f"round {turn}: {times}\n")
            sys.stdout.flush()
            if turn == 0:
                continue
            seconds["torchrelay"].append(ended - started)
            seconds["transformers"].append(after - ended)
            seconds["sources alone"].append(reading)
            for source, theirs_one, ours_one in zip(sources, expected, found, strict=True):
                num_outputs += 1
                if theirs_one == ours_one:
                    equal += 1
                elif is_near_tie(model, source, theirs_one, ours_one):
                    near_ties += 1
    num_tokens = args.requests * args.tokens
    median = {name: statistics.median(values) for name, values in seconds.items()}
    report = {
        "target": "bench-seq2seq",
        "family": args.family,
        "requests": args.requests,
        "tokens_each": args.tokens,
        "rounds": args.rounds,
        "threads": args.threads,
        "dtype": "float32",
        "torchrelay_tokens_per_s": round(num_tokens / median["torchrelay"], 1),
        "transformers_tokens_per_s": round(num_tokens / median["transformers"], 1),
        "ratio": round(median["transformers"] / median["torchrelay"], 3),
        "sources_and_first_tokens_ms_per_request": round(median["sources alone"] * 1000 / args.requests, 2),
        "outputs": num_outputs,
        "equal": equal,
        "near_ties": near_ties,
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "load": os.getloadavg()[0],
    }
    sys.stdout.write(json.dumps(report) + "\n")
    return 0 if equal + near_ties == num_outputs else 1


if __name__ == "__main__":
    raise SystemExit(main())
