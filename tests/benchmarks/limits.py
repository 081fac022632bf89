"""What the hardware allows: no engine can be faster than the machine's arithmetic and its memory. Pure.

A run takes at least its multiply-adds over the rate of the instructions, and at least one pass over the weights for
each of its steps over the measured read bandwidth; the larger of both is its limit. Keys and values are not counted as
bytes, so the limits are a little generous.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tests.benchmarks.workload import MAX_RUNNING, W4_PREFIX, Request, Workload

WEIGHT_BYTES: Final = {"bf16": 2, "fp32": 4, "int8": 1}


@dataclass(frozen=True, slots=True)
class Hardware:
    """Measured rates with all the threads that engines compute with."""

    read_bytes_s: float
    multiply_add_s: Mapping[str, float]  # by precision; a multiply-add counts as two operations


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What a decoder-only transformer with grouped heads and a gated MLP computes and reads."""

    body: int  # weights of all layers' matrices
    head: int  # weights of the matrix to the vocabulary
    attention: int  # operations of one query token per token of context, all layers

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelCost:
        """From a config.json of the Llama kind."""
        hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        queries, pairs = heads * head_dim, config["num_key_value_heads"] * head_dim
        layer = 2 * hidden * queries + 2 * hidden * pairs + 3 * hidden * config["intermediate_size"]
        return cls(layers * layer, hidden * config["vocab_size"], 4 * layers * queries)

    @property
    def num_weights(self) -> int:
        """Weights that every step reads."""
        return self.body + self.head

    def operations(self, num_new: int, num_past: int, num_sampled: int) -> float:
        """Of `num_new` tokens after `num_past` ones, `num_sampled` of which go on to the vocabulary."""
        context = num_new * num_past + num_new * (num_new + 1) / 2
        return 2 * self.body * num_new + 2 * self.head * num_sampled + self.attention * context


def limits(cost: ModelCost, workload: Workload, hardware: Hardware, precision: str) -> dict[str, float]:
    """Return the best possible figures by column key."""
    rate = hardware.multiply_add_s[precision]
    pass_s = cost.num_weights * WEIGHT_BYTES[precision] / hardware.read_bytes_s

    def tokens_per_s(requests: Sequence[Request], num_shared: int = 0) -> float:
        num_tokens = sum(request.max_tokens for request in requests)
        num_steps = max(max(request.max_tokens for request in requests), num_tokens / MAX_RUNNING)
        operations = cost.operations(num_shared, 0, 0) + sum(_operations(cost, requests, num_shared))
        return num_tokens / max(operations / rate, num_steps * pass_s)

    alone, prefill = workload.runs["W2"][0][0], workload.runs["W3"][0][0]
    num_prompt, middle = len(alone.prompt), len(alone.prompt) + alone.max_tokens // 2
    return {
        "W1": tokens_per_s(workload.runs["W1"][0]),
        "W2_ttft": max(cost.operations(num_prompt, 0, 1) / rate, pass_s) * 1e3,
        "W2_itl": max(cost.operations(1, middle, 1) / rate, pass_s) * 1e3,
        "W3": len(prefill.prompt) / max(cost.operations(len(prefill.prompt), 0, 1) / rate, pass_s),
        "W4": tokens_per_s(workload.runs["W4"][0], W4_PREFIX),
    }


def _operations(cost: ModelCost, requests: Iterable[Request], num_shared: int) -> Iterable[float]:
    for request in requests:
        num_prompt, num_more = len(request.prompt), request.max_tokens - 1
        yield cost.operations(num_prompt - num_shared, num_shared, 1)
        yield cost.operations(num_more, num_prompt, num_more)
