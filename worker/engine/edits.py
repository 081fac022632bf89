"""Edits of scores before a token is chosen: transformers' logits processors over a mixed batch.

Each row asks for its own, and only the cells concerned are touched: all rows' cells of one processor are gathered into
one flat index, so that a batch costs a handful of small operations, and rows that ask for nothing cost none.

The order is transformers' (`generation/utils.py`, `_get_logits_processor`), with what OpenAI and vLLM add at its end:

    sequence_bias, logit_bias             added
    encoder_repetition_penalty            divided or multiplied, tokens of the prompt
    repetition_penalty                    likewise, tokens of prompt and output
    no_repeat_ngram_size, encoder_no_repeat_ngram_size, bad words, min_tokens       to -inf
    forced_bos_token_id                   all others to -inf, for the first token behind a prompt of one
    forced_eos_token_id                   likewise, for the last token
    exponential_decay_length_penalty      added to what ends the output
    suppress_tokens, begin_suppress_tokens                                          to -inf
    presence_penalty, frequency_penalty   taken off, tokens of the output

What is set to -inf stays there, so all of that is written at once; only a forced token undoes what stands before it.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from worker.engine.history import TokenHistory
from worker.engine.transfer import on_device

_NEG_INF: Final = float("-inf")
_LARGEST: Final = 1e30  # of a score that grows exponentially: probabilities stay numbers at every temperature


class EditedRow(Protocol):
    """A row of scores that may be edited."""

    @property
    def history(self) -> TokenHistory | None: ...


class _Cells:
    """Cells of the scores, each with a value."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._indices: list[npt.NDArray[np.int64]] = []
        self._values: list[npt.NDArray[np.float32]] = []

    def __bool__(self) -> bool:
        return bool(self._indices)

    def add(self, row: int, token_ids: npt.NDArray[np.signedinteger[Any]], values: Any) -> None:
        """`values` is one per id, or one for all. Ids beyond the scores are left out: some checkpoints have such."""
        fits = token_ids < self._vocab_size
        if not fits.all():
            token_ids = token_ids[fits]
            values = values[fits] if isinstance(values, np.ndarray) else values
        if len(token_ids):
            self._indices.append(token_ids.astype(np.int64) + row * self._vocab_size)
            self._values.append(np.broadcast_to(np.asarray(values, dtype=np.float32), token_ids.shape))

    def index(self, device: torch.device) -> torch.Tensor:
        return on_device(torch.from_numpy(np.concatenate(self._indices)), device)

    def values(self, device: torch.device) -> torch.Tensor:
        return on_device(torch.from_numpy(np.concatenate(self._values)), device)


def edit_scores(scores: torch.Tensor, rows: Rows[EditedRow]) -> None:
    """Apply what the rows ask for, in place. A row may end with -inf everywhere: then all its tokens are forbidden.

    `scores` is [len(rows), vocab_size] float32, contiguous: logits, or for beams their logarithms of probabilities.
    """
    vocab_size, device = scores.shape[-1], scores.device
    biased, of_prompt, seen, banned, ending, counted, forced = (_Cells(vocab_size) for _ in range(7))
    forced_rows = []
    for i, row in enumerate(rows):
        history = row.history
        if history is None:
            continue
        params = history.sampling
        forced_id = _forced_id(history)
        if forced_id is not None:
            forced_rows.append(i)
            forced.add(i, np.array([forced_id], dtype=np.int64), 0.0)
            banned.add(i, np.array(params.suppress_tokens, dtype=np.int64), _NEG_INF)
        else:
            biased.add(i, *history.biases())
            of_prompt.add(i, history.prompt_ids, 1 / params.encoder_repetition_penalty)
            seen.add(i, np.frombuffer(history.seen_ids, dtype=np.int32), params.repetition_penalty)
            banned.add(i, history.always_banned, _NEG_INF)
            for ids in history.banned_ids():
                banned.add(i, ids, _NEG_INF)
            if history.num_output_tokens < params.min_tokens:
                banned.add(i, np.array(params.stop_token_ids, dtype=np.int64), _NEG_INF)
            decay = params.exponential_decay_length_penalty
            if decay is not None and history.num_output_tokens > decay[0]:
                growth = _power(decay[1], history.num_output_tokens - decay[0]) - 1
                ending.add(i, np.array(params.stop_token_ids, dtype=np.int64), growth)
        if params.begin_suppress_tokens and history.num_free_output_tokens == 0:
            banned.add(i, np.array(params.begin_suppress_tokens, dtype=np.int64), _NEG_INF)
        counts = np.frombuffer(history.counts, dtype=np.int32)
        penalties = params.presence_penalty + params.frequency_penalty * counts
        counted.add(i, np.frombuffer(history.counted_ids, dtype=np.int32), -penalties)
    flat = scores.view(-1)
    if biased:
        flat.index_add_(0, biased.index(device), biased.values(device))
    for cells in (of_prompt, seen):
        if cells:
            index, penalty = cells.index(device), cells.values(device)
            values = flat[index]
            flat[index] = torch.where(values < 0, values * penalty, values / penalty)
    if forced_rows:
        scores.index_fill_(0, on_device(torch.tensor(forced_rows), device), _NEG_INF)
        flat.index_fill_(0, forced.index(device), 0.0)
    if banned:
        flat.index_fill_(0, banned.index(device), _NEG_INF)
    if ending:
        index = ending.index(device)
        values = flat[index]
        grown = (values + values.abs() * ending.values(device)).clamp(max=_LARGEST)
        flat[index] = torch.where(values.isfinite(), grown, values)
    if counted:
        flat.index_add_(0, counted.index(device), counted.values(device))


def _forced_id(history: TokenHistory) -> int | None:
    """What the next token is whatever the scores are; the end's takes the place of the beginning's."""
    params = history.sampling
    if params.forced_eos_token_id is not None and history.num_output_tokens == params.max_tokens - 1:
        return params.forced_eos_token_id
    return params.forced_bos_token_id if history.num_tokens == 1 else None


def _power(factor: float, exponent: int) -> float:
    try:
        return min(factor**exponent, _LARGEST)
    except OverflowError:
        return _LARGEST
