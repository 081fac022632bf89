"""`torchrelay keys`: API keys and what they may do."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from google.protobuf.timestamp_pb2 import Timestamp

from torchrelay.admin.v1beta1 import api_key_pb2, api_key_pb2_grpc, grants_pb2
from torchrelay.cli import connection as at
from torchrelay.cli import output
from torchrelay.cli.admin import AdminKeyOption, admin_channel
from torchrelay.v1 import generation_pb2

_MAX_DAYS = 36_500
_ALL_ADMIN = "admin"  # short for every administrative scope
_SCOPES = {
    name.removeprefix("SCOPE_").lower().replace("admin_", "admin."): number
    for name, number in grants_pb2.Scope.items()
    if number
}
_PRIORITIES = {
    name.removeprefix("PRIORITY_").lower(): number for name, number in generation_pb2.Priority.items() if number
}

keys = typer.Typer(no_args_is_help=True, help="API keys, through the gateway's admin port.")

_KeyId = Annotated[str, typer.Argument(help="The key's id, as list shows it.")]
_ExpiresOption = Annotated[float | None, typer.Option("--expires-in-days", help="Unset is never.")]
_ScopesOption = Annotated[
    list[str] | None,
    typer.Option("--scope", help=f"{', '.join(_SCOPES)}, or admin for all of them; default: all but administration."),
]
_ModelsOption = Annotated[list[str] | None, typer.Option("--model", "-m", help="Name, or prefix*; default: all.")]
_PrioritiesOption = Annotated[
    list[str] | None, typer.Option("--priority", help=f"{', '.join(_PRIORITIES)}; default: normal and low.")
]
_MaxTokensOption = Annotated[int | None, typer.Option("--max-tokens", min=1, help="Most new tokens of an output.")]
_MaxOutputsOption = Annotated[int | None, typer.Option("--max-outputs", min=1, help="Most outputs of a request.")]
_MaxContextOption = Annotated[
    int | None, typer.Option("--max-context", min=1, help="Most tokens of prompt and output together.")
]
_MaxGraceOption = Annotated[
    float | None, typer.Option("--max-grace", min=0, help="Longest disconnect grace, in seconds.")
]
RequestsPerMinuteOption = Annotated[int, typer.Option("--requests-per-minute", min=0, help="0 is no limit.")]
TokensPerMinuteOption = Annotated[int, typer.Option("--tokens-per-minute", min=0, help="0 is no limit.")]
TokensPerDayOption = Annotated[int, typer.Option("--tokens-per-day", min=0, help="0 is no limit.")]
MaxQueuedOption = Annotated[int, typer.Option("--max-queued", min=0, help="Waiting, of one model; 0 is no limit.")]
MaxLiveOption = Annotated[
    int, typer.Option("--max-live", min=0, help="Waiting and running, of one model; 0 is no limit.")
]


@keys.command("create")
def create_key(
    tenant: Annotated[str, typer.Argument(help="Whom its calls belong to.")],
    name: Annotated[str, typer.Option("--name", help="What it is for.")] = "",
    expires_in_days: _ExpiresOption = None,
    scopes: _ScopesOption = None,
    models: _ModelsOption = None,
    priorities: _PrioritiesOption = None,
    max_tokens: _MaxTokensOption = None,
    max_outputs: _MaxOutputsOption = None,
    max_context: _MaxContextOption = None,
    max_grace: _MaxGraceOption = None,
    requests_per_minute: RequestsPerMinuteOption = 0,
    tokens_per_minute: TokensPerMinuteOption = 0,
    tokens_per_day: TokensPerDayOption = 0,
    max_queued: MaxQueuedOption = 0,
    max_live: MaxLiveOption = 0,
    as_json: at.JsonOption = False,
    admin_address: at.AdminAddressOption = at.DEFAULT_ADMIN_ADDRESS,
    admin_key: AdminKeyOption = None,
    tls_ca: at.TlsCaOption = "",
    tls_cert: at.TlsCertOption = "",
    tls_key: at.TlsKeyOption = "",
) -> None:
    """Make a key and print it: it cannot be read again."""
    request = api_key_pb2.CreateApiKeyRequest(
        tenant=tenant,
        display_name=name,
        expire_time=_expiry(expires_in_days),
        grants=_grants(scopes, models, priorities),
    )
    request.grants.quotas.MergeFrom(
        grants_pb2.Quotas(
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            tokens_per_day=tokens_per_day,
            max_queued=max_queued,
            max_live=max_live,
        )
    )
    caps = request.grants.caps
    caps.MergeFrom(grants_pb2.Caps(max_tokens=max_tokens, max_outputs=max_outputs, max_context_tokens=max_context))
    if max_grace is not None:
        caps.max_disconnect_grace.FromMilliseconds(int(max_grace * 1000))
    with admin_channel(admin_address, admin_key, at.tls_of(tls_ca, tls_cert, tls_key)) as channel:
        response = api_key_pb2_grpc.ApiKeyServiceStub(channel).CreateApiKey(request)
    output.print_json(response) if as_json else output.write(response.secret + "\n")


@keys.command("list")
def list_keys(
    tenant: Annotated[str, typer.Option("--tenant", help="Only this tenant's.")] = "",
    as_json: at.JsonOption = False,
    admin_address: at.AdminAddressOption = at.DEFAULT_ADMIN_ADDRESS,
    admin_key: AdminKeyOption = None,
    tls_ca: at.TlsCaOption = "",
    tls_cert: at.TlsCertOption = "",
    tls_key: at.TlsKeyOption = "",
) -> None:
    """List keys, without their secrets."""
    found: list[api_key_pb2.ApiKey] = []
    with admin_channel(admin_address, admin_key, at.tls_of(tls_ca, tls_cert, tls_key)) as channel:
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
        (
            key.key_id,
            key.tenant,
            _state(key),
            output.ago(key.create_time.ToDatetime(UTC)),
            ",".join(name for name, number in _SCOPES.items() if number in key.grants.scopes),
            ",".join(key.grants.models) or "all",
            key.display_name,
        )
        for key in found
    ]
    output.print_table(("ID", "TENANT", "STATE", "CREATED", "SCOPES", "MODELS", "NAME"), rows)


@keys.command("rotate")
def rotate_key(
    key_id: _KeyId,
    overlap_hours: Annotated[
        float, typer.Option("--overlap-hours", min=0, max=720, help="How long the old key goes on working.")
    ] = 24,
    expires_in_days: _ExpiresOption = None,
    as_json: at.JsonOption = False,
    admin_address: at.AdminAddressOption = at.DEFAULT_ADMIN_ADDRESS,
    admin_key: AdminKeyOption = None,
    tls_ca: at.TlsCaOption = "",
    tls_cert: at.TlsCertOption = "",
    tls_key: at.TlsKeyOption = "",
) -> None:
    """Make a key that replaces another, with the same rights and quotas, and print it."""
    request = api_key_pb2.RotateApiKeyRequest(key_id=key_id, expire_time=_expiry(expires_in_days))
    request.overlap.FromMilliseconds(int(overlap_hours * 3_600_000))
    with admin_channel(admin_address, admin_key, at.tls_of(tls_ca, tls_cert, tls_key)) as channel:
        response = api_key_pb2_grpc.ApiKeyServiceStub(channel).RotateApiKey(request)
    if as_json:
        output.print_json(response)
        return
    output.write(response.secret + "\n")
    ends = response.rotated.expire_time.ToDatetime(UTC)
    output.stderr.print(f"{response.rotated.key_id} works until {ends:%Y-%m-%d %H:%M} UTC")


@keys.command("revoke")
def revoke_key(
    key_id: _KeyId,
    as_json: at.JsonOption = False,
    admin_address: at.AdminAddressOption = at.DEFAULT_ADMIN_ADDRESS,
    admin_key: AdminKeyOption = None,
    tls_ca: at.TlsCaOption = "",
    tls_cert: at.TlsCertOption = "",
    tls_key: at.TlsKeyOption = "",
) -> None:
    """Revoke a key; every gateway refuses it within 5 seconds."""
    with admin_channel(admin_address, admin_key, at.tls_of(tls_ca, tls_cert, tls_key)) as channel:
        stub = api_key_pb2_grpc.ApiKeyServiceStub(channel)
        key = stub.RevokeApiKey(api_key_pb2.RevokeApiKeyRequest(key_id=key_id)).api_key
    output.print_json(key) if as_json else output.stderr.print(f"revoked {key.key_id} of {key.tenant}")


def _expiry(days: float | None) -> Timestamp | None:
    if days is None:
        return None
    if not 0 < days <= _MAX_DAYS:
        raise typer.BadParameter(f"must be above 0 and at most {_MAX_DAYS}", param_hint="--expires-in-days")
    moment = Timestamp()
    moment.FromDatetime(datetime.now(UTC) + timedelta(days=days))
    return moment


def _grants(scopes: list[str] | None, models: list[str] | None, priorities: list[str] | None) -> grants_pb2.Grants:
    numbers: list[int] = []
    for scope in scopes or ():
        if scope == _ALL_ADMIN:
            numbers += [number for name, number in _SCOPES.items() if name.startswith("admin.")]
        elif scope in _SCOPES:
            numbers.append(_SCOPES[scope])
        else:
            raise typer.BadParameter(f"one of {', '.join(_SCOPES)} and {_ALL_ADMIN}", param_hint="--scope")
    unknown = [name for name in priorities or () if name not in _PRIORITIES]
    if unknown:
        raise typer.BadParameter(f"one of {', '.join(_PRIORITIES)}", param_hint="--priority")
    return grants_pb2.Grants(
        scopes=numbers,  # type: ignore[arg-type]
        models=models,
        priorities=[_PRIORITIES[name] for name in priorities or ()],
    )


def _state(key: api_key_pb2.ApiKey) -> str:
    if key.HasField("revoke_time"):
        return "revoked"
    if key.HasField("expire_time") and key.expire_time.ToDatetime(UTC) <= datetime.now(UTC):
        return "expired"
    return "active"
