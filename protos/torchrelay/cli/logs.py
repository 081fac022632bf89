"""`torchrelay logs`: how much gateways and workers write, changed while they run."""

from __future__ import annotations

from datetime import UTC
from enum import StrEnum
from typing import Annotated

import typer

from torchrelay.admin.v1beta1 import log_pb2, log_pb2_grpc
from torchrelay.cli import connection as at
from torchrelay.cli import output
from torchrelay.cli.admin import AdminKeyOption, admin_channel

logs = typer.Typer(no_args_is_help=True, help="How much gateways and workers write, through the admin port.")

_Module = Annotated[str, typer.Argument(help="A Python module, such as worker.agent; worker is all of a worker.")]


class Severity(StrEnum):
    """The least that is written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@logs.command("set")
def set_level(
    module: _Module,
    severity: Annotated[Severity, typer.Argument(help="The least that is written.")],
    minutes: Annotated[float, typer.Option("--minutes", min=0.1, max=1440, help="For how long.")] = 15,
    as_json: at.JsonOption = False,
    admin_address: at.AdminAddressOption = at.DEFAULT_ADMIN_ADDRESS,
    admin_key: AdminKeyOption = None,
    tls_ca: at.TlsCaOption = "",
    tls_cert: at.TlsCertOption = "",
    tls_key: at.TlsKeyOption = "",
) -> None:
    """Set a module's level in every gateway and worker, for a time."""
    request = log_pb2.SetLogLevelRequest(
        module=module, severity=log_pb2.LogSeverity.Value(f"LOG_SEVERITY_{severity.name}")
    )
    request.ttl.FromMilliseconds(int(minutes * 60_000))
    with admin_channel(admin_address, admin_key, at.tls_of(tls_ca, tls_cert, tls_key)) as channel:
        level = log_pb2_grpc.LogServiceStub(channel).SetLogLevel(request).level
    output.print_json(level) if as_json else output.print_table(_COLUMNS, [_row(level)])


@logs.command("list")
def list_levels(
    as_json: at.JsonOption = False,
    admin_address: at.AdminAddressOption = at.DEFAULT_ADMIN_ADDRESS,
    admin_key: AdminKeyOption = None,
    tls_ca: at.TlsCaOption = "",
    tls_cert: at.TlsCertOption = "",
    tls_key: at.TlsKeyOption = "",
) -> None:
    """List the levels that are set."""
    with admin_channel(admin_address, admin_key, at.tls_of(tls_ca, tls_cert, tls_key)) as channel:
        found = log_pb2_grpc.LogServiceStub(channel).ListLogLevels(log_pb2.ListLogLevelsRequest()).levels
    if as_json:
        for level in found:
            output.print_json(level)
    else:
        output.print_table(_COLUMNS, [_row(level) for level in found])


@logs.command("reset")
def reset_level(
    module: _Module,
    admin_address: at.AdminAddressOption = at.DEFAULT_ADMIN_ADDRESS,
    admin_key: AdminKeyOption = None,
    tls_ca: at.TlsCaOption = "",
    tls_cert: at.TlsCertOption = "",
    tls_key: at.TlsKeyOption = "",
) -> None:
    """Take a module's level back."""
    with admin_channel(admin_address, admin_key, at.tls_of(tls_ca, tls_cert, tls_key)) as channel:
        log_pb2_grpc.LogServiceStub(channel).DeleteLogLevel(log_pb2.DeleteLogLevelRequest(module=module))


_COLUMNS = ("MODULE", "LEVEL", "UNTIL (UTC)")


def _row(level: log_pb2.LogLevel) -> tuple[str, str, str]:
    severity = log_pb2.LogSeverity.Name(level.severity).removeprefix("LOG_SEVERITY_").lower()
    return (level.module, severity, f"{level.expire_time.ToDatetime(UTC):%Y-%m-%d %H:%M:%S}")
