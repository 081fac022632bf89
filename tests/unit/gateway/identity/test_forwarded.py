"""x-forwarded-client-cert: as Envoy writes it, from whom it counts, and which part of it."""

from __future__ import annotations

import pytest

from common.errors import Unauthenticated
from common.grants import Grants
from gateway.identity import xfcc
from gateway.identity.caller import CallInfo, Principal
from gateway.identity.certificates import CertificateMethod, PeerNames, names_of
from gateway.identity.forwarded import HEADER, ForwardedCertificateMethod
from gateway.identity.patterns import CertificateNames, TenantPattern
from gateway.identity.proxies import TrustedProxies
from tests.builders_identity import Authority

HASH = "Hash=" + "ab" * 32
ACME = "URI=spiffe://prod/ns/acme/sa/web"
ROOT = "URI=spiffe://prod/ns/root/sa/web"
EDGE = "spiffe://prod/ns/edge/sa/proxy"
SIDECAR = "By=spiffe://prod/ns/relay/sa/gateway"
PROXY = "ipv4:10.1.2.3:4711"
STRANGER = "ipv4:10.2.2.3:4711"
PATTERNS = [TenantPattern("spiffe://prod/ns/{tenant}/sa/*"), TenantPattern("CN={tenant}")]
PROXIES = TrustedProxies(("10.1.0.0/16", EDGE))
GRANTS = Grants(scopes=("generate",))
AUTHORITY = Authority()


def method() -> ForwardedCertificateMethod:
    return ForwardedCertificateMethod(PATTERNS, GRANTS, PeerNames(), PROXIES)


def certificate_of(uri: str) -> dict[str, list[bytes]]:
    return {"x509_pem_cert": [AUTHORITY.issue(uris=(uri,)).cert]}


async def identify(*headers: str, peer: str = PROXY, uri: str = "") -> Principal | None:
    context = certificate_of(uri) if uri else {}
    return await method().identify(CallInfo([(HEADER, header) for header in headers], peer, context))


async def test_a_trusted_proxy_names_the_tenant() -> None:
    principal = await identify(f'{SIDECAR};{HASH};Subject="";{ACME}')
    assert principal is not None
    assert (principal.tenant, principal.grants, principal.method) == ("acme", GRANTS, "mesh")
    assert principal.credential_id.startswith("mesh.")


async def test_a_proxy_is_known_by_its_own_certificate() -> None:
    assert await identify(f"{HASH};{ACME}", peer=STRANGER) is None
    assert await identify(f"{HASH};{ACME}", peer=STRANGER, uri="spiffe://prod/ns/edge/sa/other") is None
    principal = await identify(f"{HASH};{ACME}", peer=STRANGER, uri=EDGE)
    assert principal is not None
    assert principal.tenant == "acme"


@pytest.mark.parametrize("peer", [STRANGER, "unix:", "ipv6:[::1]:5", ""])
async def test_from_anybody_else_the_header_is_as_if_it_were_not_there(peer: str) -> None:
    assert await identify(f"{HASH};{ACME}", peer=peer) is None
    assert await identify('"', peer=peer) is None


@pytest.mark.parametrize(
    ("header", "tenant"),
    [
        # APPEND_FORWARD: what the caller brought along stands first
        (f"{HASH};{ROOT},{SIDECAR};{HASH};{ACME}", "acme"),
        (f"{HASH};{ROOT},{HASH};{ROOT},{SIDECAR};{HASH};{ACME}", "acme"),
        # two proxies: the last is about the first, so the first's own word counts
        (f"{HASH};{ACME},{SIDECAR};{HASH};URI={EDGE}", "acme"),
        (f"{HASH};{ROOT},{HASH};{ACME},{SIDECAR};{HASH};URI={EDGE}", "acme"),
        (f"{ACME},URI={EDGE},URI={EDGE}", "acme"),
        # a trusted proxy by itself speaks for nobody
        (f"{SIDECAR};{HASH};URI={EDGE}", None),
        # a well-formed name of nobody
        (f"{ACME},{HASH};URI=spiffe://other/ns/acme/sa/web", None),
        (f"{ACME},{HASH}", None),
        (f'{ACME},{HASH};Subject=""', None),
        (f"{HASH};{ACME};URI=spiffe://prod/ns/root/sa/web", None),
        ('Subject="CN=acme,OU=x"', "acme"),
        ('subject="OU=x,CN=acme";HASH=ab', "acme"),
        ('Subject="O=CN\\=root,CN=acme"', "acme"),
        ('Subject="O=\\"\\,CN=root\\",CN=acme"', "acme"),
        ('Subject="O=\\",CN=root,CN=acme"', None),
        ('Subject="CN=acme,CN=root"', None),
        ('Subject="CN=acme+CN=root"', None),
        ('Subject="CN=a\\\\"', None),
        (f'Subject="no name at all";{ACME}', "acme"),
        (f'Subject="CN=root";{ACME}', "acme"),
        (f'Cert="-----BEGIN%20CERTIFICATE-----%0A";{ACME};DNS=x;DNS=y', "acme"),
        ('uri="spiffe://prod/ns/acme/sa/web"', "acme"),
        (f'Subject="CN=x\\",{ROOT}";{ACME}', "acme"),
    ],
)  # fmt: skip
async def test_whose_word_counts(header: str, tenant: str | None) -> None:
    principal = await identify(header)
    assert (principal and principal.tenant) == tenant


