"""Fetches small JSON documents of an identity provider; blocking, to be called in a thread."""

from __future__ import annotations

import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final

from gateway.identity.settings import is_fetchable

MAX_BYTES: Final = 1 << 20
_CHUNK: Final = 1 << 16
_DISCOVERY: Final = "/.well-known/openid-configuration"


class FetchError(Exception):
    """A document could not be had; the message names no more than the kind of failure."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect could lead from TLS to plaintext, or into the cluster's inside: it is an error."""

    def redirect_request(self, *_: Any) -> None:
        return None


def fetch_json(url: str, timeout_s: float, ca_file: Path | None = None) -> Any:
    """Return the JSON behind a URL. Raises FetchError, also for more than MAX_BYTES or after `timeout_s`."""
    if not is_fetchable(url):
        raise FetchError("the URL is neither https nor on loopback")
    end = time.monotonic() + timeout_s
    handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
    if url.startswith("http:"):
        handlers.append(urllib.request.ProxyHandler({}))  # loopback is not reached through others
    try:
        context = ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
        opener = urllib.request.build_opener(*handlers, urllib.request.HTTPSHandler(context=context))
        request = urllib.request.Request(url, headers={"Accept": "application/json", "User-Agent": "torchrelay"})
        with opener.open(request, timeout=timeout_s) as response:
            body = b""
            while chunk := response.read1(_CHUNK):
                body += chunk
                if len(body) > MAX_BYTES:
                    raise FetchError(f"the answer is larger than {MAX_BYTES} bytes")
                if time.monotonic() > end:  # drop by drop, no single read would time out
                    raise FetchError("the answer takes too long")
        return json.loads(body)
    except urllib.error.HTTPError as error:
        error.close()
        raise FetchError(f"HTTP status {error.code}") from None
    except (OSError, HTTPException, ValueError, RecursionError) as error:
        raise FetchError(type(error).__name__) from error


def read_json(path: Path) -> Any:
    """Return the JSON in a file. Raises FetchError."""
    try:
        with path.open("rb") as file:
            body = file.read(MAX_BYTES + 1)
        if len(body) > MAX_BYTES:
            raise FetchError(f"the file is larger than {MAX_BYTES} bytes")
        return json.loads(body)
    except (OSError, ValueError, RecursionError) as error:
        raise FetchError(type(error).__name__) from error


def discover(issuer: str, timeout_s: float, ca_file: Path | None = None) -> str:
    """Return where an issuer's keys are (OpenID Connect Discovery 1.0, section 4). Raises FetchError."""
    document = fetch_json(issuer.rstrip("/") + _DISCOVERY, timeout_s, ca_file)
    if not isinstance(document, dict) or document.get("issuer") != issuer:
        raise FetchError("the discovery document is another issuer's")
    url = document.get("jwks_uri")
    if not isinstance(url, str):
        raise FetchError("the discovery document names no keys")
    return url


def source_of_keys(
    *, issuer: str, url: str = "", file: Path | None = None, timeout_s: float = 5, ca_file: Path | None = None
) -> Callable[[], Any]:
    """A function that gets a JSON Web Key Set from a file, a URL, or where the issuer says. It raises FetchError."""
    if file is not None:
        return lambda: read_json(file)
    if url:
        return lambda: fetch_json(url, timeout_s, ca_file)
    return lambda: fetch_json(discover(issuer, timeout_s, ca_file), timeout_s, ca_file)
