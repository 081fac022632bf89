"""`torchrelay tenants`: shares, quotas and retention of tenants."""

from __future__ import annotations

from typing import Annotated

import typer

from torchrelay.admin.v1beta1 import grants_pb2, tenant_pb2, tenant_pb2_grpc
from torchrelay.cli import connection as at
from torchrelay.cli import keys, output
from torchrelay.cli.admin import AdminKeyOption, admin_channel

tenants = typer.Typer(no_args_is_help=True, help="What holds for all keys of a tenant, through the admin port.")

_Tenant = Annotated[str, typer.Argument(help="The tenant's name.")]


@tenants.command("set")
def set_tenant(
    tenant: _Tenant,
    weight: Annotated[float, typer.Option("--weight", help="Share of the service against other tenants.")] = 1.0,
    trust_group: Annotated[
        str, typer.Option("--trust-group", help="Tenants of one group share cached prefixes of prompts.")
    ] = "",
    max_retention_s: Annotated[
        float | None, typer.Option("--max-retention", min=1, help="How long results are kept, in seconds.")
    ] = None,
    requests_per_minute: keys.RequestsPerMinuteOption = 0,
    tokens_per_minute: keys.TokensPerMinuteOption = 0,
    tokens_per_day: keys.TokensPerDayOption = 0,
    max_queued: keys.MaxQueuedOption = 0,
    max_live: keys.MaxLiveOption = 0,
    as_json: at.JsonOption = False,
    admin_address: at.AdminAddressOption = at.DEFAULT_ADMIN_ADDRESS,
    admin_key: AdminKeyOption = None,
    tls_ca: at.TlsCaOption = "",
    tls_cert: at.TlsCertOption = "",
    tls_key: at.TlsKeyOption = "",
) -> None:
    """Make or replace a tenant's record; what is not given takes its default."""
    message = tenant_pb2.Tenant(
        tenant=tenant,
        weight=weight,
        trust_group=trust_group,
        quotas=grants_pb2.Quotas(
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            tokens_per_day=tokens_per_day,
            max_queued=max_queued,
            max_live=max_live,
        ),
    )
    if max_retention_s is not None:
        message.max_retention.FromMilliseconds(int(max_retention_s * 1000))
    with admin_channel(admin_address, admin_key, at.tls_of(tls_ca, tls_cert, tls_key)) as channel:
        stored = tenant_pb2_grpc.TenantServiceStub(channel).SetTenant(tenant_pb2.SetTenantRequest(tenant=message))
    output.print_json(stored.tenant) if as_json else output.write(str(stored.tenant))


@tenants.command("list")
def list_tenants(
    as_json: at.JsonOption = False,
    admin_address: at.AdminAddressOption = at.DEFAULT_ADMIN_ADDRESS,
    admin_key: AdminKeyOption = None,
    tls_ca: at.TlsCaOption = "",
    tls_cert: at.TlsCertOption = "",
    tls_key: at.TlsKeyOption = "",
) -> None:
    """List tenants that have a record."""
    found: list[tenant_pb2.Tenant] = []
    with admin_channel(admin_address, admin_key, at.tls_of(tls_ca, tls_cert, tls_key)) as channel:
        stub = tenant_pb2_grpc.TenantServiceStub(channel)
        token = ""
        while True:
            page = stub.ListTenants(tenant_pb2.ListTenantsRequest(page_size=1000, page_token=token))
            found += page.tenants
            token = page.next_page_token
            if not token:
                break
    if as_json:
        for one in found:
            output.print_json(one)
        return
    rows = [
        (
            one.tenant,
            f"{one.weight:g}",
            one.trust_group or "-",
            one.quotas.requests_per_minute or "-",
            one.quotas.tokens_per_minute or "-",
            one.quotas.tokens_per_day or "-",
        )
        for one in found
    ]
    output.print_table(("TENANT", "WEIGHT", "GROUP", "REQUESTS/MIN", "TOKENS/MIN", "TOKENS/DAY"), rows)


@tenants.command("delete")
def delete_tenant(
    tenant: _Tenant,
    admin_address: at.AdminAddressOption = at.DEFAULT_ADMIN_ADDRESS,
    admin_key: AdminKeyOption = None,
    tls_ca: at.TlsCaOption = "",
    tls_cert: at.TlsCertOption = "",
    tls_key: at.TlsKeyOption = "",
) -> None:
    """Delete a tenant's record: it has the defaults again. Its keys stay."""
    with admin_channel(admin_address, admin_key, at.tls_of(tls_ca, tls_cert, tls_key)) as channel:
        tenant_pb2_grpc.TenantServiceStub(channel).DeleteTenant(tenant_pb2.DeleteTenantRequest(tenant=tenant))
    output.stderr.print(f"{tenant} has the defaults again", highlight=False)
