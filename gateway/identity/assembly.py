"""Puts the kinds of credentials together as the settings say."""

from __future__ import annotations

from typing import Final

import structlog

from common.api_keys import ApiKeys
from common.grants import Grants
from common.tenants import Tenants
from gateway.identity.api_key import ApiKeyMethod
from gateway.identity.authenticator import Authenticator, CredentialMethod
from gateway.identity.certificates import CertificateMethod, PeerNames
from gateway.identity.fetching import source_of_keys
from gateway.identity.forwarded import ForwardedCertificateMethod
from gateway.identity.jwks import KeySet, KeySetTimes
from gateway.identity.jwt import JwtMethod, TokenRules
from gateway.identity.patterns import TenantPattern
from gateway.identity.proxies import TrustedProxies
from gateway.identity.settings import IdentitySettings, ProxySettings

log = structlog.get_logger()

_WANTED: Final = {
    "api_key": "an API key in `authorization: Bearer` or `x-api-key`",
    "jwt": "a token in `authorization: Bearer`",
    "certificate": "a client certificate",
    "mesh": "a client certificate",  # that a trusted proxy forwards: which are trusted is nobody's business
}


def build_authenticator(
    settings: IdentitySettings, proxy_settings: ProxySettings, api_keys: ApiKeys, tenants: Tenants
) -> Authenticator:
    """Return what turns calls into callers, by every kind of credential that is set up, in the operator's order."""
    patterns = [TenantPattern(pattern) for pattern in settings.certificate_tenants]
    proxies = TrustedProxies(proxy_settings.trusted_proxies)
    grants = Grants(scopes=settings.default_scopes)
    peers = PeerNames()
    known: dict[str, CredentialMethod] = {"api_key": ApiKeyMethod(api_keys)}
    tokens = _jwt_method(settings) if settings.jwt_issuer else None
    if tokens is not None:
        known["jwt"] = tokens
    if patterns:
        known["certificate"] = CertificateMethod(patterns, grants, peers, proxies)
    if patterns and proxies:
        known["mesh"] = ForwardedCertificateMethod(patterns, grants, peers, proxies)
    methods = {name: known[name] for name in settings.methods if name in known}
    log.info("identity.methods", methods=list(methods), strict=settings.strict)
    wanted = " or ".join(dict.fromkeys(_WANTED[name] for name in methods))
    closing = tokens.aclose if tokens is not None else None
    return Authenticator(list(methods.values()), tenants, strict=settings.strict, wanted=wanted, closing=closing)


def check_identity(settings: IdentitySettings, proxy_settings: ProxySettings) -> None:
    """Raise ValueError for settings that are sound one by one, and not together."""
    if proxy_settings.trusted_proxies and not settings.certificate_tenants:
        raise ValueError(
            "TORCHRELAY_TRUSTED_PROXIES is set, but TORCHRELAY_AUTH_CERTIFICATE_TENANTS does not say which tenants the "
            "forwarded certificates name"
        )
    set_up = {"api_key": True, "jwt": bool(settings.jwt_issuer), "certificate": bool(settings.certificate_tenants)}
    set_up["mesh"] = set_up["certificate"] and bool(proxy_settings.trusted_proxies)
    if not any(set_up[name] for name in settings.methods):
        raise ValueError("TORCHRELAY_AUTH_METHODS: none of these methods is set up, so nobody could call")


def _jwt_method(settings: IdentitySettings) -> JwtMethod:
    source = source_of_keys(
        issuer=settings.jwt_issuer,
        url=settings.jwks_url,
        file=settings.jwks_file,
        timeout_s=settings.jwks_timeout_s,
        ca_file=settings.jwks_ca_file,
    )
    times = KeySetTimes(settings.jwks_cache_s, settings.jwks_max_stale_s, settings.jwks_refetch_s)
    rules = TokenRules(
        issuer=settings.jwt_issuer,
        audience=settings.jwt_audience,
        algorithms=settings.jwt_algorithms,
        leeway_s=settings.jwt_leeway_s,
        tenant_claim=settings.jwt_tenant_claim,
        scopes_claim=settings.jwt_scopes_claim,
        models_claim=settings.jwt_models_claim,
        default_scopes=settings.default_scopes,
        admin_scopes=settings.jwt_admin_scopes,
    )
    return JwtMethod(KeySet(source, times), rules)
