"""`torchrelay dead-letters`: generations that failed, to look at, send again, or delete."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC
from typing import Annotated

import typer

from torchrelay.admin.v1beta1 import fleet_pb2, fleet_pb2_grpc
from torchrelay.cli import connection as at
from torchrelay.cli import output
from torchrelay.cli.admin import AdminKeyOption, admin_channel

_ACTED = (fleet_pb2.DEAD_LETTER_OUTCOME_RETRIED, fleet_pb2.DEAD_LETTER_OUTCOME_PURGED)
_MAX_IDS = 1000  # of one request

dead_letters = typer.Typer(no_args_is_help=True, help="Generations that failed, through the gateway's admin port.")

_Ids = Annotated[list[str] | None, typer.Argument(help="Generations, as list shows them.", show_default=False)]
_Model = Annotated[str, typer.Option("--model", "-m", help="All of this model instead.")]


@dead_letters.command("list")
def list_letters(
    model: Annotated[str, typer.Option("--model", "-m", help="Only this model's.")] = "",
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Most to show.")] = 100,
    as_json: at.JsonOption = False,
    admin_address: at.AdminAddressOption = at.DEFAULT_ADMIN_ADDRESS,
    admin_key: AdminKeyOption = None,
    tls_ca: at.TlsCaOption = "",
    tls_cert: at.TlsCertOption = "",
    tls_key: at.TlsKeyOption = "",
) -> None:
    """List generations that failed, newest first."""
    found: list[fleet_pb2.DeadLetter] = []
    token, total = "", 0
    with admin_channel(admin_address, admin_key, at.tls_of(tls_ca, tls_cert, tls_key)) as channel:
        stub = fleet_pb2_grpc.FleetServiceStub(channel)
        while len(found) < limit:
            request = fleet_pb2.ListDeadLettersRequest(
                model=model, page_size=min(1000, limit - len(found)), page_token=token
            )
            page = stub.ListDeadLetters(request)
            found += page.dead_letters
            token, total = page.next_page_token, page.total_size
            if not token:
                break
    if as_json:
        for letter in found:
            output.print_json(letter)
        return
    rows = [
        (
            letter.generation_id,
            letter.model,
            letter.tenant,
            fleet_pb2.DeadLetterReason.Name(letter.reason).removeprefix("DEAD_LETTER_REASON_").lower(),
            letter.num_claims,
            letter.prompt_tokens,
            letter.num_events,
            output.ago(letter.end_time.ToDatetime(UTC)),
        )
        for letter in found
    ]
    output.print_table(("GENERATION", "MODEL", "TENANT", "REASON", "CLAIMS", "PROMPT", "EVENTS", "FAILED"), rows)
    if token:
        output.stderr.print(f"{total} in all")


@dead_letters.command("retry")
def retry_letters(
    generation_ids: _Ids = None,
    model: _Model = "",
    as_json: at.JsonOption = False,
    admin_address: at.AdminAddressOption = at.DEFAULT_ADMIN_ADDRESS,
    admin_key: AdminKeyOption = None,
    tls_ca: at.TlsCaOption = "",
    tls_cert: at.TlsCertOption = "",
    tls_key: at.TlsKeyOption = "",
) -> None:
    """Queue them again, each as a new generation; exit status 1 if some could not be."""
    _check_choice(generation_ids, model)
    with admin_channel(admin_address, admin_key, at.tls_of(tls_ca, tls_cert, tls_key)) as channel:
        request = fleet_pb2.RetryDeadLettersRequest(generation_ids=generation_ids, model=model)
        results = fleet_pb2_grpc.FleetServiceStub(channel).RetryDeadLetters(request).results
    _print_results(results, as_json=as_json)


@dead_letters.command("purge")
def purge_letters(
    generation_ids: _Ids = None,
    model: _Model = "",
    as_json: at.JsonOption = False,
    admin_address: at.AdminAddressOption = at.DEFAULT_ADMIN_ADDRESS,
    admin_key: AdminKeyOption = None,
    tls_ca: at.TlsCaOption = "",
    tls_cert: at.TlsCertOption = "",
    tls_key: at.TlsKeyOption = "",
) -> None:
    """Delete them for good; exit status 1 if some were not there."""
    _check_choice(generation_ids, model)
    with admin_channel(admin_address, admin_key, at.tls_of(tls_ca, tls_cert, tls_key)) as channel:
        request = fleet_pb2.PurgeDeadLettersRequest(generation_ids=generation_ids, model=model)
        results = fleet_pb2_grpc.FleetServiceStub(channel).PurgeDeadLetters(request).results
    _print_results(results, as_json=as_json)


def _check_choice(generation_ids: list[str] | None, model: str) -> None:
    if bool(generation_ids) == bool(model):
        raise typer.BadParameter("name either generations or --model")
    if generation_ids is not None and len(generation_ids) > _MAX_IDS:
        raise typer.BadParameter(f"at most {_MAX_IDS} generations at a time")


def _print_results(results: Iterable[fleet_pb2.DeadLetterResult], *, as_json: bool) -> None:
    failed = False
    for result in results:
        failed = failed or result.outcome not in _ACTED
        if as_json:
            output.print_json(result)
            continue
        outcome = fleet_pb2.DeadLetterOutcome.Name(result.outcome).removeprefix("DEAD_LETTER_OUTCOME_").lower()
        new = f" as {result.new_generation_id}" if result.new_generation_id else ""
        output.write(f"{result.generation_id} {outcome}{new}\n")
    if failed:
        raise typer.Exit(1)
