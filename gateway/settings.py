"""What an operator sets of a gateway, from TORCHRELAY_GATEWAY_* variables."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class GatewaySettings(BaseSettings):
    """Addresses, limits and time-outs of one gateway process."""

    model_config = SettingsConfigDict(env_prefix="TORCHRELAY_GATEWAY_", frozen=True)

    address: str = Field(
        default="127.0.0.1:50051", description="Where clients call, host:port; port 0 takes a free one."
    )
    admin_address: str = Field(
        default="127.0.0.1:50052", description="Where operators call, host:port; empty is nowhere."
    )
    openai_address: str = Field(
        default="", description="Where OpenAI's clients call over HTTP, host:port; empty is nowhere."
    )
    health_address: str = Field(default="", description="Plaintext port for probes only, host:port; empty is none.")
    metrics_address: str = Field(
        default="",
        description="Plaintext HTTP for Prometheus and probes: /metrics, /healthz, /readyz; host:port, empty is none.",
    )
    admin_redis_url: str = Field(
        default="", description="As the Redis user that may write API keys; empty: the same as TORCHRELAY_REDIS_URL."
    )
    tls_cert_file: Path | None = Field(
        default=None, description="Certificate chain of both ports, PEM; read again when it changes. Empty: plaintext."
    )
    tls_key_file: Path | None = Field(default=None, description="Its private key, PEM.")
    tls_client_ca_file: Path | None = Field(default=None, description="Who signs clients' certificates, PEM.")
    client_certificates: Literal["none", "optional", "required"] = Field(
        default="none",
        description="Whether clients show certificates: never; those that call mtls_address; all, operators too.",
    )
    mtls_address: str = Field(
        default="", description="Where clients with certificates call, host:port, if these are optional."
    )
    insecure: bool = Field(default=False, description="Allow plaintext on addresses beyond loopback.")
    reflection: bool = Field(default=False, description="Serve gRPC reflection.")

    admin_auth: Literal["auto", "required"] = Field(
        default="auto",
        description="Whether operators' calls need credentials with an admin scope; auto: not at a loopback address.",
    )
    audit_file: Path | None = Field(
        default=None,
        description="Where each call is recorded, a line of JSON each: who, what, ids, counts and digests, never text. "
        "Operators' calls are in the log too.",
    )
    reveal_models: bool = Field(
        default=True,
        description="Whether callers learn of models that they may not use; if not, they are as if they did not exist.",
    )

    max_message_bytes: int = Field(default=4 * 1024 * 1024, gt=0, description="Largest request.")
    max_concurrent_streams: int = Field(default=256, gt=0, description="Most calls at a time on one connection.")
    max_calls: int = Field(default=4096, gt=0, description="Most generation calls at a time in this process.")
    max_calls_per_tenant_share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Most of these that one tenant has, of those that other tenants leave free; 1 where there is one "
        "tenant only.",
    )
    openai_max_connections: int = Field(
        default=8192,
        gt=0,
        description="Most connections at openai_address; calls on more are refused, and from twice as many on unheard.",
    )
    openai_max_body_bytes: int = Field(
        default=512 << 20,
        gt=0,
        description="Most bytes of all bodies that are held at openai_address, of calls in progress; at least "
        "max_message_bytes. Of those too no tenant takes more than its share.",
    )
    max_stop_strings: int = Field(default=16, ge=0, description="Most stop strings of one request.")
    max_outputs: int = Field(default=16, ge=1, description="Most outputs of one request.")

    max_batch_items: int = Field(default=50_000, gt=0, description="Most items of one batch.")
    max_batch_bytes: int = Field(default=64 << 20, gt=0, description="Most bytes of the items of one batch.")
    max_batches_per_tenant: int = Field(
        default=100, gt=0, description="Most batches of one tenant, those that have ended and are still kept included."
    )
    batch_window: int = Field(
        default=64, gt=0, description="Most items of one batch that are in the queue or with workers at a time."
    )
    max_fed_batches: int = Field(default=32, gt=0, description="Most batches that this gateway feeds at a time.")
    batch_retention_s: float = Field(
        default=86_400, gt=0, description="How long a batch and its results are kept after its end."
    )
    batch_lifetime_s: float = Field(
        default=7 * 86_400, gt=0, description="How long a batch may run; items without a result are then given up."
    )

    progress_interval_s: float = Field(default=15, gt=0, description="Silence after which a stream gets a Progress.")
    reconcile_interval_s: float = Field(
        default=1, gt=0, description="Silence after which a stream reads the log itself."
    )
    maintenance_interval_s: float = Field(
        default=1, gt=0, description="How often leases, reaping and sweeping run; at least four times a lease."
    )
    max_pending_events: int = Field(
        default=256, gt=0, description="Events kept for a slow client before it reads the log."
    )
    max_pending_bytes: int = Field(
        default=256 << 10, gt=0, description="About the most memory that these events may take, of each client."
    )
    send_timeout_s: float = Field(
        default=60, gt=0, description="How long a client may leave a message unread before its stream ends, resumable."
    )
    keepalive_s: float = Field(
        default=30, ge=1, description="Silence on a connection after which the gateway asks whether it is alive."
    )
    keepalive_timeout_s: float = Field(
        default=10, ge=1, description="How long the answer may take before the connection counts as lost."
    )
    drain_s: float = Field(default=20, ge=0, description="How long running calls may go on after SIGTERM.")

    @model_validator(mode="after")
    def _a_body_fits(self) -> Self:
        if self.openai_max_body_bytes < self.max_message_bytes:
            raise ValueError("openai_max_body_bytes must be at least max_message_bytes")
        return self

    @model_validator(mode="after")
    def _certificates_are_whole(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file belong together")
        if self.client_certificates != "none" and (self.tls_cert_file is None or self.tls_client_ca_file is None):
            raise ValueError("client_certificates need tls_cert_file, tls_key_file and tls_client_ca_file")
        if self.client_certificates == "none" and self.tls_client_ca_file is not None:
            raise ValueError(
                "tls_client_ca_file is set, but client_certificates is none: nobody would be asked for one"
            )
        # The library either demands a client's certificate or does not ask for one, by port.
        if (self.client_certificates == "optional") != bool(self.mtls_address):
            raise ValueError("client_certificates=optional and mtls_address belong together")
        # Nothing is encrypted at a socket's file, and nobody there shows a certificate.
        need_one = ("mtls_address", *(("address", "admin_address") if self.client_certificates == "required" else ()))
        for name in need_one:
            if (address := getattr(self, name)).startswith("unix:"):
                raise ValueError(
                    f"{name}={address} is a socket without TLS, where no client shows a certificate: give host:port, "
                    "or ask for certificates at mtls_address only (client_certificates=optional)"
                )
        return self
