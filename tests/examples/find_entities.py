"""Named entities, with where they stand in the text."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForTokenClassification, AutoTokenizer, TokenClassificationPipeline

from tests.examples.common import Example, main
from torchrelay.v1 import classification_pb2 as cpb

TEXT = "Anna and Torben met in Berlin, between the river and Siemens' garden."


def run(example: Example) -> None:
    request = cpb.ClassifyTokensRequest(model=example.name, texts=[TEXT], aggregation=cpb.AGGREGATION_AVERAGE)
    entities = example.client.run(request).texts[0].entities
    for one in entities:
        example.say(f"{one.start}-{one.end}", f"{one.text!r} is {one.label}, {one.score:.3f}")
    tokenizer: Any = AutoTokenizer.from_pretrained(example.model)
    model: Any = AutoModelForTokenClassification.from_pretrained(example.model)
    pipeline: Any = TokenClassificationPipeline(model=model, tokenizer=tokenizer, device="cpu")
    wanted = pipeline(TEXT, aggregation_strategy="average")
    example.check(
        "entities",
        [(e.label, e.start, e.end) for e in entities],
        [(e["entity_group"], e["start"], e["end"]) for e in wanted],
    )
    example.check("scores", [e.score for e in entities], [float(e["score"]) for e in wanted])


if __name__ == "__main__":
    main(__doc__, run)
