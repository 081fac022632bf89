"""What else a worker does on a GPU, with tiny models, in float32, beside transformers on the same device.

adapters             two adapters and the base in one batch: each as the model with that adapter in its weights
structured output    a regular expression holds every output, through replayed steps
encoder-decoder      greedy outputs, and four beams, are `generate`'s own, token by token
encoders             outputs of texts in one padded batch, within 1e-4 of each text's alone in the model's class
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import torch
from transformers import PreTrainedModel

from common.generation import AdapterRef, EarlyStopping, GrammarKind, StructuredOutput
from tests import builders_seq2seq as seq2seq
from tests.builders_adapters import ALL_LINEAR, linear_layers, merged, write_adapter
from tests.builders_engine import TokenNames, generate, make_request, make_settings, reference_tokens, tiny_model
from tests.builders_models import VOCAB_SIZE, write_tokenizer
from tests.builders_tasks import ENCODERS, make_tokenizer, tiny_encoder
from worker.assembly import choose_argmax, choose_backend, make_runner
from worker.engine.adapters.files import AdapterLimits, LinearShape, read_adapter
from worker.engine.adapters.types import AdapterLease
from worker.engine.attention.hf import UnsupportedModel
from worker.engine.loop import Engine
from worker.engine.model import speed_up_for_device
from worker.engine.runner import ModelRunner
from worker.engine.types import GenerationRequest
from worker.structured import make_compiler
from worker.tasks.facts import Head
from worker.tasks.pooling import Pooling
from worker.tasks.runner import EncoderModule, Text

_PROMPTS: Final = ([5, 9, 13, 40, 7], [101, 6, 7], list(range(20, 55)))
_SOURCES: Final = (1, 5, 16, 17, 33, 60)
_BLOCK: Final = 16
_EXPRESSION: Final = "([a-f]{3}-){4}[a-f]{3}"


def check_tasks(device: torch.device) -> dict[str, bool]:
    """By part and family, whether the device's answers are right; without families that this transformers is too old
    for, as 5.17 is for T5.
    """
    checks: dict[str, Callable[[], bool]] = {
        "adapters": lambda: _has_adapters(device),
        "structured output": lambda: _holds_a_grammar(device),
        **{f"encoder-decoder {family}": lambda f=family: _translates(f, device) for family in seq2seq.FAMILIES},
        **{f"encoder {family}": lambda f=family: _encodes(f, device) for family in ENCODERS},
    }
    found: dict[str, bool] = {}
    for name, check in checks.items():
        with suppress(UnsupportedModel):
            found[name] = check()
    return found


def _engine(model: PreTrainedModel, device: torch.device, **options: Any) -> tuple[Engine, ModelRunner]:
    settings = make_settings(block_size=_BLOCK, num_blocks=200, token_budget=64, max_num_seqs=12)
    backend = choose_backend(device, model.dtype, _BLOCK)
    inner = ModelRunner(model, backend, settings, adapt=options.pop("adapt", None))
    runner = make_runner(inner, settings)
    return Engine(runner, settings, TokenNames, argmax=choose_argmax(backend), **options), inner


def _has_adapters(device: torch.device) -> bool:
    model = tiny_model("llama")
    shapes = linear_layers(model)
    with tempfile.TemporaryDirectory() as folder:
        folders = {
            "all": write_adapter(Path(folder) / "all", shapes, rank=16, targets=ALL_LINEAR, std=0.08, alpha=4),
            "qv": write_adapter(Path(folder) / "qv", shapes, rank=5, targets=("q_proj", "v_proj"), std=0.3, seed=1),
        }
        truth = {"": copy.deepcopy(model), **{name: merged(model, at) for name, at in folders.items()}}
        for module in (model, *truth.values()):
            torch.nn.Module.to(module, device)
        if device.type == "cuda":  # on a CPU, layers would be packed for oneDNN
            speed_up_for_device(model)
        engine, runner = _engine(model, device, adapt={name: LinearShape(*shape) for name, shape in shapes.items()})
        adapters = {}
        for name, at in folders.items():
            weights = read_adapter(at, runner.adaptable, AdapterLimits(16, 1 << 24))
            adapters[name] = runner.load_adapter(AdapterRef(name, weights.revision), weights)

    def request(name: str, index: int) -> GenerationRequest:
        plain = make_request(f"{name} {index}", _PROMPTS[index], max_tokens=12)
        if not name:
            return plain
        adapter = adapters[name]
        sampling = msgspec.structs.replace(plain.sampling, adapter=adapter.ref)
        return replace(plain, sampling=sampling, adapter=AdapterLease(adapter))

    requests = {(name, i): request(name, i) for name in truth for i in range(len(_PROMPTS))}
    results = generate(engine, *requests.values())
    return all(
        results[one.request_id].tokens == [reference_tokens(truth[name], one.prompt_token_ids, one.sampling)]
        for (name, _), one in requests.items()
    )


def _holds_a_grammar(device: torch.device) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        tokenizer_json = (Path(folder) / "tokenizer.json").read_bytes()
    model = tiny_model("llama", vocab_size=VOCAB_SIZE)
    torch.nn.Module.to(model, device)
    engine, _ = _engine(model, device, grammars=make_compiler(tokenizer_json, VOCAB_SIZE, (seq2seq.EOS,)))
    vocabulary: dict[str, int] = msgspec.json.decode(tokenizer_json)["model"]["vocab"]
    names = {token_id: name for name, token_id in vocabulary.items()}
    structured = StructuredOutput(GrammarKind.REGEX, _EXPRESSION)
    requests = [
        make_request(
            f"r{i}",
            prompt,
            max_tokens=40,
            temperature=1.0,
            seed=i,
            stop_token_ids=(seq2seq.EOS,),
            structured_output=structured if i % 3 else None,
        )
        for i, prompt in enumerate(_PROMPTS * 2)
    ]
    results = generate(engine, *(engine.prepare(request) for request in requests))
    texts = ["".join(names[token] for token in results[f"r{i}"].tokens[0]) for i in range(6) if i % 3]
    return all(re.fullmatch(_EXPRESSION, text) for text in texts)


def _translates(family: str, device: torch.device) -> bool:
    def source(length: int) -> tuple[int, ...]:
        generator = torch.Generator().manual_seed(length)
        return tuple(torch.randint(4, seq2seq.VOCAB_SIZE, (length,), generator=generator).tolist())

    truth = seq2seq.tiny_seq2seq(family)
    expected = {
        (length, beams): seq2seq.generate(truth, source(length), 20, num_beams=beams)
        for length in _SOURCES
        for beams in (1, 4)
    }
    model = seq2seq.tiny_seq2seq(family)
    torch.nn.Module.to(model, device)
    engine, _ = _engine(model, device)
    requests = {
        key: make_request(
            f"{key}",
            (seq2seq.START,),
            source_token_ids=source(key[0]),
            max_tokens=20,
            stop_token_ids=(seq2seq.EOS,),
            num_beams=key[1],
            early_stopping=EarlyStopping.HEURISTIC,
        )
        for key in expected
    }
    results = generate(engine, *requests.values())
    return all(results[f"{key}"].tokens == tokens for key, tokens in expected.items())


@torch.inference_mode()
def _encodes(family: str, device: torch.device) -> bool:
    is_byte_level = "roberta" in family
    vocab_size = make_tokenizer("byte_level" if is_byte_level else "word_piece").get_vocab_size()
    body = tiny_encoder(family, "body", vocab_size=vocab_size)
    torch.nn.Module.to(body, device)
    module = EncoderModule(body, Head.VECTOR, pooling=Pooling.MEAN)
    generator = np.random.default_rng(5)
    texts = [Text(generator.integers(5, vocab_size, size=n, dtype=np.int32)) for n in (1, 3, 17, 40, 60)]
    for text, vector in zip(texts, module.run(texts), strict=True):
        ids = torch.from_numpy(text.ids.astype(np.int64))[None].to(device)
        expected = body(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].mean(0).float().cpu()
        if not torch.allclose(torch.from_numpy(vector), expected, rtol=1e-4, atol=1e-4):
            return False
    return True
