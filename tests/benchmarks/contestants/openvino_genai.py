"""OpenVINO GenAI's continuous batching pipeline. The model is a folder that optimum-intel exported."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.contestants.base import KV_CACHE_MIB, Contestant, Output, Score, main
from tests.benchmarks.workload import MAX_RUNNING, Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--inference-precision", default="bf16", help="bf16, f16 or f32; weights are as exported")


class OpenvinoGenai(Contestant):
    """Split fuse and prefix caching on; 256 batched tokens was the best of those tried."""

    def __init__(self, args: argparse.Namespace) -> None:
        import numpy
        import openvino
        import openvino_genai

        self._numpy, self._openvino, self._genai = numpy, openvino, openvino_genai
        self._folder = Path(args.model)
        self._properties = {
            "INFERENCE_NUM_THREADS": args.threads,
            "INFERENCE_PRECISION_HINT": args.inference_precision,
            "PERFORMANCE_HINT": "LATENCY",
        }
        scheduling = openvino_genai.SchedulerConfig()
        scheduling.cache_size = KV_CACHE_MIB >> 10
        scheduling.max_num_seqs = MAX_RUNNING
        scheduling.max_num_batched_tokens = 256
        scheduling.dynamic_split_fuse = True
        scheduling.enable_prefix_caching = True
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            args.model, scheduler_config=scheduling, device="CPU", properties=self._properties
        )
        self._num_requests = 0
        self.info = {
            "openvino_genai": openvino_genai.__version__,
            "inference_precision": args.inference_precision,
            "threads": args.threads,
            "kv_cache_mib": KV_CACHE_MIB,
            "token_budget": scheduling.max_num_batched_tokens,
        }

    def _add(self, request: Request) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = request.max_tokens
        config.ignore_eos = True
        config.do_sample = False
        self._num_requests += 1
        token_ids = self._numpy.array([request.prompt], dtype=self._numpy.int64)
        return self._pipeline.add_request(self._num_requests, self._openvino.Tensor(token_ids), config)

    @staticmethod
    def _drain(handle: Any, output: Output) -> None:
        while handle.can_read():
            for piece in handle.read().values():
                output.token_ids += piece.generated_ids

    def batch(self, requests: Sequence[Request], max_running: int) -> list[Output]:
        handles, outputs = [self._add(request) for request in requests], [Output() for _ in requests]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        for handle, output in zip(handles, outputs, strict=True):
            self._drain(handle, output)
        return outputs

    def stream(self, request: Request) -> Output:
        handle, output = self._add(request), Output()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            num_before = len(output.token_ids)
            self._drain(handle, output)
            output.times += [time.perf_counter()] * (len(output.token_ids) - num_before)
        return output

    def score(self, windows: Sequence[list[int]]) -> list[Score]:
        """Of the exported model itself, since the pipeline tells no probabilities of a given token."""
        numpy = self._numpy
        core = self._openvino.Core()
        compiled = core.compile_model(core.read_model(self._folder / "openvino_model.xml"), "CPU", self._properties)
        request, scores = compiled.create_infer_request(), []
        for window in windows:
            request.reset_state()
            token_ids = numpy.array([window], dtype=numpy.int64)
            inputs = {
                "input_ids": token_ids,
                "attention_mask": numpy.ones_like(token_ids),
                "position_ids": numpy.arange(len(window), dtype=numpy.int64)[None],
                "beam_idx": numpy.zeros(1, dtype=numpy.int32),
            }
            names = {name for port in compiled.inputs for name in port.get_names()}
            result = request.infer({name: value for name, value in inputs.items() if name in names})
            logits = numpy.asarray(result["logits"], dtype=numpy.float64)[0, len(window) // 2 : -1]
            top = logits.max(axis=1, keepdims=True)
            logprobs = logits - top - numpy.log(numpy.exp(logits - top).sum(axis=1, keepdims=True))
            nexts = window[len(window) // 2 + 1 :]
            scores.append(Score(logprobs[numpy.arange(len(nexts)), nexts].tolist(), logits.argmax(axis=1).tolist()))
        return scores


if __name__ == "__main__":
    main(OpenvinoGenai, add_arguments)
