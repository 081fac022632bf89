from __future__ import annotations

import pytest
from pydantic import ValidationError

from common.redis import connect
from common.sentinel import SentinelAddress, parse_sentinel_url
from common.settings import RedisSettings


def test_an_address_is_taken_apart() -> None:
    found = parse_sentinel_url("redis+sentinel://us%40er:p%3Aw@a:1,b.example,[::1]:3/my%20master/5")
    sentinels = (("a", 1), ("b.example", 26379), ("::1", 3))
    assert found == SentinelAddress(sentinels, "my master", 5, "us@er", "p:w", False)
    assert parse_sentinel_url("rediss+sentinel://a/m") == SentinelAddress((("a", 26379),), "m", is_tls=True)
    assert parse_sentinel_url("redis+sentinel://:pw@a/m/").password == "pw"


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://", "redis+sentinel://a", "redis+sentinel://a/", "redis+sentinel://a/m/x",
        "redis+sentinel://a:b/m", "redis+sentinel://a:0/m", "redis+sentinel://a:65536/m", "redis+sentinel://a,,b/m",
        "redis+sentinel://::1/m", "redis+sentinel:a/m", "redis+sentinel://a/m/1/2",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_at_the_start(url: str) -> None:
    with pytest.raises(ValueError, match="sentinel address"):
        parse_sentinel_url(url)
    with pytest.raises(ValidationError):
        RedisSettings(url=url)


def test_a_refusal_does_not_repeat_the_password() -> None:
    with pytest.raises(ValueError, match="sentinel address") as caught:
        parse_sentinel_url("redis+sentinel://u:s3cret@a:b/m")
    assert "s3cret" not in str(caught.value)


async def test_connections_have_our_options_and_each_side_its_credentials() -> None:
    settings = RedisSettings(
        url="redis+sentinel://inurl:inurl@a:1,b:2/m/3",
        username="worker",
        password="pw",
        sentinel_username="watcher",
        sentinel_password="spw",
    )
    client = connect(settings)
    pool = client.connection_pool
    assert pool.service_name == "m"
    servers = pool.connection_kwargs
    assert (servers["db"], servers["username"], servers["password"]) == (3, "worker", "pw")
    assert [s.connection_pool.connection_kwargs["port"] for s in pool.sentinel_manager.sentinels] == [1, 2]
    sentinels = pool.sentinel_manager.sentinels[0].connection_pool.connection_kwargs
    assert (sentinels["username"], sentinels["password"]) == ("watcher", "spw")
    for options in (servers, sentinels):
        assert options["protocol"] == 3
        assert options["socket_timeout"] == 3.0
        assert options["socket_connect_timeout"] == 2.0
        assert options["retry"].get_retries() == 0
    await client.aclose()


async def test_tls_holds_for_sentinels_and_servers() -> None:
    client = connect(RedisSettings(url="rediss+sentinel://u:p@a/m", tls_check_hostname=False))
    pool = client.connection_pool
    kinds = {
        pool.connection_class.__name__.removeprefix("Lean"),
        pool.sentinel_manager.sentinels[0].connection_pool.connection_class.__name__,
    }
    assert kinds == {"SentinelManagedSSLConnection", "SSLConnection"}
    assert pool.connection_kwargs["ssl_check_hostname"] is False
    assert (pool.connection_kwargs["username"], pool.connection_kwargs["password"]) == ("u", "p")
    await client.aclose()
