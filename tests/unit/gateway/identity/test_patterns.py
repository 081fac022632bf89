"""From certificates' names to tenants, and which peers may speak for others."""

from __future__ import annotations

import pytest

from gateway.identity.patterns import CertificateNames, Holder, TenantPattern, holder_of, is_spiffe_id
from gateway.identity.proxies import TrustedProxies, address_of

MESH = TenantPattern("spiffe://prod/ns/{tenant}/sa/*")


@pytest.mark.parametrize(
    ("pattern", "names", "tenant"),
    [
        ("spiffe://prod/ns/{tenant}/sa/*", CertificateNames(("spiffe://prod/ns/acme/sa/web",)), "acme"),
        ("spiffe://prod/ns/{tenant}/sa/*", CertificateNames(("spiffe://prod/ns/a.b-c_9/sa/W",), ("x",)), "a.b-c_9"),
        ("spiffe://prod/team-{tenant}.eu", CertificateNames(("spiffe://prod/team-acme.eu",)), "acme"),
        ("spiffe://prod/{tenant}", CertificateNames(("spiffe://prod/acme",)), "acme"),
        ("CN={tenant}", CertificateNames((), ("acme",)), "acme"),
        ("CN={tenant}", CertificateNames(("spiffe://prod/x",), ("acme",)), "acme"),
        ("CN=team-{tenant}.eu", CertificateNames((), ("team-acme.eu",)), "acme"),
    ],
)
def test_a_pattern_finds_the_tenant(pattern: str, names: CertificateNames, tenant: str) -> None:
    holder = TenantPattern(pattern).holder(names)
    assert holder is not None
    assert holder.tenant == tenant


@pytest.mark.parametrize(
    "uri",
    [
        "spiffe://prod/ns/acme/sa/",
        "spiffe://prod/ns/acme/sa/web/extra",
        "spiffe://prod/ns/acme/sa/web/",
        "spiffe://prod/ns//sa/web",
        "spiffe://prod/ns/acme/x/sa/web",
        "spiffe://prod/ns/Acme/sa/web",
        "spiffe://prod/ns/" + "a" * 65 + "/sa/web",
        "spiffe://prod/ns/../sa/web",
        "spiffe://prod/ns/acme/sa/..",
        "spiffe://prod/ns/acme%2F/sa/web",
        "spiffe://prod/ns/acme/sa/web?x=1",
        "spiffe://prod/ns/acme/sa/web#x",
        "spiffe://prod:80/ns/acme/sa/web",
        "spiffe://user@prod/ns/acme/sa/web",
        "spiffe://prod.evil/ns/acme/sa/web",
        "spiffe://staging/ns/acme/sa/web",
        "SPIFFE://prod/ns/acme/sa/web",
        "https://prod/ns/acme/sa/web",
        "spiffe://prod/ns/acme\n/sa/web",
        "spiffe://prod/ns/acme/sa/web\n",
        "spiffe://prod/ns/acmé/sa/web",
        " spiffe://prod/ns/acme/sa/web",
        "",
    ],
)
def test_what_does_not_fit_names_nobody(uri: str) -> None:
    assert MESH.holder(CertificateNames((uri,))) is None


def test_two_uris_are_no_spiffe_id() -> None:
    good = "spiffe://prod/ns/acme/sa/web"
    assert MESH.holder(CertificateNames((good,))) is not None
    assert MESH.holder(CertificateNames((good, "spiffe://prod/ns/root/sa/web"))) is None
    assert MESH.holder(CertificateNames((good, "https://x"))) is None


@pytest.mark.parametrize("common_names", [(), ("acme", "root"), ("Acme",), ("acme\n",), ("",), ("xacme",)])
def test_common_names_are_taken_whole_and_alone(common_names: tuple[str, ...]) -> None:
    pattern = TenantPattern("CN={tenant}" if "xacme" not in common_names else "CN=y{tenant}")
    assert pattern.holder(CertificateNames((), common_names)) is None


def test_the_first_pattern_that_fits_counts() -> None:
    patterns = [MESH, TenantPattern("CN={tenant}")]
    both = CertificateNames(("spiffe://prod/ns/acme/sa/web",), ("other",))
    assert holder_of(both, patterns) == Holder("acme", "spiffe://prod/ns/acme/sa/web")
    assert holder_of(both, patterns[::-1]) == Holder("other", "other")
    assert holder_of(CertificateNames(), patterns) is None


