"""`torchrelay gateway`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer


def gateway(
    address: Annotated[str, typer.Option("--address", "-a", help="Where clients call, host:port.")] = "",
    admin_address: Annotated[str, typer.Option("--admin-address", help="Where operators call, host:port.")] = "",
    openai_address: Annotated[str, typer.Option("--openai-address", help="Where OpenAI's clients call.")] = "",
    health_address: Annotated[str, typer.Option("--health-address", help="Plaintext port for probes.")] = "",
    metrics_address: Annotated[str, typer.Option("--metrics-address", help="HTTP for Prometheus and probes.")] = "",
    redis_url: Annotated[
        str, typer.Option("--redis-url", help="redis://, rediss://, unix:// or redis+sentinel:// address.")
    ] = "",
    reflection: Annotated[bool | None, typer.Option("--reflection/--no-reflection", help="gRPC reflection.")] = None,
    insecure: Annotated[bool | None, typer.Option("--insecure", help="Allow plaintext beyond loopback.")] = None,
) -> None:
    """Run one gateway.

    Everything else is set by TORCHRELAY_GATEWAY_*, _AUTH_*, _REDIS_*, _QUEUE_*, _ENCRYPTION_*, _METRICS_*, _TRACING_*
    and _LOG_* variables and TORCHRELAY_TRUSTED_PROXIES.
    """
    given = {
        "TORCHRELAY_GATEWAY_ADDRESS": address,
        "TORCHRELAY_GATEWAY_ADMIN_ADDRESS": admin_address,
        "TORCHRELAY_GATEWAY_OPENAI_ADDRESS": openai_address,
        "TORCHRELAY_GATEWAY_HEALTH_ADDRESS": health_address,
        "TORCHRELAY_GATEWAY_METRICS_ADDRESS": metrics_address,
        "TORCHRELAY_REDIS_URL": redis_url,
        "TORCHRELAY_GATEWAY_REFLECTION": "" if reflection is None else str(reflection),
        "TORCHRELAY_GATEWAY_INSECURE": "" if insecure is None else str(insecure),
    }
    os.environ.update({name: value for name, value in given.items() if value})
    # Anew, with nothing loaded: the package sets what gRPC reads when it is imported, and this command's was before.
    # -P: not whatever is called gateway where the command is given.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "gateway"])


def bootstrap(
    tenant: Annotated[str, typer.Argument(help="Whom the key belongs to.")] = "operators",
    redis_url: Annotated[str, typer.Option("--redis-url", help="As the user that may write API keys.")] = "",
    again: Annotated[bool, typer.Option("--again", help="Make one although one was made before.")] = False,
) -> None:
    """Make the first administrator's key, straight in the store, and print it; once for a deployment."""
    if redis_url:
        os.environ["TORCHRELAY_REDIS_URL"] = redis_url
    from gateway.bootstrap import main

    raise typer.Exit(main(tenant, again=again))
