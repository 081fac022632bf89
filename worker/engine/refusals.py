"""Requests that an engine can never run: found before they wait. Pure."""

from __future__ import annotations

import msgspec

from common.generation import peak_kv_tokens
from worker.engine.grammar import GrammarFailure
from worker.engine.types import GenerationRequest


def refusal(
    request: GenerationRequest,
    *,
    vocab_size: int,
    max_model_len: int,
    max_num_seqs: int,
    kv_tokens: int,
    block_size: int,
    max_source_tokens: int = 0,
) -> str | None:
    """Return why a request can never run, as a machine-readable reason; None if it can.

    `kv_tokens` are the slots of the whole KV cache; one sequence of `max_model_len` fits it. `max_source_tokens` is 0
    where the model has no encoder.
    """
    prompt, sampling, source = request.prompt_token_ids, request.sampling, request.source_token_ids
    if request.task is not None:
        return "TASK_NOT_SERVED"
    if not prompt:
        return "EMPTY_PROMPT"
    if len(prompt) + min(sampling.max_tokens, 1) > max_model_len:  # one that is only scored may fill it
        return "PROMPT_TOO_LONG"
    if request.emitted and len(request.emitted) != sampling.num_outputs:
        return "EMITTED_MISMATCH"
    if not source and max_source_tokens:
        return "EMPTY_SOURCE"
    if source and not max_source_tokens:
        return "SOURCE_UNSUPPORTED"  # there is no encoder to read it
    if len(source) > max_source_tokens:
        return "SOURCE_TOO_LONG"
    if source and (sampling.prompt_logprobs is not None or request.echo_text):
        return "PROMPT_SCORES_UNSUPPORTED"  # no token of a source is predicted
    if any(min(ids) < 0 or max(ids) >= vocab_size for ids in (prompt, source, *request.emitted) if ids):
        return "INVALID_TOKEN_ID"
    if isinstance(request.grammar, GrammarFailure):
        return str(request.grammar)
    if sampling.num_beams > max_num_seqs:
        return "TOO_MANY_BEAMS"
    max_tokens = min(sampling.max_tokens, max_model_len - len(prompt))
    source_kv_tokens = -(-len(source) // block_size) * block_size
    peak = peak_kv_tokens(len(prompt), msgspec.structs.replace(sampling, max_tokens=max_tokens), block_size)
    if source_kv_tokens + peak > kv_tokens:
        return "BEAMS_TOO_LONG" if sampling.num_beams > 1 else "SOURCE_TOO_LONG"
    return None
