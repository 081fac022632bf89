"""TenantService: what holds for all credentials of a tenant."""

from __future__ import annotations

from typing import Any

import grpc.aio

from common.tenants import Tenants
from gateway import audit
from gateway.admin import messages
from gateway.model_servicer import page_size
from torchrelay.admin.v1beta1 import tenant_pb2 as pb
from torchrelay.admin.v1beta1 import tenant_pb2_grpc as pb_grpc


class TenantServicer(pb_grpc.TenantServiceServicer):
    """Serves tenants' records out of the store."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants

    async def GetTenant(  # noqa: N802 - the method's name in the contract
        self, request: pb.GetTenantRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetTenantResponse:
        tenant = await self._tenants.get(messages.check_tenant_name(request.tenant))
        return pb.GetTenantResponse(tenant=messages.tenant_message(tenant))

    async def ListTenants(  # noqa: N802
        self, request: pb.ListTenantsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListTenantsResponse:
        found = await self._tenants.list()
        start = messages.page_start(request.page_token, [tenant.name for tenant in found])
        end = start + page_size(request.page_size)
        return pb.ListTenantsResponse(
            tenants=[messages.tenant_message(tenant) for tenant in found[start:end]],
            next_page_token=found[end - 1].name if len(found) > end else "",
        )

    async def SetTenant(  # noqa: N802
        self, request: pb.SetTenantRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.SetTenantResponse:
        name = messages.check_tenant_name(request.tenant.tenant, "tenant.tenant")
        audit.note(target_tenant=name)
        tenant = await self._tenants.set(name, messages.policy_of(request.tenant))
        return pb.SetTenantResponse(tenant=messages.tenant_message(tenant))

    async def DeleteTenant(  # noqa: N802
        self, request: pb.DeleteTenantRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.DeleteTenantResponse:
        name = messages.check_tenant_name(request.tenant)
        audit.note(target_tenant=name)
        await self._tenants.delete(name)
        return pb.DeleteTenantResponse()
