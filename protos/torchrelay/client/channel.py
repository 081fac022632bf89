"""Channel options and credentials, the same for the blocking and the asynchronous client."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc

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


def auth_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def _read(path: str) -> bytes | None:
    if not path:
        return None
    with open(path, "rb") as file:
        return file.read()
