"""Jobs as a worker claims them."""

from __future__ import annotations

from typing import Any

import msgspec

from common.generation import JobBody, SamplingParams, Usage
from common.jobs import ClaimedJob


def make_claimed(generation_id: str, **fields: Any) -> ClaimedJob:
    job = _claimed(generation_id)
    return msgspec.structs.replace(job, **fields)


def _claimed(generation_id: str) -> ClaimedJob:
    return ClaimedJob(
        generation_id=generation_id,
        epoch=1,
        sequence=0,
        chain_hash=bytes(8),
        remaining_ms=60_000,
        priority=1,
        attempts=0,
        tenant="acme",
        usage=Usage(),
        body=JobBody(prompt_token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=4)),
        events=(),
    )
