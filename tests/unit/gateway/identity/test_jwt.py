"""Tokens: those that count, and every forgery with one answer."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from common.errors import Unauthenticated
from common.grants import DATA_SCOPES
from gateway.identity.caller import CallInfo
from gateway.identity.jwks import KeySet, KeySetTimes
from gateway.identity.jwt import JwtMethod, TokenRules
from tests.builders_identity import AUDIENCE, ISSUER, Issuer, base64url, jwk_of

RULES = TokenRules(
    issuer=ISSUER,
    audience=(AUDIENCE, "other"),
    algorithms=("RS256", "ES256", "EdDSA"),
    leeway_s=10,
    tenant_claim="tenant",
    scopes_claim="scope",
    models_claim="models",
    default_scopes=DATA_SCOPES,
)
ISSUING = Issuer()
STRANGER = Issuer()


def method(rules: TokenRules = RULES, **options: Any) -> JwtMethod:
    return JwtMethod(KeySet(ISSUING.key_set, KeySetTimes()), rules, **options)


def changed(**changes: Any) -> TokenRules:
    values = {name: getattr(RULES, name) for name in RULES.__slots__}
    return TokenRules(**values | changes)


def call(token: str) -> CallInfo:
    return CallInfo([("authorization", f"Bearer {token}")])


@pytest.mark.parametrize("key_id", ["rsa", "ec", "ed"])
async def test_a_good_token_names_its_tenant(key_id: str) -> None:
    principal = await method().identify(call(ISSUING.token(key_id)))
    assert principal is not None
    assert (principal.tenant, principal.method) == ("acme", "jwt")
    digest = hashlib.sha256(f"{ISSUER}\0robot".encode()).hexdigest()[:16]
    assert principal.credential_id == f"jwt.{digest}"
    assert principal.grants.scopes == DATA_SCOPES
    assert principal.grants.models == ()


@pytest.mark.parametrize("metadata", [[], [("authorization", "Bearer tr_abc")], [("x-api-key", "a.b.c")]], ids=repr)
async def test_other_credentials_are_left_to_others(metadata: list[tuple[str, str | bytes]]) -> None:
    assert await method().identify(CallInfo(metadata)) is None


@pytest.mark.parametrize(
    ("claims", "scopes", "models"),
    [
        ({"scope": "generate openid generate tasks"}, ("generate", "tasks"), ()),
        ({"scope": ["batch", "admin.usage"]}, ("batch",), ()),
        ({"scope": "admin.keys"}, (), ()),
        ({"scope": "openid profile"}, (), ()),
        ({"scope": ""}, (), ()),
        ({"models": ["tiny", "llama-*"]}, DATA_SCOPES, ("tiny", "llama-*")),
        ({"models": "tiny other"}, DATA_SCOPES, ("tiny", "other")),
    ],
    ids=repr,
)
async def test_claims_become_rights(claims: dict[str, Any], scopes: tuple[str, ...], models: tuple[str, ...]) -> None:
    principal = await method().identify(call(ISSUING.token(**claims)))
    assert principal is not None
    assert (principal.grants.scopes, principal.grants.models) == (scopes, models)


async def test_a_token_makes_operators_only_where_that_is_set() -> None:
    token = ISSUING.token(scope="generate admin.keys admin.fleet")
    for allowed, scopes in ((False, ("generate",)), (True, ("generate", "admin.keys", "admin.fleet"))):
        principal = await method(changed(admin_scopes=allowed)).identify(call(token))
        assert principal is not None
        assert principal.grants.scopes == scopes


async def test_which_claims_count_is_set() -> None:
    rules = changed(tenant_claim="sub", scopes_claim="", models_claim="", default_scopes=("tasks",))
    principal = await method(rules).identify(call(ISSUING.token(scope="generate", models=[])))
    assert principal is not None
    assert (principal.tenant, principal.grants.scopes, principal.grants.models) == ("robot", ("tasks",), ())


def unsigned(token: str, algorithm: str) -> str:
    header = base64url(json.dumps({"alg": algorithm, "typ": "JWT", "kid": "ec"}).encode())
    return f"{header}.{token.split('.')[1]}."


def signed_with_the_public_key(form: bytes, key_id: str) -> str:
    header = base64url(json.dumps({"alg": "HS256", "typ": "JWT", "kid": key_id}).encode())
    signed = f"{header}.{base64url(json.dumps(ISSUING.claims()).encode())}"
    return f"{signed}.{base64url(hmac.new(form, signed.encode(), hashlib.sha256).digest())}"


def public_pem(key_id: str) -> bytes:
    public: bytes = ISSUING.keys[key_id].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return public


def tampered() -> str:
    header, payload, signature = ISSUING.token().split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
    return ".".join((header, base64url(json.dumps(claims | {"tenant": "root"}).encode()), signature))


def cut() -> str:
    return ISSUING.token()[:-4]


def strangers(**header: Any) -> str:
    return STRANGER.token(header=header)


def of_long_numbers() -> str:
    """Signed, with an expiry that is no time."""
    payload = json.dumps(ISSUING.claims()).replace(str(ISSUING.claims()["exp"]), "1e999")
    return jwt.api_jws.encode(payload.encode(), ISSUING.keys["ec"], "ES256", headers={"kid": "ec"})


FORGED: dict[str, Callable[[], str]] = {
    "alg none": lambda: unsigned(ISSUING.token(), "none"),
    "alg None": lambda: unsigned(ISSUING.token(), "NoNe"),
    "no signature": lambda: unsigned(ISSUING.token(), "ES256"),
    "HS256 with the public key": lambda: signed_with_the_public_key(public_pem("rsa"), "rsa"),
    "HS256 with the public key of another": lambda: signed_with_the_public_key(public_pem("ec"), "ec"),
    "HS256 with the JWK": lambda: signed_with_the_public_key(json.dumps(jwk_of(ISSUING.keys["rsa"])).encode(), "rsa"),
    "HS256 with nothing": lambda: signed_with_the_public_key(b"", "ec"),
    "wrong issuer": lambda: ISSUING.token(iss="https://evil.example"),
    "issuer with a slash": lambda: ISSUING.token(iss=ISSUER + "/"),
    "no issuer": lambda: ISSUING.token(iss=None),
    "wrong audience": lambda: ISSUING.token(aud="billing"),
    "wrong audiences": lambda: ISSUING.token(aud=["billing", "torchrelay2"]),
    "no audience": lambda: ISSUING.token(aud=None),
    "expired": lambda: ISSUING.token(exp=int(time.time()) - 60),
    "never expires": lambda: ISSUING.token(exp=None),
    "expires at no time": lambda: ISSUING.token(exp="soon"),
    "expires at no number": of_long_numbers,
    "not yet valid": lambda: ISSUING.token(nbf=int(time.time()) + 60),
    "issued in the future": lambda: ISSUING.token(iat=int(time.time()) + 600),
    "unknown kid": lambda: ISSUING.token("ec", header={"kid": "new"}),
    "no kid": lambda: jwt.encode(ISSUING.claims(), ISSUING.keys["ec"], "ES256"),
    "empty kid": lambda: ISSUING.token("ec", header={"kid": ""}),
    "huge kid": lambda: ISSUING.token("ec", header={"kid": "k" * 300}),
    "kid of another key": lambda: ISSUING.token("ec", key=STRANGER.keys["ec"]),
    "kid of another kind": lambda: ISSUING.token("rsa", key=ISSUING.keys["ec"]),
    "tampered payload": tampered,
    "cut signature": cut,
    "embedded jwk": lambda: strangers(jwk=jwk_of(STRANGER.keys["ec"])),
    "jku": lambda: strangers(jku="http://127.0.0.1:1/keys", x5u="http://127.0.0.1:1/certificate"),
    "x5c": lambda: strangers(x5c=["MIIB"]),
    "crit": lambda: ISSUING.token(header={"crit": ["b64"], "b64": True}),
    "no subject": lambda: ISSUING.token(sub=None),
    "empty subject": lambda: ISSUING.token(sub=""),
    "no tenant": lambda: ISSUING.token(tenant=None),
    "no tenant's name": lambda: ISSUING.token(tenant="Acme Corp"),
    "tenant of the inside": lambda: ISSUING.token(tenant="{models}:x"),
    "tenant with a newline": lambda: ISSUING.token(tenant="acme\n"),
    "long tenant": lambda: ISSUING.token(tenant="a" * 65),
    "tenants": lambda: ISSUING.token(tenant=["acme"]),
    "scopes of numbers": lambda: ISSUING.token(scope=[1]),
    "scope as an object": lambda: ISSUING.token(scope={"generate": True}),
    "no models": lambda: ISSUING.token(models=[]),
    "empty model": lambda: ISSUING.token(models=[""]),
    "models by number": lambda: ISSUING.token(models=7),
    "no token": lambda: "token",
    "dots": lambda: "..",
    "not base64": lambda: "%%%.%%%.%%%",
    "no object": lambda: f"{base64url(b'[]')}.{base64url(b'[]')}.AAAA",
    "deep": lambda: f"{base64url(b'[' * 3000)}.e30.AAAA",
    "not utf-8": lambda: f"{base64url(bytes([0xFF] * 8))}.e30.AAAA",
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
async def test_a_forged_token_is_refused_with_the_same_text(name: str) -> None:
    with pytest.raises(Unauthenticated) as raised:
        await method().identify(call(FORGED[name]()))
    assert (raised.value.message, raised.value.reason) == ("the credentials are not valid", "CREDENTIALS_INVALID")
    assert raised.value.metadata == {}


@pytest.mark.parametrize("key_id", ["rsa", "ec"])
async def test_an_algorithm_that_is_not_set_does_not_count(key_id: str) -> None:
    with pytest.raises(Unauthenticated):
        await method(changed(algorithms=("EdDSA",))).identify(call(ISSUING.token(key_id)))


async def test_clocks_may_be_apart_by_the_leeway() -> None:
    for claims in ({"exp": int(time.time()) - 4}, {"nbf": int(time.time()) + 4}):
        assert await method().identify(call(ISSUING.token(**claims))) is not None
        with pytest.raises(Unauthenticated):
            await method(changed(leeway_s=0)).identify(call(ISSUING.token(**claims)))


@pytest.mark.parametrize(("lifetime_s", "good_for_s"), [(300, 60), (20, 20)])
async def test_a_verified_token_is_remembered_for_a_minute_and_not_beyond_its_end(
    monkeypatch: pytest.MonkeyPatch, lifetime_s: int, good_for_s: int
) -> None:
    now = [1000.0]
    tokens = method(monotonic=lambda: now[0])
    token = ISSUING.token(exp=int(time.time()) + lifetime_s)
    first = await tokens.identify(call(token))
    verified: list[str] = []
    real = jwt.decode
    monkeypatch.setattr(jwt, "decode", lambda *args, **options: verified.append("") or real(*args, **options))
    now[0] += good_for_s - 2
    assert await tokens.identify(call(token)) is first
    assert verified == []
    now[0] += 2
    assert await tokens.identify(call(token)) == first
    assert len(verified) == 1


@pytest.mark.parametrize(
    "member",
    [
        jwk_of(ISSUING.keys["ec"]) | {"use": "enc"},
        jwk_of(ISSUING.keys["ec"]) | {"alg": "HS256"},
        jwk_of(ISSUING.keys["ec"]) | {"crv": "P-384"},
        jwk_of(ISSUING.keys["ec"]) | {"x": "AAAA"},
        jwk_of(ISSUING.keys["ec"]) | {"d": "AAAA"},
        jwk_of(rsa.generate_private_key(65537, 1024)),
        jwk_of(ec.generate_private_key(ec.SECP256R1())),
        {"kty": "oct", "k": base64url(b"secret" * 8), "alg": "HS256"},
        {"kty": ["EC"], "crv": {}},
    ],
    ids=range(9),
)
async def test_a_key_that_is_of_no_use_verifies_nothing(member: dict[str, Any]) -> None:
    keys = {"keys": ["x", {}, {"kid": 7}, member | {"kid": "ec"}, jwk_of(ISSUING.keys["ed"]) | {"kid": "ed"}]}
    tokens = JwtMethod(KeySet(lambda: keys, KeySetTimes()), RULES)
    with pytest.raises(Unauthenticated):
        await tokens.identify(call(ISSUING.token("ec")))
    assert await tokens.identify(call(ISSUING.token("ed"))) is not None
