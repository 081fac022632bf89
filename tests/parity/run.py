"""`make parity`: prints how the engine's outputs compare with those of transformers' own `generate`, fp32.

    greedy     each parameter alone and in random combinations, requests decoded in batches of 16 and more:
               the same tokens, but for near ties, of which each is shown
    examples   the two well-known calls of GPT-2, their config resolved as the gateway does
    sampled    chi-square tests of single draws against the distribution after transformers' processors

The last line is one JSON object; the exit status is 1 when anything differs.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from common.generation import SamplingParams
from gateway import validation
from tests import reference
from tests.builders_models import write_tiny_model, write_tokenizer
from tests.parity import check
from tests.parity.cases import NUM_TOKENS, SAMPLED, Case, alone, combinations
from torchrelay.v1 import generation_pb2 as pb
from worker.assembly import assemble
from worker.engine.demo import demo_model_dir
from worker.engine.loop import Engine
from worker.engine.settings import EngineSettings
from worker.settings import WorkerSettings

SEED = 20_000
ALPHA = 0.01  # that a right engine fails any of the tests
FAMILIES = ("gpt2", "llama", "qwen2", "mistral", "gemma2")
GPT2_124M = "gpt2-124m"
SMOLLM2 = "smollm2-135m"
EXAMPLES: dict[str, dict[str, int]] = {
    "max_length=50, num_return_sequences=1": {"max_length": 50, "num_return_sequences": 1},
    "max_length=100, no_repeat_ngram_size=2": {"max_length": 100, "no_repeat_ngram_size": 2},
}


def write_gpt2(folder: Path, num_layers: int = 12) -> Path:
    """GPT-2 in its real shape, with random weights large enough that outputs wander."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=num_layers))
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def load(folder: Path, num_threads: int = 1) -> tuple[Engine, PreTrainedModel]:
    """A worker's engine, and the plain model without defaults of its own."""
    limits = EngineSettings(num_blocks=600, max_num_seqs=64, max_model_len=256)
    worker = WorkerSettings(model=str(folder), dtype="float32", device="cpu", num_threads=num_threads)
    model = reference.load_reference(folder)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return assemble(worker, limits).engine, model


def random_prompts(model: PreTrainedModel, lengths: Sequence[int]) -> list[list[int]]:
    rng = random.Random(SEED)
    return [rng.choices(range(3, min(model.config.vocab_size, 49_000)), k=length) for length in lengths]


def compare_greedy(engine: Engine, model: PreTrainedModel, num_prompts: int, num_batches: int) -> check.Greedy:
    """All parameters alone for some prompts, then random combinations: `num_batches` of 16 requests."""
    prompts = random_prompts(model, [3, 31, 12, 60][:num_prompts])
    greedy = check.Greedy(check.logit_difference(engine, model, prompts))
    cases = []
    for prompt in prompts:
        plain = check.reference_tokens(model, prompt, SamplingParams(max_tokens=NUM_TOKENS))
        cases += alone(prompt, plain)
    greedy.compare(engine, model, cases)

    @seeded(SEED)
    @settings(
        max_examples=num_batches,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(batch=combinations(min(model.config.vocab_size, 49_000)))
    def compare_batch(batch: list[Case]) -> None:
        greedy.compare(engine, model, batch)

    compare_batch()
    return greedy


@torch.inference_mode()
def compare_example(engine: Engine, model: PreTrainedModel, options: dict[str, int]) -> bool:
    """Whether `generate(ids, **options)` gives what our engine gives for the same config."""
    prompt = random_prompts(model, [9])[0]
    ids = torch.tensor([prompt])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, do_sample=False, **options)
    names = {"num_return_sequences": "num_outputs"}
    config: Any = {names.get(name, name): value for name, value in options.items()}
    limits = validation.ConfigLimits(256, model.config.vocab_size, max_outputs=16, max_stop_strings=16)
    resolved = validation.resolve_config(
        pb.GenerationConfig(**config), pb.GenerationConfig(num_outputs=1), len(prompt), limits, seed=0
    )
    ((found, error),) = check.run_together(engine, [Case("", tuple(prompt), validation.sampling_params(resolved, ()))])
    return error is None and [*prompt, *found] == expected[0].tolist()