def test_a_credential_is_named_after_what_it_says() -> None:
    one, other = Holder("acme", "spiffe://prod/ns/acme/sa/web"), Holder("acme", "spiffe://prod/ns/acme/sa/api")
    assert one.credential_id("cert") != other.credential_id("cert")
    assert one.credential_id("mesh") == "mesh." + one.credential_id("cert").removeprefix("cert.")
    assert len(one.credential_id("cert")) == len("cert.") + 16


@pytest.mark.parametrize(
    "pattern",
    [
        "spiffe://prod/ns/acme/sa/*",
        "spiffe://prod/{tenant}/{tenant}",
        "spiffe://{tenant}/ns",
        "spiffe://*/ns/{tenant}",
        "spiffe://Prod/{tenant}",
        "spiffe://prod/ns/x*/{tenant}",
        "spiffe://prod/ns/**/{tenant}",
        "spiffe://prod//{tenant}",
        "spiffe://prod/{tenant}/",
        "spiffe://prod/(a|b)/{tenant}",
        "CN=*{tenant}",
        "O={tenant}",
        "{tenant}",
        "",
    ],
)
def test_a_pattern_that_is_none_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"must|a part"):
        TenantPattern(pattern)


@pytest.mark.parametrize("text", ["spiffe://a", "spiffe://a/b/c.d_e-F", "spiffe://prod.example-1/x"])
def test_spiffe_ids(text: str) -> None:
    assert is_spiffe_id(text)
    assert not is_spiffe_id(text + "/")
    assert not is_spiffe_id(text + "/x" * 1100)


PROXIES = TrustedProxies(("10.1.0.0/16", "192.0.2.7", "2001:db8::/48", "spiffe://prod/ns/mesh/sa/edge"))


@pytest.mark.parametrize(
    "peer",
    [
        "ipv4:10.1.2.3:4711",
        "ipv4:192.0.2.7:1",
        "ipv6:[2001:db8::9]:4711",
        "ipv6:%5B2001:db8::9%5D:4711",
        "ipv6:[::ffff:10.1.2.3]:4711",
        "ipv6:%5B::ffff:192.0.2.7%5D:4711",
    ],
)
def test_peers_in_the_networks_are_trusted(peer: str) -> None:
    assert PROXIES.trusts(peer)
    assert not TrustedProxies().trusts(peer)


@pytest.mark.parametrize(
    "peer",
    [
        "ipv4:10.2.0.1:4711",
        "ipv4:192.0.2.8:4711",
        "ipv6:[2001:db8:1::]:1",
        "ipv6:[::1]:1",
        "ipv6:[::10.1.2.3]:1",
        "unix:",
        "unix:/run/10.1.2.3",
        "unknown",
        "",
        "ipv4:",
        "ipv4:10.1.2.3",
        "dns:10.1.2.3:1",
        "ipv4:10.1.2.3.evil.example:1",
        "ipv4:010.001.002.003:1",
    ],
)
def test_other_peers_are_not(peer: str) -> None:
    assert not PROXIES.trusts(peer)


def test_a_proxy_is_known_by_its_certificate() -> None:
    assert PROXIES.trusts("ipv4:203.0.113.1:1", "spiffe://prod/ns/mesh/sa/edge")
    assert not PROXIES.trusts("ipv4:203.0.113.1:1", "spiffe://prod/ns/mesh/sa/edge2")
    assert not PROXIES.trusts("ipv4:203.0.113.1:1", None)


def test_a_socket_in_the_file_system_is_trusted_by_that_word_alone() -> None:
    assert TrustedProxies(("unix:",)).trusts("unix:")
    assert TrustedProxies(("unix:",)).trusts("unix:/run/relay.sock")
    assert not TrustedProxies(("unix:",)).trusts("ipv4:127.0.0.1:1")


@pytest.mark.parametrize(
    "entry",
    ["0.0.0.0/0", "::/0", "10.1.2.3/16", "10.0.0.0/33", "gateway", "*", "spiffe://", "spiffe://a/", "unix:/x", ""],
)
def test_an_entry_that_is_none_or_everybody_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match=r"not a|everybody"):
        TrustedProxies((entry,))


def test_the_address_of_a_peer() -> None:
    assert str(address_of("ipv6:%5Bfe80::1%25eth0%5D:1")) == "fe80::1"
    assert address_of("unix:") is None
