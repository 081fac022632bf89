"""Whose call is being served, and what a call brings along to show it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar

import msgspec

from common.grants import NO_GRANTS_GIVEN, NO_POLICY, Grants, TenantPolicy


class CallInfo(msgspec.Struct, frozen=True):
    """What is known of a call before anybody is asked.

    `peer` is as gRPC names it (`ipv4:10.0.0.1:4711`, `ipv6:[::1]:4711`, `unix:`); `auth_context` is what the transport
    has verified, such as `x509_pem_cert` of a client's certificate.
    """

    metadata: Sequence[tuple[str, str | bytes]]
    peer: str = ""
    auth_context: Mapping[str, Iterable[bytes]] = {}

    def values(self, name: str) -> list[str]:
        """The values of a metadata name, in order; binary ones are left out."""
        return [value for key, value in self.metadata if key == name and isinstance(value, str)]


class Principal(msgspec.Struct, frozen=True):
    """What a credential says: a tenant, and what this credential may do for it."""

    tenant: str
    credential_id: str  # names the credential in usage, quotas and the audit log; at most 64 bytes, no ':'
    grants: Grants = NO_GRANTS_GIVEN
    method: str = "api_key"  # by which it was shown: api_key, jwt, certificate or mesh
    quota_id: str = ""  # what its quotas are counted by, if not its own id: credentials may share one


class Caller(msgspec.Struct, frozen=True):
    """Whose call this is: a principal, and what holds for its tenant."""

    tenant: str
    key_id: str  # the credential's id
    grants: Grants = NO_GRANTS_GIVEN
    policy: TenantPolicy = NO_POLICY
    method: str = "api_key"
    quota_id: str = ""  # see Principal


# Set by the guard for the duration of one call.
CALLER: ContextVar[Caller] = ContextVar("torchrelay_caller")


def current_caller() -> Caller:
    """Return who makes the call that is being served."""
    return CALLER.get()
