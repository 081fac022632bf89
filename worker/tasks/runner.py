"""The forward pass of encoder models: texts of similar length in one padded batch, on a CPU in lanes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from worker.engine.closeness import TOLERANCE
from worker.engine.model_files import ModelError
from worker.engine.runner import memory_guard
from worker.tasks.facts import Head
from worker.tasks.labels import Array
from worker.tasks.lanes import Lanes
from worker.tasks.pooling import Pooling, pool

Ids = npt.NDArray[np.int32]
_SEED: Final = 20240229


@dataclass(frozen=True, slots=True)
class Text:
    """A text as the model reads it."""

    ids: Ids  # [num_tokens]
    types: npt.NDArray[np.uint8] | None = None  # None: all 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """A layer behind the pooling."""

    linear: torch.nn.Linear
    activation: torch.nn.Module | None

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.linear(vectors)
        return output if self.activation is None else self.activation(output)


class EncoderModule:
    """A model with its head. Runs one batch at a time, on one thread."""

    def __init__(
        self,
        body: PreTrainedModel,
        head: Head,
        *,
        pooling: Pooling = Pooling.MEAN,
        dense: Sequence[DenseLayer] = (),
        lanes: Lanes | None = None,
    ) -> None:
        """`pooling` and `dense` are of vectors; without `lanes` a batch is computed as one."""
        self.body = body
        self.head = head
        self._pooling = pooling
        self._dense = tuple(dense)
        self._lanes = lanes
        self.device = body.device
        self.dtype = body.dtype
        self._takes_types = "token_type_ids" in inspect.signature(body.forward).parameters
        self._pad_id = int(getattr(body.config.get_text_config(), "pad_token_id", None) or 0)

    def run(self, texts: Sequence[Text]) -> list[Array]:
        """Return what the head gives of each text, float32. Raises StepOutOfMemory."""
        return self._run(texts) if self._lanes is None else self._lanes.run(self._run, texts)

    @torch.inference_mode()
    def _run(self, texts: Sequence[Text]) -> list[Array]:
        width = max(map(len, texts))
        ids = np.full((len(texts), width), self._pad_id, dtype=np.int64)
        types = np.zeros_like(ids) if self._takes_types else None
        lengths = np.array([len(text) for text in texts])
        for row, text in enumerate(texts):
            ids[row, : len(text)] = text.ids
            if types is not None and text.types is not None:
                types[row, : len(text)] = text.types
        arguments: dict[str, Any] = {"input_ids": self._put(ids)}
        if types is not None:
            arguments["token_type_ids"] = self._put(types)
        # Always given: some classes would else look for the padding's id among the tokens.
        arguments["attention_mask"] = self._put((np.arange(width) < lengths[:, None]).astype(np.int64))
        with memory_guard():
            output = self._head(self.body(**arguments), self._put(lengths)).float().cpu().numpy()
        if self.head in (Head.VECTOR, Head.LABELS):
            return list(output)
        return [rows[:length] for rows, length in zip(output, lengths, strict=True)]

    def _put(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def _head(self, output: Any, lengths: torch.Tensor) -> torch.Tensor:
        match self.head:
            case Head.VECTOR:
                vectors = pool(output.last_hidden_state, lengths, self._pooling)
                for layer in self._dense:
                    vectors = layer(vectors)
                return vectors
            case Head.SPANS:
                return torch.stack((output.start_logits, output.end_logits), dim=-1)
        logits: torch.Tensor = output.logits
        return logits


def check_module(module: EncoderModule, vocab_size: int, lengths: Sequence[int]) -> float:
    """Compare texts in one padded batch with each alone; return the largest relative error.

    Raises ModelError where they differ: the class does not leave padding out, or reads across texts.
    """
    generator = np.random.default_rng(_SEED)
    texts = [Text(generator.integers(vocab_size, size=length, dtype=np.int32)) for length in lengths]
    together = module.run(texts)
    alone = [module.run([text])[0] for text in texts]
    errors = [
        float(np.linalg.norm(one - other) / max(float(np.linalg.norm(other)), 1e-6))
        for one, other in zip(together, alone, strict=True)
    ]
    error = max(errors) if all(map(np.isfinite, errors)) else float("nan")
    if not error <= TOLERANCE[module.dtype]:
        raise ModelError(
            f"the family {module.body.config.model_type} cannot be served: texts in one padded batch give other "
            f"answers than alone (relative error {error:.2g}, allowed {TOLERANCE[module.dtype]:.2g})"
        )
    return error
