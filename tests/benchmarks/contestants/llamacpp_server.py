"""llama.cpp: its own HTTP server with a slot for each request. The model is a GGUF file."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from common.children import die_with_parent
from tests.benchmarks.contestants.base import Contestant, Output, Score, main
from tests.benchmarks.workload import MAX_RUNNING, Request

_CONTEXT: Final = 73_728  # shared out evenly: 2,304 tokens a slot, enough for W3
_START_S: Final = 120.0
_SCORE_S: Final = 300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bin", type=Path, required=True, help="folder with llama-server and llama-perplexity")


class LlamaServer(Contestant):
    """Continuous batching with f16 keys and values, the client in this process."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._server = subprocess.Popen(
            [
                *(str(args.bin / "llama-server"), "-m", args.model, "--host", "127.0.0.1", "--port", str(self._port)),
                *("-t", str(args.threads), "-tb", str(args.threads), "-np", str(MAX_RUNNING), "-c", str(_CONTEXT)),
                "--no-webui",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=die_with_parent(),
        )
        self._wait_until_healthy()
        properties = self._call("GET", "/props")
        self.info = {
            "llama.cpp": properties.get("build_info"),
            "gguf": Path(args.model).name,
            "threads": args.threads,
            "slots": MAX_RUNNING,
            "context": _CONTEXT,
        }

    def _wait_until_healthy(self) -> None:
        end = time.monotonic() + _START_S
        while time.monotonic() < end:
            with contextlib.suppress(OSError, http.client.HTTPException):
                self._call("GET", "/health")
                return
            if self._server.poll() is not None:
                raise RuntimeError(f"llama-server ended with {self._server.returncode}")
            time.sleep(0.05)
        raise TimeoutError(f"llama-server is not ready after {_START_S:.0f} s")

    @contextlib.contextmanager
    def _response(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise http.client.HTTPException(f"{path}: {response.status} {response.read()[:300]!r}")
            yield response
        finally:
            connection.close()

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        with self._response(method, path, body) as response:
            return json.loads(response.read())

    @staticmethod
    def _completion(request: Request, *, stream: bool) -> dict[str, Any]:
        return {
            "prompt": request.prompt,
            "n_predict": request.max_tokens,
            "temperature": 0,
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": True,
            "cache_prompt": True,
            "return_tokens": True,
            "stream": stream,
        }

    def batch(self, requests: Sequence[Request], max_running: int) -> list[Output]:
        def one(request: Request) -> Output:
            return Output(self._call("POST", "/completion", self._completion(request, stream=False))["tokens"])

        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(one, requests))

    def stream(self, request: Request) -> Output:
        output = Output()
        with self._response("POST", "/completion", self._completion(request, stream=True)) as response:
            for line in response:
                if not line.startswith(b"data: "):
                    continue
                message = json.loads(line[6:])
                if message.get("stop"):
                    break
                token_ids = message.get("tokens") or []
                output.token_ids += token_ids
                output.times += [time.perf_counter()] * len(token_ids)
        return output

    def score(self, windows: Sequence[list[int]]) -> list[Score]:
        """By llama-perplexity, whose file of log-probabilities is read; the server tells none of a given token."""
        text = self._call("POST", "/detokenize", {"tokens": [token_id for window in windows for token_id in window]})
        with tempfile.TemporaryDirectory() as folder:
            text_path, logits_path = Path(folder) / "text", Path(folder) / "logits"
            text_path.write_text(text["content"])
            subprocess.run(
                [
                    *(str(self._args.bin / "llama-perplexity"), "-m", self._args.model, "-f", str(text_path)),
                    *("-c", str(len(windows[0])), "-b", str(len(windows[0])), "--chunks", str(len(windows))),
                    *("-t", str(self._args.threads), "--kl-divergence-base", str(logits_path)),
                ],
                check=True,
                stdout=subprocess.DEVNULL,
                timeout=_SCORE_S,
            )
            return read_logits(logits_path, windows)

    def close(self) -> None:
        self._server.terminate()
        self._server.wait(20)


def read_logits(path: Path, windows: Sequence[list[int]]) -> list[Score]:
    """Read llama-perplexity's file: for each position from a window's middle on, 16-bit log-probabilities.

        "_logits_" | context, vocabulary, windows: int32 | token ids: int32[windows, context]
        per window and position: scale, least: float32 | q: uint16[vocabulary rounded up to even]

    A log-probability is scale * q + least; those of tokens 16 below the best one are cut off there. Raises ValueError
    where the tool's tokens are not the windows'.
    """
    import numpy

    with path.open("rb") as file:
        if file.read(8) != b"_logits_":
            raise ValueError(f"{path} is no file of llama-perplexity")
        length, vocab_size, num_windows = numpy.fromfile(file, numpy.int32, 3).tolist()
        token_ids = numpy.fromfile(file, numpy.int32, num_windows * length).reshape(num_windows, length)
        if token_ids.tolist() != [list(window) for window in windows]:
            raise ValueError("llama.cpp tokenizes the text differently")
        width, scores = 4 + 2 * ((vocab_size + 1) // 2), []
        for window in windows:
            nexts = window[length // 2 + 1 :]
            rows = numpy.fromfile(file, numpy.uint16, len(nexts) * width).reshape(len(nexts), width)
            scale, least = rows[:, :4].copy().view(numpy.float32).T.astype(numpy.float64)
            quantized = rows[:, 4 : 4 + vocab_size]
            logprobs = scale * quantized[numpy.arange(len(nexts)), nexts] + least
            scores.append(Score(logprobs.tolist(), quantized.argmax(axis=1).tolist()))
    return scores


if __name__ == "__main__":
    main(LlamaServer, add_arguments)
