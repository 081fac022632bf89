"""Calls over plain HTTP, by the standard library: what a client of any kind sends and gets."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Answer:
    """A response, whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The events of a stream without comments, the mark of the end as a string."""
        lines = [line for line in self.body.decode().split("\n\n") if line and not line.startswith(":")]
        assert all(line.startswith("data: ") for line in lines)
        return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


@dataclass(frozen=True, slots=True)
class HttpDoor:
    """An address, with a key."""

    address: str
    key: str = ""

    def call(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        """Make one call. `body` is bytes, or a value for JSON."""
        connection = http.client.HTTPConnection(self.address, timeout=60)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        own = {"authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            connection.request(method, path, data, {"content-type": "application/json", **own, **(headers or {})})
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    async def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Answer:
        return await asyncio.to_thread(self.call, "POST", path, body, headers)

    async def get(self, path: str) -> Answer:
        return await asyncio.to_thread(self.call, "GET", path)
