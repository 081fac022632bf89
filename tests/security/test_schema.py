"""The contract itself: no field leads the server to another machine or into its files."""

from __future__ import annotations

import re

from google.protobuf.descriptor import Descriptor

from torchrelay.admin.v1beta1 import api_key_pb2, fleet_pb2, grants_pb2, tenant_pb2, usage_pb2
from torchrelay.v1 import generation_pb2, model_pb2

FILES = (generation_pb2, model_pb2, api_key_pb2, fleet_pb2, grants_pb2, tenant_pb2, usage_pb2)
LEADS_AWAY = re.compile(
    r"(^|_)(url|uri|urls|uris|path|file|files|filename|host|address|endpoint|callback|webhook|proxy)(_|$)"
)
TOLD = {"torchrelay.admin.v1beta1.Worker.host"}  # by the server, to operators


def fields_of(message: Descriptor) -> list[str]:
    inner = [name for nested in message.nested_types for name in fields_of(nested)]
    return [f"{message.full_name}.{field.name}" for field in message.fields] + inner


def test_no_request_names_an_address_or_a_file() -> None:
    names = [
        name
        for file in FILES
        for message in file.DESCRIPTOR.message_types_by_name.values()
        for name in fields_of(message)
    ]
    assert len(names) > 150
    assert {name for name in names if LEADS_AWAY.search(name.rpartition(".")[2])} == TOLD


def test_a_field_that_leads_away_would_be_seen() -> None:
    for name in ("image_url", "path", "weights_file", "webhook", "callback_uri"):
        assert LEADS_AWAY.search(name)
