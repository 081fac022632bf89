"""What is sealed opens where it belongs, and nowhere else."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from common import records
from common.errors import SealBroken
from common.generation import EventBody, JobBody, OutputDelta, SamplingParams, Usage
from common.sealing import EncryptionSettings, KeyFile, MasterKeys, Sealer, parse_keys

OLD, NEW = bytes(range(32)), bytes(range(1, 33))
KEYS = MasterKeys({"new": NEW, "old": OLD})
SEALER = Sealer(lambda: KEYS, accept_plaintext=False)
TEXT = b"what a caller wrote, four score bytes of it or so"


def key_line(key_id: str, key: bytes) -> str:
    return f"{key_id} {base64.b64encode(key).decode()}\n"


@given(st.binary(max_size=300), st.text(max_size=20), st.text(max_size=20), st.binary(max_size=20))
def test_what_is_sealed_opens_again(data: bytes, tenant: str, generation_id: str, label: bytes) -> None:
    sealed = SEALER.of(tenant, generation_id).seal(data, label)
    assert SEALER.of(tenant, generation_id).open(sealed, label) == data
    assert len(data) < 8 or data not in sealed


@pytest.mark.parametrize(
    ("tenant", "generation_id", "label"),
    [("b", "g1", b"body"), ("a", "g2", b"body"), ("a", "g1", b"echo"), ("a", "g1\0body", b"")],
    ids=["tenant", "generation", "label", "joint"],
)
def test_nothing_opens_elsewhere(tenant: str, generation_id: str, label: bytes) -> None:
    sealed = SEALER.of("a", "g1").seal(TEXT, b"body")
    with pytest.raises(SealBroken) as broken:
        SEALER.of(tenant, generation_id).open(sealed, label)
    assert broken.value.reason == "SEAL_BROKEN"


@given(st.integers(min_value=8), st.integers(min_value=1, max_value=255))
def test_a_changed_byte_is_found(position: int, change: int) -> None:
    sealed = bytearray(SEALER.of("a", "g1").seal(TEXT, b"body"))
    sealed[position % len(sealed)] ^= change
    with pytest.raises(SealBroken):
        SEALER.of("a", "g1").open(bytes(sealed), b"body")


@given(st.binary(max_size=60))
def test_whatever_is_stored_either_opens_or_is_refused(stored: bytes) -> None:
    for start in (b"", b"\xc1", b"\xc1\x01", b"\xc1\x01\x03new"):
        with pytest.raises(SealBroken):
            SEALER.of("a", "g1").open(start + stored, b"body")


def test_two_seals_of_the_same_differ() -> None:
    sealer = SEALER.of("a", "g1")
    assert sealer.seal(TEXT, b"body") != sealer.seal(TEXT, b"body")


def test_a_rotated_key_still_opens_and_a_removed_one_does_not() -> None:
    before = Sealer(lambda: MasterKeys({"old": OLD})).of("a", "g1").seal(TEXT, b"body")
    assert SEALER.of("a", "g1").open(before, b"body") == TEXT
    assert b"new" in SEALER.of("a", "g1").seal(TEXT, b"body")[:8]
    with pytest.raises(SealBroken) as missing:
        Sealer(lambda: MasterKeys({"new": NEW})).of("a", "g1").open(before, b"body")
    assert missing.value.reason == "ENCRYPTION_KEY_MISSING"
    with pytest.raises(SealBroken):
        Sealer().of("a", "g1").open(before, b"body")


def test_plain_records_are_read_only_while_encryption_is_introduced() -> None:
    plain = records.encode_body(BODY)
    with pytest.raises(SealBroken) as refused:
        SEALER.of("a", "g1").open(plain, b"body")
    assert refused.value.reason == "NOT_SEALED"
    assert Sealer(lambda: KEYS, accept_plaintext=True).of("a", "g1").open(plain, b"body") == plain
    assert Sealer().of("a", "g1").open(plain, b"body") == plain


BODY = JobBody(prompt_token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=3, stop_strings=("the canary",)))
EVENT = EventBody((OutputDelta(0, 0, (5, 6), "the canary"),))


def test_an_event_is_bound_to_its_place_in_the_log() -> None:
    sealer = SEALER.of("a", "g1")
    entry = records.encode_entry(bytes(8), 3, 7, EVENT, sealer)
    assert b"canary" not in entry
    event = records.event_from_fields([b"e", entry], sealer)
    assert (event.body, event.epoch, event.sequence) == (EVENT, 3, 7)
    assert entry[10:12] == b"\x03\x07"
    moved = entry[:11] + b"\x08" + entry[12:]
    with pytest.raises(SealBroken):
        records.event_from_fields([b"e", moved], sealer)


def test_ends_that_scripts_write_hold_no_text_and_are_plain() -> None:
    sealer = SEALER.of("a", "g1")
    end = records.encode_entry(bytes(8), 3, 7, EventBody(usage=Usage(1, 0, 2)))
    assert records.event_from_fields([b"e", end, b"k", b"C", b"y", b"CANCELLED"], sealer).body == EventBody(
        usage=Usage(1, 0, 2)
    )
    with pytest.raises(SealBroken):
        records.event_from_fields([b"e", records.encode_entry(bytes(8), 3, 7, EVENT)], sealer)


def test_a_body_is_sealed_anew_for_another_generation() -> None:
    one, two = SEALER.of("a", "g1"), SEALER.of("a", "g2")
    sealed = records.encode_body(BODY, one)
    moved = records.reseal_body(sealed, one, two)
    assert two.open(moved, b"body") == records.encode_body(BODY)
    with pytest.raises(SealBroken):
        one.open(moved, b"body")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "a\n",
        "a b c\n",
        "a !!!!\n",
        key_line("a", b"short"),
        key_line("a", OLD) * 2,
        key_line("a" * 33, OLD),
    ],
    ids=range(8),
)
def test_a_file_of_keys_that_is_none_is_refused_without_a_word_of_it(text: str) -> None:
    with pytest.raises(ValueError, match="encryption keys") as refused:
        parse_keys(text)
    assert not any(len(word) > 8 and word in str(refused.value) for word in text.split())


def test_keys_are_read_again_when_their_file_changes(tmp_path: Path) -> None:
    path, now = tmp_path / "keys", [0.0]
    path.write_text(key_line("one", OLD))
    keys = KeyFile(path, lambda: now[0])
    assert keys.keys().active_id == "one"
    path.write_text("# rotated\n" + key_line("two", NEW) + key_line("one", OLD))
    assert keys.keys().active_id == "one"
    now[0] = 6
    assert list(keys.keys().by_id) == ["two", "one"]
    path.write_text("half of a li")
    now[0] = 12
    assert keys.keys().active_id == "two"
    path.unlink()
    now[0] = 18
    assert keys.keys().active_id == "two"
    os.makedirs(path)
    now[0] = 24
    assert keys.keys().active_id == "two"


def test_a_broken_file_of_keys_is_logged_once_a_change_without_a_word_of_it(tmp_path: Path) -> None:
    path, now = tmp_path / "keys", [0.0]

    def look() -> list[dict[str, object]]:
        now[0] += 6
        with capture_logs() as lines:
            assert keys.keys().active_id == "one"
        return [{name: line[name] for name in ("event", "error") if name in line} for line in lines]

    path.write_text(key_line("one", OLD))
    keys = KeyFile(path, lambda: now[0])
    path.write_text(key_line("one", OLD) + "two c2VjcmV0\n")
    wrong = "the key in line 2 of the encryption keys is not 32 bytes in base64"
    assert look() == [{"event": "encryption.keys_refused", "error": wrong}]
    assert look() == []
    path.write_bytes(b"one \xff\xfe")
    assert look() == [
        {"event": "encryption.keys_refused", "error": "the file of encryption keys is not a text in UTF-8"}
    ]
    path.unlink()
    assert look() == [{"event": "encryption.keys_refused", "error": "No such file or directory"}]
    assert look() == []
    path.write_text(key_line("one", OLD) + key_line("two", NEW))
    assert look() == [{"event": "encryption.keys_loaded"}]
    path.unlink()
    assert look() == [{"event": "encryption.keys_refused", "error": "No such file or directory"}]


def test_a_sealer_that_does_not_seal_opens_what_others_sealed(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(key_line("new", NEW))
    reader = Sealer.from_settings(EncryptionSettings(keys_file=path, seal=False, accept_plaintext=True))
    assert not reader.seals
    assert reader.of("a", "g1").seal(TEXT, b"body") == TEXT
    assert reader.of("a", "g1").open(SEALER.of("a", "g1").seal(TEXT, b"body"), b"body") == TEXT
    assert reader.of("a", "g1").open(TEXT, b"body") == TEXT


def test_a_process_that_could_not_read_what_it_writes_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="accept_plaintext=true"):
        EncryptionSettings(keys_file=tmp_path / "keys", seal=False)


def test_settings_that_name_no_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="TORCHRELAY_ENCRYPTION_KEYS_FILE"):
        Sealer.from_settings(EncryptionSettings(keys_file=tmp_path / "none"))
    assert not Sealer.from_settings(EncryptionSettings()).seals
    path = tmp_path / "keys"
    path.write_text(key_line("one", OLD))
    assert Sealer.from_settings(EncryptionSettings(keys_file=path)).seals
