"""Makes the first administrator's key and writes it into a Secret of the cluster, so that no log ever holds it.

Run by the bootstrap Job: bootstrap.py SECRET TENANT. Does nothing where the Secret has a key already. That the Secret
can be written is tried before the key is made, since a key that cannot be stored is lost.
"""

import json
import os
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

_ACCOUNT = Path(os.environ.get("SERVICE_ACCOUNT_DIR", "/var/run/secrets/kubernetes.io/serviceaccount"))
_TIMEOUT_S = 10
_STORE_S = 60.0


class Secret:
    """One Secret, through the cluster's API."""

    def __init__(self, name: str) -> None:
        host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
        namespace = (_ACCOUNT / "namespace").read_text().strip()
        host = f"[{host}]" if ":" in host else host
        self._url = f"https://{host}:{port}/api/v1/namespaces/{namespace}/secrets/{name}"
        self._tls = ssl.create_default_context(cafile=str(_ACCOUNT / "ca.crt"))

    def read(self) -> dict[str, str]:
        return self._ask("GET").get("data") or {}

    def write(self, entries: dict[str, str], *, dry_run: bool = False) -> None:
        self._ask("PATCH", {"stringData": entries}, "?dryRun=All" if dry_run else "")

    def _ask(self, method: str, body: object = None, query: str = "") -> dict:
        token = (_ACCOUNT / "token").read_text().strip()
        request = urllib.request.Request(
            self._url + query,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/merge-patch+json"},
        )
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=self._tls) as answer:
            return json.load(answer)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def main(name: str, tenant: str) -> int:
    secret = Secret(name)
    if secret.read().get("key"):
        _say(f"Secret {name} has a key already.")
        return 0
    secret.write({"key": "tried"}, dry_run=True)
    made = subprocess.run(["torchrelay", "bootstrap", tenant], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        sys.stderr.write(made.stderr)
        return 1
    end = time.monotonic() + _STORE_S
    while True:
        try:
            secret.write({"key": made.stdout.strip()})
        except OSError as error:  # of which urllib's are a kind
            if time.monotonic() > end:
                _say(f"the key was made and could not be stored ({error}): it is lost. Make another by hand:")
                _say(f"torchrelay bootstrap {tenant} --again")
                return 1
            time.sleep(1)
        else:
            _say(f"The first administrator's key is in Secret {name}.")
            return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
