"""A folder of adapters is looked at again and again: what comes, goes or changes is seen, and what is bad is named."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from common.errors import BackendRefused
from common.generation import AdapterRef
from common.registry import AdapterCard
from tests.builders_adapters import write_adapter
from worker import adapters
from worker.adapters import AdapterFolder, watch_adapters
from worker.engine.adapters.files import AdapterLimits, AdapterWeights, LinearShape
from worker.engine.adapters.types import ADAPTER_NOT_FOUND, Adapter, AdapterFailure

SHAPES = {"layers.0.q_proj": LinearShape(8, 8)}


class Place:
    """A folder, and what was read of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.num_reads = 0
        self.folder = AdapterFolder(root, SHAPES, AdapterLimits(8, 1 << 20), self.make)

    def make(self, ref: AdapterRef, weights: AdapterWeights) -> Adapter:
        return Adapter(ref, weights.rank, weights.num_bytes, weights)

    def write(self, name: str, **fields: Any) -> None:
        """As a careful operator does: whole, then in its place at once."""
        whole = write_adapter(self.root / f".{name}", SHAPES, **{"rank": 2, **fields})
        shutil.rmtree(self.root / name, ignore_errors=True)
        whole.rename(self.root / name)

    def scan(self) -> dict[str, AdapterCard]:
        return {card.name: card for card in self.folder.scan()}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    place = Place(tmp_path)
    read = adapters.read_adapter

    def counted(*args: Any) -> AdapterWeights:
        place.num_reads += 1
        return read(*args)

    monkeypatch.setattr(adapters, "read_adapter", counted)
    return place


def test_adapters_come_change_and_go(place: Place) -> None:
    assert place.scan() == {}
    place.write("a")
    place.write("b", rank=4)
    first = place.scan()
    assert [(card.name, card.rank) for card in first.values()] == [("a", 2), ("b", 4)]
    place.write("a", seed=1)
    second = place.scan()
    assert second["a"].revision != first["a"].revision
    assert second["b"] == first["b"]
    shutil.rmtree(place.root / "b")
    assert place.scan() == {"a": second["a"]}


def test_files_that_stay_are_read_once(place: Place) -> None:
    place.write("a")
    (place.root / "bad").mkdir()
    place.write("bad", peft_type="LOHA")
    with capture_logs() as logs:
        for _ in range(3):
            place.scan()
    assert place.num_reads == 2
    (refused,) = [entry for entry in logs if entry["event"] == "adapter.refused"]
    assert refused["adapter"] == "bad"
    assert "peft_type" in refused["reason"]


def test_what_is_no_adapter_is_left_out(place: Place) -> None:
    (place.root / "notes.txt").write_text("none")
    (place.root / "empty").mkdir()
    place.write("half")
    (place.root / "half" / "adapter_model.safetensors").unlink()
    (place.root / "..data").mkdir()
    place.write("a name")
    assert place.scan() == {}
    place.write("half")
    assert list(place.scan()) == ["half"]


def test_a_folder_that_cannot_be_read_has_none_for_now(place: Place) -> None:
    place.write("a")
    before = place.scan()
    place.root.rename(place.root.with_name("away"))
    with capture_logs() as logs:
        assert place.scan() == place.scan() == {}
    assert [entry["event"] for entry in logs].count("adapters.unreadable") == 1
    place.root.with_name("away").rename(place.root)
    assert place.scan() == before


def test_what_is_loaded_is_the_revision_that_was_asked_for(place: Place) -> None:
    place.write("a")  # no scan has seen it yet
    with pytest.raises(AdapterFailure, match=ADAPTER_NOT_FOUND):
        place.folder.size(AdapterRef("a", "another"))
    card = place.scan()["a"]
    ref = AdapterRef("a", card.revision)
    assert place.folder.size(ref) == 4 * 2 * (8 + 8)
    assert place.folder.load(ref).form.revision == card.revision
    place.write("a", seed=1)
    for method in (place.folder.size, place.folder.load):
        with pytest.raises(AdapterFailure, match=ADAPTER_NOT_FOUND):
            method(ref)
    for name in ("missing", "../a", ""):
        with pytest.raises(AdapterFailure, match=ADAPTER_NOT_FOUND):
            place.folder.size(AdapterRef(name, card.revision))


def test_files_changed_in_place_are_seen(place: Place) -> None:
    place.write("a")
    before = place.scan()["a"]
    path = place.root / "a" / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 16', '"lora_alpha": 17'))
    os.utime(path, ns=(1, 1))
    assert place.scan()["a"].revision != before.revision


async def test_changes_are_told_once_and_again_where_they_were_not_heard() -> None:
    cards = [(), (AdapterCard("a", "1", 8),), (AdapterCard("a", "1", 8),), (AdapterCard("a", "2", 8),)]
    told: list[tuple[AdapterCard, ...]] = []
    over = asyncio.Event()

    async def tell(found: tuple[AdapterCard, ...]) -> None:
        told.append(found)
        if len(told) == 1:
            raise BackendRefused("not now")
        if len(told) == 3:
            over.set()

    scans = iter([*cards, *cards[-1:] * 100])
    task = asyncio.create_task(watch_adapters(lambda: next(scans), (), tell, 0.001))
    async with asyncio.timeout(20):
        await over.wait()
    task.cancel()
    assert told == [cards[1], cards[1], cards[3]]
