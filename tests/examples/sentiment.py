"""Sentiment: classification of many texts in one call, the best label of each."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForSequenceClassification, AutoTokenizer, TextClassificationPipeline

from tests.examples.common import Example, main
from torchrelay.v1 import classification_pb2 as cpb

TEXTS = ["An unbelievable garden, and a red letter!", "The engine was running slowly.", "It isn't for us."]


def run(example: Example) -> None:
    inputs = [cpb.ClassificationInput(text=text) for text in TEXTS]
    found = example.client.run(cpb.ClassifyRequest(model=example.name, inputs=inputs, top_k=1))
    best = [one.labels[0] for one in found.classifications]
    for text, label in zip(TEXTS, best, strict=True):
        example.say(text, f"{label.label} {label.score:.3f}")
    tokenizer: Any = AutoTokenizer.from_pretrained(example.model)
    model: Any = AutoModelForSequenceClassification.from_pretrained(example.model)
    wanted = TextClassificationPipeline(model=model, tokenizer=tokenizer, device="cpu")(TEXTS)
    example.check("labels", [label.label for label in best], [one["label"] for one in wanted])
    example.check("scores", [label.score for label in best], [one["score"] for one in wanted])


if __name__ == "__main__":
    main(__doc__, run)
