"""Encryption of what callers wrote and models answered, as it lies in the queue's server: job bodies and events.

AES-256-GCM. The key of a generation is derived (HKDF-SHA-256, RFC 5869) in two steps from one of the deployment's
master keys: first the tenant's data key, then the generation's own, so that random 96-bit nonces never come near the
number at which one key would see one twice (NIST SP 800-38D: 2**32 messages). A sealed record is

    0xc1  version 1  length of key id  key id  nonce 12  ciphertext and tag 16

and is bound to its place: generation id and label (which record of it) are authenticated with it, so that a record
moved elsewhere does not open. 0xc1 never begins a msgpack value: a plain record is told apart by its first byte.
"""

from __future__ import annotations

import base64
import binascii
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, Self

import structlog
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from common.errors import SealBroken

log = structlog.get_logger()

KEY_BYTES: Final = 32
_MAGIC: Final = b"\xc1\x01"
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
_MAX_KEY_ID_BYTES: Final = 32
_LOOK_AGAIN_S: Final = 5.0  # how soon a changed file of keys is noticed


class EncryptionSettings(BaseSettings):
    """Whether and with which keys records are sealed, from TORCHRELAY_ENCRYPTION_* variables."""

    model_config = SettingsConfigDict(env_prefix="TORCHRELAY_ENCRYPTION_", frozen=True)
    keys_file: Path | None = Field(
        default=None,
        description="Master keys, one a line: id, space, 32 bytes in base64 (openssl rand -base64 32). The first "
        "seals, all of them open. Read again when it changes. Unset: nothing is encrypted.",
    )
    seal: bool = Field(
        default=True,
        description="Encrypt what is written. false: encrypted records are read, plain ones written, until every "
        "process has the keys.",
    )
    accept_plaintext: bool = Field(
        default=False, description="Read records that are not encrypted too, while encryption is being introduced."
    )

    @model_validator(mode="after")
    def _reads_what_it_writes(self) -> Self:
        if self.keys_file is not None and not self.seal and not self.accept_plaintext:
            raise ValueError("seal=false writes plain records: it needs accept_plaintext=true, to read them again")
        return self


@dataclass(frozen=True, slots=True)
class MasterKeys:
    """The deployment's keys by id, the sealing one first."""

    by_id: Mapping[str, bytes]

    @property
    def active_id(self) -> str:
        return next(iter(self.by_id))


def parse_keys(text: str) -> MasterKeys:
    """Read a file of master keys. Raises ValueError with the line's number, never with what stands in it."""
    found: dict[str, bytes] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        key_id = words[0]
        if len(words) != 2 or not 1 <= len(key_id.encode()) <= _MAX_KEY_ID_BYTES or key_id in found:
            raise ValueError(f"line {number} of the encryption keys is not: id, space, key, with an id of its own")
        try:
            key = base64.b64decode(words[1], validate=True)
        except binascii.Error:
            key = b""
        if len(key) != KEY_BYTES:
            raise ValueError(f"the key in line {number} of the encryption keys is not {KEY_BYTES} bytes in base64")
        found[key_id] = key
    if not found:
        raise ValueError("the file of encryption keys holds no key")
    return MasterKeys(found)


def _read_keys(path: Path) -> MasterKeys:
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:  # whose own text shows a byte of it
        raise ValueError("the file of encryption keys is not a text in UTF-8") from None
    return parse_keys(text)


class KeyFile:
    """Master keys in a file that an operator may change while we run: to rotate, a key is added, then put first.

    A file that is broken is not taken: the keys before it serve on, and the log says so once.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises OSError or ValueError for a file that cannot be read or understood."""
        self._path = path
        self._clock = clock
        self._version = self._look()
        self._keys = _read_keys(path)
        self._refused: str | None = None  # what was said of the file as it is
        self._looked_at = clock()

    def keys(self) -> MasterKeys:
        """The keys as of the last seconds; those before while the file is broken."""
        if self._clock() - self._looked_at >= _LOOK_AGAIN_S:
            self._looked_at = self._clock()
            try:
                self._take()
            except OSError as error:
                self._refuse(error.strerror or type(error).__name__)
            except ValueError as error:
                self._refuse(str(error))
        return self._keys

    def _take(self) -> None:
        version = self._look()
        if version != self._version:
            self._keys = _read_keys(self._path)
            self._version = version
            log.info("encryption.keys_loaded", num_keys=len(self._keys.by_id), active=self._keys.active_id)
        self._refused = None

    def _refuse(self, why: str) -> None:
        if why != self._refused:  # it may be half-written only: the next look finds it whole
            self._refused = why
            log.error("encryption.keys_refused", file=str(self._path), error=why, kept=list(self._keys.by_id))

    def _look(self) -> tuple[int, int, int]:
        status = os.stat(self._path)
        return status.st_mtime_ns, status.st_size, status.st_ino


