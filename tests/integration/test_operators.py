"""Operators at work: the first key, the admin port with and without credentials, and the verbs of the command."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
import typer
from google.protobuf.timestamp_pb2 import Timestamp
from typer.testing import CliRunner

from common import keys
from common.api_keys import ApiKeys
from common.errors import FailedPrecondition
from common.grants import ADMIN_SCOPES
from common.redis import Redis, connect, execute
from common.settings import RedisSettings
from gateway.bootstrap import first_admin_key
from tests.builders_calls import refused
from tests.builders_models import write_tiny_model
from tests.builders_system import System, running_system
from torchrelay.admin.v1beta1 import (
    api_key_pb2,
    api_key_pb2_grpc,
    fleet_pb2,
    fleet_pb2_grpc,
    grants_pb2,
    tenant_pb2,
    tenant_pb2_grpc,
    usage_pb2,
    usage_pb2_grpc,
)
from torchrelay.cli.main import make_app
from torchrelay.client.errors import from_rpc_error
from torchrelay.v1 import generation_pb2 as pb

MODEL = "tiny"
DENIED = grpc.StatusCode.PERMISSION_DENIED


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A gateway whose operators need credentials, one whose do not, and a worker."""
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    with running_system(tmp_path_factory.mktemp("system")) as system:
        system.add_gateway(TORCHRELAY_GATEWAY_ADMIN_AUTH="required")
        system.add_gateway()
        system.add_worker(folder, MODEL)
        asyncio.run(system.ready(MODEL))
        yield system


@pytest.fixture
async def redis(system: System) -> AsyncIterator[Redis]:
    client = connect(RedisSettings(url=system.server.url))
    yield client
    await client.aclose()


@pytest.fixture
async def admin(system: System) -> AsyncIterator[grpc.aio.Channel]:
    """The admin port that asks for credentials."""
    async with grpc.aio.insecure_channel(system.gateways[0].admin_address) as channel:
        yield channel


CALLS: dict[str, Any] = {
    "admin.keys": lambda channel, **options: api_key_pb2_grpc.ApiKeyServiceStub(channel).ListApiKeys(
        api_key_pb2.ListApiKeysRequest(), **options
    ),
    "admin.tenants": lambda channel, **options: tenant_pb2_grpc.TenantServiceStub(channel).ListTenants(
        tenant_pb2.ListTenantsRequest(), **options
    ),
    "admin.fleet": lambda channel, **options: fleet_pb2_grpc.FleetServiceStub(channel).ListWorkers(
        fleet_pb2.ListWorkersRequest(), **options
    ),
    "admin.usage": lambda channel, **options: usage_pb2_grpc.UsageServiceStub(channel).QueryUsage(
        usage_pb2.QueryUsageRequest(), **options
    ),
}


def with_key(key: str) -> dict[str, Any]:
    return {"metadata": [("authorization", f"Bearer {key}")]}


async def test_each_service_asks_for_its_own_scope(system: System, admin: grpc.aio.Channel) -> None:
    assert set(CALLS) == set(ADMIN_SCOPES)
    for scope in ADMIN_SCOPES:
        key = system.create_key("ops", scopes=(scope,))
        for asked, call in CALLS.items():
            if asked == scope:
                await call(admin, **with_key(key))
                continue
            with refused() as refusal:
                await call(admin, **with_key(key))
            assert refusal.summary[:2] == (DENIED, "METHOD_NOT_ALLOWED"), (scope, asked)


@pytest.mark.parametrize("asked", CALLS)
async def test_without_credentials_operators_are_known_at_loopback_alone(
    asked: str, system: System, admin: grpc.aio.Channel
) -> None:
    with refused() as refusal:
        await CALLS[asked](admin)
    assert refusal.summary[:2] == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_MISSING")
    async with grpc.aio.insecure_channel(system.gateways[1].admin_address) as open_one:
        await CALLS[asked](open_one)
        with refused() as refusal:  # what a caller brings counts, also where it need not bring any
            await CALLS[asked](open_one, **with_key(system.key))
        assert refusal.code is DENIED


