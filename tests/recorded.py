"""Reference outputs kept in files, since the reference takes minutes: one request alone, in fp32, token by token.

Recorded outputs belong to the exact weights, prompt and options they were made with. Others are computed, and of the
recorded ones a few are computed too in every run, drawn at random. `make reference` records anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from tests import reference

RECORD_VARIABLE = "TORCHRELAY_TEST_RECORD"
NUM_RECOMPUTED = 2

_FOLDER = Path(__file__).parent / "integration" / "recorded"


class Recorded:
    """The reference outputs of one model, from `tests/integration/recorded/<name>.json`."""

    def __init__(self, name: str, model: PreTrainedModel, eos_token_ids: Sequence[int]) -> None:
        self._path = _FOLDER / f"{name}.json"
        self._model = model
        self._eos_token_ids = eos_token_ids
        self._digest = _weights_digest(model)
        self._is_recording = bool(os.environ.get(RECORD_VARIABLE))
        self._outputs: dict[str, list[int]] = {}
        if self._path.exists() and not self._is_recording:
            self._outputs = json.loads(self._path.read_text())["outputs"]

    def outputs(self, requests: Sequence[tuple[tuple[int, ...], dict[str, Any]]]) -> list[list[int]]:
        """Return the output of each (prompt, options). Raises AssertionError for a record that is not what is computed.

        A record made on another processor may differ from a computed output in a near tie; it is then replaced.
        """
        keys = [self._key(prompt, options) for prompt, options in requests]
        known = [key for key in dict.fromkeys(keys) if key in self._outputs]
        again = set(random.sample(known, min(NUM_RECOMPUTED, len(known))))
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._outputs}
        wanted = missing | {key: request for key, request in zip(keys, requests, strict=True) if key in again}
        computed = self._compute(wanted)
        comparison = reference.Comparison(logit_difference=1e-3)
        for key in again:
            comparison.add(self._model, wanted[key][0], computed[key], self._outputs[key])
        comparison.check()
        print(f"{self._path.stem}: {len(known)} recorded, {len(computed)} computed", end="; ")  # noqa: T201
        found = self._outputs | computed
        if self._is_recording:
            self._write(found)
        return [found[key] for key in keys]

    def _compute(self, requests: dict[str, tuple[tuple[int, ...], dict[str, Any]]]) -> dict[str, list[int]]:
        with ThreadPoolExecutor(2) as pool:  # each computes on one thread (conftest); the requests stay alone
            return dict(zip(requests, pool.map(self._generate, requests.values()), strict=True))

    def _generate(self, request: tuple[tuple[int, ...], dict[str, Any]]) -> list[int]:
        prompt, options = request
        rest = dict(options)
        return reference.generate(self._model, prompt, rest.pop("max_tokens", None), self._eos_token_ids, **rest)

    def _key(self, prompt: Sequence[int], options: dict[str, Any]) -> str:
        request = json.dumps([self._digest, list(prompt), options, list(self._eos_token_ids)], sort_keys=True)
        return hashlib.sha256(request.encode()).hexdigest()[:20]

    def _write(self, outputs: dict[str, list[int]]) -> None:
        made_with = {"torch": str(torch.__version__).partition("+")[0], "transformers": transformers.__version__}
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(ids)}" for key, ids in sorted(outputs.items()))
        self._path.parent.mkdir(exist_ok=True)
        self._path.write_text(f'{{"made_with": {json.dumps(made_with)},\n "outputs": {{\n{lines}\n}}}}\n')


def _weights_digest(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    update: Callable[[Any], None] = digest.update
    for name, tensor in sorted(model.state_dict().items()):
        update(name.encode())
        update(np.ascontiguousarray(tensor.detach().numpy()))
    return digest.hexdigest()
