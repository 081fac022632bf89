from __future__ import annotations

import hashlib

import msgspec
import pytest
import redis as redis_sync

from common import keys
from common.errors import BackendRefused, BackendUnavailable, InvalidRequest, ModelNotFound
from common.job_claims import JobClaims
from common.job_queue import JobQueue
from common.jobs import WorkerInfo
from common.registry import GenerationDefaults, ModelCard, ModelDirectory, ModelRegistry, ModelState
from common.settings import QueueSettings
from tests.builders_common import FlakyRedis

FILES = {"tokenizer.json": b"{}" * 1000, "chat_template.jinja": b"{{ messages }}"}


def make_card(name: str = "tiny", revision: str = "r1", files: dict[str, bytes] = FILES) -> ModelCard:
    return ModelCard(
        name=name,
        revision=revision,
        shard=keys.shard_name(name, revision),
        vocab_size=100,
        context_tokens=2048,
        max_output_tokens=1024,
        eos_token_ids=(2,),
        defaults=GenerationDefaults(temperature=0.2, max_tokens=64),
        tokenizer_files={file: hashlib.sha256(content).hexdigest() for file, content in files.items()},
    )


@pytest.fixture
def publisher(worker_redis: FlakyRedis) -> ModelRegistry:
    return ModelRegistry(worker_redis)


@pytest.fixture
def reader(gateway_redis: FlakyRedis) -> ModelRegistry:
    return ModelRegistry(gateway_redis)


async def test_a_published_model_is_read_whole(publisher: ModelRegistry, reader: ModelRegistry) -> None:
    card = make_card()
    await publisher.publish(card, FILES)
    assert await reader.list() == [card]
    assert await reader.get(card.shard) == card
    for name, digest in card.tokenizer_files.items():
        assert await reader.file(digest) == FILES[name]


async def test_a_card_of_an_older_worker_is_read(
    publisher: ModelRegistry, reader: ModelRegistry, superuser: redis_sync.Redis
) -> None:
    """It lacks what was added since."""
    card = make_card()
    await publisher.publish(card, FILES)
    old = msgspec.msgpack.decode(msgspec.msgpack.encode(card))
    for name in ("weight_format", "weight_bytes", "attention_backend"):
        del old[name]
    superuser.hset(keys.MODEL_CARDS, card.shard, msgspec.msgpack.encode(old))
    assert await reader.get(card.shard) == card


async def test_publishing_the_same_again_changes_nothing(publisher: ModelRegistry, reader: ModelRegistry) -> None:
    await publisher.publish(make_card(), FILES)
    version = await reader.version()
    await publisher.publish(make_card(), FILES)
    assert await reader.version() == version
    await publisher.publish(make_card(revision="r2"), FILES)
    assert await reader.version() > version


@pytest.mark.parametrize("files", [{}, {**FILES, "tokenizer.json": b"other"}])
async def test_a_file_that_is_not_the_named_one_is_refused(publisher: ModelRegistry, files: dict[str, bytes]) -> None:
    with pytest.raises(InvalidRequest):
        await publisher.publish(make_card(), files)
    assert await publisher.list() == []


async def test_a_file_that_is_too_large_is_refused(publisher: ModelRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.registry.MAX_FILE_BYTES", 100)
    with pytest.raises(InvalidRequest, match="too large"):
        await publisher.publish(make_card(), FILES)


async def test_files_live_as_long_as_a_card_names_them(publisher: ModelRegistry, superuser: redis_sync.Redis) -> None:
    one, two = make_card(revision="r1"), make_card(revision="r2", files={"tokenizer.json": FILES["tokenizer.json"]})
    await publisher.publish(one, FILES)
    await publisher.publish(two, FILES)
    assert await publisher.delete(one.shard)
    assert not await publisher.delete(one.shard)
    assert await publisher.list() == [two]
    assert len(superuser.keys("{models}:b:*")) == 1
    await publisher.delete(two.shard)
    assert [key.decode() for key in superuser.keys("*")] == [keys.MODEL_VERSION]


async def test_a_damaged_file_is_not_handed_on(
    publisher: ModelRegistry, reader: ModelRegistry, superuser: redis_sync.Redis
) -> None:
    card = make_card()
    await publisher.publish(card, FILES)
    digest = card.tokenizer_files["tokenizer.json"]
    superuser.set(keys.model_blob(digest), b"other")
    with pytest.raises(ModelNotFound):
        await reader.file(digest)


async def test_a_gateway_cannot_change_the_registry(reader: ModelRegistry) -> None:
    with pytest.raises(BackendRefused):
        await reader.publish(make_card(files={}), {})


async def test_the_directory_follows_publication_workers_and_deletion(
    publisher: ModelRegistry, reader: ModelRegistry, queue: JobQueue, worker_redis: FlakyRedis
) -> None:
    directory = ModelDirectory(reader, queue)
    with pytest.raises(BackendUnavailable):  # what exists is not known yet, which is no reason to say that it does not
        directory.resolve("tiny")
    await directory.refresh()
    assert directory.entries == ()
    with pytest.raises(ModelNotFound):
        directory.resolve("tiny")
    old, new = make_card(revision="r1"), make_card(revision="r2")
    await publisher.publish(old, FILES)
    await directory.refresh()
    assert [entry.state for entry in directory.entries] == [ModelState.COLD]
    worker = JobClaims(worker_redis, old.shard, keys.random_id(), QueueSettings())
    await worker.heartbeat(WorkerInfo())
    await publisher.publish(new, FILES)
    await directory.refresh()
    assert {entry.card.revision: entry.state for entry in directory.revisions("tiny")} == {
        "r1": ModelState.READY,
        "r2": ModelState.COLD,
    }
    assert directory.resolve("tiny").card == old  # the newer has no worker yet
    assert set(directory.shards) == {old.shard, new.shard}
    await worker.leave()
    await directory.refresh()
    assert directory.resolve("tiny").state is ModelState.COLD
    await publisher.delete(old.shard)
    await publisher.delete(new.shard)
    await directory.refresh()
    with pytest.raises(ModelNotFound):
        directory.resolve("tiny")
