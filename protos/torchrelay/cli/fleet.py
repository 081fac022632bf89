"""`torchrelay queue` and `torchrelay drain`: what waits, and workers that are to leave."""

from __future__ import annotations

from typing import Annotated

import grpc
import typer

from torchrelay.admin.v1beta1 import fleet_pb2, fleet_pb2_grpc
from torchrelay.cli import connection as at
from torchrelay.cli import output
from torchrelay.cli.admin import AdminKeyOption, admin_channel
from torchrelay.cli.fleet_stream import first, follow, request_of
from torchrelay.cli.fleet_view import QUEUE_COLUMNS, queue_rows

_ID_LENGTH = 26
_MIN_PREFIX = 6


def queue(
    model: Annotated[str, typer.Option("--model", "-m", help="Only this model's.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per model on stdout.")] = False,
    admin_address: at.AdminAddressOption = at.DEFAULT_ADMIN_ADDRESS,
    admin_key: AdminKeyOption = None,
    tls_ca: at.TlsCaOption = "",
    tls_cert: at.TlsCertOption = "",
    tls_key: at.TlsKeyOption = "",
) -> None:
    """Show what waits, by model, priority and tenant: how much, and for how long."""
    with admin_channel(admin_address, admin_key, at.tls_of(tls_ca, tls_cert, tls_key)) as channel:
        snapshot = first(channel, model)
    if as_json:
        for one in snapshot.models:
            output.print_json(one)
    else:
        output.print_table(QUEUE_COLUMNS, queue_rows(snapshot))


def drain(
    worker_id: Annotated[
        str, typer.Argument(help=f"A worker's id, or at least {_MIN_PREFIX} characters that it alone begins with.")
    ] = "",
    model: Annotated[str, typer.Option("--model", "-m", help="All workers of this model instead.")] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Until they have left.")] = False,
    as_json: at.JsonOption = False,
    admin_address: at.AdminAddressOption = at.DEFAULT_ADMIN_ADDRESS,
    admin_key: AdminKeyOption = None,
    tls_ca: at.TlsCaOption = "",
    tls_cert: at.TlsCertOption = "",
    tls_key: at.TlsKeyOption = "",
) -> None:
    """Have workers take nothing new, finish or give back what they have, and end."""
    if bool(worker_id) == bool(model):
        raise typer.BadParameter("give a worker's id or --model", param_hint="WORKER_ID")
    with admin_channel(admin_address, admin_key, at.tls_of(tls_ca, tls_cert, tls_key)) as channel:
        stub = fleet_pb2_grpc.FleetServiceStub(channel)
        whole_id = _whole_id(stub, worker_id) if worker_id else ""
        request = fleet_pb2.DrainWorkerRequest(worker_id=whole_id, model=model)
        workers = {worker.worker_id: worker for worker in stub.DrainWorker(request).workers}
        for worker in workers.values():
            _tell(worker, "asked", as_json=as_json)
        if not workers:
            output.stderr.print("no worker is alive")
        if wait and workers:
            _wait(channel, workers, as_json=as_json)


def _whole_id(stub: fleet_pb2_grpc.FleetServiceStub, given: str) -> str:
    """Return the id of the live worker that begins so. Raises BadParameter if there is none, or more than one."""
    if len(given) == _ID_LENGTH:
        return given
    if len(given) < _MIN_PREFIX:
        raise typer.BadParameter(f"give at least {_MIN_PREFIX} characters", param_hint="WORKER_ID")
    found = [
        worker.worker_id
        for worker in stub.ListWorkers(fleet_pb2.ListWorkersRequest()).workers
        if worker.worker_id.startswith(given)
    ]
    if len(found) != 1:
        what = "no live worker's id begins" if not found else f"{len(found)} workers' ids begin"
        hint = "`torchrelay ps --workers` lists them"
        raise typer.BadParameter(f"{what} with {given}; {hint}", param_hint="WORKER_ID")
    return found[0]


def _wait(channel: grpc.Channel, workers: dict[str, fleet_pb2.Worker], *, as_json: bool) -> None:
    """Until none of them is alive any more; also while a gateway is away."""
    left = dict(workers)
    for update in follow(channel, request_of("", 1.0)):
        if update.snapshot is None:
            output.stderr.print(update.note, soft_wrap=True)
            continue
        alive = {worker.worker_id for worker in update.snapshot.workers}
        for worker_id in [worker_id for worker_id in left if worker_id not in alive]:
            _tell(left.pop(worker_id), "gone", as_json=as_json)
        if not left:
            return


def _tell(worker: fleet_pb2.Worker, state: str, *, as_json: bool) -> None:
    if as_json:
        output.print_json({"worker_id": worker.worker_id, "model": worker.model, "state": state})
    else:
        output.write(f"{worker.worker_id} {worker.model} {state}\n")
