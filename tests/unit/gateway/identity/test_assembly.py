"""Which kinds of credentials are set up, in which order, and settings that are refused at start."""

from __future__ import annotations

from typing import Any, cast

import pytest
from pydantic import ValidationError

from common.api_keys import ApiKeys
from common.errors import Unauthenticated
from common.grants import NO_POLICY, TenantPolicy
from common.settings import describe_errors, unknown_variables
from common.tenants import Tenants
from gateway.identity.assembly import build_authenticator, check_identity
from gateway.identity.caller import CallInfo
from gateway.identity.settings import IDENTITY_SETTINGS, IdentitySettings, ProxySettings
from tests.builders_identity import Authority

PATTERN = "spiffe://prod/ns/{tenant}/sa/*"
CERTIFICATE = Authority().issue(uris=("spiffe://prod/ns/direct/sa/web",)).cert
HEADER = ("x-forwarded-client-cert", "URI=spiffe://prod/ns/forwarded/sa/web")


class NoKeys:
    async def verify(self, key: str) -> None:
        raise Unauthenticated("the credentials are not valid")


class Policies:
    async def policy(self, name: str) -> TenantPolicy:
        return NO_POLICY


async def tenant_of(call: CallInfo, *, proxies: str = "10.0.0.0/8", **settings: Any) -> str:
    identity = (IdentitySettings(**settings), ProxySettings(trusted_proxies=proxies))  # type: ignore[arg-type]
    authenticator = build_authenticator(*identity, cast(ApiKeys, NoKeys()), cast(Tenants, Policies()))
    caller = await authenticator.authenticate(call)
    assert caller.grants.scopes == identity[0].default_scopes
    return caller.tenant


def proxied(peer: str = "ipv4:10.0.0.1:1", *, key: bool = False, certificate: bool = False) -> CallInfo:
    metadata: list[tuple[str, str | bytes]] = [HEADER]
    if key:
        metadata.append(("x-api-key", "tr_x"))
    return CallInfo(metadata, peer, {"x509_pem_cert": [CERTIFICATE]} if certificate else {})


async def test_certificates_name_tenants_where_patterns_are_set() -> None:
    stranger = "ipv4:192.0.2.1:1"
    assert await tenant_of(proxied(), certificate_tenants=PATTERN, default_scopes="generate") == "forwarded"
    assert await tenant_of(proxied(stranger, certificate=True), certificate_tenants=PATTERN) == "direct"
    for call, proxies, patterns in (
        (proxied(), "", PATTERN),
        (proxied(stranger), "10.0.0.0/8", PATTERN),
        (proxied(), "10.0.0.0/8", ""),
        (proxied(certificate=True), "", ""),
    ):
        with pytest.raises(Unauthenticated) as raised:
            await tenant_of(call, proxies=proxies, certificate_tenants=patterns)
        assert raised.value.reason == "CREDENTIALS_MISSING"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "credentials are required: an API key in `authorization: Bearer` or `x-api-key`"),
        (
            {"methods": "certificate,mesh", "certificate_tenants": PATTERN},
            "credentials are required: a client certificate",
        ),
        (
            {"methods": "jwt,api_key", "jwt_issuer": "https://issuer.example", "jwt_audience": "x"},
            "credentials are required: a token in `authorization: Bearer` or an API key in `authorization: Bearer` or "
            "`x-api-key`",
        ),
    ],
    ids=["keys", "certificates", "tokens"],
)
async def test_who_brings_nothing_is_told_what_counts_here(settings: dict[str, str], text: str) -> None:
    with pytest.raises(Unauthenticated) as raised:
        await tenant_of(CallInfo([], "ipv4:192.0.2.1:1"), **settings)
    assert (raised.value.reason, raised.value.message) == ("CREDENTIALS_MISSING", text)


async def test_the_order_is_the_operator_s() -> None:
    with pytest.raises(Unauthenticated, match="not valid"):
        await tenant_of(proxied(key=True), certificate_tenants=PATTERN)
    assert await tenant_of(proxied(key=True), certificate_tenants=PATTERN, methods="mesh,api_key") == "forwarded"
    assert await tenant_of(proxied(key=True), certificate_tenants=PATTERN, methods="mesh") == "forwarded"


