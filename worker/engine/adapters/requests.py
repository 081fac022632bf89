"""What an adapter means for a request: which one it has, when it lets go of it, and with whom it shares blocks."""

from __future__ import annotations

import hashlib

from worker.engine.adapters.types import ADAPTER_NOT_FOUND, AdapterFailure, AdapterLease
from worker.engine.types import GenerationRequest


def unmet_adapter(request: GenerationRequest) -> str | None:
    """Return why a request cannot have the adapter that it names: it is never computed without; None: it has it."""
    wanted, given = request.sampling.adapter, request.adapter
    if isinstance(given, AdapterFailure):
        return str(given)
    found = given.adapter.ref if given is not None else None
    return ADAPTER_NOT_FOUND if found != wanted else None


def release(request: GenerationRequest) -> None:
    """Let go of a request's adapter, which others may then evict."""
    if isinstance(request.adapter, AdapterLease):
        request.adapter.release()


def cache_salt(request: GenerationRequest) -> bytes:
    """Return what keeps a request's blocks apart: an adapter's keys and values are its revision's alone."""
    ref = request.sampling.adapter
    if ref is None:
        return request.cache_salt
    return hashlib.sha256(b"adapter\0" + ref.revision.encode() + b"\0" + request.cache_salt).digest()