def compare_sampled(engine: Engine, model: PreTrainedModel, num_draws: int) -> dict[str, float]:
    """p-values by case."""
    (prompt,) = random_prompts(model, [7])
    return {
        name: check.chi_square_p(
            engine, model, prompt, SamplingParams(**{"max_tokens": 1, "temperature": 1.0, **fields}), num_draws, SEED
        )
        for name, fields in SAMPLED.items()
    }


def say(text: str = "") -> None:
    print(text, flush=True)  # noqa: T201 - the program's output


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*FAMILIES, GPT2_124M, SMOLLM2])
    parser.add_argument("--batches", type=int, default=20, help="of random combinations; a tenth for the large models")
    parser.add_argument("--draws", type=int, default=4000, help="of each sampled case; tiny models only")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for the large models")
    args = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    started = time.monotonic()
    figures: dict[str, dict[str, Any]] = {}
    p_values: dict[str, float] = {}
    say(f"{'model':<14}{'greedy same':>12}{'near ties':>11}{'wrong':>7}{'logit diff':>12}  examples")
    with tempfile.TemporaryDirectory() as root:
        for name in args.models:
            is_large = name in (GPT2_124M, SMOLLM2)
            if name == SMOLLM2:
                folder = demo_model_dir()
            else:
                folder = Path(root) / name
                folder = write_gpt2(folder) if name == GPT2_124M else write_tiny_model(folder, name)
            engine, model = load(folder, args.threads if is_large else 1)
            greedy = compare_greedy(
                engine,
                model,
                num_prompts=1 if is_large else 2,
                num_batches=max(1, args.batches // (10 if is_large else 1)),
            )
            examples = {}
            if name in ("gpt2", GPT2_124M):
                examples = {text: compare_example(engine, model, options) for text, options in EXAMPLES.items()}
            if not is_large:
                p_values |= {f"{name}: {case}": p for case, p in compare_sampled(engine, model, args.draws).items()}
            figures[name] = {
                "same": greedy.num_same,
                "near_ties": greedy.near_ties,
                "wrong": greedy.wrong,
                "logit_difference": greedy.logit_difference,
                "examples": examples,
            }
            shown = ", ".join(f"{text}: {'same' if same else 'DIFFERENT'}" for text, same in examples.items())
            say(
                f"{name:<14}{greedy.num_same:>12}{len(greedy.near_ties):>11}{len(greedy.wrong):>7}"
                f"{greedy.logit_difference:>12.1e}  {shown}"
            )
            for text in (*greedy.near_ties, *greedy.wrong):
                say(f"    {text}")
    alpha = ALPHA / max(1, len(p_values))
    rejected = {name: p for name, p in p_values.items() if p < alpha}
    say(
        f"\nsampled: {len(p_values)} chi-square tests of {args.draws} draws, seeds from {SEED}; least p "
        f"{min(p_values.values(), default=1.0):.2g}, rejected below {alpha:.2g} ({ALPHA} over all): {len(rejected)}"
    )
    num_outputs = sum(figure["same"] + len(figure["near_ties"]) + len(figure["wrong"]) for figure in figures.values())
    num_near = sum(len(figure["near_ties"]) for figure in figures.values())
    is_right = (
        not rejected
        and not any(figure["wrong"] for figure in figures.values())
        and all(all(figure["examples"].values()) for figure in figures.values())
        and num_near <= max(1, num_outputs // 500)
    )
    report = {
        "target": "parity",
        "ok": is_right,
        "num_outputs": num_outputs,
        "num_near_ties": num_near,
        "models": figures,
        "draws": args.draws,
        "seed": SEED,
        "alpha": alpha,
        "num_tests": len(p_values),
        "rejected": rejected,
        "seconds": round(time.monotonic() - started, 1),
    }
    say(json.dumps(report))
    return 0 if is_right else 1


if __name__ == "__main__":
    raise SystemExit(main())
