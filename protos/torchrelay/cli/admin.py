"""The way to a gateway's admin port."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import grpc
import typer

from torchrelay.cli import output
from torchrelay.client import Tls
from torchrelay.client.channel import auth_metadata, is_loopback

AdminKeyOption = Annotated[
    str | None,
    typer.Option(
        "--admin-key", envvar="TORCHRELAY_ADMIN_KEY", help="API key with the scope of the verb; not needed on loopback."
    ),
]


class _WithKey(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Adds a key to every call."""

    def __init__(self, key: str) -> None:
        self._metadata = auth_metadata(key)

    def intercept_unary_unary(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return continuation(self._with_key(details), request)

    def intercept_unary_stream(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return continuation(self._with_key(details), request)

    def _with_key(self, details: Any) -> grpc.ClientCallDetails:
        return _Details(details.method, details.timeout, [*(details.metadata or ()), *self._metadata])


class _Details(grpc.ClientCallDetails):
    """What gRPC asks of a call: it has attributes and no constructor of its own."""

    def __init__(self, method: str, timeout: float | None, metadata: Any) -> None:
        self.method = method
        self.timeout = timeout
        self.metadata = metadata
        self.credentials = None
        self.wait_for_ready = None
        self.compression = None


@contextmanager
def admin_channel(address: str, key: str | None, tls: Tls | None = None) -> Iterator[grpc.Channel]:
    """A channel to an admin port, on which failed calls become lines that say what to do, and exit code 1.

    A key is not sent in plaintext beyond loopback.
    """
    if key and tls is None and not is_loopback(address):
        raise typer.BadParameter("a key is sent beyond loopback with --tls-ca only", param_hint="--admin-key")
    with output.explained_errors(address, "--admin-address"), _open(address, tls) as channel:
        yield grpc.intercept_channel(channel, _WithKey(key)) if key else channel


def _open(address: str, tls: Tls | None) -> grpc.Channel:
    if tls is not None:
        return grpc.secure_channel(address, tls.credentials())
    return grpc.insecure_channel(address)
