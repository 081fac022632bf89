"""`torchrelay models`, `ps`, `cancel`, `erase`: what there is, and its end."""

from __future__ import annotations

from datetime import UTC
from typing import Annotated

import typer

from torchrelay.admin.v1beta1 import fleet_pb2, fleet_pb2_grpc
from torchrelay.cli import connection as at
from torchrelay.cli import output
from torchrelay.cli.admin import AdminKeyOption, admin_channel
from torchrelay.v1 import generation_pb2, model_pb2

_MODEL_COLUMNS = (
    "NAME",
    "STATE",
    "WORKERS",
    "QUEUED",
    "CONTEXT",
    "DTYPE",
    "WEIGHTS",
    "SIZE",
    "ATTENTION",
    "ADAPTERS",
    "REVISION",
)

models = typer.Typer(no_args_is_help=True, help="The models that are served.")


@models.command("list")
@at.connected
def list_models(
    as_json: at.JsonOption = False,
    *,
    connection: at.Connection,
) -> None:
    """List the models that you may use."""
    with output.explained_errors(connection.address), connection.client() as client:
        found = client.models()
    if as_json:
        for model in found:
            output.print_json(model)
        return
    rows = [
        (
            model.name,
            model_pb2.ModelState.Name(model.state).removeprefix("MODEL_STATE_").lower(),
            model.num_workers,
            model.num_queued,
            model.context_length,
            model.dtype,
            model.weight_format or "-",
            output.size(model.weight_bytes),
            model.attention_backend or "-",
            ", ".join(adapter.name for adapter in model.adapters) or "-",
            model.revision[:12],
        )
        for model in found
    ]
    output.print_table(_MODEL_COLUMNS, rows)


@models.command("show")
@at.connected
def show_model(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    as_json: at.JsonOption = False,
    *,
    connection: at.Connection,
) -> None:
    """Show one model with its defaults."""
    with output.explained_errors(connection.address), connection.client() as client:
        request = model_pb2.GetModelRequest(model=name)
        model = client.model.GetModel(request, metadata=client.metadata).model
    output.print_json(model) if as_json else output.write(str(model))


def ps(
    model: Annotated[str, typer.Option("--model", "-m", help="Only this model's.")] = "",
    workers: Annotated[bool, typer.Option("--workers", "-w", help="List workers instead.")] = False,
    as_json: at.JsonOption = False,
    admin_address: at.AdminAddressOption = at.DEFAULT_ADMIN_ADDRESS,
    admin_key: AdminKeyOption = None,
    tls_ca: at.TlsCaOption = "",
    tls_cert: at.TlsCertOption = "",
    tls_key: at.TlsKeyOption = "",
) -> None:
    """List generations in flight, or the workers."""
    with admin_channel(admin_address, admin_key, at.tls_of(tls_ca, tls_cert, tls_key)) as channel:
        stub = fleet_pb2_grpc.FleetServiceStub(channel)
        if workers:
            _print_workers(stub.ListWorkers(fleet_pb2.ListWorkersRequest(model=model)), as_json=as_json)
        else:
            request = fleet_pb2.ListGenerationsRequest(model=model, page_size=1000)
            _print_generations(stub.ListGenerations(request), as_json=as_json)


@at.connected
def cancel(
    generation_ids: Annotated[list[str], typer.Argument(help="Generations to end.")],
    as_json: at.JsonOption = False,
    *,
    connection: at.Connection,
) -> None:
    """End generations."""
    with output.explained_errors(connection.address), connection.client() as client:
        for generation_id in generation_ids:
            state = _state(client.cancel(generation_id))
            if as_json:
                output.print_json({"generation_id": generation_id, "state": state})
            else:
                output.write(f"{generation_id} {state}\n")


@at.connected
def erase(
    generation_ids: Annotated[list[str], typer.Argument(help="Generations to end and erase.")],
    *,
    connection: at.Connection,
) -> None:
    """Erase all that is stored of generations, input and output; those that run are ended."""
    with output.explained_errors(connection.address), connection.client() as client:
        for generation_id in generation_ids:
            client.delete(generation_id)
            output.write(f"{generation_id} erased\n")


def _print_workers(response: fleet_pb2.ListWorkersResponse, *, as_json: bool) -> None:
    if as_json:
        for worker in response.workers:
            output.print_json(worker)
        return
    rows = []
    for worker in response.workers:
        used = worker.num_blocks - worker.num_free_blocks
        share = f"{used / worker.num_blocks:.0%}" if worker.num_blocks else "-"
        step = f"{worker.last_step_time.ToMicroseconds() / 1000:.0f} ms"
        state = "draining" if worker.draining else f"{worker.num_running} run, {worker.num_waiting} wait"
        rows.append((worker.worker_id, worker.model, worker.device, state, share, step, worker.generated_tokens))
    output.print_table(("WORKER", "MODEL", "DEVICE", "SEQUENCES", "KV", "STEP", "TOKENS"), rows)


def _print_generations(response: fleet_pb2.ListGenerationsResponse, *, as_json: bool) -> None:
    if as_json:
        for generation in response.generations:
            output.print_json(generation)
        return
    rows = [
        (
            info.generation_id,
            info.model,
            info.tenant,
            _state(info.state) + (f" #{info.place}" if info.HasField("place") else ""),
            info.usage.prompt_tokens,
            info.usage.completion_tokens,
            output.ago(info.create_time.ToDatetime(UTC)),
        )
        for info in response.generations
    ]
    output.print_table(("GENERATION", "MODEL", "TENANT", "STATE", "PROMPT", "TOKENS", "CREATED"), rows)
    if response.total_size > len(rows):
        output.stderr.print(f"{response.total_size - len(rows)} more")


def _state(state: generation_pb2.GenerationState.ValueType) -> str:
    return generation_pb2.GenerationState.Name(state).removeprefix("GENERATION_STATE_").lower()
