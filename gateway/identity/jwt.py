"""JSON Web Tokens of one issuer in `authorization: Bearer` (RFC 7519, and the advice of RFC 8725)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import jwt
from jwt.exceptions import PyJWTError

from common.api_keys import PREFIX
from common.errors import Unauthenticated
from common.grants import ADMIN_SCOPES, TENANT_NAME, Grants, Scope
from gateway.identity.api_key import bearer_of
from gateway.identity.caller import CallInfo, Principal
from gateway.identity.jwks import MAX_KEY_ID_CHARS, KeySet

_CACHE_S: Final = 60.0  # longest time that a token counts as verified
_MAX_CACHED: Final = 10_000
_MAX_MODELS: Final = 64
_MAX_MODEL_CHARS: Final = 128
_SCOPES: Final = frozenset(scope.value for scope in Scope)
_NO_ADMIN_SCOPES: Final = _SCOPES - frozenset(ADMIN_SCOPES)


@dataclass(frozen=True, slots=True)
class TokenRules:
    """What a token must be, and where it says what."""

    issuer: str
    audience: Sequence[str]
    algorithms: Sequence[str]
    leeway_s: float
    tenant_claim: str
    scopes_claim: str
    models_claim: str
    default_scopes: tuple[str, ...]
    admin_scopes: bool = False  # whether a token's own may be administrative


class _Refused(Exception):
    """A token does not count; why is nobody's business."""


class JwtMethod:
    """Identifies by JWT. A verified token is remembered for a minute at most, by the clock `monotonic`."""

    def __init__(self, keys: KeySet, rules: TokenRules, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._keys = keys
        self._rules = rules
        self._monotonic = monotonic
        self._cache: dict[bytes, tuple[float, Principal]] = {}  # digest -> good until, whose

    async def aclose(self) -> None:
        """Stop fetching keys."""
        await self._keys.aclose()

    async def identify(self, call: CallInfo) -> Principal | None:
        """Return whose token the call bears, None if it bears none. Raises Unauthenticated, with one text."""
        token = bearer_of(call)
        if not token or token.startswith(f"{PREFIX}_"):
            return None
        digest = hashlib.sha256(token.encode()).digest()
        cached = self._cache.get(digest)
        if cached is not None and self._monotonic() < cached[0]:
            return cached[1]
        self._cache.pop(digest, None)
        try:
            claims = await self._verify(token)
            principal = principal_of(claims, self._rules)
            left_s = min(_CACHE_S, int(claims["exp"]) - time.time())
        except (_Refused, PyJWTError, ValueError, TypeError, ArithmeticError, RecursionError):
            raise Unauthenticated("the credentials are not valid") from None
        if left_s > 0:
            if len(self._cache) >= _MAX_CACHED:
                self._cache.clear()
            self._cache[digest] = (self._monotonic() + left_s, principal)
        return principal

    async def _verify(self, token: str) -> dict[str, Any]:
        header = jwt.get_unverified_header(token)
        key_id, algorithm = header.get("kid"), header.get("alg")
        # Keys that a token brings along or points to (jwk, jku, x5c, x5u) are never looked at. Nothing that is critical
        # (RFC 7515, 4.1.11) is understood here.
        if algorithm not in self._rules.algorithms or "crit" in header:
            raise _Refused
        if not isinstance(key_id, str) or not 0 < len(key_id) <= MAX_KEY_ID_CHARS:
            raise _Refused
        key = await self._keys.find(key_id)
        if key is None or key.algorithm != algorithm:
            raise _Refused
        claims: dict[str, Any] = jwt.decode(
            token,
            key.key,
            algorithms=[key.algorithm],  # by the key, not by the token
            audience=list(self._rules.audience),
            issuer=self._rules.issuer,
            leeway=self._rules.leeway_s,
            options={"require": ["exp", "iss", "aud", "sub"]},
        )
        return claims


def principal_of(claims: dict[str, Any], rules: TokenRules) -> Principal:
    """What a verified token's claims say. Raises ValueError for claims of another form."""
    tenant, subject = claims.get(rules.tenant_claim), claims.get("sub")
    if not isinstance(tenant, str) or TENANT_NAME.fullmatch(tenant) is None:
        raise ValueError("no tenant")
    if not isinstance(subject, str) or not subject:
        raise ValueError("no subject")
    scopes = rules.default_scopes
    if rules.scopes_claim and rules.scopes_claim in claims:
        # Also where none of them is known: a token made for other things has no rights here.
        allowed = _SCOPES if rules.admin_scopes else _NO_ADMIN_SCOPES
        scopes = tuple(scope for scope in dict.fromkeys(_words(claims[rules.scopes_claim])) if scope in allowed)
    models: tuple[str, ...] = ()
    if rules.models_claim and rules.models_claim in claims:
        models = tuple(_words(claims[rules.models_claim]))
        # An empty list would stand for all models.
        if not 0 < len(models) <= _MAX_MODELS or not all(0 < len(name) <= _MAX_MODEL_CHARS for name in models):
            raise ValueError("no models")
    digest = hashlib.sha256(f"{claims['iss']}\0{subject}".encode()).hexdigest()[:16]
    return Principal(tenant, f"jwt.{digest}", Grants(scopes=scopes, models=models), "jwt")


def _words(claim: Any) -> list[str]:
    """A claim's words: a string's, by spaces, or a list's members. Raises ValueError."""
    words = claim.split() if isinstance(claim, str) else claim
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError("neither a string nor a list of strings")
    return words
