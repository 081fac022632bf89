"""Settings that gateway and worker share, and the check for misspelt variables."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, Literal, NamedTuple, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from redis.asyncio.connection import parse_url

from common.logs import LogFormat
from common.sentinel import is_sentinel_url, parse_sentinel_url

PREFIX: Final = "TORCHRELAY_"
ROLE_PREFIXES: Final = (
    "TORCHRELAY_GATEWAY_", "TORCHRELAY_AUTH_", "TORCHRELAY_TRUSTED_PROXIES", "TORCHRELAY_WORKER_", "TORCHRELAY_ENGINE_"
)  # fmt: skip
COMMAND_LINE_VARIABLES: Final = frozenset(
    f"TORCHRELAY_{name}"
    for name in (
        "ADDRESS",
        "ADMIN_ADDRESS",
        "ADMIN_KEY",
        "API_KEY",
        "TOKEN",
        "TLS_CA",
        "TLS_CERT",
        "TLS_KEY",
        "INSECURE",
        "TEST_SERVER",
        "TEST_RECORD",
    )
)

_SECOND: Final = 1000
_HOUR: Final = 3600 * _SECOND
_DAY: Final = 24 * _HOUR


class RedisSettings(BaseSettings):
    """Where the server is and how long to wait for it, from TORCHRELAY_REDIS_* variables."""

    model_config = SettingsConfigDict(env_prefix="TORCHRELAY_REDIS_", frozen=True)
    url: str = Field(
        default="redis://127.0.0.1:6379/0",
        description="redis://, rediss:// (TLS) or unix:// address, which may hold user and password; or "
        "redis+sentinel://host:port,host:port/<master name>/<db> (rediss+sentinel: TLS).",
    )
    username: str | None = Field(default=None, description="ACL user, if not in the URL.")
    password: SecretStr | None = Field(default=None, description="Password, if not in the URL.")
    sentinel_username: str | None = Field(default=None, description="ACL user of the sentinels.")
    sentinel_password: SecretStr | None = Field(default=None, description="Password of the sentinels.")
    tls_ca_file: Path | None = Field(default=None, description="CA bundle that signed the server's certificate.")
    tls_cert_file: Path | None = Field(default=None, description="Client certificate, for servers that ask for one.")
    tls_key_file: Path | None = Field(default=None, description="Key of the client certificate.")
    tls_check_hostname: bool = Field(default=True, description="Whether the certificate must bear the URL's host name.")
    connect_timeout_ms: int = Field(default=2 * _SECOND, gt=0, description="Longest wait for a connection.")
    socket_timeout_ms: int = Field(
        default=3 * _SECOND, ge=2 * _SECOND, description="Longest wait for a reply; blocking reads wait up to a second."
    )
    max_connections: int = Field(default=64, gt=0, description="Most connections of one process.")
    retry_deadline_ms: int = Field(default=10 * _SECOND, ge=0, description="How long an operation is tried again.")
    retry_base_ms: int = Field(default=20, gt=0, description="Upper bound of the first pause between two tries.")
    retry_cap_ms: int = Field(default=1 * _SECOND, gt=0, description="Upper bound of every pause between two tries.")

    min_replicas: int = Field(
        default=0, ge=0, description="Replicas that must have a new job before it is accepted. 0: none is asked."
    )
    wait_timeout_ms: int = Field(default=1 * _SECOND, gt=0, description="Longest wait for those replicas.")
    replica_sync: Literal["disk", "memory"] = Field(
        default="disk",
        description="What a replica confirms: that it is in its append-only file (where the server has WAITAOF), or "
        "received.",
    )

    @field_validator("url")
    @classmethod
    def _address_is_one(cls, value: str) -> str:
        if is_sentinel_url(value):
            parse_sentinel_url(value)
            return value
        try:
            parse_url(value)
        except ValueError:  # whose text may hold a part of a password
            kinds = "redis://, rediss://, unix://, redis+sentinel:// or rediss+sentinel://"
            raise ValueError(f"an address begins with {kinds}, and its port is a number") from None
        return value

    @model_validator(mode="after")
    def _replicas_answer_before_the_socket_gives_up(self) -> Self:
        if self.min_replicas and self.wait_timeout_ms > self.socket_timeout_ms - _SECOND // 2:
            raise ValueError("wait_timeout_ms must be at least 500 below socket_timeout_ms")
        return self

    @model_validator(mode="after")
    def _client_certificate_is_whole(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file belong together")
        return self


class QueueSettings(BaseSettings):
    """Bounds and times of the job queue, from TORCHRELAY_QUEUE_* variables."""

    model_config = SettingsConfigDict(env_prefix="TORCHRELAY_QUEUE_", frozen=True)
    max_queued: int = Field(default=10_000, gt=0, description="Most waiting jobs of a model.")
    max_queued_per_tenant: int = Field(default=2_000, gt=0, description="Most waiting jobs of one tenant and model.")
    max_live_per_tenant: int = Field(
        default=4_000, gt=0, description="Most waiting and running jobs of one tenant and model."
    )
    max_memory_share: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="Share of the server's maxmemory above which no new job is accepted, so that running ones can end.",
    )
    default_lifetime_ms: int = Field(default=_HOUR, gt=0, description="A job's time limit when the caller sets none.")
    max_lifetime_ms: int = Field(default=_DAY, gt=0, description="Longest time limit of a job.")
    max_disconnect_grace_ms: int = Field(
        default=10 * 60 * _SECOND, ge=0, description="Longest life of a job nobody listens to."
    )
    retention_ms: int = Field(default=_HOUR, gt=0, description="How long a finished generation can be read.")
    dead_letter_retention_ms: int = Field(
        default=7 * _DAY,
        gt=0,
        description="How long a failed generation can be looked at and sent again; at least retention_ms.",
    )
    worker_lease_ms: int = Field(
        default=10 * _SECOND,
        ge=100,
        description="A worker silent for so long loses its jobs; below 6 s, also when the server was away.",
    )
    gateway_lease_ms: int = Field(
        default=10 * _SECOND, ge=100, description="A gateway silent for so long loses its clients."
    )
    deadline_slack_ms: int = Field(
        default=2 * _SECOND, ge=0, description="Time a worker has to end an expired job itself."
    )
    max_fruitless_attempts: int = Field(
        default=3,
        gt=0,
        description="Attempts in a row without progress before the dead letter. After two of them a job runs alone: "
        "with fewer than 3, jobs beside one that ends its workers are given up with it.",
    )
    max_claims: int = Field(default=64, gt=0, description="Most times that a job is handed out, progress or not.")
    max_log_bytes: int = Field(default=16 << 20, gt=0, description="Most bytes of one generation's events.")
    max_claim_bytes: int = Field(default=16 << 20, gt=0, description="Most bytes of bodies and logs in one claim.")
    max_attach_events: int = Field(default=1024, gt=0, description="Most events in one answer to attach.")
    max_attach_bytes: int = Field(default=256 << 10, gt=0, description="About the most bytes in one answer to attach.")
    reply_ttl_ms: int = Field(default=60 * _SECOND, gt=0, description="Life of a reply stream that nobody renews.")
    expected_completion_tokens: int = Field(
        default=256, gt=0, description="Output charged to a tenant when a job starts; settled when it ends."
    )
    bypass_kv_tokens: int = Field(
        default=0,
        ge=0,
        description="Jobs up to this size may pass a higher class whose next job does not fit yet. 0: none.",
    )
    priority_floor: float = Field(
        default=0.05,
        ge=0,
        le=0.25,
        description="Least share of the service of each priority class below the highest while it has jobs waiting.",
    )

    @property
    def max_upkeep_pause_s(self) -> float:
        """Longest pause between two rounds of upkeep, a quarter of the shorter lease.

        A reap that comes more than half a lease (and 3 s) after the last one takes the server for stopped, and gives
        all workers another lease: with rarer rounds, as an operator may set them, no job of a dead worker would ever
        move on.
        """
        return min(self.worker_lease_ms, self.gateway_lease_ms) / 4 / _SECOND

    @model_validator(mode="after")
    def _times_agree(self) -> Self:
        if self.default_lifetime_ms > self.max_lifetime_ms:
            raise ValueError("default_lifetime_ms must be at most max_lifetime_ms")
        return self


class MetricsSettings(BaseSettings):
    """What metrics hold, from TORCHRELAY_METRICS_* variables; where they are served is each role's own setting."""

    model_config = SettingsConfigDict(env_prefix="TORCHRELAY_METRICS_", frozen=True)
    max_tenants: int = Field(
        default=100, ge=0, description="Tenants with series of their own in each process; further ones share `other`."
    )


