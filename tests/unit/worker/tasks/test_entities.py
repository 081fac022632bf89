"""Entities of tokens, held to what transformers' own pipeline makes of the same model and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer, TokenClassificationPipeline

from common.tasks import Aggregation, Entity, TokenSpans, pack_ids
from gateway.tasks.encoding import Tokens, WordMarks
from gateway.tokenization import TextCodec
from tests.builders_tasks import CORPUS, NER_LABELS, write_encoder
from worker.tasks.entities import find_entities

TEXTS = (
    "Anna is in Berlin for Siemens",
    "unbelievable organisations, quickly: London's weather!",
    "  The river,by the bridge  and 2024 engines ",
    "Ünïcode wörds 🙂 and Torben",
    CORPUS[3][:120],
)


@pytest.fixture(scope="module", params=["bert", "roberta"])
def tagger(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, TextCodec]:
    folder: Path = write_encoder(tmp_path_factory.mktemp("tagger"), request.param, "tokens")
    model: Any = AutoModelForTokenClassification.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    pipeline = TokenClassificationPipeline(model=model, tokenizer=tokenizer, device="cpu")
    return pipeline, TextCodec((folder / "tokenizer.json").read_bytes(), None)


def spans_and_logits(pipeline: Any, codec: TextCodec, text: str) -> tuple[TokenSpans, np.ndarray[Any, Any]]:
    tokens = Tokens.of(codec.encode_pair(text))
    with torch.no_grad():
        logits = pipeline.model(input_ids=torch.tensor([tokens.ids])).logits[0].numpy()
    return WordMarks(codec.tokenizer).spans(tokens, 0, text), logits


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("aggregation", list(Aggregation))
@pytest.mark.parametrize("text", TEXTS)
def test_they_are_those_of_the_pipeline(tagger: tuple[Any, TextCodec], text: str, aggregation: Aggregation) -> None:
    pipeline, codec = tagger
    spans, logits = spans_and_logits(pipeline, codec, text)
    for ignored in (("O",), ()):
        found = find_entities(logits, spans, text, NER_LABELS, aggregation, ignored)
        expected = pipeline(text, aggregation_strategy=str(aggregation), ignore_labels=list(ignored))
        key = "entity" if aggregation is Aggregation.NONE else "entity_group"
        assert [(one.label, one.start, one.end) for one in found] == [(e[key], e["start"], e["end"]) for e in expected]
        assert np.allclose([one.score for one in found], [e["score"] for e in expected], atol=1e-5)
        assert all(one.text == text[one.start : one.end] for one in found)


def entities(
    labels: list[str], begins: list[int], scores: list[float], aggregation: Aggregation, text: str = "ab cd ef gh"
) -> tuple[Entity, ...]:
    """Tokens of two characters, each with its label at this probability."""
    logits = np.full((len(labels), len(NER_LABELS)), 0.0, dtype=np.float32)
    for row, (label, score) in enumerate(zip(labels, scores, strict=True)):
        others = (1 - score) / (len(NER_LABELS) - 1)
        logits[row] = np.log(others)
        logits[row, NER_LABELS.index(label)] = np.log(score)
    starts = [3 * i for i in range(len(labels))]
    spans = TokenSpans(pack_ids(starts), pack_ids([start + 2 for start in starts]), bytes(begins))
    return find_entities(logits, spans, text, NER_LABELS, aggregation, ("O",))


def test_an_entity_goes_on_until_another_begins() -> None:
    found = entities(["B-PER", "I-PER", "B-PER", "I-LOC"], [1, 1, 1, 1], [0.9, 0.5, 0.8, 0.7], Aggregation.SIMPLE)
    assert [(one.label, one.text) for one in found] == [("PER", "ab cd"), ("PER", "ef"), ("LOC", "gh")]
    assert found[0].score == pytest.approx(0.7, abs=1e-6)


def test_words_are_labelled_as_a_whole() -> None:
    labels, begins, scores = ["B-PER", "B-LOC", "B-LOC", "O"], [1, 0, 0, 1], [0.6, 0.9, 0.4, 0.9]
    by = {
        aggregation: [(one.label, one.text) for one in entities(labels, begins, scores, aggregation)]
        for aggregation in Aggregation
    }
    assert by[Aggregation.FIRST] == [("PER", "ab cd ef")]
    assert by[Aggregation.MAX] == by[Aggregation.AVERAGE] == [("LOC", "ab cd ef")]
    assert by[Aggregation.SIMPLE] == [("PER", "ab"), ("LOC", "cd"), ("LOC", "ef")]


def test_a_text_without_tokens_of_its_own_has_none() -> None:
    spans = TokenSpans(pack_ids([-1, -1]), pack_ids([-1, -1]), bytes(2))
    for aggregation in Aggregation:
        assert find_entities(np.zeros((2, 6), np.float32), spans, "", NER_LABELS, aggregation, ()) == ()
