"""What the commands share: options that every contestant of ours understands."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tests.benchmarks.bench import PRECISIONS, Bench, make_parser
from tests.benchmarks.contestants import engine
from tests.benchmarks.limits import WEIGHT_BYTES


@pytest.mark.parametrize(
    ("precision", "dtype", "quantization"),
    [
        ("bf16", "bfloat16", "none"),
        ("fp32", "float32", "none"),
        ("int8", "bfloat16", "int8"),
    ],
)
@pytest.mark.parametrize("speculation", [False, True])
def test_our_entries_say_what_the_engine_is_to_be(
    precision: str, dtype: str, quantization: str, speculation: bool
) -> None:
    bench = Bench.__new__(Bench)  # without a model
    bench.args = make_parser("").parse_args(["--kv-cache-mib", "64", *(["--speculation"] if speculation else [])])
    bench.model = Path("model")
    entry = bench.our_entry(precision)
    parser = argparse.ArgumentParser()
    engine.add_arguments(parser)
    args = parser.parse_args(entry.arguments)
    assert (args.dtype, args.quantization, args.kv_cache_mib) == (dtype, quantization, 64)
    assert args.speculation == speculation
    assert entry.is_ours


def test_every_precision_of_ours_has_a_limit() -> None:
    assert set(PRECISIONS) == set(WEIGHT_BYTES)