class LogSettings(BaseSettings):
    """What a process writes on stderr, from TORCHRELAY_LOG_* variables."""

    model_config = SettingsConfigDict(env_prefix="TORCHRELAY_LOG_", frozen=True)
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(default="INFO", description="Least that is written.")
    format: LogFormat = Field(default=LogFormat.AUTO, description="json, text, or auto: text on a terminal.")
    core_dumps: bool = Field(
        default=False, description="Whether a crash may leave a core file: it would hold what callers wrote."
    )

    @field_validator("level", mode="before")
    @classmethod
    def _case_does_not_matter(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value


def describe_errors(error: ValidationError) -> str:
    """Say which settings are wrong, by the names of their variables, one line each."""
    kind = next((kind for kind in BaseSettings.__subclasses__() if kind.__name__ == error.title), BaseSettings)
    prefix = kind.model_config.get("env_prefix", PREFIX)
    lines = []
    for fault in error.errors(include_url=False, include_input=False):
        name = ".".join(map(str, fault["loc"]))
        lines.append(f"{prefix}{name.upper() or '*'}: {fault['msg']}\n")
    return "".join(lines)


class UnknownVariable(NamedTuple):
    """A TORCHRELAY_ variable that no setting reads, and the one that was probably meant."""

    name: str
    nearest: str | None


def variables_of(settings: type[BaseSettings]) -> set[str]:
    """Names of the environment variables that a settings class reads, in upper case."""
    prefix = settings.model_config.get("env_prefix", "")
    return {(prefix + name).upper() for name in settings.model_fields}


def unknown_variables(
    environment: Mapping[str, str], classes: Iterable[type[BaseSettings]], also_known: Iterable[str] = ()
) -> list[UnknownVariable]:
    """Variables with our prefix that nothing reads: a misspelt setting must not be ignored in silence.

    Those of another role's prefix are left to that role: all may share one environment.
    """
    known = {name.upper() for name in also_known} | COMMAND_LINE_VARIABLES
    own_prefixes = set()
    for settings in classes:
        known |= variables_of(settings)
        own_prefixes.add(settings.model_config.get("env_prefix", PREFIX))
    foreign = tuple(prefix for prefix in ROLE_PREFIXES if prefix not in own_prefixes)
    named = (name for name in environment if name.upper().startswith(PREFIX))
    unknown = sorted(name for name in named if name.upper() not in known and not name.upper().startswith(foreign))
    return [
        UnknownVariable(name, next(iter(difflib.get_close_matches(name.upper(), known, n=1)), None)) for name in unknown
    ]
