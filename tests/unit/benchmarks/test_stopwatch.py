"""The parts of a step that benchmarks tell apart are parts that this engine has."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.stopwatch import ENGINE_PARTS, watch_engine
from tests.builders_engine import TokenNames, generate, make_request
from tests.builders_models import tiny_module
from worker.engine.attention.cpu_ext import CpuAttention
from worker.engine.decoder.compile import compile_decoder
from worker.engine.loop import Engine
from worker.engine.runner import ModelRunner
from worker.engine.settings import EngineSettings


@pytest.mark.parametrize("is_compiled", [False, True])
def test_every_part_of_a_step_is_timed(is_compiled: bool) -> None:
    module, backend = tiny_module("llama", dtype=torch.float32), CpuAttention()
    settings = EngineSettings(num_blocks=32, block_size=backend.block_size, max_num_seqs=4, token_budget=64)
    decoder = compile_decoder(module, backend, 256) if is_compiled else None
    engine = Engine(ModelRunner(module, backend, settings, decoder), settings, TokenNames)
    watch = watch_engine(engine, [*ENGINE_PARTS, "norms"])
    generate(engine, make_request(prompt=[1, 2, 3], max_tokens=4))
    spent = watch.reset()
    assert {part for part, ms in spent.items() if ms == 0.0} == {"norms"} | ({"attention"} if is_compiled else set())
