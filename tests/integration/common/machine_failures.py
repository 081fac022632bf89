"""The state machine of the protocol tests, with jobs that end their workers or give way, and failed ones sent again."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from redis.exceptions import RedisError

from common import keys
from common.errors import BackendUnavailable
from common.scripts import ScriptRunner
from tests.integration.common.conftest import SHARD
from tests.integration.common.invariants import MAX_PREEMPTIONS, Seen
from tests.integration.common.machine import MAX_JOBS, SLOTS, ProtocolMachine
from tests.integration.common.parties import QUEUE


class FailuresMachine(ProtocolMachine):
    """Adds rules; the invariants are the same."""

    @rule(slot=SLOTS, times=st.integers(1, 3))
    def poisoned(self, slot: int, times: int) -> None:
        """Something ends worker after worker before any of its jobs makes progress."""
        for _ in range(times):
            worker = self.workers[slot]
            self._get_work(worker)
            self.parts.superuser.zadd(keys.worker_leases(SHARD), {worker.claims.worker_id: 0}, xx=True)
            self._no_grace()
            self.workers[slot] = self._new_worker()
            self._run(self.gateways[slot].queue.reap(SHARD))

    @rule(slot=SLOTS, times=st.integers(1, 3), is_lost=st.booleans())
    def preempt(self, slot: int, times: int, is_lost: bool) -> None:
        """A worker makes room for a higher class, again and again. What may not give way, it finds again as its own."""
        worker = self.workers[slot]
        for _ in range(times):
            self._get_work(worker)
            held = sorted(worker.tokens)
            self._maybe_lost(is_lost, lambda held=held: worker.claims.preempt(held, MAX_PREEMPTIONS))  # type: ignore[misc]
            worker.tokens.clear()
            self._learn(worker, self._run(worker.claims.commit()))
            self._take_up(worker, self._run(worker.claims.owned()))

    @precondition(lambda self: len(self.tenant_of) < MAX_JOBS)
    @rule(data=st.data(), is_lost=st.booleans())
    def retry_dead_letter(self, data: st.DataObject, is_lost: bool) -> None:
        """An operator sends a failed job again: a new one, once, whatever happened to the call before."""
        failed = [name for name in sorted(self.tenant_of) if self._state(name) == "F"]
        if not failed:
            return
        old_id, new_id = data.draw(st.sampled_from(failed), label="letter"), f"{SHARD}.{self._new_id()}"
        runner = ScriptRunner(self.parts.gateway_redis, self.overrides)
        limits = (QUEUE.max_lifetime_ms, QUEUE.max_queued, QUEUE.max_queued_per_tenant, QUEUE.max_live_per_tenant)

        async def retry() -> list[bytes]:
            try:
                return list(await runner.run("retry", keys.meta(SHARD), old_id, new_id, *limits))
            except RedisError as error:
                raise BackendUnavailable("lost") from error

        status, *made = self._maybe_lost(is_lost, retry)
        if status == b"OK" and made == [new_id.encode()]:
            self.tenant_of[new_id] = self.tenant_of[old_id]
            self.seen[new_id] = Seen()
            self.attach_ids[new_id] = [""]
        elif status == b"OK":
            assert made[0].decode() in self.tenant_of, "a repeat made another generation"
