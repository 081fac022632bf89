from __future__ import annotations

import pytest
import redis as redis_sync

from common import api_keys, keys
from common.api_keys import CACHE_MS, REFUSED_MS, ApiKeys, digest_of, generate_key
from common.errors import ApiKeyNotFound, BackendRefused, InvalidRequest, Unauthenticated
from tests.builders_common import FlakyRedis


class Clock:
    now_ms = 1000.0

    def __call__(self) -> float:
        return self.now_ms


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def admin(admin_redis: FlakyRedis) -> ApiKeys:
    return ApiKeys(admin_redis)


@pytest.fixture
def gateway(gateway_redis: FlakyRedis, clock: Clock) -> ApiKeys:
    return ApiKeys(gateway_redis, monotonic_ms=clock)


async def test_a_created_key_is_accepted_and_known_by_its_tenant(admin: ApiKeys, gateway: ApiKeys) -> None:
    created = await admin.create("acme", "laptop")
    verified = await gateway.verify(created.secret)
    assert verified == created.api_key
    assert (verified.tenant, verified.name) == ("acme", "laptop")
    assert created.secret.split("_")[2].endswith(verified.last_four)


async def test_the_server_never_holds_the_secret(admin: ApiKeys, superuser: redis_sync.Redis) -> None:
    created = await admin.create("acme", "laptop")
    secret = created.secret.split("_")[2].encode()
    for key in superuser.keys("*"):
        dumped = superuser.dump(key)
        assert dumped is not None
        assert secret not in dumped
        assert secret not in key


async def test_unknown_mistyped_expired_and_revoked_keys_get_one_answer(
    admin: ApiKeys, gateway: ApiKeys, superuser: redis_sync.Redis
) -> None:
    unknown, _ = generate_key()
    known = (await admin.create("acme", "a")).secret
    forged = (await admin.create("acme", "b")).secret
    superuser.hset(keys.api_key(forged.split("_")[1]), "digest", "0" * 64)
    expired = await admin.create("acme", "c", ttl_ms=10_000)
    superuser.hset(keys.api_key(expired.api_key.key_id), "expires_ms", 1)
    revoked = await admin.create("acme", "d")
    await admin.revoke(revoked.api_key.key_id)
    texts = set()
    for key in (unknown, known[:-1], known + "x", "", "Bearer x", forged, expired.secret, revoked.secret):
        with pytest.raises(Unauthenticated) as caught:
            await gateway.verify(key)
        texts.add((caught.value.reason, caught.value.message))
    assert len(texts) == 1


async def test_a_revoked_key_works_no_longer_than_the_cache(admin: ApiKeys, gateway: ApiKeys, clock: Clock) -> None:
    created = await admin.create("acme", "laptop")
    await gateway.verify(created.secret)
    await admin.revoke(created.api_key.key_id)
    clock.now_ms += CACHE_MS - 1
    await gateway.verify(created.secret)
    clock.now_ms += 1
    with pytest.raises(Unauthenticated):
        await gateway.verify(created.secret)


async def test_the_cache_does_not_outlive_the_key(admin: ApiKeys, gateway: ApiKeys, clock: Clock) -> None:
    created = await admin.create("acme", "laptop", ttl_ms=1000)
    await gateway.verify(created.secret)
    clock.now_ms += 1001
    await admin.revoke(created.api_key.key_id)  # what the server's clock would have done
    with pytest.raises(Unauthenticated):
        await gateway.verify(created.secret)


async def test_a_cached_key_costs_no_command(
    admin: ApiKeys, gateway: ApiKeys, gateway_redis: FlakyRedis, superuser: redis_sync.Redis
) -> None:
    created = await admin.create("acme", "laptop")
    await gateway.verify(created.secret)
    before = superuser.info("stats")["total_commands_processed"]
    for _ in range(50):
        await gateway.verify(created.secret)
    assert superuser.info("stats")["total_commands_processed"] - before <= 1  # the INFO itself


async def test_a_false_key_costs_two_commands_a_second(
    gateway: ApiKeys, superuser: redis_sync.Redis, clock: Clock
) -> None:
    false_key, _ = generate_key()

    async def commands(tries: int) -> int:
        before = superuser.info("stats")["total_commands_processed"]  # type: ignore[index]
        for _ in range(tries):
            with pytest.raises(Unauthenticated):
                await gateway.verify(false_key)
        return superuser.info("stats")["total_commands_processed"] - before - 1  # type: ignore[index,no-any-return]

    with pytest.raises(Unauthenticated):
        await gateway.verify(generate_key()[0])  # opens the connections
    assert await commands(50) == 2
    clock.now_ms += REFUSED_MS
    assert await commands(50) == 2


async def test_a_key_that_was_refused_is_accepted_a_second_after_it_became_good(
    admin: ApiKeys, gateway: ApiKeys, superuser: redis_sync.Redis, clock: Clock
) -> None:
    created = await admin.create("acme", "laptop")
    record = keys.api_key(created.api_key.key_id)
    digest = superuser.hget(record, "digest")
    superuser.hdel(record, "digest")
    with pytest.raises(Unauthenticated):
        await gateway.verify(created.secret)
    superuser.hset(record, "digest", digest)  # type: ignore[arg-type]
    clock.now_ms += REFUSED_MS - 1
    with pytest.raises(Unauthenticated):
        await gateway.verify(created.secret)
    clock.now_ms += 1
    assert (await gateway.verify(created.secret)) == created.api_key


async def test_refusals_that_are_remembered_are_bounded(gateway: ApiKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_keys, "_MAX_CACHED", 3)
    refused = [generate_key()[0] for _ in range(5)]
    for key in refused:
        with pytest.raises(Unauthenticated):
            await gateway.verify(key)
    assert list(gateway._refused) == [digest_of(key) for key in refused[2:]]


async def test_keys_are_listed_by_tenant_and_revoked_once(admin: ApiKeys) -> None:
    one = (await admin.create("a", "one")).api_key
    two = (await admin.create("b", "two", ttl_ms=5000)).api_key
    assert {key.key_id for key in await admin.list()} == {one.key_id, two.key_id}
    assert await admin.list("b") == [two]
    first = await admin.revoke(one.key_id)
    assert first.revoked_ms is not None
    assert await admin.revoke(one.key_id) == first
    assert await admin.list("a") == [first]
    with pytest.raises(ApiKeyNotFound):
        await admin.revoke("nothing")


@pytest.mark.parametrize(
    ("tenant", "name", "ttl_ms"), [("", "x", None), ("a", "", None), ("a\n", "x", 1), ("a", "x", 0)]
)
async def test_a_key_without_owner_name_or_life_is_refused(
    admin: ApiKeys, tenant: str, name: str, ttl_ms: int | None
) -> None:
    with pytest.raises(InvalidRequest):
        await admin.create(tenant, name, ttl_ms)


async def test_a_gateway_can_read_keys_but_not_make_them(gateway: ApiKeys) -> None:
    with pytest.raises(BackendRefused):
        await gateway.create("acme", "x")
