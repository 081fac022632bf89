"""The gateway's certificates: read at start, and again whenever their files change.

A pair that is broken, half-written or expired is never taken: the last good one serves on, and the log says so once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import structlog
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

log = structlog.get_logger()

_Identity: TypeAlias = tuple[tuple[int, int, int], ...]  # of each file: inode, size, time of its last change in ns


class CertificateError(ValueError):
    """Certificates cannot be used; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Certificates:
    """A sound chain with its key, and who signs clients' certificates (empty: they are not asked for)."""

    chain: bytes
    key: bytes
    client_ca: bytes
    not_after: datetime


def read_certificates(cert_file: Path, key_file: Path, client_ca_file: Path | None, now: datetime) -> Certificates:
    """Read and check what a server shows and trusts. Raises CertificateError."""
    chain, key = _read(cert_file), _read(key_file)
    try:
        certificate = x509.load_pem_x509_certificates(chain)[0]
    except ValueError:
        raise CertificateError(f"{cert_file}: holds no PEM certificate, or a broken one") from None
    try:
        public_key = load_pem_private_key(key, None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise CertificateError(f"{key_file}: holds no PEM private key without a passphrase") from None
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if public_key.public_bytes(*form) != certificate.public_key().public_bytes(*form):
        raise CertificateError(f"{key_file}: not the key of the certificate in {cert_file}")
    if now >= certificate.not_valid_after_utc:
        raise CertificateError(f"{cert_file}: expired at {certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}")
    if now < certificate.not_valid_before_utc:
        raise CertificateError(f"{cert_file}: not valid before {certificate.not_valid_before_utc:%Y-%m-%dT%H:%M:%SZ}")
    client_ca = b"" if client_ca_file is None else _read(client_ca_file)
    if client_ca_file is not None:
        try:
            x509.load_pem_x509_certificates(client_ca)
        except ValueError:
            raise CertificateError(f"{client_ca_file}: holds no PEM certificate, or a broken one") from None
    return Certificates(chain, key, client_ca, certificate.not_valid_after_utc)


class ServerCertificates:
    """The certificates in force. `configuration` and `changed` may be called from any thread.

    Raises CertificateError at once if the files cannot be used. `now` is the clock.
    """

    def __init__(
        self,
        cert_file: Path,
        key_file: Path,
        client_ca_file: Path | None = None,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._cert_file = cert_file
        self._key_file = key_file
        self._client_ca_file = client_ca_file
        self._now = now
        self._lock = threading.Lock()
        self._identity = self._look()
        self._refused: _Identity | None = None  # what was said to be broken
        self._current = self._read()

    def reload(self) -> Certificates:
        """Return the certificates in force, new ones if the files have changed and are sound."""
        with self._lock:
            identity = self._look()
            if identity == self._identity:
                return self._current
            try:
                fresh = self._read()
            except CertificateError as error:
                # Tried again at each handshake: the other file may still be on its way, or its time may come.
                if identity != self._refused:
                    self._refused = identity
                    log.error("tls.certificate_refused", error=str(error), kept_until=f"{self._current.not_after}")
                return self._current
            if self._look() == identity:  # else somebody writes just now: the next handshake looks again
                self._identity = identity
            self._refused = None
            if fresh != self._current:
                self._current = fresh
                log.info("tls.certificate_loaded", file=str(self._cert_file), not_after=f"{fresh.not_after}")
            return self._current

    def credentials(self, *, require_client: bool) -> grpc.ServerCredentials:
        """Credentials for one port, which ask for the certificates in force at every handshake.

        Each port needs its own: the library spends the first configuration on the first port.
        """
        used = self._current

        def fetch() -> Any:  # a configuration, or None for no change, which the library's types leave out
            nonlocal used
            current = self.reload()
            if current is used:
                return None
            used = current
            return _configuration(current, with_clients=require_client)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(used, with_clients=require_client), fetch, require_client_authentication=require_client
        )

    def _look(self) -> _Identity:
        files = (self._cert_file, self._key_file, self._client_ca_file)
        return tuple(_identity(file) for file in files if file is not None)

    def _read(self) -> Certificates:
        return read_certificates(self._cert_file, self._key_file, self._client_ca_file, self._now())


def _configuration(certificates: Certificates, *, with_clients: bool) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(certificates.key, certificates.chain)], certificates.client_ca if with_clients else None
    )


def _identity(file: Path) -> tuple[int, int, int]:
    try:
        found = os.stat(file)
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_size, found.st_mtime_ns)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CertificateError(f"{file}: {error.strerror}") from None
