"""What an operator sets of identity, from TORCHRELAY_AUTH_* variables and TORCHRELAY_TRUSTED_PROXIES."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal, Self, TypeAlias, get_args

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from common.grants import DATA_SCOPES, Scope
from gateway.identity.patterns import TenantPattern
from gateway.identity.proxies import TrustedProxies
from torchrelay.client.channel import is_loopback

Method: TypeAlias = Literal["api_key", "jwt", "certificate", "mesh"]
Algorithm: TypeAlias = Literal["RS256", "ES256", "EdDSA"]
METHODS: Final[tuple[Method, ...]] = get_args(Method)
ALGORITHMS: Final[tuple[Algorithm, ...]] = get_args(Algorithm)
_SCOPES: Final = frozenset(scope.value for scope in Scope)


def _words(value: object) -> object:
    """Split what a variable holds at its commas."""
    return tuple(word.strip() for word in value.split(",") if word.strip()) if isinstance(value, str) else value


def is_fetchable(url: str) -> bool:
    """Whether keys may come from a URL: over TLS, or from this machine."""
    scheme, _, rest = url.partition("://")
    authority = rest.partition("/")[0]
    if not authority or "@" in authority or any(c <= " " for c in url):
        return False
    return scheme == "https" or (scheme == "http" and is_loopback(authority if ":" in authority else f"{authority}:80"))


class IdentitySettings(BaseSettings):
    """Which credentials count, in which order, and what they are worth."""

    model_config = SettingsConfigDict(env_prefix="TORCHRELAY_AUTH_", frozen=True)

    methods: Annotated[tuple[Method, ...], NoDecode] = Field(
        default=METHODS,
        description="Kinds of credentials in the order in which they are looked for, by commas: api_key, jwt, "
        "certificate, mesh. Those that are not set up are left out.",
    )
    strict: bool = Field(default=False, description="Refuse a call that bears two credentials, by one name or by two.")
    default_scopes: Annotated[tuple[str, ...], NoDecode] = Field(
        default=DATA_SCOPES, description="Scopes of certificates, and of tokens that name none, by commas."
    )

    jwt_issuer: str = Field(default="", description="Who issues tokens, as their `iss`; empty: no JWT is accepted.")
    jwt_audience: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="What tokens must be for: one of these in their `aud`, by commas."
    )
    jwt_algorithms: Annotated[tuple[Algorithm, ...], NoDecode] = Field(
        default=ALGORITHMS, description="Signatures that count, by commas: RS256, ES256, EdDSA."
    )
    jwt_leeway_s: float = Field(default=30, ge=0, le=300, description="How far clocks may be apart.")
    jwt_tenant_claim: str = Field(default="tenant", min_length=1, description="Claim that names the tenant.")
    jwt_scopes_claim: str = Field(
        default="scope", description="Claim with scopes, by spaces or as a list; empty: all have the default scopes."
    )
    jwt_admin_scopes: bool = Field(
        default=False,
        description="Whether admin.* scopes in a token count: its issuer then makes operators of this deployment.",
    )
    jwt_models_claim: str = Field(
        default="models", description="Claim with the models allowed, a list; tokens without it may use all."
    )
    jwks_url: str = Field(
        default="", description="Where the keys are, https; empty: where the issuer's discovery document says."
    )
    jwks_file: Path | None = Field(default=None, description="Keys as a file, instead of a URL.")
    jwks_ca_file: Path | None = Field(default=None, description="CA bundle of the key server; empty: the system's.")
    jwks_cache_s: float = Field(default=600, gt=0, description="Age at which keys are fetched again.")
    jwks_max_stale_s: float = Field(
        default=24 * 3600, gt=0, description="Age up to which keys serve while the key server fails."
    )
    jwks_refetch_s: float = Field(
        default=30, gt=0, description="Least time between two fetches, whatever unknown keys callers name."
    )
    jwks_timeout_s: float = Field(default=5, gt=0, le=60, description="Longest time that a fetch takes.")

    certificate_tenants: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="How client certificates name tenants, by commas: SPIFFE ids such as "
        "spiffe://prod/ns/{tenant}/sa/*, or CN={tenant}. The first that matches counts; empty: none is accepted.",
    )

    _split = field_validator(
        "methods", "default_scopes", "jwt_audience", "jwt_algorithms", "certificate_tenants", mode="before"
    )(_words)

    @field_validator("methods", "jwt_algorithms")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError("names at least one, and each only once")
        return value

    @field_validator("default_scopes")
    @classmethod
    def _scopes_are_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not set(value) <= _SCOPES:
            raise ValueError(f"holds an unknown scope; there are {', '.join(sorted(_SCOPES))}")
        return value

    @field_validator("certificate_tenants")
    @classmethod
    def _patterns_are_sound(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            TenantPattern(pattern)
        return value

    @field_validator("jwks_url")
    @classmethod
    def _keys_come_over_tls(cls, value: str) -> str:
        if value and not is_fetchable(value):
            raise ValueError("must be an https URL (http on loopback only)")
        return value

    @model_validator(mode="after")
    def _tokens_are_set_up_whole(self) -> Self:
        keys = bool(self.jwks_url) + (self.jwks_file is not None)
        if not self.jwt_issuer:
            if keys or self.jwt_audience:
                raise ValueError("jwt_issuer is needed for tokens to be accepted")
            return self
        if not self.jwt_audience:
            raise ValueError("jwt_audience is needed beside jwt_issuer, or tokens for other services would do")
        if keys > 1:
            raise ValueError("jwks_url and jwks_file exclude each other")
        if keys == 0 and not is_fetchable(self.jwt_issuer):
            raise ValueError("jwt_issuer is no https URL to discover keys at: set jwks_url or jwks_file")
        if self.jwks_max_stale_s < self.jwks_cache_s:
            raise ValueError("jwks_max_stale_s must be at least jwks_cache_s")
        return self


class ProxySettings(BaseSettings):
    """Which peers may speak for others."""

    model_config = SettingsConfigDict(env_prefix="TORCHRELAY_", frozen=True)
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Peers whose x-forwarded-client-cert counts, by commas: networks such as 10.0.0.7 or 10.1.0.0/16, "
        "SPIFFE ids of the proxies' own certificates, or unix: for whoever may open the socket. Default: nobody.",
    )

    _split = field_validator("trusted_proxies", mode="before")(_words)

    @field_validator("trusted_proxies")
    @classmethod
    def _entries_are_sound(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        TrustedProxies(value)
        return value


IDENTITY_SETTINGS: Final[tuple[type[BaseSettings], ...]] = (IdentitySettings, ProxySettings)