async def test_nobody_grants_more_administration_than_it_has(system: System, admin: grpc.aio.Channel) -> None:
    stub: api_key_pb2_grpc.ApiKeyServiceAsyncStub = api_key_pb2_grpc.ApiKeyServiceStub(admin)
    own = with_key(system.create_key("ops", scopes=("admin.keys",)))
    wish = api_key_pb2.CreateApiKeyRequest(tenant="ops", grants=grants_pb2.Grants(scopes=[grants_pb2.SCOPE_ADMIN_KEYS]))
    made = await stub.CreateApiKey(wish, **own)
    more = grants_pb2.Grants(scopes=[grants_pb2.SCOPE_GENERATE, grants_pb2.SCOPE_ADMIN_FLEET])
    for call in (
        stub.CreateApiKey(api_key_pb2.CreateApiKeyRequest(tenant="ops", grants=more), **own),
        stub.UpdateApiKey(api_key_pb2.UpdateApiKeyRequest(key_id=made.api_key.key_id, grants=more), **own),
    ):
        with refused() as refusal:
            await call
        assert refusal.summary[:2] == (DENIED, "SCOPE_NOT_ALLOWED")


@pytest.mark.parametrize("method", ["RotateApiKey", "UpdateApiKey", "RevokeApiKey"])
async def test_a_key_that_may_do_more_is_not_changed(method: str, system: System, admin: grpc.aio.Channel) -> None:
    """Else who may make keys would have every right, by rotating the administrator's."""
    stub: Any = api_key_pb2_grpc.ApiKeyServiceStub(admin)
    own = with_key(system.create_key("ops", scopes=("admin.keys",)))
    stronger, equal = (system.create_key("ops", scopes=scopes) for scopes in (ADMIN_SCOPES, ("admin.keys",)))
    request: Any = getattr(api_key_pb2, f"{method}Request")
    with refused() as refusal:
        await getattr(stub, method)(request(key_id=stronger.split("_")[1]), **own)
    assert refusal.summary[:2] == (DENIED, "SCOPE_NOT_ALLOWED")
    await CALLS["admin.fleet"](admin, **with_key(stronger))
    await getattr(stub, method)(request(key_id=equal.split("_")[1]), **own)


async def test_a_whole_key_names_itself_and_is_written_nowhere(system: System, admin: grpc.aio.Channel) -> None:
    stub: api_key_pb2_grpc.ApiKeyServiceAsyncStub = api_key_pb2_grpc.ApiKeyServiceStub(admin)
    own = with_key(system.create_key("ops", scopes=("admin.keys",)))
    whole, mistyped = system.create_key("brief"), system.create_key("brief")[:-1] + "!"
    revoked = await stub.RevokeApiKey(api_key_pb2.RevokeApiKeyRequest(key_id=whole), **own)
    assert revoked.api_key.key_id == whole.split("_")[1]
    with refused() as refusal:
        await stub.RevokeApiKey(api_key_pb2.RevokeApiKeyRequest(key_id=mistyped), **own)
    assert refusal.reason == "API_KEY_NOT_FOUND"
    log = system.gateways[0].log()
    assert "RevokeApiKey" in log
    assert not any(key.split("_")[2] in log for key in (whole, mistyped))


@pytest.mark.parametrize(
    ("seconds", "nanos"), [(253_402_300_799, 999_999_999), (10**15, 0), (-5, 0), (7_300_000_000, 0), (2**33, -1)]
)
async def test_a_time_that_is_none_is_refused_and_the_list_stays(
    seconds: int, nanos: int, system: System, admin: grpc.aio.Channel
) -> None:
    stub: api_key_pb2_grpc.ApiKeyServiceAsyncStub = api_key_pb2_grpc.ApiKeyServiceStub(admin)
    usage: usage_pb2_grpc.UsageServiceAsyncStub = usage_pb2_grpc.UsageServiceStub(admin)
    own = with_key(system.create_key("ops", scopes=("admin.keys", "admin.usage")))
    moment = Timestamp(seconds=seconds, nanos=nanos)
    with refused() as refusal:
        await stub.CreateApiKey(api_key_pb2.CreateApiKeyRequest(tenant="a", expire_time=moment), **own)
    assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["expire_time"])
    with refused() as refusal:
        await usage.QueryUsage(usage_pb2.QueryUsageRequest(end_time=moment), **own)
    assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["end_time"])
    assert (await stub.ListApiKeys(api_key_pb2.ListApiKeysRequest(), **own)).api_keys


