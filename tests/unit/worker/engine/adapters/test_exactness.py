"""Two adapters and the base in one batch: each output is what the model with that adapter in its weights gives.

That is what PEFT computes: W x + scale * B A x. On the compiled decoder, and on transformers' modules as they are and
as they are replaced for speed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from common.generation import AdapterRef
from tests.builders_adapters import ALL_LINEAR, linear_layers, merged, write_adapter
from tests.builders_engine import Collected, Driver, TokenNames, make_request, reference_tokens, tiny_model
from tests.unit.worker.engine.test_decoder import Session
from worker.engine.adapters.files import AdapterLimits, LinearShape, read_adapter
from worker.engine.adapters.types import AdapterFailure, AdapterLease
from worker.engine.attention.cpu_ext import CpuAttention
from worker.engine.attention.torch_ref import TorchAttention
from worker.engine.batch import AdapterRows
from worker.engine.decoder.compile import compile_decoder
from worker.engine.fuse import speed_up
from worker.engine.graphs import GraphRunner, run_again
from worker.engine.loop import Engine
from worker.engine.runner import ModelRunner
from worker.engine.settings import EngineSettings
from worker.engine.types import GenerationRequest

PATHS: Final = ("decoder", "modules", "fast modules")
PROMPTS: Final = [[5, 9, 13, 40, 7], [101, 6, 7], list(range(20, 55))]
# GPT-2's and Phi-3's own names beside the common ones.
TARGETS: Final = (*ALL_LINEAR, "qkv_proj", "gate_up_proj", "c_attn", "c_fc", "c_proj", "dense", "fc1", "fc2")


@dataclass
class Lab:
    """A model on one of the paths, with adapters, and what each of them should give."""

    runner: ModelRunner
    limits: EngineSettings
    leases: Mapping[str, AdapterLease]
    truth: Mapping[str, PreTrainedModel]  # by adapter; "" is the base

    @classmethod
    def make(cls, folder: Path, path: str, family: str = "llama", **settings: Any) -> Lab:
        model = tiny_model(family)
        shapes = linear_layers(model)
        folders = {
            "all": write_adapter(folder / "all", shapes, rank=16, targets=TARGETS, std=0.08, use_rslora=True, alpha=4),
            "qv": write_adapter(folder / "qv", shapes, rank=5, targets=("q_proj", "v_proj"), std=0.3, seed=1),
        }
        if family in ("gpt2", "phi3"):
            whole = "c_attn" if family == "gpt2" else "qkv_proj"
            write_adapter(folder / "qv", shapes, rank=5, targets=(whole,), std=0.3, seed=1, fan_in_fan_out=True)
        truth = {"": tiny_model(family), **{name: merged(model, at) for name, at in folders.items()}}
        limits = EngineSettings(
            **{"token_budget": 64, "max_num_seqs": 8, "block_size": 16, "num_blocks": 200, **settings}
        )
        decoder = None
        if path == "decoder":
            backend = CpuAttention()
            decoder = compile_decoder(model, backend, 256)
        elif path == "fast modules":
            assert speed_up(model)
        attention = backend if path == "decoder" else TorchAttention(16)
        adapt = {name: LinearShape(*shape) for name, shape in shapes.items()}
        runner = ModelRunner(model, attention, limits, decoder, adapt=adapt)
        leases = {}
        for name, at in folders.items():
            weights = read_adapter(at, runner.adaptable, AdapterLimits(16, 1 << 24))
            leases[name] = AdapterLease(runner.load_adapter(AdapterRef(name, weights.revision), weights))
        return cls(runner, limits, leases, truth)

    def engine(self) -> Engine:
        return Engine(self.runner, self.limits, TokenNames)

    def request(self, request_id: str, adapter: str, prompt: list[int], **fields: Any) -> GenerationRequest:
        lease = self.leases.get(adapter)
        ref = None if lease is None else lease.adapter.ref
        request = make_request(request_id, prompt, **{"max_tokens": 12, "adapter": None, **fields})
        return replace(
            request,
            sampling=type(request.sampling)(**{**_fields(request.sampling), "adapter": ref}),
            adapter=None if lease is None else AdapterLease(lease.adapter),
        )

    def check(self, results: Mapping[str, Collected], requests: Mapping[str, GenerationRequest]) -> None:
        for name, request in requests.items():
            adapter = "" if request.sampling.adapter is None else request.sampling.adapter.name
            expected = reference_tokens(self.truth[adapter], request.prompt_token_ids, request.sampling)
            assert results[name].error is None
            assert results[name].tokens == [expected], (name, adapter)


def _fields(struct: Any) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


@pytest.fixture(scope="module", params=PATHS)
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.make(tmp_path_factory.mktemp("adapters"), request.param)


def mixed(lab: Lab, **fields: Any) -> dict[str, GenerationRequest]:
    return {
        f"{adapter or 'base'} {index}": lab.request(f"{adapter or 'base'} {index}", adapter, prompt, **fields)
        for index, prompt in enumerate(PROMPTS)
        for adapter in ("", "all", "qv")
    }


def test_each_output_of_a_mixed_batch_is_its_own_model_s(lab: Lab) -> None:
    requests = mixed(lab)
    driver = Driver(lab.engine())
    driver.add(*requests.values())
    results = driver.run()
    lab.check(results, requests)
    # Or the adapters would do nothing, and the test could not fail.
    for index in range(len(PROMPTS)):
        assert len({tuple(results[f"{name} {index}"].tokens[0]) for name in ("base", "all", "qv")}) == 3


@pytest.mark.parametrize(("path", "family"), [("decoder", "phi3"), ("decoder", "qwen2"), ("modules", "gpt2")])
def test_families_with_other_layers(path: str, family: str, tmp_path: Path) -> None:
    """Queries, keys and values or gates and ups in one layer; biases; GPT-2's transposed weights."""
    lab = Lab.make(tmp_path, path, family)
    requests = mixed(lab)
    driver = Driver(lab.engine())
    driver.add(*requests.values())
    lab.check(driver.run(), requests)


