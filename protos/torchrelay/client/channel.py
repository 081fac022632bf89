"""Channel options and credentials, the same for the blocking and the asynchronous client."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc

from torchrelay.client.tracing import trace_metadata

Token: TypeAlias = str | Callable[[], str]  # a JWT, or what returns one that is good now

# Retries are the client's own: a retry inside the library would hide from it where the stream broke. Reconnecting is
# capped so that a gateway that comes back is found within seconds. Servers accept a ping every 10 seconds.
OPTIONS: Sequence[tuple[str, Any]] = (
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # what counts over a connection that still takes bytes; a minute if not set
    ("grpc.http2.max_pings_without_data", 0),  # no bound: whoever reads a long stream sends nothing but pings
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
)


@dataclass(frozen=True, slots=True)
class Tls:
    """Transport security. Empty paths mean the system's certificate authorities and no client certificate."""

    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files. Raises ValueError for a certificate without its key, and OSError."""
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError("cert_file and key_file belong together")
        return grpc.ssl_channel_credentials(_read(self.ca_file), _read(self.key_file), _read(self.cert_file))


def is_loopback(address: str) -> bool:
    """Whether an address like host:port, unix:path or ipv4:host:port,host:port stays on this machine."""
    if address.startswith("unix:"):
        return True
    if address.startswith(("ipv4:", "ipv6:")):
        return all(is_loopback(one) for one in address[5:].split(","))
    host = address.rsplit(":", 1)[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Bearer:
    """What calls bear: an API key, or a token that may be another for every call. Raises ValueError for both."""

    def __init__(self, api_key: str | None, token: Token | None = None) -> None:
        if api_key and token:
            raise ValueError("give an api_key or a token, not both")
        self._secret = api_key or token or ""

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata of one call: the caller's credential and trace. Raises what a token's function raises."""
        return auth_metadata(self._secret() if callable(self._secret) else self._secret) + trace_metadata()


def auth_metadata(secret: str | None) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {secret}"),) if secret else ()


def _read(path: str) -> bytes | None:
    if not path:
        return None
    with open(path, "rb") as file:
        return file.read()
