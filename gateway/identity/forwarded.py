"""Who calls through a mesh: the client certificate that a trusted proxy has verified and forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from common.errors import Unauthenticated
from common.grants import Grants
from gateway.identity import xfcc
from gateway.identity.caller import CallInfo, Principal
from gateway.identity.certificates import PeerNames
from gateway.identity.patterns import CertificateNames, Holder, TenantPattern, holder_of
from gateway.identity.proxies import TrustedProxies

HEADER: Final = "x-forwarded-client-cert"
_MAX_CACHED: Final = 1024  # of at most 8 KB each


class ForwardedCertificateMethod:
    """Identifies by x-forwarded-client-cert, from trusted proxies alone; another's is not read.

    Envoy must be set to SANITIZE_SET or APPEND_FORWARD: then the last element is its own word about whom it talks to.
    In the modes that only forward, nobody can tell a proxy's element from one that a caller wrote.
    """

    def __init__(
        self, patterns: Sequence[TenantPattern], grants: Grants, peers: PeerNames, proxies: TrustedProxies
    ) -> None:
        self._patterns = patterns
        self._grants = grants
        self._peers = peers
        self._proxies = proxies
        self._cache: dict[str, Holder | None] = {}  # by header: a caller's is the same at each call

    async def identify(self, call: CallInfo) -> Principal | None:
        """Return for whom a trusted proxy speaks; None if nobody does, or the names are no tenant's.

        Raises Unauthenticated for a header that no proxy writes.
        """
        headers = call.values(HEADER)
        if not headers or not self._proxies.trusts(call.peer, self._peers.of(call).spiffe_id):
            return None
        try:
            # Envoy makes one header of several. A second one has come past it.
            (header,) = headers
            holder = self._holder(header)
        except ValueError:
            raise Unauthenticated("the credentials are not valid") from None
        if holder is None:
            return None
        return Principal(holder.tenant, holder.credential_id("mesh"), self._grants, "mesh")

    def _holder(self, header: str) -> Holder | None:
        if header not in self._cache:
            names = original_caller(xfcc.parse(header), self._proxies)
            if len(self._cache) >= _MAX_CACHED:
                self._cache.clear()
            self._cache[header] = holder_of(names, self._patterns) if names is not None else None
        return self._cache[header]


def original_caller(elements: Sequence[xfcc.Element], proxies: TrustedProxies) -> CertificateNames | None:
    """The names of whom the chain of trusted proxies speaks for, None if the first of them speaks for nobody.

    From the right: the last element is the word of the proxy that is our peer, about its own client. Where that client
    is a trusted proxy too, the element before it is that proxy's word. What stands before is a stranger's: not read.
    """
    for element in reversed(elements):
        names = element.names()
        if names.spiffe_id is None or names.spiffe_id not in proxies.spiffe_ids:
            return names
    return None