class Sealer:
    """Seals and opens records. Without keys it leaves plain ones as they are, and opens no others.

    With `seal` false it opens what others seal, and writes plain records.
    """

    def __init__(
        self, keys: Callable[[], MasterKeys] | None = None, *, seal: bool = True, accept_plaintext: bool = True
    ) -> None:
        self._keys = keys
        self._seals = seal and keys is not None
        self._accept_plaintext = accept_plaintext or keys is None
        self._tenant_key = lru_cache(maxsize=1024)(_tenant_key)

    @classmethod
    def from_settings(cls, settings: EncryptionSettings) -> Sealer:
        """Raises ValueError for keys that cannot be read."""
        if settings.keys_file is None:
            return cls()
        try:
            keys = KeyFile(settings.keys_file).keys
            return cls(keys, seal=settings.seal, accept_plaintext=settings.accept_plaintext)
        except OSError as error:
            raise ValueError(f"TORCHRELAY_ENCRYPTION_KEYS_FILE cannot be read: {error.strerror}") from error

    def of(self, tenant: str, generation_id: str) -> GenerationSealer:
        """What seals and opens the records of one generation."""
        return GenerationSealer(self, tenant, generation_id)

    @property
    def seals(self) -> bool:
        """Whether what is written is sealed."""
        return self._seals

    @property
    def accepts_plaintext(self) -> bool:
        return self._accept_plaintext

    def active_id(self) -> str:
        assert self._keys is not None
        return self._keys().active_id

    def cipher(self, key_id: str, tenant: str, generation_id: str) -> AESGCM:
        """The cipher of one generation under one master key. Raises SealBroken for a key that is not there."""
        master = self._keys().by_id.get(key_id) if self._keys is not None else None
        if master is None:
            raise SealBroken("a record is sealed with a key that is not configured", reason="ENCRYPTION_KEY_MISSING")
        return AESGCM(_derive(self._tenant_key(master, tenant), b"torchrelay generation\0" + generation_id.encode()))


class GenerationSealer:
    """Seals and opens the records of one generation; keeps its cipher."""

    __slots__ = ("_cipher", "_generation_id", "_key_id", "_sealer", "_tenant")

    def __init__(self, sealer: Sealer, tenant: str, generation_id: str) -> None:
        self._sealer = sealer
        self._tenant = tenant
        self._generation_id = generation_id
        self._key_id = ""
        self._cipher: AESGCM | None = None

    @property
    def seals(self) -> bool:
        return self._sealer.seals

    def seal(self, data: bytes, label: bytes) -> bytes:
        """Return the record of some data; `label` says which record of the generation it is."""
        if not self._sealer.seals:
            return data
        key_id = self._sealer.active_id()
        nonce = os.urandom(_NONCE_BYTES)
        name = key_id.encode()
        sealed = self._cipher_of(key_id).encrypt(nonce, data, self._place(label))
        return _MAGIC + bytes((len(name),)) + name + nonce + sealed

    def open(self, record: bytes, label: bytes) -> bytes:
        """Return the data of a record. Raises SealBroken."""
        if record[:1] != _MAGIC[:1]:
            self.check_plain()
            return record
        head = len(_MAGIC) + 1
        end_of_id = head + record[2] if len(record) > 2 else 0
        if record[:2] != _MAGIC or len(record) < end_of_id + _NONCE_BYTES + _TAG_BYTES:
            raise SealBroken("a sealed record is not whole")
        nonce, sealed = record[end_of_id : end_of_id + _NONCE_BYTES], record[end_of_id + _NONCE_BYTES :]
        cipher = self._cipher_of(record[head:end_of_id].decode(errors="replace"))
        try:
            return cipher.decrypt(nonce, sealed, self._place(label))
        except InvalidTag:
            raise SealBroken("a sealed record does not open: it was changed, or belongs elsewhere") from None

    def check_plain(self) -> None:
        """Raise SealBroken where a record that is not sealed is not to be believed."""
        if not self._sealer.accepts_plaintext:
            raise SealBroken("a record is not sealed, and plain ones are not accepted", reason="NOT_SEALED")

    def _place(self, label: bytes) -> bytes:
        return self._generation_id.encode() + b"\0" + label

    def _cipher_of(self, key_id: str) -> AESGCM:
        if self._cipher is None or self._key_id != key_id:
            self._cipher = self._sealer.cipher(key_id, self._tenant, self._generation_id)
            self._key_id = key_id
        return self._cipher


def _derive(key: bytes, info: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(key)


def _tenant_key(master: bytes, tenant: str) -> bytes:
    return _derive(master, b"torchrelay tenant\0" + tenant.encode())


PLAIN: Final = Sealer()
