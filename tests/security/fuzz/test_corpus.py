"""What the fuzzers have found and kept is replayed by every run of the tests, without a fuzzer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common import records
from tests.security.fuzz import seeds, targets
from tests.security.fuzz.targets import REQUEST_TYPES, TARGETS

CORPUS = Path(__file__).parents[1] / "corpus"


def inputs(target: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]


@pytest.mark.parametrize("target", TARGETS)
def test_the_kept_corpus_breaks_no_law(target: str) -> None:
    assert len(inputs(target)) >= 6
    for data in inputs(target):
        TARGETS[target](data)


@pytest.mark.parametrize("target", TARGETS)
def test_good_inputs_are_good_and_their_beginnings_break_no_law(target: str) -> None:
    for data in seeds.of(target):
        for end in range(len(data) + 1):
            TARGETS[target](data[:end])


def test_every_request_of_every_service_is_parsed() -> None:
    names = {kind.DESCRIPTOR.name for kind in REQUEST_TYPES}
    assert {"GenerateRequest", "StreamGenerateRequest", "TokenizeRequest", "CreateApiKeyRequest"} <= names
    assert all(name.endswith("Request") for name in names)
    assert len({data[0] for data in seeds.of("parser")}) == len(REQUEST_TYPES)


def test_the_corpus_stays_small() -> None:
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) <= 300 * 1024


def parse_unguarded(deserialize: Callable[[bytes], Any], data: bytes) -> Any:
    return deserialize(data)


def decode_unguarded(decoder: Any, data: bytes) -> Any:
    return decoder.decode(data)


def key_of_unguarded(metadata: list[tuple[str, str | bytes]]) -> str:
    return next(str(value) for name, value in metadata if name == "authorization").split(" ")[1]


MUTANTS: dict[str, tuple[str, Any, str, Callable[..., Any]]] = {
    "parser": ("parser", targets, "parse", parse_unguarded),
    "codec": ("codec", records, "decode", decode_unguarded),
    "credentials": ("credentials", targets, "api_key_of", key_of_unguarded),
    "checksum": ("credentials", targets, "id_of", lambda key: key[3:15]),
}


@pytest.mark.parametrize(("target", "module", "name", "broken"), MUTANTS.values(), ids=MUTANTS.keys())
def test_without_a_guard_the_kept_corpus_breaks_the_law(
    monkeypatch: pytest.MonkeyPatch, target: str, module: Any, name: str, broken: Callable[..., Any]
) -> None:
    monkeypatch.setattr(module, name, broken)

    def breaks(data: bytes) -> bool:
        try:
            TARGETS[target](data)
        except Exception:  # noqa: BLE001 - any is a broken law
            return True
        return False

    assert any(map(breaks, inputs(target)))
