"""API keys: `tr_<id>_<secret>_<checksum>`, of which only a SHA-256 is stored.

The secret has 256 random bits, so a fast hash is enough: there is nothing to guess. The checksum tells a mistyped or
cut key apart from a wrong one without asking the server, and lets scanners find leaked keys.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from common import keys
from common.errors import ApiKeyNotFound, FailedPrecondition, InvalidRequest, Unauthenticated
from common.grants import NO_GRANTS_GIVEN, Grants
from common.jobs import MAX_TENANT_BYTES
from common.redis import Redis, Retry, execute

PREFIX: Final = "tr"
CACHE_MS: Final = 5000  # a revoked key works no longer than this
REFUSED_MS: Final = 1000  # a key that was refused is refused again without asking for no longer than this
_ALPHABET: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID_LENGTH: Final = 12
_SECRET_LENGTH: Final = 43  # 62**43 > 2**256
_CHECKSUM_LENGTH: Final = 6  # 62**6 > 2**32
_CHAR: Final = "[0-9A-Za-z]"
_FORMAT: Final = re.compile(
    f"{PREFIX}_({_CHAR}{{{_ID_LENGTH}}})_{_CHAR}{{{_SECRET_LENGTH}}}_{_CHAR}{{{_CHECKSUM_LENGTH}}}"
)
_NO_DIGEST: Final = "0" * 64
_MAX_NAME_BYTES: Final = 128
_MAX_CACHED: Final = 10_000
_GRANTS_ENCODER: Final = msgspec.json.Encoder()
_GRANTS_DECODER: Final = msgspec.json.Decoder(Grants)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A stored key. Times are server time in ms since the epoch; None where it does not apply."""

    key_id: str
    tenant: str
    name: str
    last_four: str  # of the secret, for its owner to recognise it
    created_ms: int
    expires_ms: int | None = None
    revoked_ms: int | None = None
    grants: Grants = NO_GRANTS_GIVEN
    rotated_from: str = ""  # id of the key that it replaces
    quota_id: str = ""  # what its quotas are counted by: that of the first key of its line

    def is_valid(self, now_ms: int) -> bool:
        return self.revoked_ms is None and (self.expires_ms is None or now_ms < self.expires_ms)


@dataclass(frozen=True, slots=True)
class CreatedApiKey:
    """A new key. `secret` is the whole key as callers send it; it cannot be read again."""

    api_key: ApiKey
    secret: str


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))


def _checksum(stem: str) -> str:
    return _base62(zlib.crc32(stem.encode()), _CHECKSUM_LENGTH)


def generate_key() -> tuple[str, str]:
    """A new key and its id."""
    key_id = "".join(secrets.choice(_ALPHABET) for _ in range(_ID_LENGTH))
    stem = f"{PREFIX}_{key_id}_{_base62(secrets.randbits(256), _SECRET_LENGTH)}"
    return f"{stem}_{_checksum(stem)}", key_id