@pytest.mark.parametrize(
    ("grants", "field"),
    [
        (grants_pb2.Grants(scopes=[99]), "grants.scopes[0]"),  # type: ignore[list-item]
        (grants_pb2.Grants(priorities=[9]), "grants.priorities[0]"),  # type: ignore[list-item]
        (grants_pb2.Grants(models=["a*b"]), "grants.models[0]"),
        (grants_pb2.Grants(models=[""]), "grants.models[0]"),
        (grants_pb2.Grants(caps=grants_pb2.Caps(max_tokens=0)), "grants.caps.max_tokens"),
        (grants_pb2.Grants(quotas=grants_pb2.Quotas(max_live=1 << 50)), "grants.quotas.max_live"),
    ],
    ids=range(6),
)
async def test_bad_grants_are_named(
    grants: grants_pb2.Grants, field: str, system: System, admin: grpc.aio.Channel
) -> None:
    stub: api_key_pb2_grpc.ApiKeyServiceAsyncStub = api_key_pb2_grpc.ApiKeyServiceStub(admin)
    key = with_key(system.create_key("ops", scopes=("admin.keys",)))
    with refused() as refusal:
        await stub.CreateApiKey(api_key_pb2.CreateApiKeyRequest(tenant="a", grants=grants), **key)
    assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tenant": "No Caps"}, "tenant.tenant"),
        ({"tenant": "a", "weight": 0.0}, "tenant.weight"),
        ({"tenant": "a", "weight": float("nan")}, "tenant.weight"),
        ({"tenant": "a", "trust_group": "x\n"}, "tenant.trust_group"),
    ],
    ids=range(4),
)
async def test_bad_tenants_are_named(
    fields: dict[str, Any], field: str, system: System, admin: grpc.aio.Channel
) -> None:
    stub: tenant_pb2_grpc.TenantServiceAsyncStub = tenant_pb2_grpc.TenantServiceStub(admin)
    key = with_key(system.create_key("ops", scopes=("admin.tenants",)))
    with refused() as refusal:
        await stub.SetTenant(tenant_pb2.SetTenantRequest(tenant=tenant_pb2.Tenant(**fields)), **key)
    assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])


async def test_the_first_key_is_made_once(redis: Redis) -> None:
    await execute(redis, "DEL", keys.FIRST_ADMIN_KEY)
    key = await first_admin_key(redis, "operators")
    assert set((await ApiKeys(redis).verify(key)).grants.scopes) == set(ADMIN_SCOPES)
    with pytest.raises(FailedPrecondition, match="--again"):
        await first_admin_key(redis, "operators")
    other = await first_admin_key(redis, "operators", again=True)
    assert other != key
    await execute(redis, "DEL", keys.FIRST_ADMIN_KEY)
    racing = await asyncio.gather(*(first_admin_key(redis, "operators") for _ in range(4)), return_exceptions=True)
    assert sum(isinstance(outcome, FailedPrecondition) for outcome in racing) == 3
    assert sum(isinstance(outcome, str) for outcome in racing) == 1


# -- the command


class Verbs:
    """Runs verbs against the admin port that asks for credentials, as an operator with all scopes."""

    def __init__(self, app: typer.Typer, system: System) -> None:
        self._app = app
        self._env = {
            "TORCHRELAY_ADDRESS": system.gateways[0].address,
            "TORCHRELAY_API_KEY": system.key,
            "TORCHRELAY_ADMIN_ADDRESS": system.gateways[0].admin_address,
            "TORCHRELAY_ADMIN_KEY": system.create_key("ops", scopes=ADMIN_SCOPES),
            "COLUMNS": "200",
        }

    def __call__(self, *args: str, status: int = 0, **env: str) -> Any:
        result = CliRunner(env={**self._env, **env}).invoke(self._app, args)
        assert result.exit_code == status, result.output
        return result


@pytest.fixture
def run(system: System) -> Verbs:
    return Verbs(make_app(), system)


