"""Serves the OpenAI door in the gateway's event loop: uvicorn, with the gateway's certificates and limits."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import ssl
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import h11
import msgspec
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from gateway.openai.errors import HttpError, answer_to, merge_headers
from gateway.settings import GatewaySettings
from gateway.tls import CertificateError, ServerCertificates

_HEAD_S: Final = 30.0  # how long a request's head may take to arrive
_KEEP_ALIVE_S: Final = 75
_LAST_WORDS_S: Final = 2.0  # for calls that are left when the server stops
_TICK_S: Final = 1.0
_MAX_HEAD_BYTES: Final = 16 * 1024
_RETRY_AFTER_MS: Final = 500
PEER_CERTIFICATE: Final = "torchrelay.peer_certificate"
_ABORT: Final = "torchrelay.abort"


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
            http=partial(_Protocol, settings=settings),  # type: ignore[arg-type]
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
            self._server.end()
            await self._serving
            if tasks := self._server.server_state.tasks:  # cancelled, and telling their clients so
                await asyncio.wait(tuple(tasks), timeout=_LAST_WORDS_S)

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
    """Leaves signals to the gateway, and wakes up once a second for the date in its answers, not ten times."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._ending = asyncio.Event()

    def end(self) -> None:
        """Begin to shut down."""
        self.should_exit = True
        self._ending.set()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):
                    await self._ending.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(H11Protocol):
    """Ends connections whose requests do not arrive or whose answers are not read, and those that are too many.

    Notes the client's certificate.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _unread_timer: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, settings: GatewaySettings, **options: Any) -> None:
        super().__init__(*args, **options)
        self._settings = settings

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, _ABORT: transport.abort}
        if len(self.connections) > 2 * self._settings.openai_max_connections:
            transport.abort()
            return
        if len(self.connections) > self._settings.openai_max_connections:
            self.app = _too_many
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
        self._stop_watching()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        self._stop_watching()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Also where the last answer is not read: closing alone would keep it for ever."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def _watch_reader(self, num_unread: int | None = None) -> None:
        """End the connection of a client that reads nothing for long of what is kept for it; slow ones may go on."""
        left = self.transport.get_write_buffer_size()
        if num_unread is not None and left >= num_unread:
            self.transport.abort()
        else:
            self._unread_timer = self.loop.call_later(self._settings.send_timeout_s, self._watch_reader, left)

    def _stop_watching(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

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


async def _too_many(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a call on a connection more than there may be."""
    error = HttpError(503, "this gateway has as many connections as it may", "gateway_full")
    data = msgspec.json.encode(answer_to(error, is_chat=False).body)
    headers = {"content-type": "application/json", "content-length": str(len(data)), "connection": "close"}
    pause = {"retry-after": "1", "retry-after-ms": str(random.randint(_RETRY_AFTER_MS, 3 * _RETRY_AFTER_MS))}
    await send({"type": "http.response.start", "status": 503, "headers": merge_headers(headers, pause)})
    await send({"type": "http.response.body", "body": data})


def abort(scope: Mapping[str, Any]) -> None:
    """End a call's connection at once; what its client has not read is dropped."""
    end = scope.get("state", {}).get(_ABORT)
    if end is not None:
        end()


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
