"""Where the commands connect to, and with which key."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from torchrelay.client import AsyncClient, Client, RetryPolicy, Tls
from torchrelay.client.channel import is_loopback

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_ADMIN_ADDRESS = "127.0.0.1:50052"
# Somebody looks at the terminal: a wrong address is said at once, a stream that broke is picked up again with patience.
_RETRY = RetryPolicy(first_contact_s=2.0)

AddressOption = Annotated[
    str, typer.Option("--address", "-a", envvar="TORCHRELAY_ADDRESS", help="Gateway, host:port or a gRPC target.")
]
AdminAddressOption = Annotated[
    str, typer.Option("--admin-address", envvar="TORCHRELAY_ADMIN_ADDRESS", help="The gateway's admin port, host:port.")
]
ApiKeyOption = Annotated[
    str | None,
    typer.Option("--api-key", envvar="TORCHRELAY_API_KEY", help="API key; on loopback, the one that serve made."),
]
TlsCaOption = Annotated[str, typer.Option("--tls-ca", envvar="TORCHRELAY_TLS_CA", help="Certificate authority, PEM.")]
TlsCertOption = Annotated[
    str, typer.Option("--tls-cert", envvar="TORCHRELAY_TLS_CERT", help="Your certificate, PEM, for mutual TLS.")
]
TlsKeyOption = Annotated[str, typer.Option("--tls-key", envvar="TORCHRELAY_TLS_KEY", help="Its private key, PEM.")]
TokenOption = Annotated[
    str | None, typer.Option("--token", envvar="TORCHRELAY_TOKEN", help="JSON Web Token, instead of an API key.")
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", envvar="TORCHRELAY_INSECURE", help="Plaintext beyond loopback.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object per result on stdout.")]


def credentials_file() -> Path:
    """Return where `torchrelay serve` leaves the key that it made for this user."""
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "torchrelay" / "credentials"


def tls_of(ca: str, cert: str, key: str) -> Tls | None:
    """Return what the options say of TLS, None if nothing. Raises BadParameter."""
    if bool(cert) != bool(key):
        raise typer.BadParameter("--tls-cert and --tls-key belong together", param_hint="--tls-cert")
    for option, path in (("--tls-ca", ca), ("--tls-cert", cert), ("--tls-key", key)):
        if path and not os.access(path, os.R_OK):
            raise typer.BadParameter(f"{path} cannot be read", param_hint=option)
    return Tls(ca, cert, key) if ca or cert else None


@dataclass(frozen=True, slots=True)
class Connection:
    """Address and credentials of one command."""

    address: str
    api_key: str | None
    tls: Tls | None = None
    insecure: bool = False
    token: str | None = None

    def key(self) -> str | None:
        """Return the key given, or on loopback the development key: it must never be sent to another machine.

        Nor is it needed beside another credential.
        """
        if self.api_key and self.token:
            raise typer.BadParameter("give --api-key or --token, not both", param_hint="--token")
        has_other = bool(self.token) or (self.tls is not None and bool(self.tls.cert_file))
        if self.api_key or has_other or not is_loopback(self.address):
            return self.api_key
        try:
            return credentials_file().read_text().strip() or None
        except OSError:
            return None

    def client(self) -> Client:
        return Client(self.address, **self._options())

    def aio_client(self, retry: RetryPolicy = _RETRY, options: Sequence[tuple[str, Any]] = ()) -> AsyncClient:
        return AsyncClient(self.address, **self._options() | {"retry": retry, "options": options})

    def _options(self) -> dict[str, Any]:
        return {
            "api_key": self.key(),
            "token": self.token,
            "tls": self.tls,
            "insecure": self.insecure,
            "retry": _RETRY,
        }


def connection_of(
    address: AddressOption = DEFAULT_ADDRESS,
    api_key: ApiKeyOption = None,
    token: TokenOption = None,
    tls_ca: TlsCaOption = "",
    tls_cert: TlsCertOption = "",
    tls_key: TlsKeyOption = "",
    insecure: InsecureOption = False,
) -> Connection:
    """Return what a command's options say. Raises BadParameter."""
    return Connection(address, api_key, tls_of(tls_ca, tls_cert, tls_key), insecure, token)


def connected(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `connection_of` in the place of its parameter `connection`, behind its own."""
    options = inspect.signature(connection_of, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True).parameters

    @functools.wraps(command)
    def with_options(*args: Any, **values: Any) -> None:
        connection = connection_of(**{name: values.pop(name) for name in options})
        command(*args, connection=connection, **values)

    # What Typer reads.
    parameters = [*(own[name] for name in own if name != "connection"), *options.values()]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options
