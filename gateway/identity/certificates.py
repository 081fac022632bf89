"""Client certificates that the transport has verified: SPIFFE ids or common names are tenants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from cryptography import x509
from cryptography.x509.oid import NameOID

from common.grants import Grants
from gateway.identity.caller import CallInfo, Principal
from gateway.identity.patterns import CertificateNames, TenantPattern, holder_of
from gateway.identity.proxies import TrustedProxies

_MAX_CACHED: Final = 4096
_NO_NAMES: Final = CertificateNames()


def names_of(pem: bytes) -> CertificateNames:
    """The names in a certificate; none where it cannot be read."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        common_names = tuple(
            attribute.value if isinstance(attribute.value, str) else ""
            for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        )
        try:
            san = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            return CertificateNames((), common_names)
        return CertificateNames(tuple(san.get_values_for_type(x509.UniformResourceIdentifier)), common_names)
    except ValueError:
        return _NO_NAMES


class PeerNames:
    """The names of a connection's client, remembered by certificate: each call of a connection bears the same."""

    def __init__(self) -> None:
        self._cache: dict[bytes, CertificateNames] = {}

    def of(self, call: CallInfo) -> CertificateNames:
        """Names of the certificate that the transport has verified; none if there is no certificate."""
        pem = next(iter(call.auth_context.get("x509_pem_cert", ())), None)
        if pem is None:
            return _NO_NAMES
        names = self._cache.get(pem)
        if names is None:
            if len(self._cache) >= _MAX_CACHED:
                self._cache.clear()
            names = self._cache[pem] = names_of(pem)
        return names


class CertificateMethod:
    """Identifies by the connection's client certificate.

    A trusted proxy's certificate is nobody's credential: the proxy speaks for its callers, and one that shows no
    certificate must not become the proxy.
    """

    def __init__(
        self, patterns: Sequence[TenantPattern], grants: Grants, peers: PeerNames, proxies: TrustedProxies
    ) -> None:
        self._patterns = patterns
        self._grants = grants
        self._peers = peers
        self._proxies = proxies

    async def identify(self, call: CallInfo) -> Principal | None:
        """Return whose certificate the connection bears; None if there is none, or it names no tenant."""
        names = self._peers.of(call)
        holder = holder_of(names, self._patterns)
        if holder is None or self._proxies.trusts(call.peer, names.spiffe_id):
            return None
        return Principal(holder.tenant, holder.credential_id("cert"), self._grants, "certificate")
