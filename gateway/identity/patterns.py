"""From a certificate's names to a tenant. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from common.grants import TENANT_NAME

_VARIABLE: Final = "{tenant}"
_SEGMENT: Final = r"[A-Za-z0-9_.-]+"  # of a SPIFFE id's path, by the SPIFFE ID standard, section 2
_LITERAL: Final = re.compile(r"[A-Za-z0-9_.-]*")
_TRUST_DOMAIN: Final = re.compile(r"[a-z0-9_.-]{1,255}")
_SPIFFE: Final = "spiffe://"
_SPIFFE_ID: Final = re.compile(rf"spiffe://[a-z0-9_.-]{{1,255}}(/{_SEGMENT})*")
_MAX_SPIFFE_BYTES: Final = 2048


@dataclass(frozen=True, slots=True)
class CertificateNames:
    """What a verified certificate calls its holder."""

    uris: tuple[str, ...] = ()
    common_names: tuple[str, ...] = ()

    @property
    def spiffe_id(self) -> str | None:
        """Its SPIFFE id; None if it has none, or further URIs beside it, which the standard forbids."""
        return self.uris[0] if len(self.uris) == 1 and is_spiffe_id(self.uris[0]) else None

    @property
    def common_name(self) -> str | None:
        return self.common_names[0] if len(self.common_names) == 1 else None


@dataclass(frozen=True, slots=True)
class Holder:
    """A tenant, and the name in the certificate that says so."""

    tenant: str
    name: str

    def credential_id(self, kind: str) -> str:
        """The same for every certificate that bears the name."""
        return f"{kind}.{hashlib.sha256(self.name.encode()).hexdigest()[:16]}"


def is_spiffe_id(text: str) -> bool:
    """Whether a text is a SPIFFE id: no port, no query, no dot segments, no escapes."""
    if len(text) > _MAX_SPIFFE_BYTES or _SPIFFE_ID.fullmatch(text) is None:
        return False
    return not any(segment in (".", "..") for segment in text.split("/"))


class TenantPattern:
    """`spiffe://domain/ns/{tenant}/sa/*` or `CN={tenant}`: `*` is one path segment, `{tenant}` within one the tenant.

    Raises ValueError for a pattern that is none.
    """

    def __init__(self, pattern: str) -> None:
        if pattern.count(_VARIABLE) != 1:
            raise ValueError(f"{pattern}: must hold {_VARIABLE} once")
        self._of_common_name = pattern.startswith("CN=")
        if self._of_common_name:
            self._regex = re.compile(_segment(pattern, pattern.removeprefix("CN=")))
            return
        if not pattern.startswith(_SPIFFE):
            raise ValueError(f"{pattern}: must begin with spiffe:// or CN=")
        domain, *path = pattern.removeprefix(_SPIFFE).split("/")
        if _TRUST_DOMAIN.fullmatch(domain) is None:
            raise ValueError(f"{pattern}: the trust domain must be spelt out, in lower case")
        segments = [re.escape(domain), *(_SEGMENT if part == "*" else _segment(pattern, part) for part in path)]
        self._regex = re.compile(_SPIFFE + "/".join(segments))

    def holder(self, names: CertificateNames) -> Holder | None:
        """Who holds a certificate with these names, None if the pattern does not fit."""
        name = names.common_name if self._of_common_name else names.spiffe_id
        match = self._regex.fullmatch(name) if name is not None else None
        return Holder(match[1], name) if match is not None and name is not None else None


def holder_of(names: CertificateNames, patterns: Iterable[TenantPattern]) -> Holder | None:
    """Who holds a certificate, by the first pattern that fits."""
    return next((holder for pattern in patterns if (holder := pattern.holder(names)) is not None), None)


def _segment(pattern: str, part: str) -> str:
    before, variable, behind = part.partition(_VARIABLE)
    if not part or not _LITERAL.fullmatch(before) or not _LITERAL.fullmatch(behind):
        raise ValueError(f"{pattern}: a part is empty, or holds what no name may (* stands alone)")
    return re.escape(before) + (f"({TENANT_NAME.pattern})" if variable else "") + re.escape(behind)
