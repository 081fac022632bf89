"""The sequence that decodes one output of a request."""

from __future__ import annotations

from collections.abc import Iterable

from common.generation import SamplingParams
from worker.engine.adapters.requests import cache_salt
from worker.engine.adapters.types import AdapterLease
from worker.engine.grammar import Matcher
from worker.engine.seq2seq.source import Source
from worker.engine.sequence import Sequence
from worker.engine.types import GenerationRequest


def new_sequence(
    request: GenerationRequest,
    sampling: SamplingParams,
    output_index: int,
    emitted: Iterable[int],
    arrival: int,
    matcher: Matcher | None,
) -> Sequence:
    """Return what decodes an output; `sampling` is the request's, within what the model bears."""
    source, salt = Source.of(request.source_token_ids), cache_salt(request)
    return Sequence(
        request.request_id,
        request.prompt_token_ids,
        sampling,
        output_index=output_index,
        emitted=emitted,
        cache_salt=salt if source is None else source.salt(salt),
        priority=request.priority,
        arrival=arrival,
        deadline=request.deadline,
        tenant=request.tenant,
        weight=request.weight,
        matcher=matcher,
        adapter=request.adapter.adapter if isinstance(request.adapter, AdapterLease) else None,
        source=source,
    )