def test_a_prompt_s_blocks_are_its_adapter_s_alone(lab: Lab) -> None:
    prompt = list(range(30, 70))
    engine = lab.engine()
    hits = []
    for adapter in ("all", "", "qv", "all", "", "qv"):
        requests = {"r": lab.request("r", adapter, prompt)}
        driver = Driver(engine)
        driver.add(*requests.values())
        results = driver.run()
        lab.check(results, requests)
        usage = results["r"].usage
        assert usage is not None
        hits.append(usage.cached_prompt_tokens)
    assert hits == [0, 0, 0, 32, 32, 32]


def test_preempted_and_taken_over_sequences_keep_their_adapters(tmp_path: Path) -> None:
    lab = Lab.make(tmp_path, "decoder", num_blocks=9, max_model_len=64)
    requests = mixed(lab, max_tokens=20)
    driver = Driver(lab.engine())
    driver.add(*requests.values())
    results = driver.run()
    assert driver.engine.stats().num_preemptions > 0
    lab.check(results, requests)
    # Another worker goes on behind what the log holds.
    taken_over = {
        name: replace(request, emitted=(tuple(results[name].tokens[0][:7]),), adapter=AdapterLease(lease.adapter))
        for name, request in requests.items()
        if isinstance(lease := request.adapter, AdapterLease)
    }
    driver = Driver(lab.engine())
    driver.add(*taken_over.values())
    lab.check(driver.run(), taken_over)


