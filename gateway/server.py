"""The gateway's ports: the public one, the operators', and one for probes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from gateway.interceptors.guard import Guard
from gateway.settings import GatewaySettings
from gateway.tls import ServerCertificates
from torchrelay.client.channel import is_loopback

_PUBLIC: Final = tuple(
    f"torchrelay.v1.{name}"
    for name in ("GenerationService", "ModelService", "EmbeddingService", "ClassificationService", "BatchService")
)
_ADMIN: Final = tuple(
    f"torchrelay.admin.v1beta1.{name}"
    for name in ("ApiKeyService", "TenantService", "FleetService", "UsageService", "LogService")
)
_MAX_METADATA_BYTES: Final = 8192


def server_options(settings: GatewaySettings) -> Sequence[tuple[str, Any]]:
    """Return the limits of a server's connections."""
    return (
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_concurrent_streams", settings.max_concurrent_streams),
        # Equal limits: between a soft and a hard one the library refuses at random.
        ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", _MAX_METADATA_BYTES),
        # Clients may ping every 10 seconds, idle or not, so that dead connections are found on both sides.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", int(settings.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(settings.keepalive_timeout_s * 1000)),
        # What counts when a ping gets no answer over a connection that still takes bytes; a minute if not set.
        ("grpc.http2.ping_timeout_ms", int(settings.keepalive_timeout_s * 1000)),
        ("grpc.so_reuseport", 0),  # a second gateway on this address is an error, not a silent half of the calls
    )


class Health:
    """Liveness and readiness. Alive: the event loop turns. Ready: connected once, and not draining."""

    def __init__(self) -> None:
        self.servicer = health_aio.HealthServicer()

    async def set_ready(self, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", "readiness", *_PUBLIC):
            await self.servicer.set(name, status)

    async def set_alive(self) -> None:
        await self.servicer.set("liveness", health_pb2.HealthCheckResponse.SERVING)


class GatewayServer:
    """Opens the ports, and closes them without cutting a call that can still end."""

    def __init__(self, settings: GatewaySettings, public_guard: Guard, admin_guard: Guard) -> None:
        self._settings = settings
        self.health = Health()
        self.public = grpc.aio.server(interceptors=(public_guard,), options=server_options(settings))
        self.admin = grpc.aio.server(interceptors=(admin_guard,), options=server_options(settings))
        self.probes = grpc.aio.server(options=server_options(settings))
        self.address = ""
        self.admin_address = ""
        self.mtls_address = ""

    async def start(self) -> None:
        """Bind and serve. Raises OSError if an address is taken, and CertificateError."""
        settings = self._settings
        certificates = certificates_of(settings)
        mutual = settings.client_certificates == "required"
        health_pb2_grpc.add_HealthServicer_to_server(self.health.servicer, self.public)
        await self.health.set_ready(False)
        await self.health.set_alive()
        if settings.reflection:
            reflection.enable_server_reflection(
                (*_PUBLIC, "grpc.health.v1.Health", reflection.SERVICE_NAME), self.public
            )
            reflection.enable_server_reflection((*_ADMIN, reflection.SERVICE_NAME), self.admin)
        self.address = _bind(self.public, settings.address, certificates, mutual=mutual)
        if settings.mtls_address:
            self.mtls_address = _bind(self.public, settings.mtls_address, certificates, mutual=True)
        await self.public.start()
        if settings.admin_address:
            self.admin_address = _bind(self.admin, settings.admin_address, certificates, mutual=mutual)
            await self.admin.start()
        if settings.health_address:
            health_pb2_grpc.add_HealthServicer_to_server(self.health.servicer, self.probes)
            _bind(self.probes, settings.health_address)
            await self.probes.start()

    async def stop(self) -> None:
        """Not ready first, then no new calls; running calls get their time and then end, resumable."""
        await self.health.set_ready(False)
        await asyncio.gather(self.public.stop(self._settings.drain_s), self.admin.stop(1))
        await self.probes.stop(0)


def certificates_of(settings: GatewaySettings) -> ServerCertificates | None:
    """Return the ports' certificates, None where there is no TLS. Raises CertificateError."""
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return None
    return ServerCertificates(settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file)


def check_plaintext(settings: GatewaySettings) -> None:
    """Raise ValueError if an address beyond loopback would be plaintext without the operator's word for it.

    Also CertificateError, a ValueError, where there is TLS and its files are of no use.
    """
    if certificates_of(settings) is not None:
        return
    for name in ("address", "admin_address", "openai_address"):
        address: str = getattr(settings, name)
        if address and not settings.insecure and not is_loopback(address):
            raise ValueError(
                f"TORCHRELAY_GATEWAY_{name.upper()}={address} is beyond loopback and would be plaintext: API keys and "
                "prompts could be read on the way. Bind to loopback, set TORCHRELAY_GATEWAY_TLS_CERT_FILE and "
                "_TLS_KEY_FILE, or allow it with --insecure (TORCHRELAY_GATEWAY_INSECURE=true), as behind a mesh that "
                "encrypts."
            )


def is_admin_open(settings: GatewaySettings) -> bool:
    """Return whether operators need no credentials."""
    return settings.admin_auth == "auto" and is_loopback(settings.admin_address)


def _bind(
    server: grpc.aio.Server, address: str, certificates: ServerCertificates | None = None, *, mutual: bool = False
) -> str:
    try:
        # Whoever may open a socket's file is on this machine, and has no host name to check.
        if certificates is None or address.startswith("unix:"):
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, certificates.credentials(require_client=mutual))
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: the address is taken, or not this machine's") from error
    if port == 0:
        raise OSError(f"cannot listen on {address}: the address is taken, or not this machine's")
    if address.startswith("unix:"):
        return address
    return f"{address.rpartition(':')[0]}:{port}"
