"""Peers that may speak for others: by address, or by their own certificate. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Final
from urllib.parse import unquote

from gateway.identity.patterns import is_spiffe_id

UNIX: Final = "unix:"


class TrustedProxies:
    """Networks, SPIFFE ids, and `unix:`. Raises ValueError for an entry that is none of them."""

    def __init__(self, entries: Iterable[str] = ()) -> None:
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        self.spiffe_ids: set[str] = set()
        self._has_unix = False
        for entry in entries:
            if entry == UNIX:
                self._has_unix = True
            elif entry.startswith("spiffe://"):
                if not is_spiffe_id(entry):
                    raise ValueError(f"{entry}: not a SPIFFE id")
                self.spiffe_ids.add(entry)
            else:
                self._networks.append(_network(entry))

    def __bool__(self) -> bool:
        return bool(self._networks or self.spiffe_ids or self._has_unix)

    def trusts(self, peer: str, spiffe_id: str | None = None) -> bool:
        """Whether a peer, as gRPC names it, with the verified id of its certificate, may speak for others."""
        if spiffe_id is not None and spiffe_id in self.spiffe_ids:
            return True
        if peer.startswith(UNIX):
            return self._has_unix
        address = address_of(peer)
        return address is not None and any(address in network for network in self._networks)


def address_of(peer: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address of `ipv4:10.0.0.1:4711` or `ipv6:%5B::1%5D:4711`; one that maps IPv4 is IPv4. None if none."""
    kind, _, rest = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return None
    host = unquote(rest).rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _network(entry: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        network = ipaddress.ip_network(entry)
    except ValueError:
        raise ValueError(f"{entry}: not an IP address, a network without host bits, a SPIFFE id or unix:") from None
    if network.prefixlen == 0:
        raise ValueError(f"{entry}: everybody would be trusted")
    return network
