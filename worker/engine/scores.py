"""What is reported about tokens: log-probabilities, ranks and alternatives, of the distribution that the model gives.

That is before penalties, temperature and filters. Everything comes to the host in the one copy that the tokens take:
first a row's own log-probability, then its rank, then the ids and the log-probabilities of its alternatives, float64.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from common.generation import Alternatives, PromptScores, SamplingParams
from worker.engine.transfer import to_device


@dataclass(frozen=True, slots=True)
class TokenDetails:
    """A token among those that could have stood in its place."""

    rank: int  # 1 is the most probable; of equal ones the first counts for all
    alternatives: Alternatives


# By row: the log-probability, and the details of those that asked for them.
Scores: TypeAlias = tuple[dict[int, float], dict[int, TokenDetails]]


def wants_logprobs(sampling: SamplingParams) -> bool:
    """Whether the sampled tokens of such a request are scored, be it only to choose the best outputs."""
    return sampling.logprobs or sampling.num_best > 0


def score_tokens(logits: torch.Tensor, tokens: torch.Tensor, num_alternatives: int, *, ranked: bool) -> torch.Tensor:
    """Return [num_rows, 1 or 2 + 2 * num_alternatives] float64, as said above.

    `logits` is [num_rows, vocab_size] float32, `tokens` [num_rows] int64.
    """
    chosen = logits.gather(1, tokens[:, None])
    totals = logits.logsumexp(-1, keepdim=True)
    columns = [(chosen - totals).double()]
    if ranked:
        columns.append((logits > chosen).sum(-1, keepdim=True).double() + 1)
    if num_alternatives:
        top, ids = logits.topk(min(num_alternatives, logits.shape[-1]), dim=-1)
        columns += [ids.double(), (top - totals).double()]
    return torch.cat(columns, dim=-1)


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Scores of some rows of a batch, on their way to the host."""

    rows: list[int]
    num_alternatives: list[int]  # asked for, by place in `rows`
    table: torch.Tensor  # [len(rows), ...] as `score_tokens` returns it

    @classmethod
    def of(cls, logits: torch.Tensor, tokens: torch.Tensor, wanted: list[tuple[int, int]]) -> list[TokenScores]:
        """Score these rows of a batch, each with the number of alternatives asked for, as few do with any.

        `logits` is [num_rows, vocab_size] float32, `tokens` [num_rows] int64, negative where one is drawn again later.
        """
        groups = [[w for w in wanted if not w[1]], [w for w in wanted if w[1]]]
        found = []
        for group in filter(None, groups):
            rows, counts = [row for row, _ in group], [count for _, count in group]
            index = to_device(rows, logits.device)
            most = max(counts)
            table = score_tokens(logits[index], tokens[index].clamp(min=0), most, ranked=most > 0)
            found.append(cls(rows, counts, table))
        return found

    def read(self, values: Iterable[float], logprobs: dict[int, float], details: dict[int, TokenDetails]) -> None:
        """Enter what came to the host: the table, row by row."""
        flat, width = list(values), self.table.shape[1]
        for place, (row, count) in enumerate(zip(self.rows, self.num_alternatives, strict=True)):
            logprob, *rest = flat[place * width : (place + 1) * width]
            logprobs[row] = logprob
            if count:
                details[row] = _details(rest, count)


def _details(values: list[float], count: int) -> TokenDetails:
    rank, *alternatives = values
    half = len(alternatives) // 2
    pairs = zip(alternatives[:half], alternatives[half:], strict=True)
    return TokenDetails(int(rank), tuple((int(token_id), logprob) for token_id, logprob in list(pairs)[:count]))


def score_prompt(
    logits: torch.Tensor, token_ids: Iterable[int], first_token_index: int, num_alternatives: int
) -> PromptScores:
    """Score tokens of a prompt, whose first one stands there in it; row i of `logits` gives the i-th one's."""
    tokens = to_device(token_ids, logits.device)
    table = score_tokens(logits.float(), tokens, num_alternatives, ranked=True).cpu().tolist()
    details = [_details(values[1:], num_alternatives) for values in table]
    return PromptScores(
        first_token_index=first_token_index,
        logprobs=tuple(values[0] for values in table),
        ranks=tuple(found.rank for found in details),
        top_logprobs=tuple(found.alternatives for found in details) if num_alternatives else (),
    )
