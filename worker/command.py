"""`torchrelay worker`, `torchrelay models register` and `torchrelay models check`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

ModelOption = Annotated[str, typer.Option("--model", "-m", help="`demo`, a directory, or a Hub id.")]
ModelNameOption = Annotated[str, typer.Option("--model-name", help="Name that requests use.")]
RevisionOption = Annotated[str, typer.Option("--revision", help="Branch, tag or commit of a Hub id.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
RedisOption = Annotated[
    str, typer.Option("--redis-url", help="redis://, rediss://, unix:// or redis+sentinel:// address.")
]

models = typer.Typer()


def worker(
    model: ModelOption = "",
    model_name: ModelNameOption = "",
    revision: RevisionOption = "",
    dtype: DtypeOption = "",
    device: DeviceOption = "",
    redis_url: RedisOption = "",
    metrics_address: Annotated[str, typer.Option("--metrics-address", help="HTTP for Prometheus and probes.")] = "",
    profile: Annotated[int, typer.Option("--profile", min=0, help="Write a Chrome trace of so many steps.")] = 0,
    profile_file: Annotated[str, typer.Option("--profile-file", help="Where; default torchrelay-trace.json.")] = "",
) -> None:
    """Run one worker.

    The rest is set by TORCHRELAY_WORKER_*, _ENGINE_*, _REDIS_*, _QUEUE_*, _METRICS_*, _TRACING_* and _LOG_* variables.
    """
    _set(model, model_name, revision, dtype, redis_url, device)
    if metrics_address:
        os.environ["TORCHRELAY_WORKER_METRICS_ADDRESS"] = metrics_address
    if profile:
        os.environ["TORCHRELAY_WORKER_PROFILE_STEPS"] = str(profile)
    if profile_file:
        os.environ["TORCHRELAY_WORKER_PROFILE_FILE"] = profile_file
    from worker.__main__ import main  # the command's help needs no torch

    raise typer.Exit(main())


@models.command("register")
def register(
    model: ModelOption = "demo",
    model_name: ModelNameOption = "",
    revision: RevisionOption = "",
    dtype: DtypeOption = "",
    redis_url: RedisOption = "",
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="NAME=DIR", help="A LoRA adapter in PEFT's format; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Publish a model without serving it: requests for it wait until a worker starts."""
    _set(model, model_name, revision, dtype, redis_url)
    from worker.publishing import register_model  # the command's help needs no torch

    raise typer.Exit(register_model(as_json=as_json, adapters=adapter or ()))


@models.command("check")
def check(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A directory, a Hub id, or `demo`.")],
    revision: RevisionOption = "",
    dtype: DtypeOption = "",
    device: DeviceOption = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Load a model as a worker would and report how it can be served; status 78 if it cannot."""
    _set(model, "", revision, dtype, "", device)
    from worker.model_check import check_model_dir  # the command's help needs no torch

    raise typer.Exit(check_model_dir(as_json=as_json))


def _set(model: str, model_name: str, revision: str, dtype: str, redis_url: str, device: str = "") -> None:
    given = {
        "TORCHRELAY_WORKER_MODEL": model,
        "TORCHRELAY_WORKER_MODEL_NAME": model_name,
        "TORCHRELAY_WORKER_REVISION": revision,
        "TORCHRELAY_WORKER_DTYPE": dtype,
        "TORCHRELAY_WORKER_DEVICE": device,
        "TORCHRELAY_REDIS_URL": redis_url,
    }
    os.environ.update({name: value for name, value in given.items() if value})
