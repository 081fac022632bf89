"""Parts for tests of identity: an authority with certificates, an issuer with tokens, and its key server."""

from __future__ import annotations

import base64
import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

ISSUER = "https://issuer.example"
AUDIENCE = "torchrelay"


def pem_of_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, PEM."""

    cert: bytes
    key: bytes

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Put both into files; return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        cert, key = folder / f"{name}.pem", folder / f"{name}.key"
        cert.write_bytes(self.cert)
        key.write_bytes(self.key)
        return cert, key


class Authority:
    """Signs certificates."""

    def __init__(self, name: str = "test authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
        self._certificate = (
            _builder(self._name, self._name, self._key, -3600, 86400)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    @property
    def pem(self) -> bytes:
        return self._certificate.public_bytes(Encoding.PEM)

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "ca.pem"
        path.write_bytes(self.pem)
        return path

    def issue(
        self,
        *,
        common_name: str = "",
        uris: tuple[str, ...] = (),
        hosts: tuple[str, ...] = (),
        valid_from_s: float = -60,
        valid_for_s: float = 3600,
    ) -> Pair:
        """A certificate for servers and clients; times are from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else [])
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
        for host in hosts:
            names.append(x509.IPAddress(ip_address(host)) if host[0].isdigit() else x509.DNSName(host))
        builder = _builder(subject, self._name, key, valid_from_s, valid_for_s).add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        authority_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = builder.add_extension(authority_id, critical=False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=not common_name)
        return Pair(builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM), pem_of_key(key))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, from_s: float, for_s: float
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(seconds=from_s))
        .not_valid_after(now + timedelta(seconds=for_s))
    )


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@dataclass
class Issuer:
    """Issues tokens, signed with keys by id."""

    name: str = ISSUER
    keys: dict[str, Any] = field(
        default_factory=lambda: {
            "rsa": rsa.generate_private_key(65537, 2048),
            "ec": ec.generate_private_key(ec.SECP256R1()),
            "ed": ed25519.Ed25519PrivateKey.generate(),
        }
    )

    @staticmethod
    def algorithm_of(key: Any) -> str:
        return {"RSA": "RS256", "EC": "ES256", "OKP": "EdDSA"}[jwk_of(key)["kty"]]

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Good claims, changed; None takes one away."""
        now = int(time.time())
        claims = {"iss": self.name, "aud": AUDIENCE, "sub": "robot", "tenant": "acme", "iat": now, "exp": now + 300}
        return {name: value for name, value in (claims | changes).items() if value is not None}

    def token(self, key_id: str = "ec", *, header: dict[str, Any] | None = None, key: Any = None, **claims: Any) -> str:
        """A token, by default one that counts."""
        signer = self.keys[key_id] if key is None else key
        headers = {"kid": key_id} | (header or {})
        return jwt.encode(self.claims(**claims), signer, self.algorithm_of(signer), headers=headers)

    def key_set(self) -> dict[str, Any]:
        return {"keys": [jwk_of(key) | {"kid": key_id} for key_id, key in self.keys.items()]}


def jwk_of(key: Any) -> dict[str, Any]:
    """The public half of a key as a JWK."""
    for algorithm in ("RS256", "ES256", "EdDSA"):
        try:
            found = jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key(), as_dict=True)  # type: ignore[call-overload]
        except (TypeError, ValueError, AttributeError, jwt.exceptions.PyJWTError):
            continue
        return {name: value for name, value in found.items() if name in ("kty", "n", "e", "crv", "x", "y")}
    raise AssertionError("no such key")


@dataclass
class KeyServer:
    """An HTTP server on loopback: what it answers may be changed at any time, and its requests are counted."""

    url: str = ""
    documents: dict[str, Any] = field(default_factory=dict)  # by path: JSON, or bytes as they are
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)


@contextmanager
def running_key_server(files: tuple[Path, Path] | None = None) -> Iterator[KeyServer]:
    """Over TLS where certificate and key are given."""
    state = KeyServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.paths.append(self.path)
            document = state.documents.get(self.path)
            self.send_response(state.status if document is not None else 404)
            body = document if isinstance(document, bytes) else json.dumps(document).encode()
            for name, value in state.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        if files is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*files)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        state.url = f"http{'' if files is None else 's'}://127.0.0.1:{server.server_address[1]}"
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