def id_of(key: str) -> str | None:
    """The id in a well-formed key with the right checksum, else None."""
    match = _FORMAT.fullmatch(key)
    if match is None:
        return None
    stem, _, checksum = key.rpartition("_")
    return match[1] if hmac.compare_digest(checksum, _checksum(stem)) else None


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class ApiKeys:
    """Creates, verifies, lists and revokes keys. Methods raise the errors of `Retry` besides what they name.

    `verify` remembers an answer for CACHE_MS, a refusal for REFUSED_MS; `monotonic_ms` is the clock of that memory.
    """

    def __init__(
        self,
        redis: Redis,
        *,
        retry: Retry | None = None,
        monotonic_ms: Callable[[], float] = lambda: time.monotonic() * 1000,
    ) -> None:
        self._redis = redis
        self._retry = retry or Retry()
        self._monotonic_ms = monotonic_ms
        self._cache: dict[str, tuple[float, ApiKey]] = {}  # digest -> good until, key
        self._refused: dict[str, float] = {}  # digest -> refused until, the oldest first

    async def _execute(self, *command: str | bytes | int) -> Any:
        return await self._retry.call(lambda: execute(self._redis, *command))

    async def _now_ms(self) -> int:
        seconds, micros = await self._execute("TIME")
        return int(seconds) * 1000 + int(micros) // 1000

    async def create(
        self, tenant: str, name: str, ttl_ms: int | None = None, *, grants: Grants | None = None
    ) -> CreatedApiKey:
        """Make a key for a tenant, with the default grants if none are given. Raises InvalidRequest."""
        for field, value, limit in (("tenant", tenant, MAX_TENANT_BYTES), ("name", name, _MAX_NAME_BYTES)):
            if not 1 <= len(value.encode()) <= limit or any(c < " " or c == "\x7f" for c in value):
                raise InvalidRequest(f"{field} must be 1 to {limit} bytes without control characters", field=field)
        return await self._make(tenant, name, ttl_ms, grants or NO_GRANTS_GIVEN)

    async def rotate(self, key_id: str, overlap_ms: int, ttl_ms: int | None = None) -> tuple[CreatedApiKey, ApiKey]:
        """Make a key like another, which ends after `overlap_ms`, or earlier if it would have. Returns new and old.

        Both draw on the same quotas. Raises ApiKeyNotFound, and FailedPrecondition for a key that has ended already.
        """
        old = await self.get(key_id)
        now_ms = await self._now_ms()
        if not old.is_valid(now_ms):
            raise FailedPrecondition("the key was revoked or has expired", reason="API_KEY_ENDED")
        made = await self._make(old.tenant, old.name, ttl_ms, old.grants, rotated_from=old)
        ends_ms = now_ms + overlap_ms
        if old.expires_ms is None or ends_ms < old.expires_ms:
            await self._execute("HSET", keys.api_key(key_id), "expires_ms", ends_ms)
        self._cache.clear()
        return made, await self.get(key_id)

    async def update(self, key_id: str, grants: Grants) -> ApiKey:
        """Replace what a key may do; it holds everywhere within CACHE_MS. Raises ApiKeyNotFound."""
        await self.get(key_id)
        await self._execute("HSET", keys.api_key(key_id), "grants", _GRANTS_ENCODER.encode(grants))
        self._cache.clear()
        return await self.get(key_id)

    async def _make(
        self, tenant: str, name: str, ttl_ms: int | None, grants: Grants, rotated_from: ApiKey | None = None
    ) -> CreatedApiKey:
        if ttl_ms is not None and ttl_ms <= 0:
            raise InvalidRequest("the lifetime must be above 0", field="ttl", reason="FIELD_OUT_OF_RANGE")
        key, key_id = generate_key()
        now_ms = await self._now_ms()
        api_key = ApiKey(
            key_id=key_id,
            tenant=tenant,
            name=name,
            last_four=key[-_CHECKSUM_LENGTH - 5 : -_CHECKSUM_LENGTH - 1],
            created_ms=now_ms,
            expires_ms=None if ttl_ms is None else now_ms + ttl_ms,
            grants=grants,
            rotated_from=rotated_from.key_id if rotated_from is not None else "",
            quota_id=rotated_from.quota_id if rotated_from is not None else key_id,
        )
        fields: list[str | bytes | int] = ["digest", digest_of(key), "tenant", tenant, "name", name]
        fields += ["grants", _GRANTS_ENCODER.encode(grants), "quota_id", api_key.quota_id]
        fields += ["last_four", api_key.last_four, "created_ms", now_ms]
        if api_key.rotated_from:
            fields += ["rotated_from", api_key.rotated_from]
        if api_key.expires_ms is not None:
            fields += ["expires_ms", api_key.expires_ms]
        # The index first: an id without a record is left out by `list`, a record without an id could not be revoked.
        await self._execute("SADD", keys.API_KEY_IDS, key_id)
        await self._execute("HSET", keys.api_key(key_id), *fields)
        return CreatedApiKey(api_key, key)

    async def verify(self, key: str) -> ApiKey:
        """The key's record. Raises Unauthenticated, with one text for every cause, after the same work for each.

        A key that was refused within REFUSED_MS is refused without asking.
        """
        digest = digest_of(key)
        cached = self._cache.get(digest)
        if cached is not None and self._monotonic_ms() < cached[0]:
            return cached[1]
        self._cache.pop(digest, None)
        asked = self._monotonic_ms()
        key_id = id_of(key)
        if key_id is not None and asked >= self._refused.get(digest, asked):
            stored, now_ms = await asyncio.gather(self._read(key_id), self._now_ms())
            api_key, stored_digest = stored or (None, _NO_DIGEST)
            if hmac.compare_digest(digest, stored_digest) and api_key is not None and api_key.is_valid(now_ms):
                left = CACHE_MS if api_key.expires_ms is None else min(CACHE_MS, api_key.expires_ms - now_ms)
                if len(self._cache) >= _MAX_CACHED:
                    self._cache.clear()
                self._cache[digest] = (asked + left, api_key)
                return api_key
            self._refused.pop(digest, None)  # it moves to the end
            if len(self._refused) >= _MAX_CACHED:
                del self._refused[next(iter(self._refused))]
            self._refused[digest] = asked + REFUSED_MS
        raise Unauthenticated("the credentials are not valid")

    async def current(self, key_id: str) -> ApiKey:
        """A key's record as it is now. Raises ApiKeyNotFound, and Unauthenticated for one that has ended."""
        api_key, now_ms = await asyncio.gather(self.get(key_id), self._now_ms())
        if not api_key.is_valid(now_ms):
            raise Unauthenticated("the credentials are not valid")
        return api_key

    async def _read(self, key_id: str) -> tuple[ApiKey, str] | None:
        fields = await self._execute("HGETALL", keys.api_key(key_id))
        if b"digest" not in fields:
            return None
        text = {name.decode(): value.decode() for name, value in fields.items()}
        api_key = ApiKey(
            key_id=key_id,
            tenant=text["tenant"],
            name=text["name"],
            last_four=text["last_four"],
            created_ms=int(text["created_ms"]),
            expires_ms=int(text["expires_ms"]) if "expires_ms" in text else None,
            revoked_ms=int(text["revoked_ms"]) if "revoked_ms" in text else None,
            grants=_GRANTS_DECODER.decode(text["grants"]) if "grants" in text else NO_GRANTS_GIVEN,
            rotated_from=text.get("rotated_from", ""),
            quota_id=text.get("quota_id", key_id),
        )
        return api_key, text["digest"]

    async def list(self, tenant: str | None = None) -> list[ApiKey]:
        """All keys, or a tenant's, the oldest first; revoked and expired ones too."""
        ids = await self._execute("SMEMBERS", keys.API_KEY_IDS)
        found = await asyncio.gather(*(self._read(key_id.decode()) for key_id in ids))
        api_keys = [stored[0] for stored in found if stored is not None]
        return sorted(
            (key for key in api_keys if tenant is None or key.tenant == tenant),
            key=lambda key: (key.created_ms, key.key_id),
        )

    async def revoke(self, key_id: str) -> ApiKey:
        """End a key; it is refused everywhere within CACHE_MS. Again changes nothing. Raises ApiKeyNotFound."""
        await self.get(key_id)
        await self._execute("HSETNX", keys.api_key(key_id), "revoked_ms", await self._now_ms())
        self._cache.clear()
        return await self.get(key_id)

    async def get(self, key_id: str) -> ApiKey:
        """A key's record. Raises ApiKeyNotFound."""
        stored = await self._read(key_id)
        if stored is None:
            raise ApiKeyNotFound("no such API key")
        return stored[0]
