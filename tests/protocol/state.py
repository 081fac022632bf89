"""States of the protocol's model: what the server stores, what each process holds in memory, what is on its way.

Everything is an immutable tuple, so that states compare and hash by value. Ids of workers, gateways and generations are
small integers, -1 is none. The chain hash of an event is modelled by what it stands for: the tuple of all tokens up to
that event. Two hashes are equal exactly when the contents are.
"""

from __future__ import annotations

from typing import NamedTuple

NONE = -1
LIVE = frozenset("QR")
FINAL = frozenset("DFCE")
LOST = "LOST"  # what a client is told instead of an end: RESULT_LOST, or NOT_FOUND, after a failover
SUPERSEDED = "SUPERSEDED"

_OUTPUTS, _POSITIONS, _EPOCHS = 4, 16, 64

Chain = tuple[int, ...]


def token(history: int, epoch: int, output: int, index: int) -> int:
    """The token that a worker computes at a position of an output. Whoever computes it anew gets another one: after a
    takeover (another epoch) and after a failover (another history) equal tokens would hide that two outputs are mixed.
    """
    return ((history * _EPOCHS + epoch) * _OUTPUTS + output) * _POSITIONS + index


def position_of(one: int) -> tuple[int, int]:
    """Output and index of a token."""
    return one // _POSITIONS % _OUTPUTS, one % _POSITIONS


def epoch_of_token(one: int) -> int:
    """The epoch of the worker that computed a token."""
    return one // (_POSITIONS * _OUTPUTS) % _EPOCHS


class Entry(NamedTuple):
    """An entry of a log; its id is (epoch, n). In a reply stream also with kinds Q and S."""

    epoch: int
    n: int  # events up to here
    kind: str  # "" event; T a worker began; D F C E the end
    chain: Chain
    num_tokens: int  # of the chain, those of this entry

    @property
    def tokens(self) -> Chain:
        return self.chain[len(self.chain) - self.num_tokens :]


class Job(NamedTuple):
    """The hash of a job. While it runs, `n` is that of its claim: the run record has the current one."""

    id: int
    key: int  # idempotency key: the client that made it
    state: str = "Q"
    epoch: int = 0
    n: int = 0
    epochs: tuple[tuple[int, int], ...] = ()  # (epoch, events before it) of each epoch that wrote
    worker: int = NONE
    gateway: int = NONE
    attach_id: int = 0
    attempts: int = 0  # fruitless ones in a row
    claims: int = 0
    progress: bool = False  # of the current epoch; only in a loaded job
    log: tuple[Entry, ...] = ()
    detached: bool = False  # its disconnect grace runs
    late_at: int = NONE  # the deadline passed when the log had so many entries
    attached_at: int = 0  # events when another gateway got the stream; for a law only

    @property
    def chain(self) -> Chain:
        return self.log[-1].chain if self.log else ()

    @property
    def events(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.log if entry.kind != "T")


class Record(NamedTuple):
    """A run record: the place of a running job in its worker's hash."""

    worker: int
    job: int
    epoch: int
    n: int
    progress: bool
    gateway: int


class Item(NamedTuple):
    """One item of a reply stream."""

    job: int
    entry: Entry


class LastClaim(NamedTuple):
    """What the server remembers of a worker's last claim, to answer a repeat."""

    worker: int
    call: int
    jobs: tuple[int, ...]


class Server(NamedTuple):
    """All keys of a shard."""

    jobs: tuple[Job, ...] = ()
    queue: tuple[int, ...] = ()
    records: tuple[Record, ...] = ()
    last_claims: tuple[LastClaim, ...] = ()
    streams: tuple[tuple[Item, ...] | None, ...] = ((), ())  # by gateway; None: does not exist


class Event(NamedTuple):
    """An event in a commit, and where the worker believes that the log stands."""

    job: int
    epoch: int
    n_before: int
    chain: Chain
    num_tokens: int
    kind: str
    progress: bool

    @property
    def n(self) -> int:
        return self.n_before + 1


class Computed(NamedTuple):
    """What the engine computed while a commit's outcome was unknown, to be committed later if the epoch still holds."""

    job: int
    epoch: int
    tokens: Chain
    kind: str


class Held(NamedTuple):
    """A job as its worker knows it: up to where it is committed, and everything that the engine has computed."""

    job: int
    epoch: int
    n: int
    chain: Chain
    progress: bool
    computed: Chain


class Commit(NamedTuple):
    """Arguments of a commit."""

    events: tuple[Event, ...]
    rest: tuple[tuple[int, int], ...]  # (job, epoch) of what else is held


class Worker(NamedTuple):
    """A worker incarnation's memory."""

    id: int
    held: tuple[Held, ...] = ()
    pending: Commit | None = None  # sent, outcome unknown
    backlog: tuple[Computed, ...] = ()
    call: int = NONE  # claim sent, outcome unknown


class Call(NamedTuple):
    """A stream of a generation at a gateway. `client` -1: its client is gone, which the gateway may not know yet."""

    attach_id: int
    job: int
    gateway: int
    client: int
    n: int = 0
    chain: Chain = ()
    epoch: int = 0
    reads: bool = False  # it must read the log next
    reattaches: bool = False  # it has read that nobody has the stream
    ended: bool = False  # everything was delivered


class Client(NamedTuple):
    """What a client has received, and what it was told in the end."""

    job: int = NONE
    n: int = 0
    chain: Chain = ()
    call: int = NONE  # attach id
    end: str = ""
    superseded: bool = False  # it was told that another call has its stream, although it is alone


class Message(NamedTuple):
    """A request on its way, whose reply nobody waits for any more."""

    kind: str
    args: tuple[object, ...]


class Budget(NamedTuple):
    """How often each fault, and each thing that need not happen, may still happen."""

    drops: int = 0
    worker_crashes: int = 0
    gateway_crashes: int = 0
    lost: int = 0  # replies or requests lost; a lost request may arrive late
    trims: int = 0
    lapses: int = 0  # the lease of a living gateway ends
    restarts: int = 0
    failovers: int = 0
    reaps: int = 0
    cancels: int = 0
    deadlines: int = 0
    releases: int = 0
    empties: int = 0  # events without tokens
    failures: int = 0  # a worker gives a job up
    backlogs: int = 0
    forgets: int = 0  # the server forgets a worker's last claim call


class State(NamedTuple):
    """Everything."""

    server: Server
    workers: tuple[Worker, ...]
    gateways: tuple[int, ...]  # living incarnations
    calls: tuple[Call, ...]
    clients: tuple[Client, ...]
    messages: tuple[Message, ...]
    budget: Budget
    next_job: int = 0
    replica: Server | None = None  # what a replica has, that may be promoted
    history: int = 0  # failovers so far
    past: tuple[tuple[int, str, Chain], ...] = ()  # jobs as they were before the failover: id, state, tokens
    error: str = ""  # a script failed on the server
