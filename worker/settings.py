"""What an operator sets of a worker, from TORCHRELAY_WORKER_* variables; the engine has its own settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class WorkerSettings(BaseSettings):
    """Which model to serve, where, and how to stop."""

    model_config = SettingsConfigDict(env_prefix="TORCHRELAY_WORKER_", frozen=True, protected_namespaces=())

    model: str = Field(default="demo", description="`demo`, a directory, or a Hub id.")
    model_name: str = Field(default="", description="Name that requests use; default: the last part of `model`.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a Hub id.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="Type of the weights.")
    quantization: Literal["none", "fp8", "int8", "int4"] = Field(
        default="none",
        description="Weights in 8 or 4 bits: int8 for Llama-shaped models on a CPU, any of them on a GPU.",
    )
    tool_format: Literal["auto", "hermes", "llama3", "mistral", "mistral11", "generic", "none"] = Field(
        default="auto", description="How the model writes tool calls; auto is by its chat template, none refuses tools."
    )
    reasoning_format: Literal["auto", "think", "magistral", "none"] = Field(
        default="auto", description="How the model marks its reasoning; auto is by its chat template."
    )
    tasks: str = Field(
        default="",
        description="Tasks of an encoder-decoder model, of generate, translate and summarize, between commas; default: "
        "what its files tell.",
    )
    adapters_dir: str = Field(
        default="",
        description="Folder of LoRA adapters in PEFT's format, each in a sub-directory of its name; watched.",
    )
    adapters_scan_s: float = Field(default=5, gt=0, description="How often to look whether adapters came or went.")
    max_loaded_adapters: int = Field(default=16, gt=0, description="Most adapters in memory at a time.")
    adapter_bytes: int = Field(default=1 << 30, gt=0, description="Memory for adapters, all together.")
    max_adapter_rank: int = Field(default=256, gt=0, description="Adapters of a higher rank are refused.")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N.")
    num_threads: int = Field(default=0, ge=0, description="Threads that compute on a CPU; 0 is one per physical core.")
    metrics_address: str = Field(
        default="",
        description="Plaintext HTTP for Prometheus and probes: /metrics, /healthz, /readyz; host:port, empty is none.",
    )
    max_jobs: int = Field(default=256, gt=0, description="Most generations held at a time.")
    max_events_per_s: int = Field(
        default=0,
        ge=0,
        description="Most messages a second, of all its streams together. Where steps would make more, each has tokens "
        "of several, of 0.2 s at most; first and last tokens never wait. 0: 100 for each thread that computes on a "
        "CPU, which messages take from the model, and one for each step on a GPU.",
    )
    profile_steps: int = Field(default=0, ge=0, description="Steps to write a trace of, once warm; 0 is none.")
    profile_file: str = Field(default="torchrelay-trace.json", description="Where to write that trace.")
    drain_s: float = Field(
        default=20, ge=0, description="After SIGTERM, how long held generations may still finish here."
    )
    hang_s: float = Field(default=120, gt=0, description="A step that takes longer than this ends the process.")
    preempt: bool = Field(
        default=True, description="Give lower classes' generations back where one of the highest class finds no room."
    )
