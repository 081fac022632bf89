"""The parties of the protocol's state machine: worker and gateway incarnations, and their connections."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import redis as redis_sync

from common.acl import Role
from common.embedded import EmbeddedServer
from common.job_claims import JobClaims
from common.job_queue import START_CURSOR, JobQueue
from common.redis import Retry
from common.settings import QueueSettings
from tests.builders_common import flaky_client

QUEUE = QueueSettings(
    max_queued=6,
    max_queued_per_tenant=4,
    max_live_per_tenant=6,
    max_claims=8,
    max_claim_bytes=600,
    worker_lease_ms=600_000,  # leases end when the machine says so
    gateway_lease_ms=600_000,
    reply_ttl_ms=600_000,
)
NO_RETRY = Retry(deadline_ms=0)  # the machine itself is the caller that tries again, or does something else first


@dataclass
class Worker:
    """A worker incarnation as its process sees it: number of tokens of each job that it computes."""

    claims: JobClaims
    tokens: dict[str, int] = field(default_factory=dict)


@dataclass
class Gateway:
    queue: JobQueue
    cursor: bytes = START_CURSOR
    clients: set[str] = field(default_factory=set)  # generations whose streams it has


class Parts:
    """The connections of a test run, shared by its histories."""

    def __init__(self, server: EmbeddedServer, superuser: redis_sync.Redis) -> None:
        self.superuser = superuser
        self.runner = asyncio.Runner()
        self.gateway_redis = flaky_client(server.socket_path, Role.GATEWAY)
        self.worker_redis = flaky_client(server.socket_path, Role.WORKER)

    def close(self) -> None:
        self.runner.run(self.gateway_redis.aclose())
        self.runner.run(self.worker_redis.aclose())
        self.runner.close()
