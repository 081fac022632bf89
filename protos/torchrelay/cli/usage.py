"""`torchrelay usage`: tokens by tenant, key, model and hour."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from torchrelay.admin.v1beta1 import usage_pb2, usage_pb2_grpc
from torchrelay.cli import connection as at
from torchrelay.cli import output
from torchrelay.cli.admin import AdminKeyOption, admin_channel

_DIMENSIONS = {
    name.removeprefix("USAGE_DIMENSION_").lower(): number for name, number in usage_pb2.UsageDimension.items() if number
}


def usage(
    by: Annotated[list[str] | None, typer.Option("--by", help=f"{', '.join(_DIMENSIONS)}; default: tenant.")] = None,
    hours: Annotated[int, typer.Option("--hours", min=1, max=840, help="How far back, this hour included.")] = 24,
    tenant: Annotated[str, typer.Option("--tenant", help="Only this tenant's.")] = "",
    key_id: Annotated[str, typer.Option("--key", help="Only this key's.")] = "",
    model: Annotated[str, typer.Option("--model", "-m", help="Only this model's.")] = "",
    as_json: at.JsonOption = False,
    admin_address: at.AdminAddressOption = at.DEFAULT_ADMIN_ADDRESS,
    admin_key: AdminKeyOption = None,
    tls_ca: at.TlsCaOption = "",
    tls_cert: at.TlsCertOption = "",
    tls_key: at.TlsKeyOption = "",
) -> None:
    """Sum what was used. Each generation counts once, in the hour in which it ended."""
    wanted = by or ["tenant"]
    if any(name not in _DIMENSIONS for name in wanted):
        raise typer.BadParameter(f"one of {', '.join(_DIMENSIONS)}", param_hint="--by")
    request = usage_pb2.QueryUsageRequest(
        tenant=tenant,
        key_id=key_id,
        model=model,
        group_by=[_DIMENSIONS[name] for name in wanted],
    )
    request.start_time.FromDatetime(datetime.now(UTC) - timedelta(hours=hours - 1))
    with admin_channel(admin_address, admin_key, at.tls_of(tls_ca, tls_cert, tls_key)) as channel:
        rows = usage_pb2_grpc.UsageServiceStub(channel).QueryUsage(request).rows
    if as_json:
        for row in rows:
            output.print_json(row)
        return
    table = [
        (
            *(_cell(row, name) for name in _DIMENSIONS if name in wanted),
            row.generations,
            row.prompt_tokens,
            row.cached_prompt_tokens,
            row.completion_tokens,
        )
        for row in rows
    ]
    names = [name.upper() for name in _DIMENSIONS if name in wanted]
    output.print_table((*names, "GENERATIONS", "PROMPT", "CACHED", "COMPLETION"), table)


def _cell(row: usage_pb2.UsageRow, name: str) -> str:
    if name == "hour":
        return f"{row.hour.ToDatetime(UTC):%Y-%m-%d %H:00}"
    return (row.key_id if name == "key" else getattr(row, name)) or "-"
