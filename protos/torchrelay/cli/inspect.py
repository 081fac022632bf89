"""`torchrelay models`, `keys`, `ps`, `cancel`: what there is, and who may use it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

import grpc
import typer

from torchrelay.admin.v1beta1 import api_key_pb2, api_key_pb2_grpc, fleet_pb2, fleet_pb2_grpc
from torchrelay.cli import connection as at
from torchrelay.cli import output
from torchrelay.v1 import generation_pb2, model_pb2

_MAX_DAYS = 36_500
_MODEL_COLUMNS = ("NAME", "STATE", "WORKERS", "QUEUED", "CONTEXT", "DTYPE", "WEIGHTS", "SIZE", "ATTENTION", "REVISION")

models = typer.Typer(no_args_is_help=True, help="The models that are served.")
keys = typer.Typer(no_args_is_help=True, help="API keys, through the gateway's admin port.")


@models.command("list")
def list_models(
    as_json: at.JsonOption = False,
    address: at.AddressOption = at.DEFAULT_ADDRESS,
    api_key: at.ApiKeyOption = None,
    tls_ca: at.TlsCaOption = "",
    insecure: at.InsecureOption = False,
) -> None:
    """List the models that you may use."""
    with output.explained_errors(address), at.Connection(address, api_key, tls_ca, insecure).client() as client:
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
            model.revision[:12],
        )
        for model in found
    ]
    output.print_table(_MODEL_COLUMNS, rows)


@models.command("show")
def show_model(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    as_json: at.JsonOption = False,
    address: at.AddressOption = at.DEFAULT_ADDRESS,
    api_key: at.ApiKeyOption = None,
    tls_ca: at.TlsCaOption = "",
    insecure: at.InsecureOption = False,
) -> None:
    """Show one model with its defaults."""
    with output.explained_errors(address):
        connection = at.Connection(address, api_key, tls_ca, insecure)
        with connection.client() as client:
            request = model_pb2.GetModelRequest(model=name)
            model = client.model.GetModel(request, metadata=client.metadata).model
    output.print_json(model) if as_json else output.write(str(model))


@keys.command("create")
def create_key(
    tenant: Annotated[str, typer.Argument(help="Whom its calls belong to.")],
    name: Annotated[str, typer.Option("--name", help="What it is for.")] = "",
    expires_in_days: Annotated[float | None, typer.Option("--expires-in-days", help="Unset is never.")] = None,
    as_json: at.JsonOption = False,
    admin_address: at.AdminAddressOption = at.DEFAULT_ADMIN_ADDRESS,
) -> None:
    """Make a key and print it: it cannot be read again."""
    request = api_key_pb2.CreateApiKeyRequest(tenant=tenant, display_name=name)
    if expires_in_days is not None:
        if not 0 < expires_in_days <= _MAX_DAYS:
            raise typer.BadParameter(f"must be above 0 and at most {_MAX_DAYS}", param_hint="--expires-in-days")
        request.expire_time.FromDatetime(datetime.now(UTC) + timedelta(days=expires_in_days))
    with output.explained_errors(admin_address, "--admin-address"), grpc.insecure_channel(admin_address) as channel:
        response = api_key_pb2_grpc.ApiKeyServiceStub(channel).CreateApiKey(request)
    output.print_json(response) if as_json else output.write(response.secret + "\n")


@keys.command("list")
def list_keys(
    tenant: Annotated[str, typer.Option("--tenant", help="Only this tenant's.")] = "",
    as_json: at.JsonOption = False,
    admin_address: at.AdminAddressOption = at.DEFAULT_ADMIN_ADDRESS,
) -> None:
    """List keys, without their secrets."""
    found: list[api_key_pb2.ApiKey] = []
    with output.explained_errors(admin_address, "--admin-address"), grpc.insecure_channel(admin_address) as channel:
        stub = api_key_pb2_grpc.ApiKeyServiceStub(channel)
        token = ""
        while True:
            page = stub.ListApiKeys(api_key_pb2.ListApiKeysRequest(tenant=tenant, page_token=token))
            found += page.api_keys
            token = page.next_page_token
            if not token:
                break
    if as_json:
        for key in found:
            output.print_json(key)
        return
    rows = [
        (key.key_id, key.tenant, _key_state(key), output.ago(key.create_time.ToDatetime(UTC)), key.display_name)
        for key in found
    ]
    output.print_table(("ID", "TENANT", "STATE", "CREATED", "NAME"), rows)


@keys.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="The key's id, as list shows it.")],
    as_json: at.JsonOption = False,
    admin_address: at.AdminAddressOption = at.DEFAULT_ADMIN_ADDRESS,
) -> None:
    """Revoke a key; every gateway refuses it within 5 seconds."""
    with output.explained_errors(admin_address, "--admin-address"), grpc.insecure_channel(admin_address) as channel:
        stub = api_key_pb2_grpc.ApiKeyServiceStub(channel)
        key = stub.RevokeApiKey(api_key_pb2.RevokeApiKeyRequest(key_id=key_id)).api_key
    output.print_json(key) if as_json else output.stderr.print(f"revoked {key.key_id} of {key.tenant}")


def ps(
    model: Annotated[str, typer.Option("--model", "-m", help="Only this model's.")] = "",
    workers: Annotated[bool, typer.Option("--workers", "-w", help="List workers instead.")] = False,
    as_json: at.JsonOption = False,
    admin_address: at.AdminAddressOption = at.DEFAULT_ADMIN_ADDRESS,
) -> None:
    """List generations in flight, or the workers."""
    with output.explained_errors(admin_address, "--admin-address"), grpc.insecure_channel(admin_address) as channel:
        stub = fleet_pb2_grpc.FleetServiceStub(channel)
        if workers:
            _print_workers(stub.ListWorkers(fleet_pb2.ListWorkersRequest(model=model)), as_json=as_json)
        else:
            request = fleet_pb2.ListGenerationsRequest(model=model, page_size=1000)
            _print_generations(stub.ListGenerations(request), as_json=as_json)


def cancel(
    generation_ids: Annotated[list[str], typer.Argument(help="Generations to end.")],
    as_json: at.JsonOption = False,
    address: at.AddressOption = at.DEFAULT_ADDRESS,
    api_key: at.ApiKeyOption = None,
    tls_ca: at.TlsCaOption = "",
    insecure: at.InsecureOption = False,
) -> None:
    """End generations."""
    with output.explained_errors(address), at.Connection(address, api_key, tls_ca, insecure).client() as client:
        for generation_id in generation_ids:
            state = _state(client.cancel(generation_id))
            if as_json:
                output.print_json({"generation_id": generation_id, "state": state})
            else:
                output.write(f"{generation_id} {state}\n")


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


def _key_state(key: api_key_pb2.ApiKey) -> str:
    if key.HasField("revoke_time"):
        return "revoked"
    if key.HasField("expire_time") and key.expire_time.ToDatetime(UTC) <= datetime.now(UTC):
        return "expired"
    return "active"
