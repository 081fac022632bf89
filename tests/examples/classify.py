"""Classification with BERT: single texts and a pair, such as premise and hypothesis."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.examples.common import Example, main
from torchrelay.v1 import classification_pb2 as cpb

INPUTS = (
    cpb.ClassificationInput(text="The weather in London is unbelievable."),
    cpb.ClassificationInput(text="Anna is in Berlin.", pair="Anna is in Germany."),
)


def run(example: Example) -> None:
    found = example.client.run(cpb.ClassifyRequest(model=example.name, inputs=INPUTS, top_k=3))
    tokenizer: Any = AutoTokenizer.from_pretrained(example.model)
    model: Any = AutoModelForSequenceClassification.from_pretrained(example.model)
    for one, labels in zip(INPUTS, found.classifications, strict=True):
        texts = f"{one.text} / {one.pair}" if one.pair else one.text
        example.say(texts, ", ".join(f"{label.label} {label.score:.3f}" for label in labels.labels))
        batch = tokenizer(one.text, one.pair or None, return_tensors="pt", return_token_type_ids=True)
        best = model(**batch).logits[0].softmax(-1).topk(len(labels.labels))
        names = [model.config.id2label[index] for index in best.indices.tolist()]
        example.check("labels", [label.label for label in labels.labels], names)
        example.check("scores", [label.score for label in labels.labels], best.values.tolist())


if __name__ == "__main__":
    main(__doc__, run)