@pytest.mark.parametrize(
    "header",
    [
        "",
        ",",
        ";",
        "=",
        "URI",
        f"{ACME},",
        f"{ACME};",
        f",{ACME}",
        f";{ACME}",
        f"{ACME},,{ACME}",
        f"{ACME}, {ACME}",
        f" {ACME}",
        "=spiffe://prod/ns/acme/sa/web",
        "U RI=spiffe://prod/ns/acme/sa/web",
        '"URI"=spiffe://prod/ns/acme/sa/web',
        'URI="spiffe://prod/ns/acme/sa/web',
        'URI="spiffe://prod/ns/acme/sa/web"x',
        'URI=spiffe"://prod/ns/acme/sa/web',
        'Subject="CN=a\\"',
        'Subject="CN=a"b"',
        "Subject=CN=acme",
        'Subject="CN=acme";Subject="CN=root"',
        f"{ACME}\n",
        f"{ACME}\x00",
        f"{ACME}\x7f",
        "URI=spiffe://prod/ns/acmé/sa/web",
        ";".join(["DNS=x"] * 65),
        ",".join([ACME] * 33),
        f"DNS={'x' * 9000};{ACME}",
    ],
    ids=range(29),
)
async def test_what_no_proxy_writes_is_refused(header: str) -> None:
    with pytest.raises(Unauthenticated) as raised:
        await identify(header)
    assert (raised.value.message, raised.value.reason) == ("the credentials are not valid", "CREDENTIALS_INVALID")


async def test_two_headers_are_refused() -> None:
    with pytest.raises(Unauthenticated):
        await identify(ACME, ACME)


async def test_a_call_without_the_header_bears_no_credential_of_this_kind() -> None:
    assert await identify() is None


def test_values_keep_their_escapes() -> None:
    (element,) = xfcc.parse('Subject="CN=a\\\\,O=\\"x;y\\"";uri=u;URI=v')
    assert element.values("subject") == ('CN=a\\\\,O=\\"x;y\\"',)
    assert element.values("uri") == ("u", "v")


def direct() -> CertificateMethod:
    return CertificateMethod(PATTERNS, GRANTS, PeerNames(), PROXIES)


async def test_a_connection_s_certificate_names_the_tenant() -> None:
    call = CallInfo([], STRANGER, certificate_of("spiffe://prod/ns/acme/sa/web"))
    principal = await direct().identify(call)
    assert principal is not None
    assert (principal.tenant, principal.grants, principal.method) == ("acme", GRANTS, "certificate")
    assert principal.credential_id.startswith("cert.")
    assert await direct().identify(CallInfo([], STRANGER)) is None


@pytest.mark.parametrize(("peer", "uri"), [(STRANGER, EDGE), (PROXY, "spiffe://prod/ns/acme/sa/web")])
async def test_a_trusted_proxy_s_certificate_is_nobody_s_credential(peer: str, uri: str) -> None:
    assert await direct().identify(CallInfo([], peer, certificate_of(uri))) is None


def test_the_names_in_a_certificate() -> None:
    pair = AUTHORITY.issue(common_name="acme", uris=("spiffe://a/b", "https://x"), hosts=("h.example", "10.0.0.1"))
    assert names_of(pair.cert) == CertificateNames(("spiffe://a/b", "https://x"), ("acme",))
    assert names_of(AUTHORITY.issue(common_name="acme").cert) == CertificateNames((), ("acme",))
    assert names_of(b"no certificate") == CertificateNames()
