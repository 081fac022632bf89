"""Serves the OpenAI door in the gateway's event loop: uvicorn, with the gateway's certificates and limits."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from gateway.settings import GatewaySettings
from gateway.tls import CertificateError, ServerCertificates

_HEAD_S: Final = 30.0  # how long a request's head may take to arrive
_KEEP_ALIVE_S: Final = 75
_MAX_HEAD_BYTES: Final = 16 * 1024
PEER_CERTIFICATE: Final = "torchrelay.peer_certificate"


class OpenAiServer:
    """One port."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings, certificates: ServerCertificates | None) -> None:
        self._app = app
        self._settings = settings
        self._certificates = certificates
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self.address = ""

    async def start(self) -> None:
        """Bind and serve; nowhere, if no address is set. Raises OSError if the address is taken, CertificateError."""
        settings = self._settings
        if not settings.openai_address:
            return
        for name in ("uvicorn", "uvicorn.error"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what it says may hold what a caller wrote
        listener = _listen(settings.openai_address)
        host, port = listener.getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        config = uvicorn.Config(
            self._app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(settings.drain_s)),
            ssl_context_factory=self._context if self._certificates is not None else None,
        )
        self._server = _Server(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started:
            if self._serving.done():
                self._serving.result()
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """No new calls; running ones get their time, and then end."""
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving

    def _context(self, config: uvicorn.Config, default: Any) -> ssl.SSLContext:
        settings, certificates = self._settings, self._certificates
        assert certificates is not None
        assert settings.tls_cert_file is not None
        assert settings.tls_key_file is not None
        mutual = settings.client_certificates == "required"
        return _RotatingContext(certificates, settings.tls_cert_file, settings.tls_key_file, mutual=mutual).outer


class _RotatingContext:
    """A context whose handshakes use the certificates in force."""

    def __init__(self, certificates: ServerCertificates, cert_file: Path, key_file: Path, *, mutual: bool) -> None:
        self._certificates = certificates
        self._files = (cert_file, key_file)
        self._mutual = mutual
        self._used = certificates.reload()
        self._inner = self._make()
        self.outer = self._make()
        self.outer.sni_callback = self._choose

    def _make(self) -> ssl.SSLContext:
        """Raises CertificateError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(*self._files)
            if self._mutual:
                context.load_verify_locations(cadata=self._used.client_ca.decode())
                context.verify_mode = ssl.CERT_REQUIRED
        except (ssl.SSLError, OSError) as error:
            raise CertificateError(f"{self._files[0]}: {type(error).__name__}") from None
        return context

    def _choose(self, connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        """At each handshake, with or without a server's name."""
        current = self._certificates.reload()
        if current is not self._used:
            with contextlib.suppress(CertificateError):  # being written just now: the next handshake looks again
                self._inner, self._used = self._make(), current
        connection.context = self._inner


class _Server(uvicorn.Server):
    """Leaves signals to the gateway."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(H11Protocol):
    """Ends connections whose requests do not arrive, and notes the client's certificate."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        der = tls.getpeercert(binary_form=True) if tls is not None else None
        if der is not None:
            self.app_state = {**self.app_state, PEER_CERTIFICATE: ssl.DER_cert_to_PEM_cert(der).encode()}
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(_HEAD_S, self._give_up)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if self.conn.their_state is h11.IDLE:
            self.transport.close()


def auth_context_of(scope: Mapping[str, Any]) -> Mapping[str, tuple[bytes, ...]]:
    """Return what the transport has verified of the client, by gRPC's names."""
    certificate = scope.get("state", {}).get(PEER_CERTIFICATE)
    return {} if certificate is None else {"x509_pem_cert": (certificate,)}


def _listen(address: str) -> socket.socket:
    """Raises OSError."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, int(port)))
        listener.listen(2048)
    except (OSError, ValueError) as error:
        listener.close()
        raise OSError(f"cannot listen on {address}: the address is taken, or not this machine's") from error
    listener.setblocking(False)
    return listener
