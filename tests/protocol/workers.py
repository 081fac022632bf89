"""What workers do, step by step: common/job_claims.py, and the parts of worker/agent.py that decide what comes next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations, product

from tests.protocol.scripts import ScriptError, Scripts, Shard
from tests.protocol.state import NONE, Commit, Computed, Event, Held, Job, Message, State, Worker, position_of, token

Step = tuple[str, State]


def spend(state: State, fault: str) -> State:
    """Take one from a budget."""
    budget = state.budget
    return state._replace(budget=budget._replace(**{fault: getattr(budget, fault) - 1}))


def on_its_way(state: State, kind: str, *args: object) -> State:
    """Add a request whose reply nobody waits for; a second, equal one makes no difference."""
    message = Message(kind, args)
    if message in state.messages:
        return state
    return state._replace(messages=tuple(sorted((*state.messages, message), key=repr)))


class Workers(Scripts):
    """Transitions of the workers."""

    def __init__(
        self, *, length: int, num_outputs: int = 1, max_attempts: int = 2, max_claims: int = 3, has_grace: bool = True
    ) -> None:
        """`length` is the number of tokens of each output."""
        super().__init__(max_attempts=max_attempts, max_claims=max_claims, has_grace=has_grace)
        self.length = length
        self.num_outputs = num_outputs

    def put(self, state: State, shard: Shard, slot: int, worker: Worker) -> State:
        """The state with the server's keys and one worker's memory replaced."""
        workers = (*state.workers[:slot], worker, *state.workers[slot + 1 :])
        return state._replace(server=shard.close(), workers=workers)

    def worker_steps(self, state: State) -> Iterator[Step]:
        has_blank = False
        for slot, worker in enumerate(state.workers):
            if self.is_blank(state, worker):  # workers that nobody knows anything of are alike: one needs to begin
                if has_blank:
                    continue
                has_blank = True
            name = f"worker {worker.id}"
            if worker.pending is None:
                yield from self.claims(state, slot, worker, name)
                yield from self.commits(state, slot, worker, name)
            else:
                yield from self.sends(state, slot, worker, f"{name} repeats its commit")
                if state.budget.backlogs and not worker.backlog:
                    yield from self.computes(state, slot, worker, name)
            yield from self.others(state, slot, worker, name)

    def is_blank(self, state: State, worker: Worker) -> bool:
        if worker != Worker(worker.id):
            return False
        servers = [state.server] if state.replica is None else [state.server, state.replica]
        return not (
            any(record.worker == worker.id for server in servers for record in server.records)
            or any(last.worker == worker.id for server in servers for last in server.last_claims)
            or any(message.args[0] == worker.id for message in state.messages if message.kind in ("claim", "commit"))
        )

    # -- claim

    def claims(self, state: State, slot: int, worker: Worker, name: str) -> Iterator[Step]:
        if state.server.queue or worker.call != NONE:
            call = worker.call if worker.call != NONE else self._fresh_call(state, worker.id)
            most = {1, max(1, len(state.server.queue))}
            for max_jobs in sorted(most):
                shard = Shard(state.server)
                jobs = self.claim(shard, worker.id, call, max_jobs)
                yield f"{name} claims {max_jobs}", self.put(state, shard, slot, self.adopt(worker, jobs))
                if state.budget.lost:
                    poorer = spend(state, "lost")
                    unsure = worker._replace(call=call)
                    yield f"{name} claims {max_jobs}, the reply is lost", self.put(poorer, shard, slot, unsure)
                    asked = self.put(poorer, Shard(state.server), slot, unsure)
                    asked = on_its_way(asked, "claim", worker.id, call, max_jobs)
                    yield f"{name} claims {max_jobs}, the request is held up", asked
        known = {held.job for held in worker.held}
        if any(record.worker == worker.id and record.job not in known for record in state.server.records):
            shard = Shard(state.server)
            jobs = self.owned(shard, worker.id, known)
            yield f"{name} adopts", self.put(state, shard, slot, self.adopt(worker, jobs)._replace(call=worker.call))

    def _fresh_call(self, state: State, worker_id: int) -> int:
        """A claim's call id: random in life, here the smallest that nobody remembers."""
        servers = [state.server] if state.replica is None else [state.server, state.replica]
        used = {last.call for server in servers for last in server.last_claims if last.worker == worker_id}
        asked: set[object] = {message.args[1] for message in state.messages if message.kind == "claim"}
        return next(call for call in range(len(used) + len(asked) + 1) if call not in used | asked)

    def adopt(self, worker: Worker, jobs: Iterable[Job]) -> Worker:
        held = {one.job: one for one in worker.held}
        for job in jobs:
            if job.id not in held or held[job.id].epoch < job.epoch:
                held[job.id] = Held(job.id, job.epoch, job.n, job.chain, job.progress, job.chain)
        return worker._replace(held=tuple(sorted(held.values())), call=NONE)

    # -- commit

    def next_tokens(self, held: Held, state: State) -> Iterator[tuple[tuple[int, ...], str]]:
        """What one engine step may produce for a job: tokens, and how it ends the job."""
        counts = [0] * self.num_outputs
        for one in held.computed:
            counts[position_of(one)[0]] += 1
        going = [output for output in range(self.num_outputs) if counts[output] < self.length]
        for number in range(1, len(going) + 1):
            for outputs in combinations(going, number):
                tokens = tuple(token(state.history, held.epoch, output, counts[output]) for output in outputs)
                yield tokens, "D" if sum(counts) + number == self.num_outputs * self.length else ""
        if not going:  # nothing is missing but the end: it was taken over, or its last step brought no token
            yield (), "D"

    def commits(self, state: State, slot: int, worker: Worker, name: str) -> Iterator[Step]:
        if worker.backlog:
            events = tuple(self._later(worker))
            spent = worker._replace(backlog=())
            if events or spent.held:
                yield from self.sends(state, slot, self.prepare(spent, events), f"{name} commits what had waited")
            return
        for number in range(1, len(worker.held) + 1):
            for chosen in combinations(worker.held, number):
                for steps in product(*(tuple(self.next_tokens(held, state)) for held in chosen)):
                    events = tuple(self._event(held, *step) for held, step in zip(chosen, steps, strict=True))
                    label = f"{name} commits {_told(events)}"
                    yield from self.sends(state, slot, self.prepare(worker, events), label)
        for held in worker.held:
            for kind, what in (("", "empties"), ("F", "failures")):
                if getattr(state.budget, what):
                    event = self._event(held, (), kind)._replace(progress=held.progress)
                    label = f"{name} commits {_told((event,))}"
                    yield from self.sends(spend(state, what), slot, self.prepare(worker, (event,)), label)

    def _event(self, held: Held, tokens: tuple[int, ...], kind: str) -> Event:
        return Event(held.job, held.epoch, held.n, held.chain + tokens, len(tokens), kind, progress=True)

    def fits_epoch(self, held: Held, computed: Computed) -> bool:
        """Whether what was computed belongs to the claim that is held now."""
        return held.epoch == computed.epoch

    def _later(self, worker: Worker) -> Iterator[Event]:
        held = {one.job: one for one in worker.held}
        for computed in worker.backlog:
            if computed.job in held and self.fits_epoch(held[computed.job], computed):
                yield self._event(held[computed.job], computed.tokens, computed.kind)

    def prepare(self, worker: Worker, events: tuple[Event, ...]) -> Worker:
        named = {event.job: event for event in events}
        rest = tuple((held.job, held.epoch) for held in worker.held if held.job not in named)
        held = tuple(one._replace(computed=named[one.job].chain) if one.job in named else one for one in worker.held)
        return worker._replace(held=held, pending=Commit(events, rest))

    def sends(self, state: State, slot: int, worker: Worker, label: str) -> Iterator[Step]:
        """Send the pending commit: it works, or its reply is lost, or it is lost and may arrive late."""
        assert worker.pending is not None
        shard = Shard(state.server)
        try:
            lost = self.commit(shard, worker.id, worker.pending.events, worker.pending.rest)
        except ScriptError as error:
            yield label, self.put(state, shard, slot, worker)._replace(error=f"commit: {error}")
            return
        yield label, self.put(state, shard, slot, self.learn(worker, lost))
        if state.budget.lost:
            poorer = spend(state, "lost")
            yield f"{label}, the reply is lost", self.put(poorer, shard, slot, worker)
            asked = self.put(poorer, Shard(state.server), slot, worker)
            yield f"{label}, the request is held up", on_its_way(asked, "commit", worker.id, worker.pending)

    def learn(self, worker: Worker, lost: frozenset[int]) -> Worker:
        """Take note of a commit's reply."""
        assert worker.pending is not None
        events = {event.job: event for event in worker.pending.events}
        held = []
        for one in worker.held:
            event = events.get(one.job)
            if one.job in lost or (event is not None and event.kind != ""):
                continue
            if event is None:
                held.append(one)
            else:
                progress = one.progress or event.progress
                held.append(Held(one.job, event.epoch, event.n, event.chain, progress, one.computed))
        return worker._replace(held=tuple(held), pending=None)

    def computes(self, state: State, slot: int, worker: Worker, name: str) -> Iterator[Step]:
        """The engine goes one step on while a commit's outcome is unknown."""
        assert worker.pending is not None
        ended = {event.job for event in worker.pending.events if event.kind != ""}
        for held in worker.held:
            if held.job not in ended:
                for tokens, kind in self.next_tokens(held, state):
                    waiting = worker._replace(
                        held=tuple(
                            one._replace(computed=one.computed + tokens) if one == held else one for one in worker.held
                        ),
                        backlog=(Computed(held.job, held.epoch, tokens, kind),),
                    )
                    poorer = spend(state, "backlogs")
                    yield f"{name} computes on job {held.job}", self.put(poorer, Shard(state.server), slot, waiting)

    # -- the rest

    def others(self, state: State, slot: int, worker: Worker, name: str) -> Iterator[Step]:
        held = [(one.job, one.epoch) for one in worker.held]
        lost = self.lost(Shard(state.server), worker.id, held) if held else ()
        if lost:
            kept = worker._replace(held=tuple(one for one in worker.held if one.job not in lost))
            yield f"{name} beats and learns what it lost", self.put(state, Shard(state.server), slot, kept)
        if state.budget.releases and held and worker.pending is None:
            shard = Shard(state.server)
            self.release(shard, worker.id, held)
            poorer = spend(state, "releases")
            yield f"{name} gives back", self.put(poorer, shard, slot, worker._replace(held=(), backlog=()))
            if state.budget.lost:
                yield f"{name} gives back, the reply is lost", self.put(spend(poorer, "lost"), shard, slot, worker)
        if state.budget.worker_crashes and worker != Worker(worker.id):
            new = Worker(worker.id + len(state.workers))
            yield f"{name} crashes", self.put(spend(state, "worker_crashes"), Shard(state.server), slot, new)


def _told(events: tuple[Event, ...]) -> str:
    parts = []
    for event in events:
        positions = ",".join("{}.{}".format(*position_of(one)) for one in event.chain[-event.num_tokens :])
        what = f"tokens {positions}" if event.num_tokens else "no token"
        parts.append(f"job {event.job}: {what}{' and ' + event.kind if event.kind else ''}")
    return "; ".join(parts)
