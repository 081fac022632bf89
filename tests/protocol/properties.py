"""The laws I1 to I9 of the protocol, and a few that belong to them, each on one state of the model.

After a failover that lost the end of the history, what a client saw may not be stored any more: I4 to I6 and I9 then
ask only that nobody is ever given a mixture of two outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final

from tests.protocol.model import Config
from tests.protocol.state import (
    FINAL,
    LIVE,
    LOST,
    NONE,
    Chain,
    Job,
    Server,
    State,
    epoch_of_token,
    position_of,
)


def stored_n(server: Server, job: Job) -> int:
    """Events of a job, as its run record or its hash says."""
    for record in server.records:
        if job.state == "R" and (record.worker, record.job) == (job.worker, job.id):
            return record.n
    return job.n


def i1_one_terminal_and_nothing_after_it(server: Server, _: Config) -> str | None:
    for job in server.jobs:
        ends = [number for number, entry in enumerate(job.log, 1) if entry.kind in FINAL]
        if ends != ([len(job.log)] if job.state in FINAL else []):
            return f"job {job.id} in state {job.state} has ends at {ends} of {len(job.log)}"
        if ends and job.log[-1].kind != job.state:
            return f"job {job.id} in state {job.state} ends with {job.log[-1].kind}"
    return None


def i2_events_and_tokens_are_numbered_without_gap(server: Server, config: Config) -> str | None:
    for job in server.jobs:
        events = job.events
        if [entry.n for entry in events] != list(range(1, len(events) + 1)):
            return f"events of job {job.id} are {[entry.n for entry in events]}"
        if stored_n(server, job) != len(events):
            return f"job {job.id} has {len(events)} events, stored {stored_n(server, job)}"
        counts = [0] * config.num_outputs
        for entry in events:
            for one in entry.tokens:
                output, index = position_of(one)
                if counts[output] != index:
                    return f"output {output} of job {job.id} has token {index} where {counts[output]} is next"
                counts[output] += 1
    return None


def i3_only_the_holder_of_the_epoch_appends(server: Server, _: Config) -> str | None:
    for job in server.jobs:
        held: set[int] = set()
        last = 0
        for entry in job.log:
            if entry.epoch < last:
                return f"epochs of job {job.id} go back"
            last = entry.epoch
            if entry.kind == "T":
                if entry.epoch in held:
                    return f"epoch {entry.epoch} of job {job.id} is held twice"
                held.add(entry.epoch)
            elif entry.kind in ("", "D") and entry.epoch not in held:
                return f"an event of job {job.id} is of epoch {entry.epoch}, which nobody held"
            elif entry.kind in ("C", "E") and entry.epoch in held:
                return f"job {job.id} was ended from outside in its holder's epoch {entry.epoch}"
            if any(epoch_of_token(one) != entry.epoch for one in entry.tokens):
                return f"an event of job {job.id} in epoch {entry.epoch} was computed in another"
        if job.state == "Q" and job.log and job.epoch <= last:
            return f"queued job {job.id} is at epoch {job.epoch}, which its last holder had"
        events = job.events
        if len(events) > stored_n(server, job) and (job.state == "Q" or events[-1].epoch != job.epoch):
            return f"an event of epoch {events[-1].epoch} was appended to job {job.id}, which is at {job.epoch}"
        if job.epoch < last:
            return f"job {job.id} is at epoch {job.epoch}, its log at {last}"
    return None


def i4_a_client_sees_a_prefix_of_the_log(state: State, _: Config) -> str | None:
    """After a failover also of the log as it was before; then too, all that it has is of one output."""
    for number, client in enumerate(state.clients):
        if client.job == NONE:
            continue
        events = next((job.events for job in state.server.jobs if job.id == client.job), ())
        chains = [entry.chain for entry in events]
        before = [chain for past_id, _, chain in state.past if past_id == client.job]
        is_whole = any(client.chain == chain[: len(client.chain)] for chain in before) or client.chain in ((), *chains)
        if not is_whole:
            histories = " or ".join(map(_told, [*chains[-1:], *before]))
            return f"client {number} has {_told(client.chain)}, the log {histories}"
        if not state.history and client.n and (client.n > len(chains) or chains[client.n - 1] != client.chain):
            return f"client {number} is at event {client.n} with {_told(client.chain)}"
    return None


def _told(chain: Chain) -> str:
    return "[" + " ".join("{}.{}".format(*position_of(one)) + f"@{epoch_of_token(one)}" for one in chain) + "]"


def i5_the_end_comes_after_all_tokens(state: State, _: Config) -> str | None:
    for number, client in enumerate(state.clients):
        if client.end in FINAL:
            whole = [(job.state, job.chain) for job in state.server.jobs if job.id == client.job]
            whole += [(past, chain) for past_id, past, chain in state.past if past_id == client.job]
            if client.chain not in [chain for ending, chain in whole if ending in FINAL]:
                return f"client {number} was told {client.end} with {_told(client.chain)} of {whole}"
            events = next((job.events for job in state.server.jobs if job.id == client.job), ())
            if not state.history and client.n != len(events):
                return f"client {number} was told {client.end} after {client.n} of {len(events)} events"
    return None


def i6_the_client_is_told_the_stored_end(state: State, _: Config) -> str | None:
    for number, client in enumerate(state.clients):
        if client.end in FINAL:
            stored = [job.state for job in state.server.jobs if job.id == client.job]
            stored += [past for past_id, past, _ in state.past if past_id == client.job]
            if client.end not in stored:
                return f"client {number} was told {client.end}, stored is {stored}"
    return None


def i7_attempts_are_bounded(server: Server, config: Config) -> str | None:
    for job in server.jobs:
        fruitless = 0  # epochs that were held and brought nothing, in a row
        for (epoch, _), (following, _) in zip(job.epochs, job.epochs[1:], strict=False):
            brought = any(entry.epoch == epoch and entry.kind != "T" for entry in job.log)
            fruitless = 0 if brought else fruitless + (following > epoch)
        if fruitless > config.max_attempts and not config.budget.releases:  # which do not count
            return f"job {job.id} was begun {fruitless} times in a row for nothing"
        if job.attempts > config.max_attempts or job.claims > config.max_claims:
            return f"job {job.id} has {job.attempts} attempts, {job.claims} claims"
        if job.epoch > 2 * config.max_claims + 1:
            return f"job {job.id} is at epoch {job.epoch}"
    return None


def i8_a_job_is_in_exactly_one_place(server: Server, _: Config) -> str | None:
    for job in server.jobs:
        queued = server.queue.count(job.id)
        holders = [record for record in server.records if record.job == job.id]
        if queued != (job.state == "Q"):
            return f"job {job.id} in state {job.state} is queued {queued} times"
        if [record.worker for record in holders] != ([job.worker] if job.state == "R" else []):
            return f"job {job.id} in state {job.state} of worker {job.worker} is with {holders}"
        if holders and (holders[0].epoch, holders[0].gateway) != (job.epoch, job.gateway):
            return f"the run record of job {job.id} has another epoch or gateway than the job"
        if job.detached != (job.state in LIVE and job.gateway == NONE):
            return f"the grace of job {job.id} does not run as it should"
    if any(record.job not in {job.id for job in server.jobs} for record in server.records):
        return "a worker has a job that does not exist"
    return None


def i8_events_go_to_the_call_that_attached_last(state: State, config: Config) -> str | None:
    """A client's stream is fed: unless another call or the end of a lease took it away, its gateway has the job.

    An attach that was held up may take it away for a call that is over; so this asks nothing once a request was lost.
    """
    if state.history or state.budget.lost != config.budget.lost or config.num_rivals:
        return None
    may_lapse = state.budget.lapses != config.budget.lapses or len(state.server.streams) > config.num_gateways
    for call in state.calls:
        job = next((job for job in state.server.jobs if job.id == call.job), None)
        if (
            call.client == NONE
            or job is None
            or job.state not in LIVE
            or any(other.job == job.id for other in state.calls if other != call)
        ):
            continue
        if job.gateway != call.gateway and not may_lapse:
            return f"events of job {job.id} go to gateway {job.gateway}, its only call is at {call.gateway}"
    return None


def i4_a_superseded_stream_gets_nothing_more(state: State, config: Config) -> str | None:
    for call in state.calls:
        for job in state.server.jobs:
            has_other = job.id == call.job and job.state in LIVE and job.gateway not in (call.gateway, NONE)
            if has_other and config.num_rivals and call.n > job.attached_at:
                return f"call {call.attach_id} has {call.n} events, another one attached after {job.attached_at}"
    return None


def i9_nothing_acknowledged_is_lost(state: State, config: Config) -> str | None:
    for number, client in enumerate(state.clients):
        if not state.history:
            if client.superseded and state.budget.lost == config.budget.lost:
                return f"client {number}, who is alone, was told that another has its stream"
            if client.end == LOST:
                return f"client {number} is told that its result is lost"
            if client.job != NONE and client.job not in {job.id for job in state.server.jobs}:
                return f"the generation of client {number} does not exist"
            if state.server.jobs and sum(job.key == number for job in state.server.jobs) > 1:
                return f"client {number} has two generations of one idempotency key"
    return None


def i10_an_expired_job_is_never_handed_out(server: Server, _: Config) -> str | None:
    for job in server.jobs:
        if job.late_at != NONE and any(entry.kind == "T" for entry in job.log[job.late_at :]):
            return f"job {job.id} was handed out after its deadline"
    return None


def no_script_fails_halfway(state: State, _: Config) -> str | None:
    return state.error or None


SERVER_LAWS: Final[Mapping[str, Callable[[Server, Config], str | None]]] = {
    "I1": i1_one_terminal_and_nothing_after_it,
    "I3": i3_only_the_holder_of_the_epoch_appends,
    "I2": i2_events_and_tokens_are_numbered_without_gap,
    "I7": i7_attempts_are_bounded,
    "I8": i8_a_job_is_in_exactly_one_place,
    "I10": i10_an_expired_job_is_never_handed_out,
}
LAWS: Final[Mapping[str, Callable[[State, Config], str | None]]] = {
    "no script fails halfway": no_script_fails_halfway,
    "I4": i4_a_client_sees_a_prefix_of_the_log,
    "I5": i5_the_end_comes_after_all_tokens,
    "I6": i6_the_client_is_told_the_stored_end,
    "I4 (superseded)": i4_a_superseded_stream_gets_nothing_more,
    "I8 (events)": i8_events_go_to_the_call_that_attached_last,
    "I9": i9_nothing_acknowledged_is_lost,
}
Broken = tuple[str, str] | None


@lru_cache(maxsize=1 << 16)
def _broken_on_server(server: Server, config: Config) -> Broken:
    """What is stored changes in one of five steps only, so most states share it with others."""
    for name, law in SERVER_LAWS.items():
        detail = law(server, config)
        if detail is not None:
            return name, detail
    return None


def broken(state: State, config: Config) -> Broken:
    """The first law that a state breaks, and how."""
    for name, law in LAWS.items():
        detail = law(state, config)
        if detail is not None:
            return name, detail
    return _broken_on_server(state.server, config)
