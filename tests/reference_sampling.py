"""transformers' own logits processors for our parameters: made by its `generate`, in its order, over the vocabulary."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList

from common.generation import SamplingParams


class OutputPenalties(LogitsProcessor):
    """presence_penalty and frequency_penalty as OpenAI describes them: over the output, not the prompt."""

    def __init__(self, presence: float, frequency: float, num_prompt_tokens: int) -> None:
        self._presence = presence
        self._frequency = frequency
        self._num_prompt_tokens = num_prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        output = input_ids[:, self._num_prompt_tokens :]
        counts = torch.zeros_like(scores).scatter_add(1, output, torch.ones_like(output, dtype=scores.dtype))
        return scores - (self._presence + self._frequency * counts) * (counts > 0)


def options_of(params: SamplingParams, num_prompt_tokens: int) -> dict[str, Any]:
    """Arguments of `generate` that mean what `params` means, what ends an output and how long it is included.

    What is off is left out. `logits_processor` is among them where transformers has no such parameter.
    """
    options: dict[str, Any] = {
        "do_sample": params.temperature > 0,
        "max_new_tokens": params.max_tokens,
        "eos_token_id": list(params.stop_token_ids) or None,
    }
    own = SamplingParams(max_tokens=1)
    same = ["repetition_penalty", "no_repeat_ngram_size", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size"]
    same += ["suppress_tokens", "begin_suppress_tokens", "exponential_decay_length_penalty", "forced_eos_token_id"]
    if params.temperature > 0:
        options["top_k"] = 0  # else 50
        same += ["temperature", "top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"]
    for name in same:
        value = getattr(params, name)
        if value != getattr(own, name):
            options[name] = list(value) if isinstance(value, tuple) else value
    if params.min_tokens:
        options["min_new_tokens"] = params.min_tokens
    if params.bad_words_ids:
        options["bad_words_ids"] = [list(ids) for ids in params.bad_words_ids]
    if params.sequence_bias:
        options["sequence_bias"] = [[list(ids), float(bias)] for ids, bias in params.sequence_bias]
    if params.presence_penalty or params.frequency_penalty:
        penalties = OutputPenalties(params.presence_penalty, params.frequency_penalty, num_prompt_tokens)
        options["logits_processor"] = LogitsProcessorList([penalties])
    return options


def processors_of(params: SamplingParams, prompt: list[int]) -> LogitsProcessorList:
    """The list that `generate` would run for a request of one prompt."""
    options = options_of(params, len(prompt))
    own = options.pop("logits_processor", None)
    max_length = len(prompt) + options.pop("max_new_tokens")
    config = GenerationConfig(**{"max_length": max_length, **options})
    ends = config.eos_token_id
    config._eos_token_tensor = None if ends is None else torch.tensor(ends)
    model = SimpleNamespace(
        config=SimpleNamespace(is_encoder_decoder=False),
        _merge_criteria_processor_list=lambda default, custom: LogitsProcessorList([*default, *(custom or [])]),
    )
    processors: LogitsProcessorList = GenerationMixin._get_logits_processor(
        model,  # type: ignore[arg-type]
        config,
        input_ids_seq_length=len(prompt),
        encoder_input_ids=torch.tensor([prompt]),
        logits_processor=own,
        device="cpu",
        model_kwargs={},
    )
    return processors
