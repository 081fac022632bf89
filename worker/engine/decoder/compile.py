"""Turns a loaded model into a compiled decoder, if it is one and answers as before."""

from __future__ import annotations

import math
import time
from typing import Final

import structlog
import torch
from transformers import PreTrainedModel

from worker.engine import loadcheck
from worker.engine.attention.cpu_ext import CpuAttention
from worker.engine.closeness import TOLERANCE, Closeness
from worker.engine.decoder.layout import NotLlamaShaped, read_layout
from worker.engine.decoder.low_rank import read_places
from worker.engine.decoder.program import CompiledDecoder
from worker.engine.decoder.smoothing import observed_magnitudes
from worker.engine.host_memory import trim

_log = structlog.get_logger(__name__)

# Median over the tokens. Eight bits move logits by some hundredths up to a few tenths of their spread, a fault by about
# the whole of it.
_INT8_TOLERANCE: Final = 0.5


class DecoderDiffers(Exception):
    """The compiled decoder gives other logits than the model, whose weights it has taken: load the model again."""


@torch.inference_mode()
def compile_decoder(
    module: PreTrainedModel, backend: CpuAttention, num_positions: int, *, int8: bool = False
) -> CompiledDecoder:
    """Compile a model on the CPU. Its linear layers lose their weights to the decoder.

    The decoder's logits of packed, paged and chunked sequences are compared with those that the plain model gives to
    each alone. Raises NotLlamaShaped, with the model's weights untouched, or DecoderDiffers.
    """
    started = time.monotonic()
    if module.device.type != "cpu" or module.dtype not in TOLERANCE:
        raise NotLlamaShaped(f"{module.dtype} on {module.device} is not what the decoder computes with")
    probes = loadcheck.probe_attention(module)
    module.set_attn_implementation("eager")  # as it came, should the model be refused
    layout = read_layout(module, probes, num_positions)
    # Positions at both ends of the context: some models change what they do with distance.
    far = max(0, num_positions - loadcheck.LONGEST_TEST)
    with observed_magnitudes(layout) as magnitudes:
        expected = {first: loadcheck.plain_logits(module, first) for first in (0, far)}
    decoder = CompiledDecoder(layout, module.dtype, backend.kernels, int8=int8, magnitudes=magnitudes if int8 else None)
    decoder.places = read_places(layout, module)
    _let_go_of_files(module)
    trim()
    errors = [
        loadcheck.packed_error(decoder.bind, decoder.layer_shapes, module.dtype, backend, logits, first)
        for first, logits in expected.items()
    ]
    error = max(errors, key=lambda e: (math.isnan(e), e))
    tolerance = _INT8_TOLERANCE if int8 else TOLERANCE[module.dtype]
    if not error <= tolerance:
        raise DecoderDiffers(f"relative error of the logits {error:.2g}, allowed {tolerance:.2g}")
    decoder.closeness = Closeness(error, tolerance)
    _log.info("model.compiled", int8=int8, error=error, seconds=round(time.monotonic() - started, 1))
    return decoder


def _let_go_of_files(module: PreTrainedModel) -> None:
    """Copy what is left of the model's tensors: as views they would keep the mapped weight files in memory."""
    module.get_input_embeddings().weight = torch.nn.Parameter(torch.empty(0, dtype=module.dtype), requires_grad=False)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()
