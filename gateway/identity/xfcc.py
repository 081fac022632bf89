"""The header x-forwarded-client-cert as Envoy writes it. Pure.

Elements by ',', each of `Key=value` pairs by ';'. Keys have no case. A value with ',', ';' or '=' in it stands in
double quotes, where a backslash makes the next character a plain one: Envoy escapes '"', and subjects are RFC 2253
strings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.x509.oid import NameOID

from gateway.identity.patterns import CertificateNames

MAX_CHARS: Final = 8192
_MAX_ELEMENTS: Final = 32
_MAX_PAIRS: Final = 64


@dataclass(frozen=True, slots=True)
class Element:
    """What one proxy says of its direct client."""

    pairs: tuple[tuple[str, str], ...]  # keys in lower case

    def values(self, key: str) -> tuple[str, ...]:
        return tuple(value for name, value in self.pairs if name == key)

    def names(self) -> CertificateNames:
        """The names of the client's certificate. Raises ValueError for two subjects."""
        uris = tuple(uri for uri in self.values("uri") if uri)
        subjects = self.values("subject")
        if len(subjects) > 1:
            raise ValueError("two subjects")
        return CertificateNames(uris, _common_names(subjects[0]) if subjects and subjects[0] else ())


def parse(header: str) -> list[Element]:
    """Return the elements, the first proxy's first. Raises ValueError for everything that Envoy would not write."""
    if not header or len(header) > MAX_CHARS or not header.isascii() or not header.isprintable():
        raise ValueError("empty, too long, or not printable ASCII")
    elements: list[Element] = []
    pairs: list[tuple[str, str]] = []
    at = 0
    while True:
        key, equals, _ = header[at:].partition("=")
        if not equals or not key.isalnum():
            raise ValueError("a pair without a key")
        value, at = _value(header, at + len(key) + 1)
        pairs.append((key.lower(), value))
        if len(pairs) > _MAX_PAIRS or len(elements) >= _MAX_ELEMENTS:
            raise ValueError("too many parts")
        if at == len(header):
            return [*elements, Element(tuple(pairs))]
        if header[at] == ",":
            elements.append(Element(tuple(pairs)))
            pairs = []
        elif header[at] != ";":
            raise ValueError("a quoted value that goes on behind its end")
        at += 1


def _value(header: str, start: int) -> tuple[str, int]:
    """A value and where it ends. Escapes in quotes stay as they are, for whoever knows what the value is."""
    if not header.startswith('"', start):
        end = start
        while end < len(header) and header[end] not in ",;":
            if header[end] in '"=':
                raise ValueError("a value that should stand in quotes")
            end += 1
        return header[start:end], end
    end = start + 1
    while end < len(header) and header[end] != '"':
        end += 2 if header[end] == "\\" else 1
    if end >= len(header):
        raise ValueError("a quote that does not end")
    return header[start + 1 : end], end + 1


def _common_names(subject: str) -> tuple[str, ...]:
    try:
        name = x509.Name.from_rfc4514_string(subject, {"emailAddress": NameOID.EMAIL_ADDRESS})
    except ValueError:
        return ()  # with attributes that are not known, say: then the URI alone may name a tenant
    return tuple(str(attribute.value) for attribute in name.get_attributes_for_oid(NameOID.COMMON_NAME))
