"""The issuer's keys: fetched aside, remembered, and kept while the issuer does not answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import structlog
from jwt import PyJWK
from jwt.exceptions import PyJWTError

from common.errors import Unavailable
from gateway.identity.fetching import FetchError

log = structlog.get_logger()

MAX_KEY_ID_CHARS: Final = 256
_MAX_KEYS: Final = 256
_RETRY_AFTER_MS: Final = 1000
_MIN_RSA_BITS: Final = 2048
_ALGORITHMS: Final = {("RSA", None): "RS256", ("EC", "P-256"): "ES256", ("OKP", "Ed25519"): "EdDSA"}
_PRIVATE: Final = ("d", "k")  # members of a private or a shared key


@dataclass(frozen=True, slots=True)
class VerificationKey:
    """A public key, and the one algorithm that it verifies."""

    algorithm: str
    key: Any  # as PyJWT takes it


@dataclass(frozen=True, slots=True)
class KeySetTimes:
    """In seconds: when keys are fetched again, how long they may serve, and how rarely anybody is asked."""

    cache_s: float = 600
    max_stale_s: float = 24 * 3600
    refetch_s: float = 30


def parse_key_set(document: Any) -> dict[str, VerificationKey]:
    """Return the public keys of a JSON Web Key Set (RFC 7517) by their ids; what is of no use is left out.

    Raises FetchError for a document that is none, or has no key of use.
    """
    members = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(members, list) or len(members) > _MAX_KEYS:
        raise FetchError("not a key set")
    keys: dict[str, VerificationKey] = {}
    for member in members:
        key_id = member.get("kid") if isinstance(member, dict) else None
        if not isinstance(key_id, str) or not 0 < len(key_id) <= MAX_KEY_ID_CHARS or key_id in keys:
            continue
        key = _key(member)
        if key is not None:
            keys[key_id] = key
    if not keys:
        raise FetchError("the key set has no key of use")
    return keys


def _key(member: dict[str, Any]) -> VerificationKey | None:
    kind = member.get("kty")
    curve = member.get("crv") if kind != "RSA" else None
    algorithm = _ALGORITHMS.get((kind, curve)) if isinstance(kind, str) and isinstance(curve, str | None) else None
    if algorithm is None or member.get("alg", algorithm) != algorithm or member.get("use", "sig") != "sig":
        return None
    if any(name in member for name in _PRIVATE):
        return None
    try:
        key = PyJWK(member, algorithm).key
    except (PyJWTError, ValueError, TypeError):
        return None
    if kind == "RSA" and key.key_size < _MIN_RSA_BITS:
        return None
    return VerificationKey(algorithm, key)


class KeySet:
    """Keys by id, from a blocking `fetch` that runs in a thread and raises FetchError.

    Fetches are at least `refetch_s` apart, whoever asks for whatever. `monotonic` is the clock, in seconds. It owns the
    task that fetches: `aclose` ends it.
    """

    def __init__(
        self, fetch: Callable[[], Any], times: KeySetTimes, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._fetch = fetch
        self._times = times
        self._monotonic = monotonic
        self._keys: dict[str, VerificationKey] = {}
        self._fetched = float("-inf")
        self._asked = float("-inf")
        self._fetching: asyncio.Task[None] | None = None
        self._closed = False

    async def aclose(self) -> None:
        """Fetch no more, and end a fetch that runs; its thread goes on to the fetch's own time-out."""
        self._closed = True
        fetching = self._fetching
        if fetching is not None:
            fetching.cancel()
            await asyncio.wait([fetching])

    async def find(self, key_id: str) -> VerificationKey | None:
        """The key of an id; None if there is none, as far as one may ask just now.

        A known key is never waited for: it is fetched again beside the calls that it serves. Raises Unavailable while
        there are no keys at all, or only keys that are too old: nobody can tell then whether a token is good.
        """
        age = self._monotonic() - self._fetched
        key = self._keys.get(key_id) if age < self._times.max_stale_s else None
        if key is not None and age < self._times.cache_s:
            return key
        self._refresh()
        if key is not None:
            return key
        if self._fetching is not None:
            await asyncio.shield(self._fetching)  # a caller that leaves ends its own waiting alone
        if self._monotonic() - self._fetched >= self._times.max_stale_s:
            raise Unavailable(
                "the issuer's keys are not to be had", reason="IDENTITY_UNAVAILABLE", retry_after_ms=_RETRY_AFTER_MS
            )
        return self._keys.get(key_id)

    def _refresh(self) -> None:
        now = self._monotonic()
        if self._fetching is None and not self._closed and now - self._asked >= self._times.refetch_s:
            self._asked = now
            self._fetching = asyncio.create_task(self._load())

    async def _load(self) -> None:
        try:
            self._keys = parse_key_set(await asyncio.to_thread(self._fetch))
            self._fetched = self._monotonic()
            log.info("keys.fetched", num_keys=len(self._keys))
        except FetchError as error:
            log.warning("keys.not_fetched", error=str(error), num_kept=len(self._keys))
        except Exception as error:  # noqa: BLE001 - whoever waits for keys gets an answer, whatever broke
            log.error("keys.not_fetched", error=type(error).__name__, num_kept=len(self._keys))
        finally:
            self._fetching = None
