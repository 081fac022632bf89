"""The whole protocol as a transition system: server, workers, gateways, clients, and every fault at any moment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tests.protocol.scripts import ScriptError, Shard
from tests.protocol.state import (
    FINAL,
    LIVE,
    LOST,
    NONE,
    SUPERSEDED,
    Budget,
    Call,
    Client,
    Commit,
    Entry,
    Item,
    Job,
    Message,
    Server,
    State,
    Worker,
)
from tests.protocol.workers import Step, Workers, on_its_way, spend


class ResultLostError(Exception):
    """An event does not continue what was delivered."""


class Config(NamedTuple):
    """A configuration to explore: the sizes, and how often each fault may strike."""

    budget: Budget
    length: int = 2
    num_outputs: int = 1
    num_clients: int = 1  # each with a generation of its own
    num_rivals: int = 0  # further clients that ask for the first generation
    num_gateways: int = 2
    max_attempts: int = 2
    max_claims: int = 3
    has_grace: bool = True


class Protocol(Workers):
    """The transition system. Mutants override single methods of it."""

    def __init__(self, config: Config) -> None:
        super().__init__(
            length=config.length,
            num_outputs=config.num_outputs,
            max_attempts=config.max_attempts,
            max_claims=config.max_claims,
            has_grace=config.has_grace,
        )
        self.config = config
        self.tracks_attach = config.num_rivals > 0

    def initial(self) -> State:
        number = self.config.num_clients + self.config.num_rivals
        gateways = tuple(range(self.config.num_gateways))
        server = Server(streams=((),) * len(gateways))
        return State(server, (Worker(0), Worker(1)), gateways, (), (Client(),) * number, (), self.config.budget)

    def successors(self, state: State) -> Iterator[Step]:
        """Every step that may come next, with a readable name."""
        if state.error:
            return
        parts = (
            self.client_steps,
            self.gateway_steps,
            self.worker_steps,
            self.upkeep_steps,
            self.message_steps,
            self.server_faults,
        )
        for part in parts:
            for action, after in part(state):
                yield action, self.without_spent_messages(after) if after.messages else after

    # -- parts of a state

    def fresh_attach_id(self, state: State) -> int:
        """Random in life, here the smallest that nobody remembers."""
        servers = [state.server] if state.replica is None else [state.server, state.replica]
        used = {job.attach_id for server in servers for job in server.jobs} | {call.attach_id for call in state.calls}
        attaching: set[object] = {
            message.args[-1] for message in state.messages if message.kind in ("detach", "enqueue", "attach")
        }
        return next(number for number in range(1, len(used) + len(attaching) + 2) if number not in used | attaching)

    def with_client(self, state: State, number: int, client: Client) -> State:
        return state._replace(clients=(*state.clients[:number], client, *state.clients[number + 1 :]))

    def with_call(self, state: State, call: Call) -> State:
        others = tuple(other for other in state.calls if other.attach_id != call.attach_id)
        return state._replace(calls=tuple(sorted((*others, call))))

    def close(self, state: State, call: Call, end: str, *, detaches: bool) -> State:
        """A call is over at its gateway. `end`: what its client is told; "" if the connection broke."""
        state = state._replace(calls=tuple(other for other in state.calls if other.attach_id != call.attach_id))
        if detaches:
            state = on_its_way(state, "detach", call.job, call.gateway, call.attach_id)
        if call.client == NONE:
            return state
        client = state.clients[call.client]
        if end == SUPERSEDED and not self.config.num_rivals:
            end = ""  # by a call of its own that came late: it resumes
            client = client._replace(superseded=True)
        return self.with_client(state, call.client, client._replace(call=NONE, end=end))

    def open(self, state: State, call: Call) -> State:
        """A call has the stream at its gateway: others that had it there are told so, and it waits for events."""
        for other in state.calls:
            if other.job == call.job and other.gateway == call.gateway:
                state = self.close(state, other, SUPERSEDED, detaches=False)
        client = state.clients[call.client]._replace(job=call.job, call=call.attach_id)
        return self.with_call(self.with_client(state, call.client, client), call)

    # -- clients

    def client_steps(self, state: State) -> Iterator[Step]:
        for number, client in enumerate(state.clients):
            if client.end:
                continue
            name = f"client {number}"
            if client.call != NONE:
                if state.budget.drops:
                    call = next(call for call in state.calls if call.attach_id == client.call)
                    gone = self.with_call(spend(state, "drops"), call._replace(client=NONE))
                    yield f"{name} loses its connection", self.with_client(gone, number, client._replace(call=NONE))
                continue
            is_rival = number >= self.config.num_clients
            for gateway in state.gateways:
                if client.job == NONE and not is_rival:
                    yield from self.generates(state, number, gateway, f"{name} asks gateway {gateway}")
                elif not is_rival or state.server.jobs:
                    job = client.job if client.job != NONE else 0
                    yield from self.resumes(state, number, job, gateway, f"{name} resumes at gateway {gateway}")
                if not state.next_job:
                    break  # gateways are alike in the beginning

    def generates(self, state: State, number: int, gateway: int, label: str) -> Iterator[Step]:
        shard, attach_id = Shard(state.server), self.fresh_attach_id(state)
        job = self.enqueue(shard, state.next_job, number, gateway, attach_id)
        is_duplicate = job != state.next_job
        if is_duplicate:
            found = self.attach(shard, job, gateway, 0, None, attach_id)
            assert found.status == "OK"
        new = state._replace(server=shard.close(), next_job=state.next_job + (not is_duplicate))
        call = Call(attach_id, job, gateway, number)
        opened = self.open(new, call)
        if is_duplicate:
            opened = self.catch_up(opened, call, found.events, found.job)
        yield label, opened
        if state.budget.lost and not is_duplicate:
            poorer = spend(state, "lost")
            # The gateway has given up: what its call may have done is let go of.
            unsure = poorer._replace(server=shard.close(), next_job=state.next_job + 1)
            yield f"{label}, the reply is lost", on_its_way(unsure, "detach", job, gateway, attach_id)
            held_up = poorer._replace(next_job=state.next_job + 1)
            held_up = on_its_way(held_up, "enqueue", state.next_job, number, gateway, attach_id)
            yield f"{label}, the request is held up", on_its_way(held_up, "detach", job, gateway, attach_id)
            twice = on_its_way(spend(opened, "lost"), "enqueue", state.next_job, number, gateway, attach_id)
            yield f"{label} at the second try, the first is held up", twice

    def resumes(self, state: State, number: int, job: int, gateway: int, label: str) -> Iterator[Step]:
        client, attach_id = state.clients[number], self.fresh_attach_id(state)
        shard = Shard(state.server)
        found = self.attach(shard, job, gateway, client.n, client.chain, attach_id)
        if found.status != "OK":
            yield label, self.with_client(state, number, client._replace(end=LOST))
            return
        new = state._replace(server=shard.close())
        call = Call(attach_id, job, gateway, number, client.n, client.chain)
        yield label, self.catch_up(self.open(new, call), call, found.events, found.job)
        if state.budget.lost:
            unsure = on_its_way(spend(new, "lost"), "detach", job, gateway, attach_id)
            yield f"{label}, the reply is lost", unsure
            held_up = on_its_way(spend(state, "lost"), "attach", job, gateway, client.n, client.chain, attach_id)
            yield f"{label}, the request is held up", on_its_way(held_up, "detach", job, gateway, attach_id)

    # -- gateways: gateway/progress.py and gateway/stream.py

    def advance(self, call: Call, entry: Entry) -> Call:
        """Take the next event."""
        assert entry.n == call.n + 1
        if call.chain + entry.tokens != entry.chain:
            raise ResultLostError
        return call._replace(n=entry.n, chain=entry.chain)

    def judge(self, call: Call, entry: Entry) -> str:
        """What to do with an item of the reply stream."""
        if entry.kind == "S":
            return "read"
        if entry.epoch < call.epoch:
            return "read" if entry.n > call.n else "drop"
        if entry.kind in ("T", "Q"):
            return "read" if entry.n > call.n else "news"
        if entry.n <= call.n:
            return "drop"
        return "read" if entry.n > call.n + 1 else "deliver"

    def hears(self, call: Call, item: Item) -> Call:
        """A call takes an item of its gateway's reply stream."""
        verdict = self.judge(call, item.entry)
        call = call._replace(epoch=max(call.epoch, item.entry.epoch), reads=verdict == "read")
        if verdict == "deliver":
            call = self.advance(call, item.entry)
            call = call._replace(ended=item.entry.kind in FINAL)
        return call

    def update(self, state: State, call: Call) -> State:
        """Store a call, and hand its client what was delivered."""
        state = self.with_call(state, call)
        if call.client == NONE:
            return state
        client = state.clients[call.client]._replace(n=call.n, chain=call.chain)
        return self.with_client(state, call.client, client)

    def catch_up(self, state: State, call: Call, events: tuple[Entry, ...], job: Job | None) -> State:
        """Deliver what the log holds, after which the call knows the job's state."""
        assert job is not None
        call = call._replace(reads=False)
        try:
            for entry in events:
                if entry.n > call.n:
                    call = self.advance(call, entry)
        except ResultLostError:
            return self.close(self.update(state, call), call, LOST, detaches=True)
        return self.update(state, call._replace(epoch=job.epoch, ended=job.state in FINAL))

    def gateway_steps(self, state: State) -> Iterator[Step]:
        for gateway in state.gateways:
            stream = state.server.streams[gateway]
            if stream:
                yield f"gateway {gateway} hears", self.hears_all(state, gateway, stream)
                if state.budget.trims:
                    yield f"gateway {gateway}: its stream is trimmed", self._emptied(spend(state, "trims"), gateway)
        for call in state.calls:
            name = f"gateway {call.gateway}, call {call.attach_id}"
            if call.client == NONE:
                yield f"{name}: the client is gone", self.close(state, call, "", detaches=not call.ended)
            if call.ended:
                yield f"{name} finishes", self.finishes(state, call)
            elif call.reattaches:
                yield f"{name} attaches again", self.reattached(state, call)
            else:
                after = self.reconciles(state, call)
                if after != state:
                    yield f"{name} reads the log", after

    def _emptied(self, state: State, gateway: int) -> State:
        streams = (*state.server.streams[:gateway], (), *state.server.streams[gateway + 1 :])
        return state._replace(server=state.server._replace(streams=streams))

    def hears_all(self, state: State, gateway: int, stream: tuple[Item, ...]) -> State:
        """Hand everything in the reply stream to the calls of this gateway."""
        state = self._emptied(state, gateway)
        for call in state.calls:
            if call.gateway != gateway:
                continue
            try:
                now = call
                for item in stream:
                    if item.job == now.job and not (now.ended or now.reads):  # what it will read says more
                        now = self.hears(now, item)
                if now != call:
                    state = self.update(state, now)
            except ResultLostError:
                state = self.close(self.update(state, now), now, LOST, detaches=True)
        return state

    def must_reconcile(self, call: Call) -> bool:
        """Whether a call that heard nothing for a while reads the log."""
        return True

    def reconciles(self, state: State, call: Call) -> State:
        if not (call.reads or self.must_reconcile(call)):
            return state
        found = self.attach(Shard(state.server), call.job, NONE, call.n, call.chain, 0)
        if found.status != "OK":
            return self.close(state, call, LOST, detaches=True)
        assert found.job is not None
        if found.job.state in FINAL or self.is_mine(found.job, call):
            return self.catch_up(state, call, found.events, found.job)
        if found.job.gateway != NONE:
            return self.close(state, call, SUPERSEDED, detaches=False)
        return self.with_call(state, call._replace(reattaches=True))

    def is_mine(self, job: Job, call: Call) -> bool:
        return job.gateway == call.gateway

    def reattached(self, state: State, call: Call) -> State:
        """Nobody had the stream when the call looked, its gateway's lease had ended. One script later it attaches."""
        call = call._replace(reattaches=False)
        shard = Shard(state.server)
        found = self.attach(shard, call.job, call.gateway, call.n, call.chain, call.attach_id, again=True)
        if found.status == "SUPERSEDED":
            return self.close(state, call, SUPERSEDED, detaches=False)
        if found.status != "OK":
            return self.close(state, call, LOST, detaches=True)
        return self.catch_up(state._replace(server=shard.close()), call, found.events, found.job)

    def finishes(self, state: State, call: Call) -> State:
        """The last message of a stream: what is stored about the end."""
        job = self.load(Shard(state.server), call.job)
        return self.close(state, call, LOST if job is None or job.state not in FINAL else job.state, detaches=False)

    # -- what happens by itself

    def upkeep_steps(self, state: State) -> Iterator[Step]:
        budget = state.budget
        for job in state.server.jobs:
            if job.state not in LIVE:
                continue
            if budget.cancels:
                yield f"job {job.id} is cancelled", self._on_server(spend(state, "cancels"), "cancel", job.id)
            if budget.deadlines and job.late_at == NONE:
                shard = Shard(state.server)
                shard.jobs[job.id] = job._replace(late_at=len(job.log))
                passed = spend(state, "deadlines")._replace(server=shard.close())
                yield f"the deadline of job {job.id} passes", passed
            if job.late_at != NONE:
                yield f"a sweep ends job {job.id}, which is late", self._on_server(state, "sweep_late", job.id)
            if job.detached:
                yield f"a sweep ends job {job.id}, alone too long", self._on_server(state, "sweep_detached", job.id)
        alive = {worker.id for worker in state.workers}
        for worker in sorted({record.worker for record in state.server.records}):
            if worker not in alive or budget.reaps:
                poorer = spend(state, "reaps") if worker in alive else state
                yield f"worker {worker} is reaped", self._on_server(poorer, "reap", worker)
        for gateway, stream in enumerate(state.server.streams):
            is_dead = gateway not in state.gateways
            has_jobs = any(job.gateway == gateway and job.state in LIVE for job in state.server.jobs)
            if has_jobs and (is_dead or budget.lapses):
                poorer = state if is_dead else spend(state, "lapses")
                yield f"the lease of gateway {gateway} ends", self._on_server(poorer, "sweep_gateway", gateway)
            if stream is None and not is_dead:
                shard = Shard(state.server)
                shard.streams[gateway] = ()
                yield f"gateway {gateway} beats", state._replace(server=shard.close())

    def _on_server(self, state: State, script: str, *args: int) -> State:
        shard, error = Shard(state.server), ""
        try:
            getattr(self, script)(shard, *args)
        except ScriptError as failure:
            error = f"{script}: {failure}"
        return state._replace(server=shard.close(), error=error)

    def message_steps(self, state: State) -> Iterator[Step]:
        """Requests that nobody waits for arrive, in any order."""
        for message in state.messages:
            rest = state._replace(messages=tuple(other for other in state.messages if other != message))
            shard, error = Shard(state.server), ""
            try:
                self.arrives(shard, message.kind, message.args)
            except ScriptError as failure:
                error = f"{message.kind}: {failure}"
            yield f"a {message.kind} arrives late", rest._replace(server=shard.close(), error=error)

    def arrives(self, shard: Shard, kind: str, args: tuple[object, ...]) -> None:
        if kind == "commit":
            worker, sent = args
            assert isinstance(worker, int)
            assert isinstance(sent, Commit)
            self.commit(shard, worker, sent.events, sent.rest)
        else:
            getattr(self, kind)(shard, *args)

    drops_spent_messages = True  # a mutant that acts on what is spent says False

    def without_spent_messages(self, state: State) -> State:
        """Leave out requests that can change nothing any more, however late they arrive: there would be many."""
        if not self.drops_spent_messages or state.replica is not None or state.error:
            return state
        jobs = {job.id: job for job in state.server.jobs}
        is_over = all(job.state in FINAL for job in jobs.values()) and len(jobs) == self.config.num_clients
        kept = tuple(one for one in state.messages if not (is_over or self.is_spent(one, jobs, state.messages)))
        return state if len(kept) == len(state.messages) else state._replace(messages=kept)

    def is_spent(self, message: Message, jobs: Mapping[int, Job], messages: tuple[Message, ...]) -> bool:
        if message.kind == "commit":
            sent = message.args[1]
            assert isinstance(sent, Commit)
            return all(event.job in jobs and jobs[event.job].epoch > event.epoch for event in sent.events)
        if message.kind in ("detach", "attach"):
            job_id, attach_id = message.args[0], message.args[-1]
            assert isinstance(job_id, int)
            assert isinstance(attach_id, int)
            if job_id not in jobs:
                return False
            may_attach = any(one.args[-1] == attach_id for one in messages if one.kind in ("attach", "enqueue"))
            return jobs[job_id].state in FINAL or not (may_attach or self.has_stream(jobs[job_id], attach_id))
        return message.kind == "enqueue" and message.args[0] in jobs

    def server_faults(self, state: State) -> Iterator[Step]:
        budget = state.budget
        if budget.gateway_crashes:
            for slot, gateway in enumerate(state.gateways):
                if any(call.gateway == gateway for call in state.calls):
                    yield f"gateway {gateway} crashes", self._gateway_crashed(spend(state, "gateway_crashes"), slot)
        if budget.restarts and state.messages:
            yield "the server restarts", spend(state, "restarts")._replace(messages=())
        if budget.forgets:
            for last in state.server.last_claims:
                kept = tuple(other for other in state.server.last_claims if other != last)
                server = state.server._replace(last_claims=kept)
                yield (
                    f"the last claim of worker {last.worker} is forgotten",
                    spend(state, "forgets")._replace(server=server),
                )
        if budget.failovers and state.next_job:
            if state.replica is None:
                yield "a replica falls behind", state._replace(replica=state.server)
            elif state.replica != state.server:
                yield "the replica is promoted", self._promoted(spend(state, "failovers"))

    def _gateway_crashed(self, state: State, slot: int) -> State:
        dead = state.gateways[slot]
        for call in state.calls:
            if call.gateway == dead:
                state = self.close(state, call, "", detaches=False)
        new = len(state.server.streams)
        streams = tuple(None if number == dead else stream for number, stream in enumerate(state.server.streams))
        server = state.server._replace(streams=(*streams, ()))
        replica = state.replica
        if replica is not None:
            replica = replica._replace(streams=(*replica.streams, None))
        gateways = tuple(new if number == slot else gateway for number, gateway in enumerate(state.gateways))
        return state._replace(server=server, replica=replica, gateways=gateways)

    def _promoted(self, state: State) -> State:
        assert state.replica is not None
        past = tuple((job.id, job.state, job.chain) for job in state.server.jobs)
        return state._replace(server=state.replica, replica=None, history=state.history + 1, past=past)


def tells_all_ends(state: State) -> bool:
    """Whether every client has learnt the end."""
    return all(client.end for client in state.clients)
