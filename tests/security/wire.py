"""A client's end of HTTP/2 that does what no library would: raw frames over a socket, for tests of the gateway."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from typing import Final

import hpack

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS, ACK = 1, 4, 1
CANCEL: Final = struct.pack(">I", 8)


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0, length: int | None = None) -> bytes:
    """One frame (RFC 9113, section 4.1); `length` lies about the payload's."""
    size = len(payload) if length is None else length
    return struct.pack(">I", size)[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def grpc_headers(path: str, authority: str, *extra: tuple[str, str]) -> bytes:
    """The header block of a call, without a dynamic table."""
    encoder = hpack.Encoder()
    fields = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", authority),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *extra,
    ]
    return bytes(encoder.encode([(name, value, True) for name, value in fields]))


class Attacker:
    """A connection. `send` says how many bytes went before the gateway hung up or stopped reading."""

    def __init__(self, address: str, *, preface: bool = True) -> None:
        host, _, port = address.rpartition(":")
        self.authority = address
        self.socket = socket.create_connection((host, int(port)), timeout=10)
        self.received = b""
        self.num_sent = 0  # bytes, in all
        if preface:
            self.send(PREFACE + frame(SETTINGS))

    def send(self, data: bytes, timeout_s: float = 10) -> int:
        """Send, reading what comes meanwhile so that neither side waits for the other."""
        sent, end = 0, time.monotonic() + timeout_s
        self.socket.settimeout(0.05)
        view = memoryview(data)
        while sent < len(data) and time.monotonic() < end:
            try:
                step = self.socket.send(view[sent : sent + 65536])
                sent += step
                self.num_sent += step
            except TimeoutError:
                pass
            except OSError:
                break
            if not self._drain():
                break
        return sent

    def wait_until_closed(self, timeout_s: float) -> bool:
        """Read until the gateway ends the connection; False if it has not by then."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if not self._drain():
                return True
        return False

    def frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        """What came so far: type, flags, stream, payload."""
        at = 0
        while at + 9 <= len(self.received):
            size = int.from_bytes(self.received[at : at + 3], "big")
            kind, flags = self.received[at + 3], self.received[at + 4]
            stream = int.from_bytes(self.received[at + 5 : at + 9], "big") & 0x7FFFFFFF
            yield kind, flags, stream, self.received[at + 9 : at + 9 + size]
            at += 9 + size

    def _drain(self) -> bool:
        self.socket.settimeout(0.01)
        try:
            data = self.socket.recv(1 << 20)
        except TimeoutError:
            return True
        except OSError:
            return False
        self.received = (self.received + data)[: 1 << 20]
        return bool(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.close()

    def __enter__(self) -> Attacker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
