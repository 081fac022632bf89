"""Where the commands connect to, and with which key."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

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
InsecureOption = Annotated[
    bool, typer.Option("--insecure", envvar="TORCHRELAY_INSECURE", help="Plaintext beyond loopback.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object per result on stdout.")]


def credentials_file() -> Path:
    """Return where `torchrelay serve` leaves the key that it made for this user."""
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "torchrelay" / "credentials"


@dataclass(frozen=True, slots=True)
class Connection:
    """Address and credentials of one command."""

    address: str
    api_key: str | None
    tls_ca: str = ""
    insecure: bool = False

    def key(self) -> str | None:
        """Return the key given, or on loopback the development key: it must never be sent to another machine."""
        if self.api_key or not is_loopback(self.address):
            return self.api_key
        try:
            return credentials_file().read_text().strip() or None
        except OSError:
            return None

    def client(self) -> Client:
        return Client(self.address, api_key=self.key(), tls=self._tls(), insecure=self.insecure, retry=_RETRY)

    def aio_client(self) -> AsyncClient:
        return AsyncClient(self.address, api_key=self.key(), tls=self._tls(), insecure=self.insecure, retry=_RETRY)

    def _tls(self) -> Tls | None:
        return Tls(ca_file=self.tls_ca) if self.tls_ca else None