@pytest.mark.parametrize(
    ("variables", "fault"),
    [
        ({"METHODS": "api_key,password"}, "TORCHRELAY_AUTH_METHODS.1: Input should be"),
        ({"METHODS": "jwt,jwt"}, "TORCHRELAY_AUTH_METHODS: Value error, names at least one"),
        ({"METHODS": ""}, "TORCHRELAY_AUTH_METHODS: Value error, names at least one"),
        ({"DEFAULT_SCOPES": "generate,root"}, "TORCHRELAY_AUTH_DEFAULT_SCOPES: Value error, holds an unknown scope"),
        ({"CERTIFICATE_TENANTS": "spiffe://x"}, "TORCHRELAY_AUTH_CERTIFICATE_TENANTS: Value error, spiffe://x: must"),
        ({"JWT_ALGORITHMS": "HS256"}, "TORCHRELAY_AUTH_JWT_ALGORITHMS.0: Input should be 'RS256', 'ES256' or 'EdDSA'"),
        ({"JWT_ALGORITHMS": "none"}, "TORCHRELAY_AUTH_JWT_ALGORITHMS.0: Input should be"),
        ({"JWT_ISSUER": "https://x"}, "TORCHRELAY_AUTH_*: Value error, jwt_audience is needed"),
        ({"JWT_AUDIENCE": "x"}, "TORCHRELAY_AUTH_*: Value error, jwt_issuer is needed"),
        ({"JWT_ISSUER": "x", "JWT_AUDIENCE": "x"}, "TORCHRELAY_AUTH_*: Value error, jwt_issuer is no https URL"),
        ({"JWT_ISSUER": "http://x", "JWT_AUDIENCE": "x"}, "TORCHRELAY_AUTH_*: Value error, jwt_issuer is no https"),
        ({"JWKS_URL": "http://keys.example/"}, "TORCHRELAY_AUTH_JWKS_URL: Value error, must be an https URL"),
        ({"JWKS_URL": "http://127.0.0.1.evil.example/"}, "TORCHRELAY_AUTH_JWKS_URL: Value error, must be an https"),
        ({"JWKS_URL": "http://127.0.0.1@evil.example/"}, "TORCHRELAY_AUTH_JWKS_URL: Value error, must be an https"),
        ({"JWKS_URL": "file:///keys"}, "TORCHRELAY_AUTH_JWKS_URL: Value error, must be an https URL"),
        (
            {"JWT_ISSUER": "x", "JWT_AUDIENCE": "x", "JWKS_URL": "https://x/", "JWKS_FILE": "x"},
            "TORCHRELAY_AUTH_*: Value error, jwks_url and jwks_file exclude each other",
        ),
        (
            {"JWT_ISSUER": "https://x", "JWT_AUDIENCE": "x", "JWKS_MAX_STALE_S": "60"},
            "TORCHRELAY_AUTH_*: Value error, jwks_max_stale_s must be at least",
        ),
    ],
    ids=range(17),
)
def test_a_bad_setting_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], fault: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"TORCHRELAY_AUTH_{name}", value)
    with pytest.raises(ValidationError) as raised:
        IdentitySettings()
    (line,) = describe_errors(raised.value).splitlines()
    assert line.startswith(fault)


def test_a_proxy_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHRELAY_TRUSTED_PROXIES", "10.0.0.1, gateway")
    with pytest.raises(ValidationError) as raised:
        ProxySettings()
    assert describe_errors(raised.value).startswith("TORCHRELAY_TRUSTED_PROXIES: Value error, gateway: not an IP")


def test_variables_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHRELAY_AUTH_METHODS", "mesh, api_key")
    monkeypatch.setenv("TORCHRELAY_AUTH_CERTIFICATE_TENANTS", f"{PATTERN},CN={{tenant}}")
    monkeypatch.setenv("TORCHRELAY_TRUSTED_PROXIES", "10.0.0.1,2001:db8::/32, spiffe://prod/edge")
    settings, proxies = IdentitySettings(), ProxySettings()
    assert settings.methods == ("mesh", "api_key")
    assert settings.certificate_tenants == (PATTERN, "CN={tenant}")
    assert proxies.trusted_proxies == ("10.0.0.1", "2001:db8::/32", "spiffe://prod/edge")
    names = {"TORCHRELAY_TRUSTED_PROXIES": "", "TORCHRELAY_AUTH_METHODS": "", "TORCHRELAY_AUTH_METHOD": ""}
    (unknown,) = unknown_variables(names, IDENTITY_SETTINGS)
    assert unknown == ("TORCHRELAY_AUTH_METHOD", "TORCHRELAY_AUTH_METHODS")
    assert unknown_variables(names, ()) == [], "other roles may share the environment"


@pytest.mark.parametrize(
    ("settings", "proxies", "fault"),
    [
        ({}, "10.0.0.1", "TORCHRELAY_TRUSTED_PROXIES is set, but"),
        ({"methods": "jwt"}, "", "nobody could call"),
        ({"methods": "mesh", "certificate_tenants": PATTERN}, "", "nobody could call"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], proxies: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        check_identity(IdentitySettings(**settings), ProxySettings(trusted_proxies=proxies))  # type: ignore[arg-type]


def test_settings_that_go_together_pass() -> None:
    proxies = ProxySettings(trusted_proxies="10.0.0.1")  # type: ignore[arg-type]
    check_identity(IdentitySettings(), ProxySettings())
    check_identity(IdentitySettings(methods="mesh", certificate_tenants=PATTERN), proxies)  # type: ignore[arg-type]