def test_a_key_is_made_with_rights_and_rotated(run: Verbs) -> None:
    arguments = "--scope generate --scope admin.usage --model tiny --priority low --max-tokens 9 --max-grace 1.5"
    secret = run(
        "keys",
        "create",
        "acme",
        *arguments.split(),
        "--tokens-per-day",
        "1000",
        "--max-live",
        "3",
        "--max-outputs",
        "2",
    ).stdout.strip()
    key_id = secret.split("_")[1]

    def stored(wanted: str) -> dict[str, Any]:
        lines = run("keys", "list", "--tenant", "acme", "--json").stdout.splitlines()
        return next(key for key in map(json.loads, lines) if key["key_id"] == wanted)

    grants = stored(key_id)["grants"]
    assert grants == {
        "scopes": ["SCOPE_GENERATE", "SCOPE_ADMIN_USAGE"],
        "models": ["tiny"],
        "priorities": ["PRIORITY_LOW"],
        "caps": {"max_tokens": 9, "max_outputs": 2, "max_disconnect_grace": "1.500s"},
        "quotas": {"tokens_per_day": "1000", "max_live": "3"},
    }
    rotated = run("keys", "rotate", key_id, "--overlap-hours", "1")
    assert f"{key_id} works until" in rotated.stderr
    new = stored(rotated.stdout.split("_")[1])
    assert (new["rotated_from"], new["grants"]) == (key_id, grants)
    assert "expire_time" in stored(key_id)
    assert "expire_time" not in new
    row = next(line for line in run("keys", "list").stdout.splitlines() if line.startswith(key_id))
    assert row.split()[1:3] == ["acme", "active"]
    assert "generate,admin.usage" in row
    assert "--scope" in run("keys", "create", "acme", "--scope", "everything", status=2).stderr
    assert "--priority" in run("keys", "create", "acme", "--priority", "first", status=2).stderr


def test_both_keys_of_a_rotation_draw_on_one_quota(run: Verbs, system: System) -> None:
    old = run("keys", "create", "turning", "--requests-per-minute", "2").stdout.strip()
    new = run("keys", "rotate", old.split("_")[1]).stdout.strip()

    async def ask(key: str) -> str:
        request = pb.GenerateRequest(
            model=MODEL, input=pb.GenerationInput(text="hello"), config=pb.GenerationConfig(max_tokens=1)
        )
        async with system.client(system.gateways[0]) as client:
            try:
                await client.generation.Generate(request, **with_key(key))
            except grpc.aio.AioRpcError as error:
                return from_rpc_error(error).reason
        return ""

    assert [asyncio.run(ask(key)) for key in (old, new, old, new)] == ["", "", "RATE_LIMITED", "RATE_LIMITED"]


def test_a_tenant_is_set_listed_and_deleted(run: Verbs) -> None:
    run("tenants", "set", "weighty", "--weight", "3", "--trust-group", "house", "--max-retention", "60")
    row = next(line for line in run("tenants", "list").stdout.splitlines() if line.startswith("weighty"))
    assert row.split() == ["weighty", "3", "house", "-", "-", "-"]
    (stored,) = [one for line in run("tenants", "list", "--json").stdout.splitlines() if (one := json.loads(line))]
    assert stored["max_retention"] == "60s"
    run("tenants", "delete", "weighty")
    assert "TENANT_NOT_FOUND" in run("tenants", "delete", "weighty", status=1).stderr


def test_usage_is_shown_and_erasing_leaves_it(run: Verbs) -> None:
    answer = json.loads(run("generate", "hello", "-m", MODEL, "--max-tokens", "3", "--json").stdout)
    generation_id = answer["generation_id"]
    assert run("erase", generation_id).stdout == f"{generation_id} erased\n"
    assert "REQUEST_NOT_FOUND" in run("erase", generation_id, status=1).stderr
    refused = run("generate", "hello", "-m", MODEL, "--priority", "high", status=1)
    assert "PRIORITY_NOT_ALLOWED" in refused.stderr
    assert "--priority" in run("generate", "hello", "-m", MODEL, "--priority", "urgent", status=2).stderr
    rows = [
        line.split()
        for line in run("usage", "--tenant", "tests", "--by", "tenant", "--by", "model").stdout.splitlines()
    ]
    assert rows[0] == ["TENANT", "MODEL", "GENERATIONS", "PROMPT", "CACHED", "COMPLETION"]
    assert rows[1][:2] == ["tests", MODEL]
    assert int(rows[1][2]) >= 1
    assert "--by" in run("usage", "--by", "colour", status=2).stderr


def test_an_operators_key_is_not_sent_in_the_clear_to_another_machine(run: Verbs) -> None:
    result = run("tenants", "list", status=2, TORCHRELAY_ADMIN_ADDRESS="gateway.example:50052")
    assert "--tls-ca" in result.stderr


def test_the_verb_says_what_scope_was_missing(run: Verbs, system: System) -> None:
    result = run("tenants", "list", status=1, TORCHRELAY_ADMIN_KEY=system.key)
    assert "may not call this method" in result.stderr