def test_guessing_tokens_changes_nothing(tmp_path: Path) -> None:
    lab = Lab.make(tmp_path, "decoder")
    prompt = [7, 8, 9, 10] * 6
    requests = {name: lab.request(name, name.strip(), prompt, max_tokens=30) for name in ("", "all", "qv")}
    driver = Driver(lab.engine())
    driver.add(*requests.values())
    lab.check(driver.run(), requests)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_a_row_is_the_same_to_the_bit_whatever_its_batch(precision: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = tiny_model("llama").to(dtype)
    shapes = linear_layers(model)
    at = write_adapter(tmp_path / "one", shapes, rank=11, targets=TARGETS, std=0.1)
    truth = merged(tiny_model("llama"), at)
    backend = CpuAttention()
    decoder = compile_decoder(model, backend, 256, int8=precision == "int8")
    form = decoder.adapter_form(read_adapter(at, decoder.adaptable, AdapterLimits(16, 1 << 24)))
    session = Session(decoder, [50, 33, 7])

    def step(*spans: tuple[int, int, int], adapted: set[int], rows: list[int] | None = None) -> torch.Tensor:
        of_rows = torch.tensor([0 if i in adapted else -1 for i, a, b in spans for _ in range(a, b)], dtype=torch.int32)
        forward = decoder.forward
        decoder.forward = lambda batch: forward(replace(batch, adapters=AdapterRows((form,), of_rows)))  # type: ignore[method-assign]
        try:
            return session.step(*spans, rows=rows)
        finally:
            del decoder.forward

    together = step((0, 0, 50), (1, 0, 33), (2, 0, 7), adapted={1})
    assert torch.equal(together[:50], session.step((0, 0, 50)))  # as if there were no adapters
    assert torch.equal(together[50:83], step((1, 0, 33), adapted={1}))
    assert not torch.equal(together[50:83], session.step((1, 0, 33)))
    parts = [step((1, a, b), adapted={1}) for a, b in ((0, 1), (1, 30), (30, 33))]
    assert torch.equal(torch.cat(parts), together[50:83])
    wanted = step((0, 0, 50), (1, 0, 33), (2, 0, 7), adapted={1}, rows=[3, 60, 82, 89])
    assert torch.equal(wanted, together[[3, 60, 82, 89]])
    with torch.inference_mode():
        expected = truth(session.tokens[1][None]).logits[0]
    error = (together[50:83] - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.median() < {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.5}[precision]


def test_logits_are_the_merged_model_s_to_1e_4(tmp_path: Path) -> None:
    """On a scale where rounding is near 1e-6: that of the weights themselves."""
    lab = Lab.make(tmp_path, "decoder")
    driver = Driver(lab.engine())
    requests = {name: lab.request(name, name, PROMPTS[2], logprobs=True, max_tokens=4) for name in ("all", "qv")}
    driver.add(*requests.values())
    results = driver.run()
    for name in requests:
        tokens = results[name].tokens[0]
        with torch.inference_mode():
            logits = lab.truth[name](torch.tensor([[*PROMPTS[2], *tokens]])).logits[0, len(PROMPTS[2]) - 1 : -1]
        expected = logits.log_softmax(-1)[torch.arange(len(tokens)), tokens]
        assert torch.allclose(torch.tensor(results[name].logprobs[0]), expected, atol=1e-4)


def test_replayed_decodes_are_those_without_adapters(tmp_path: Path) -> None:
    lab = Lab.make(tmp_path, "modules")
    lab.runner = GraphRunner(lab.runner, run_again, lab.limits.max_num_seqs, lab.limits.block_size)  # type: ignore[assignment]
    requests = mixed(lab)
    driver = Driver(lab.engine())
    driver.add(*requests.values())
    lab.check(driver.run(), requests)


class Joined(nn.Module):
    """An MLP whose gates and ups are one layer, and which tells so."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.both = nn.Linear(64, 2 * 96, bias=False)
        self.both.weight = nn.Parameter(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach())
        self.down_proj = mlp.down_proj
        self.parts = {"gate_proj": (self.both, 0), "up_proj": (self.both, 96)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates, ups = self.both(x).chunk(2, dim=-1)
        output: torch.Tensor = self.down_proj(nn.functional.silu(gates) * ups)
        return output


def test_layers_that_were_joined_keep_their_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def join(model: Any) -> bool:
        for layer in model.model.layers:
            layer.mlp = Joined(layer.mlp)
        return True

    monkeypatch.setattr("tests.unit.worker.engine.adapters.test_exactness.speed_up", join)
    lab = Lab.make(tmp_path, "fast modules")
    requests = mixed(lab)
    driver = Driver(lab.engine())
    driver.add(*requests.values())
    lab.check(driver.run(), requests)


class TestWithoutItsAdapterARequestIsNotComputed:
    def test_one_that_never_got_it(self, lab: Lab) -> None:
        request = replace(lab.request("r", "all", [1, 2, 3]), adapter=None)
        driver = Driver(lab.engine())
        driver.add(request)
        assert driver.run()["r"].error == "ADAPTER_NOT_FOUND"

    def test_one_that_got_another(self, lab: Lab) -> None:
        given = AdapterLease(lab.leases["qv"].adapter)
        driver = Driver(lab.engine())
        driver.add(replace(lab.request("r", "all", [1, 2, 3]), adapter=given))
        assert driver.run()["r"].error == "ADAPTER_NOT_FOUND"

    def test_one_whose_adapter_failed(self, lab: Lab) -> None:
        driver = Driver(lab.engine())
        driver.add(replace(lab.request("r", "all", [1, 2, 3]), adapter=AdapterFailure("ADAPTER_FAILED")))
        assert driver.run()["r"].error == "ADAPTER_FAILED"


@pytest.mark.parametrize("end", ["finished", "aborted", "refused"])
def test_an_adapter_is_let_go_of_when_its_request_is_over(lab: Lab, end: str) -> None:
    released: list[str] = []
    lease = AdapterLease(lab.leases["all"].adapter, lambda: released.append("all"))
    prompt = [-1] if end == "refused" else [1, 2, 3]
    driver = Driver(lab.engine())
    driver.add(replace(lab.request("r", "all", prompt, num_outputs=2), adapter=lease))
    if end == "refused":
        assert released == ["all"]
        return
    driver.step()
    assert not released
    if end == "aborted":
        driver.engine.abort("r")
    driver.run()
    assert released == ["all"]


def test_layers_that_do_not_see_every_token_take_no_adapters() -> None:
    model = tiny_model("llama")
    routed = model.model.layers[1].mlp
    original = routed.forward
    routed.forward = lambda x: torch.cat([original(x[:, :2]), x[:, 2:]], dim=1)
    limits = EngineSettings(token_budget=64, max_num_seqs=8, num_blocks=50)
    adapt = {name: LinearShape(*shape) for name, shape in linear_layers(model).items()}
    runner = ModelRunner(model, TorchAttention(16), limits, adapt=adapt)
    assert adapt.keys() - runner.adaptable.keys() == {
        f"model.layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    }
