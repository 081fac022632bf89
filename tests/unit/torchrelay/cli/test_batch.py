"""What `torchrelay batch` makes of its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from torchrelay.cli.batch import _last_index, read_items

GOOD = {"custom_id": "a", "classify": {"inputs": [{"text": "x"}]}}


def write(folder: Path, *lines: str) -> Path:
    file = folder / "requests.jsonl"
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def test_each_line_is_an_item_and_names_its_model_or_takes_the_command_s(tmp_path: Path) -> None:
    own = {"generate": {"model": "own", "input": {"text": "é"}, "config": {"max_tokens": 3}}}
    items = read_items(write(tmp_path, json.dumps(GOOD), "", json.dumps(own)), "given")
    assert [item.WhichOneof("request") for item in items] == ["classify", "generate"]
    assert (items[0].custom_id, items[0].classify.model, items[0].classify.inputs[0].text) == ("a", "given", "x")
    assert (items[1].generate.model, items[1].generate.config.max_tokens) == ("own", 3)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2"),
        ("[1]", "line 2"),
        ('{"custom_id": "x"}', "line 2: names no request"),
        ('{"clasify": {}}', "clasify"),
        ('{"classify": {"inputs": [{"txt": "x"}]}}', "txt"),
        ('{"classify": {"top_k": -1}}', "line 2"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    with pytest.raises(typer.BadParameter, match=says):
        read_items(write(tmp_path, json.dumps(GOOD), line), "m")


def test_a_file_without_requests_or_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="holds no request"):
        read_items(write(tmp_path, "", " "), "m")
    with pytest.raises(typer.BadParameter, match="names no model"):
        read_items(write(tmp_path, json.dumps(GOOD)))
    with pytest.raises(typer.BadParameter, match="cannot be read"):
        read_items(tmp_path / "none")
    (tmp_path / "latin").write_bytes(b'{"custom_id": "\xe9"}\n')
    with pytest.raises(typer.BadParameter, match="cannot be read"):
        read_items(tmp_path / "latin")


def test_results_go_on_behind_the_last_whole_line(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    assert _last_index(None) == _last_index(file) == 0
    file.write_text('{"index": "1"}\n{"index": "2", "custom_id": "x"}\n{"index": "3", "cus')
    assert _last_index(file) == 2
    assert file.read_text() == '{"index": "1"}\n{"index": "2", "custom_id": "x"}\n'
    file.write_text('{"ind')
    assert _last_index(file) == 0
    assert file.read_text() == ""
    file.write_text("something else\n")
    with pytest.raises(typer.BadParameter, match="does not hold results"):
        _last_index(file)
