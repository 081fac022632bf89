"""ApiKeyService: makes, lists, changes, rotates and revokes keys."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp

from common.api_keys import ApiKey, ApiKeys, id_of
from common.errors import InvalidRequest
from common.grants import Grants
from gateway import audit, convert
from gateway.admin import messages
from gateway.identity.caller import current_caller
from gateway.model_servicer import page_size
from gateway.validation import milliseconds
from torchrelay.admin.v1beta1 import api_key_pb2 as pb
from torchrelay.admin.v1beta1 import api_key_pb2_grpc as pb_grpc
from torchrelay.admin.v1beta1 import grants_pb2

_MAX_DISPLAY_NAME: Final = 128
_MAX_OVERLAP_MS: Final = 30 * 86_400_000


class ApiKeyServicer(pb_grpc.ApiKeyServiceServicer):
    """Serves API keys out of the store."""

    def __init__(self, api_keys: ApiKeys, wall_clock: Callable[[], float] = time.time) -> None:
        self._api_keys = api_keys
        self._wall_clock = wall_clock

    async def CreateApiKey(  # noqa: N802 - the method's name in the contract
        self, request: pb.CreateApiKeyRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.CreateApiKeyResponse:
        messages.check_tenant_name(request.tenant)
        if len(request.display_name) > _MAX_DISPLAY_NAME:
            raise InvalidRequest(
                f"must be at most {_MAX_DISPLAY_NAME} characters",
                reason="FIELD_OUT_OF_RANGE",
                field="display_name",
                limit=_MAX_DISPLAY_NAME,
                got=len(request.display_name),
            )
        created = await self._api_keys.create(
            request.tenant,
            request.display_name or request.tenant,
            self._ttl_ms(request.expire_time) if request.HasField("expire_time") else None,
            grants=_grantable(request.grants),
        )
        audit.note(target_tenant=request.tenant, target_key=created.api_key.key_id)
        return pb.CreateApiKeyResponse(api_key=_api_key(created.api_key), secret=created.secret)

    async def ListApiKeys(  # noqa: N802
        self, request: pb.ListApiKeysRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListApiKeysResponse:
        found = await self._api_keys.list(request.tenant or None)
        names = [f"{key.created_ms}.{key.key_id}" for key in found]
        start = messages.page_start(request.page_token, names)
        end = start + page_size(request.page_size)
        return pb.ListApiKeysResponse(
            api_keys=[_api_key(key) for key in found[start:end]],
            next_page_token=names[end - 1] if len(found) > end else "",
        )

    async def RevokeApiKey(  # noqa: N802
        self, request: pb.RevokeApiKeyRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.RevokeApiKeyResponse:
        revoked = await self._api_keys.revoke(await self._changeable(request.key_id))
        return pb.RevokeApiKeyResponse(api_key=_api_key(revoked))

    async def RotateApiKey(  # noqa: N802
        self, request: pb.RotateApiKeyRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.RotateApiKeyResponse:
        overlap_ms = milliseconds(request.overlap, "overlap", minimum=0)
        if overlap_ms > _MAX_OVERLAP_MS:
            raise InvalidRequest(
                "must be at most 30 days",
                reason="FIELD_OUT_OF_RANGE",
                field="overlap",
                limit=_MAX_OVERLAP_MS,
                got=overlap_ms,
            )
        ttl_ms = self._ttl_ms(request.expire_time) if request.HasField("expire_time") else None
        key_id = await self._changeable(request.key_id)
        made, rotated = await self._api_keys.rotate(key_id, overlap_ms, ttl_ms)
        audit.note(target_tenant=rotated.tenant, new_key=made.api_key.key_id)
        return pb.RotateApiKeyResponse(api_key=_api_key(made.api_key), secret=made.secret, rotated=_api_key(rotated))

    async def UpdateApiKey(  # noqa: N802
        self, request: pb.UpdateApiKeyRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.UpdateApiKeyResponse:
        updated = await self._api_keys.update(await self._changeable(request.key_id), _grantable(request.grants))
        return pb.UpdateApiKeyResponse(api_key=_api_key(updated))

    def _ttl_ms(self, expire_time: Timestamp) -> int:
        ttl_ms = messages.milliseconds_of(expire_time, "expire_time") - int(self._wall_clock() * 1000)
        if ttl_ms <= 0:
            raise InvalidRequest("must be in the future", reason="FIELD_OUT_OF_RANGE", field="expire_time")
        return ttl_ms

    async def _changeable(self, given: str) -> str:
        """Return the id of a key that the caller may change; a whole key names itself. Raises ApiKeyNotFound too.

        Who could change a key that may do more would have its rights by rotating it.
        """
        if not given:
            raise InvalidRequest("key_id is required", reason="FIELD_REQUIRED", field="key_id")
        key_id = id_of(given) or given
        stored = await self._api_keys.get(key_id)
        audit.note(target_tenant=stored.tenant, target_key=stored.key_id)  # what is no id is not noted: it may be a key
        messages.check_scopes(stored.grants.scopes, current_caller().grants.scopes)
        return stored.key_id


def _grantable(message: grants_pb2.Grants) -> Grants:
    """Return what is granted. Nobody makes a key that may administer more than its maker may."""
    grants = messages.grants_of(message)
    messages.check_scopes(grants.scopes, current_caller().grants.scopes)
    return grants


def _api_key(key: ApiKey) -> pb.ApiKey:
    message = pb.ApiKey(
        key_id=key.key_id,
        tenant=key.tenant,
        display_name=key.name,
        create_time=convert.timestamp(key.created_ms),
        grants=messages.grants_message(key.grants),
        rotated_from=key.rotated_from,
    )
    if key.expires_ms is not None:
        message.expire_time.FromMilliseconds(key.expires_ms)
    if key.revoked_ms is not None:
        message.revoke_time.FromMilliseconds(key.revoked_ms)
    return message
