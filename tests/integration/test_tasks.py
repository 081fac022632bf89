"""The tasks of encoder models over gRPC and HTTP, against the models' own classes."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    TextClassificationPipeline,
    TokenClassificationPipeline,
)
from typer.testing import CliRunner

from tests.builders_http import HttpDoor
from tests.builders_system import System, running_system, until
from tests.builders_tasks import CORPUS, real_sentence_model, write_encoder
from torchrelay.admin.v1beta1 import fleet_pb2, fleet_pb2_grpc
from torchrelay.cli.main import make_app
from torchrelay.client import RelayError
from torchrelay.v1 import classification_pb2 as cpb
from torchrelay.v1 import embedding_pb2 as epb
from torchrelay.v1 import generation_pb2 as pb
from torchrelay.v1 import model_pb2

TEXTS = [
    "A man is eating food.",
    "The girl is carrying a baby.",
    "Ünïcode, 中文 and 🙂: a text of other letters.",
    "word",
    "A longer text that says the same thing again and again. " * 8,
]
_TOO_LONG: Final = "CONTEXT_LENGTH_EXCEEDED"
_RANGE: Final = "FIELD_OUT_OF_RANGE"
NER_TEXT = "Anna and Torben, in unbelievable London's garden (1998)."


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("encoders")
    return {
        "minilm": real_sentence_model(),
        "labels": write_encoder(base / "labels", "bert", "labels"),
        "tokens": write_encoder(base / "tokens", "distilbert", "tokens"),
        "spans": write_encoder(base / "spans", "bert", "spans"),
        "ranks": write_encoder(base / "ranks", "roberta", "labels", labels=("fits",)),
    }


@pytest.fixture(scope="module")
def system(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with running_system(tmp_path_factory.mktemp("tasks")) as found:
        found.add_gateway()
        for name, folder in folders.items():
            found.add_worker(folder, name)
        asyncio.run(found.ready(*folders))
        yield found


def texts_of(*texts: str, pair: str | None = None) -> list[cpb.ClassificationInput]:
    return [cpb.ClassificationInput(text=text, pair=pair) for text in texts]


async def refused(system: System, request: Any) -> RelayError:
    async with system.client() as client:
        with pytest.raises(RelayError) as caught:
            await client.run(request)
        return caught.value


async def test_vectors_of_real_weights_are_those_of_the_model_at_any_mix(
    system: System, folders: dict[str, Path]
) -> None:
    model: Any = AutoModel.from_pretrained(folders["minilm"])
    tokenizer: Any = AutoTokenizer.from_pretrained(folders["minilm"])
    expected = []
    for text in TEXTS:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt", padding=False, truncation=False)).last_hidden_state
        expected.append(torch.nn.functional.normalize(hidden.mean(1))[0].numpy())
    async with system.client() as client:
        calls = [
            epb.EmbedRequest(model="minilm", texts=TEXTS),
            *(epb.EmbedRequest(model="minilm", texts=[t]) for t in TEXTS),
        ]
        together, *alone = await asyncio.gather(*map(client.run, calls))
        for vector, one, wanted in zip(together.embeddings, alone, expected, strict=True):
            assert np.allclose(vector.values, wanted, atol=1e-4)
            assert np.allclose(one.embeddings[0].values, wanted, atol=1e-4)
        assert together.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone)
        short = await client.run(epb.EmbedRequest(model="minilm", texts=TEXTS[:1], dimensions=100))
        cut = expected[0][:100] / np.linalg.norm(expected[0][:100])
        assert np.allclose(short.embeddings[0].values, cut, atol=1e-4)
        plain = await client.run(epb.EmbedRequest(model="minilm", texts=TEXTS[:1], normalize=False))
        assert np.linalg.norm(plain.embeddings[0].values) != pytest.approx(1, abs=1e-3)


async def test_labels_are_those_of_transformers_pipeline(system: System, folders: dict[str, Path]) -> None:
    model: Any = AutoModelForSequenceClassification.from_pretrained(folders["labels"])
    tokenizer: Any = AutoTokenizer.from_pretrained(folders["labels"])
    pipeline: Any = TextClassificationPipeline(model=model, tokenizer=tokenizer, device="cpu")
    texts = [*CORPUS[:4], "Anna", "blue engines"]
    async with system.client() as client:
        for function, name in (
            (cpb.SCORE_FUNCTION_UNSPECIFIED, None),
            (cpb.SCORE_FUNCTION_SIGMOID, "sigmoid"),
            (cpb.SCORE_FUNCTION_NONE, "none"),
        ):
            expected = pipeline(texts, top_k=None, function_to_apply=name)
            found = await client.run(cpb.ClassifyRequest(model="labels", inputs=texts_of(*texts), function=function))
            for one, wanted in zip(found.classifications, expected, strict=True):
                assert [entry.label for entry in one.labels] == [entry["label"] for entry in wanted]
                assert np.allclose([e.score for e in one.labels], [e["score"] for e in wanted], atol=1e-4)
        with torch.no_grad():
            batch = tokenizer("Anna", "is in Berlin", return_tensors="pt", return_token_type_ids=True)
            logits = model(**batch).logits[0]
        pair = await client.run(
            cpb.ClassifyRequest(model="labels", inputs=texts_of("Anna", pair="is in Berlin"), top_k=2)
        )
        best = logits.softmax(-1).topk(2)
        names = [model.config.id2label[i] for i in best.indices.tolist()]
        assert [entry.label for entry in pair.classifications[0].labels] == names
        assert np.allclose([e.score for e in pair.classifications[0].labels], best.values, atol=1e-4)


async def test_entities_are_those_of_transformers_pipeline(system: System, folders: dict[str, Path]) -> None:
    model: Any = AutoModelForTokenClassification.from_pretrained(folders["tokens"])
    tokenizer: Any = AutoTokenizer.from_pretrained(folders["tokens"])
    pipeline: Any = TokenClassificationPipeline(model=model, tokenizer=tokenizer, device="cpu")
    async with system.client() as client:
        for aggregation in (
            cpb.AGGREGATION_UNSPECIFIED,
            cpb.AGGREGATION_FIRST,
            cpb.AGGREGATION_AVERAGE,
            cpb.AGGREGATION_MAX,
        ):
            name = (
                "simple" if not aggregation else cpb.Aggregation.Name(aggregation).removeprefix("AGGREGATION_").lower()
            )
            request = cpb.ClassifyTokensRequest(model="tokens", texts=[NER_TEXT, "Berlin"], aggregation=aggregation)
            found = await client.run(request)
            for entities, text in zip(found.texts, request.texts, strict=True):
                wanted = pipeline(text, aggregation_strategy=name)
                assert [(e.label, e.start, e.end) for e in entities.entities] == [
                    (e["entity_group"], e["start"], e["end"]) for e in wanted
                ]
                assert np.allclose([e.score for e in entities.entities], [e["score"] for e in wanted], atol=1e-4)
                assert all(e.text == text[e.start : e.end] for e in entities.entities)


async def test_answers_come_from_windows_of_a_long_context(system: System, folders: dict[str, Path]) -> None:
    """The reference runs the model class on the tokenizer's own windows, and looks through all spans."""
    question, context = "who is in Berlin?", " ".join(CORPUS[:6])
    tokenizer: Any = AutoTokenizer.from_pretrained(folders["spans"])
    model: Any = AutoModelForQuestionAnswering.from_pretrained(folders["spans"])
    width = 96
    batch = tokenizer(
        question, context, max_length=width, truncation="only_second", stride=20,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    assert len(batch["input_ids"]) > 3
    best: dict[tuple[int, int], float] = {}
    for number, ids in enumerate(batch["input_ids"]):
        encoding = batch.encodings[number]
        with torch.no_grad():
            types = torch.tensor([encoding.type_ids])
            output = model(input_ids=torch.tensor([ids]), token_type_ids=types)
        own = [i for i, owner in enumerate(encoding.sequence_ids) if owner == 1]
        allowed = [0, *own]
        begin, end = (
            logits[0, allowed].double().softmax(-1)[1:] for logits in (output.start_logits, output.end_logits)
        )
        for i, first in enumerate(own):
            for j, last in enumerate(own[i : i + 15], i):
                start, stop = (
                    encoding.word_to_chars(encoding.word_ids[first], 1)[0],
                    encoding.word_to_chars(encoding.word_ids[last], 1)[1],
                )
                score = float(begin[i] * end[j])
                best[start, stop] = max(score, best.get((start, stop), 0.0))
    wanted = sorted(best.items(), key=lambda item: -item[1])[:3]
    async with system.client() as client:
        found = await client.run(
            cpb.AnswerQuestionRequest(model="spans", question=question, context=context, top_k=3, window_overlap=20)
        )
    assert [(one.start, one.end) for one in found.answers] == [span for span, _ in wanted]
    assert np.allclose([one.score for one in found.answers], [score for _, score in wanted], atol=1e-4)
    assert all(one.text == context[one.start : one.end] for one in found.answers)


async def test_documents_are_ordered_by_how_well_they_fit(system: System, folders: dict[str, Path]) -> None:
    model: Any = AutoModelForSequenceClassification.from_pretrained(folders["ranks"])
    tokenizer: Any = AutoTokenizer.from_pretrained(folders["ranks"])
    query, documents = "where is Anna", ["in Berlin", "a river", CORPUS[2][:100], "because", "Paris in 1998"]
    with torch.no_grad():
        logits = [model(**tokenizer(query, d, return_tensors="pt")).logits[0, 0] for d in documents]
    scores = torch.stack(logits).sigmoid().tolist()
    async with system.client() as client:
        found = await client.run(cpb.RerankRequest(model="ranks", query=query, documents=documents, top_n=3))
    order = sorted(range(len(documents)), key=lambda i: -scores[i])[:3]
    assert [one.index for one in found.documents] == order
    assert np.allclose([one.score for one in found.documents], [scores[i] for i in order], atol=1e-4)


async def test_get_model_says_what_a_model_does(system: System) -> None:
    async with system.client() as client:
        models = {model.name: model for model in await client.models()}
    assert models["minilm"].tasks == [model_pb2.TASK_EMBED]
    assert (models["minilm"].embedding_dimensions, models["minilm"].context_length) == (384, 256)
    assert models["labels"].tasks == [model_pb2.TASK_CLASSIFY]
    assert models["ranks"].tasks == [model_pb2.TASK_CLASSIFY, model_pb2.TASK_RERANK]
    assert models["tokens"].labels[0] == "O"
    assert models["spans"].tasks == [model_pb2.TASK_ANSWER_QUESTION]


@pytest.mark.parametrize(
    ("request_", "field", "reason"),
    [
        (epb.EmbedRequest(model="minilm"), "texts", "FIELD_REQUIRED"),
        (epb.EmbedRequest(model="minilm", texts=["a", ""]), "texts[1]", "FIELD_REQUIRED"),
        (epb.EmbedRequest(model="minilm", texts=["a"] * 2049), "texts", _RANGE),
        (epb.EmbedRequest(model="minilm", texts=["a"], dimensions=385), "dimensions", _RANGE),
        (epb.EmbedRequest(model="minilm", texts=["a", "b " * 300]), "texts[1]", _TOO_LONG),
        (epb.EmbedRequest(model="minilm", texts=["b" * 100_000]), "texts[0]", _TOO_LONG),
        (cpb.ClassifyRequest(model="labels", inputs=[cpb.ClassificationInput()]), "inputs[0].text", "FIELD_REQUIRED"),
        (cpb.ClassifyRequest(model="labels", inputs=texts_of("a", pair="")), "inputs[0].pair", "FIELD_REQUIRED"),
        (cpb.ClassifyRequest(model="labels", inputs=texts_of("a"), function=9), "function", "FIELD_INVALID"),  # type: ignore[arg-type]
        (cpb.ClassifyTokensRequest(model="tokens", texts=["a"], aggregation=77), "aggregation", "FIELD_INVALID"),  # type: ignore[arg-type]
        (cpb.AnswerQuestionRequest(model="spans", question="q"), "context", "FIELD_REQUIRED"),
        (cpb.AnswerQuestionRequest(model="spans", question="the " * 60, context="c"), "question", _TOO_LONG),
        (
            cpb.AnswerQuestionRequest(model="spans", question="q", context="c", window_overlap=95),
            "window_overlap",
            _RANGE,
        ),
        (cpb.AnswerQuestionRequest(model="spans", question="q", context="c", top_k=1000), "top_k", _RANGE),
        (cpb.RerankRequest(model="ranks", query="q", documents=["ok", "the " * 95]), "documents[1]", _TOO_LONG),
        (
            cpb.RerankRequest(model="ranks", query="the " * 95, documents=["d"], truncation=pb.TRUNCATION_END),
            "documents[0]",
            _TOO_LONG,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_bad_input_is_refused_by_its_field(system: System, request_: Any, field: str, reason: str) -> None:
    error = await refused(system, request_)
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    assert [violation.field for violation in error.violations] == [field]


async def test_a_task_that_a_model_does_not_serve_names_those_that_it_does(system: System) -> None:
    requests = [
        (epb.EmbedRequest(model="ranks", texts=["a"]), "classify,rerank"),
        (cpb.RerankRequest(model="labels", query="q", documents=["d"]), "classify"),
        (cpb.AnswerQuestionRequest(model="minilm", question="q", context="c"), "embed"),
    ]
    for request, tasks in requests:
        error = await refused(system, request)
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "TASK_NOT_SERVED")
        assert error.metadata["tasks"] == tasks
    async with system.client() as client:
        with pytest.raises(RelayError) as caught:
            await client.generate("text", model="minilm")
    assert caught.value.reason == "TASK_NOT_SERVED"


async def test_long_texts_are_cut_where_that_is_asked_for(system: System, folders: dict[str, Path]) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folders["minilm"])
    long = "the quick brown fox " * 100
    ids = tokenizer(long, truncation=True, max_length=256, padding=False)["input_ids"]
    model: Any = AutoModel.from_pretrained(folders["minilm"])
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model(input_ids=torch.tensor([ids])).last_hidden_state.mean(1))[0]
    async with system.client() as client:
        found = await client.run(epb.EmbedRequest(model="minilm", texts=[long], truncation=pb.TRUNCATION_END))
        assert found.usage.prompt_tokens == 256
        assert np.allclose(found.embeddings[0].values, expected, atol=1e-4)
        # The query stays whole, and as much of the document as fits beside it.
        ranked = await client.run(
            cpb.RerankRequest(model="ranks", query="where", documents=["the " * 95], truncation=pb.TRUNCATION_END)
        )
        assert ranked.usage.prompt_tokens == 94


async def test_a_repeat_with_its_key_is_answered_from_what_is_stored(system: System) -> None:
    request = epb.EmbedRequest(model="minilm", texts=["once"], idempotency_key="embed-once")
    async with system.client() as client:
        first, again = await client.run(request), await client.run(request)
        assert first == again
        other = epb.EmbedRequest(model="minilm", texts=["twice"], idempotency_key="embed-once")
        with pytest.raises(RelayError) as caught:
            await client.run(other)
        assert caught.value.reason == "IDEMPOTENCY_KEY_REUSED"


async def test_a_task_survives_its_worker_and_can_be_cancelled(system: System, folders: dict[str, Path]) -> None:
    name = "away"
    worker = system.add_worker(folders["labels"], name)
    await system.ready(name)
    worker.kill()
    async with system.client() as client:
        calls = [
            asyncio.create_task(client.run(cpb.ClassifyRequest(model=name, inputs=texts_of(text))))
            for text in ("Anna", "Berlin")
        ]
        waiting: list[str] = []

        async def both_wait() -> bool:
            waiting[:] = await generations_of(system, name)
            return len(waiting) == 2

        await until(both_wait, what="two requests that wait")
        await client.cancel(waiting[0])
        worker.start()
        found = await asyncio.gather(*calls, return_exceptions=True)
    worker.kill()
    [ended] = [one for one in found if isinstance(one, RelayError)]
    assert (ended.code, ended.reason) == (grpc.StatusCode.ABORTED, "CANCELLED")
    [answered] = [one for one in found if isinstance(one, cpb.ClassifyResponse)]
    assert answered.generation_id == waiting[1]
    assert answered.classifications


async def generations_of(system: System, name: str) -> list[str]:
    """The ids of what is queued or runs for a model."""
    async with grpc.aio.insecure_channel(system.gateways[0].admin_address) as channel:
        stub: fleet_pb2_grpc.FleetServiceAsyncStub = fleet_pb2_grpc.FleetServiceStub(channel)
        response = await stub.ListGenerations(fleet_pb2.ListGenerationsRequest(page_size=1000))
    return [one.generation_id for one in response.generations if one.generation_id.startswith(f"{name}-")]


async def test_a_time_limit_ends_a_request_that_nobody_computes(system: System, folders: dict[str, Path]) -> None:
    name = "gone"
    worker = system.add_worker(folders["labels"], name)
    await system.ready(name)
    worker.kill()
    request = cpb.ClassifyRequest(model=name, inputs=texts_of("Anna"))
    request.time_limit.FromMilliseconds(300)
    assert (await refused(system, request)).code is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_key_without_the_scope_embeds_nothing(system: System) -> None:
    key = system.create_key("narrow", scopes=("generate",))
    async with system.client(key=key) as client:
        with pytest.raises(RelayError) as caught:
            await client.run(epb.EmbedRequest(model="minilm", texts=["a"]))
    assert caught.value.code is grpc.StatusCode.PERMISSION_DENIED


async def test_embeddings_over_http(system: System) -> None:
    door = HttpDoor(system.gateways[0].openai_address, system.create_key("http"))
    body = {"model": "minilm", "input": ["hello", "world"]}
    floats = (await door.post("/v1/embeddings", body)).json
    packed = (await door.post("/v1/embeddings", {**body, "encoding_format": "base64", "user": "me"})).json
    async with system.client() as client:
        direct = await client.run(epb.EmbedRequest(model="minilm", texts=["hello", "world"]))
    for index, one in enumerate(direct.embeddings):
        assert np.allclose(floats["data"][index]["embedding"], one.values, atol=1e-6)
        raw = np.frombuffer(base64.b64decode(packed["data"][index]["embedding"]), "<f4")
        assert np.allclose(raw, one.values, atol=1e-6)
    assert floats["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    for wrong, param in (
        ({"input": [[1, 2]]}, "input"),
        ({"input": []}, "input"),
        ({"input": ["ok", ""]}, "input[1]"),
        ({"input": "a", "temperature": 1}, "temperature"),
        ({"input": "a", "dimensions": 1000}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ):
        answer = await door.post("/v1/embeddings", {"model": "minilm", **wrong})
        assert (answer.status, answer.json["error"]["param"]) == (400, param)
    assert (await door.post("/v1/embeddings", {"model": "labels", "input": "a"})).json["error"][
        "code"
    ] == "task_not_served"
    assert (await door.post("/v1/embeddings", {"model": "none", "input": "a"})).status == 404


async def test_a_generation_s_calls_on_a_task_s_id_do_no_harm(system: System) -> None:
    async with system.client() as client:
        found = await client.run(epb.EmbedRequest(model="minilm", texts=["hello"]))
        seen = await client.get(found.generation_id)
        assert seen.state == pb.GENERATION_STATE_FINISHED
        assert seen.usage.prompt_tokens == 3
        events = [event async for event in client.resume(found.generation_id)]
        assert events[-1].HasField("finished")
        await client.delete(found.generation_id)
        with pytest.raises(RelayError):
            await client.get(found.generation_id)


def test_the_command_has_a_verb_for_each(system: System, folders: dict[str, Path], tmp_path: Path) -> None:
    context = tmp_path / "context.txt"
    context.write_text("Anna is in Berlin, by the river.")
    at = ["--address", system.gateways[0].address, "--api-key", system.key]

    def run(*words: str) -> str:
        found = CliRunner().invoke(make_app(), [*words, *at])
        assert found.exit_code == 0, found.output
        return found.stdout

    assert len(json.loads(run("embed", "hello", "-m", "minilm", "--dimensions", "7"))) == 7
    assert len(run("classify", "Anna", "Berlin", "-m", "labels", "--top-k", "2").splitlines()) == 5
    assert json.loads(run("classify", "Anna", "-m", "labels", "--json"))["classifications"]
    header, *rows = run("entities", NER_TEXT, "-m", "tokens", "--aggregation", "none").splitlines()
    assert header.split() == ["TEXT", "WHERE", "LABEL", "SCORE", "ENTITY"]
    for row in rows:  # which there are is up to a random model
        _, where, _, _, entity = row.split()
        start, end = map(int, where.split("-"))
        assert NER_TEXT[start:end] == entity
    [found] = json.loads(run("answer", "where?", str(context), "-m", "spans", "--json"))["answers"]
    assert found["text"] in context.read_text()
    assert run("rerank", "where", "in Berlin", "a river", "-m", "ranks", "--top-n", "1").count("\n") == 2
    refused = CliRunner().invoke(make_app(), ["classify", "Anna", "-m", "minilm", *at])
    assert refused.exit_code == 1
    assert "TASK_NOT_SERVED, tasks embed" in refused.stderr
