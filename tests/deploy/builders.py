"""Values for tests of the chart."""

from __future__ import annotations

from typing import Any


def model(name: str = "tiny", source: dict[str, Any] | None = None, **values: Any) -> dict[str, Any]:
    """An entry of `models`, by default from a volume."""
    return {"name": name, "source": source or {"volumeClaim": {"name": "models", "path": name}}, **values}


HUB = {"hub": {"id": "org/model", "revision": "abc", "tokenSecret": "hub-token"}}
EXTERNAL = {
    "url": "rediss://redis.example.com:6380/0",
    "auth": {
        "secretName": "redis-users",
        "gateway": {"username": "gw"},
        "worker": {"username": "wk"},
        "admin": {"username": "ad"},
    },
}
