"""A small HTTP server in each process, for Prometheus and for probes: /metrics, /healthz, /readyz.

It answers from threads of its own, so that a scrape is answered while the event loop is busy, and a worker's probes
while its model is loaded. Plaintext, and open to whoever reaches it: it tells names of models and tenants, and counts.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    make_wsgi_app,
)

_BEAT_S: Final = 1.0
_MAX_SILENCE_S: Final = 30.0
_REQUEST_S: Final = 10.0
_MAX_REQUESTS: Final = 16

StartResponse = Callable[..., Any]


def process_registry() -> CollectorRegistry:
    """Return a registry of metrics that tells of this process: memory, CPU time, open files, versions."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each one, which nothing here asks for
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    return registry


class Vitals:
    """Whether a process is alive and ready. Written by its event loop, read by the server's threads.

    Alive: its event loop turns, or has not begun to. Ready: as it says itself.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._beaten_at: float | None = None
        self._unready = "starting"

    async def run(self) -> None:
        """Show that the event loop turns, until cancelled."""
        while True:
            self.beat()
            await asyncio.sleep(_BEAT_S)

    def beat(self) -> None:
        self._beaten_at = self._clock()

    def set_ready(self) -> None:
        self._unready = ""

    def set_unready(self, why: str) -> None:
        """`why` is told to who asks: one or two words."""
        self._unready = why

    @property
    def is_alive(self) -> bool:
        return self._beaten_at is None or self._clock() - self._beaten_at < _MAX_SILENCE_S

    @property
    def unready(self) -> str:
        """Why it is not ready; empty if it is."""
        return self._unready


class _Handler(WSGIRequestHandler):
    timeout = _REQUEST_S  # of the socket: a client that sends nothing holds a thread no longer

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name in the standard library
        """A probe every few seconds is no event."""


class _Server(WSGIServer):
    """Answers each request on a thread of its own, a few at a time; who comes on top of these is not heard."""

    request_queue_size = 32

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._free = threading.BoundedSemaphore(_MAX_REQUESTS)
        super().__init__(*args, **kwargs)

    def server_bind(self) -> None:
        """As in WSGIServer, without asking the resolver for this host's name: that may take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        threading.Thread(target=self._answer, args=(request, client_address), name="monitor", daemon=True).start()

    def _answer(self, request: Any, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except OSError:
            pass  # the client has gone away
        finally:
            self.shutdown_request(request)
            self._free.release()


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class MonitorServer:
    """Serves a registry of metrics and a process's vitals until `close`."""

    def __init__(self, address: str, registry: CollectorRegistry, vitals: Vitals) -> None:
        """Listen on `host:port`. Raises OSError if that cannot be bound, ValueError if it is no address."""
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        if not host or not port.isdecimal():
            raise ValueError(f"{address} is not host:port")
        kind = _ServerV6 if ":" in host else _Server
        try:
            self._server = make_server(host, int(port), _app(registry, vitals), kind, _Handler)
        except (OSError, OverflowError) as error:
            raise OSError(f"cannot listen on {address}: the address is taken, or not this machine's") from error
        self.address = f"{address.rpartition(':')[0]}:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, name="monitor", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _app(registry: CollectorRegistry, vitals: Vitals) -> Callable[[dict[str, Any], StartResponse], Iterable[bytes]]:
    metrics: Any = make_wsgi_app(registry)

    def app(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            answer: Iterable[bytes] = metrics(environ, start_response)
            return answer
        if path == "/healthz":
            fault = "" if vitals.is_alive else "the event loop does not turn"
        elif path == "/readyz":
            fault = vitals.unready if vitals.is_alive else "the event loop does not turn"
        else:
            start_response("404 Not Found", [("content-type", "text/plain")])
            return [b"there are /metrics, /healthz and /readyz\n"]
        start_response("503 Service Unavailable" if fault else "200 OK", [("content-type", "text/plain")])
        return [(fault or "ok").encode() + b"\n"]

    return app
