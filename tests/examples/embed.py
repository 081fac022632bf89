"""Vectors of sentences, and how alike the sentences are."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from tests.examples.common import Example, main
from torchrelay.v1 import embedding_pb2 as epb

TEXTS = ["A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby."]


def run(example: Example) -> None:
    found = example.client.run(epb.EmbedRequest(model=example.name, texts=TEXTS))
    vectors = torch.tensor([list(one.values) for one in found.embeddings])
    for text, cosine in zip(TEXTS, (vectors @ vectors[0]).tolist(), strict=True):
        example.say(f"{TEXTS[0]} / {text}", f"{cosine:.3f}")
    tokenizer: Any = AutoTokenizer.from_pretrained(example.model)
    model: Any = AutoModel.from_pretrained(example.model)
    for text, vector in zip(TEXTS, vectors, strict=True):
        mean = model(**tokenizer(text, return_tensors="pt", padding=False)).last_hidden_state.mean(1)[0]
        example.check(f"the vector of {text!r}", vector.tolist(), torch.nn.functional.normalize(mean, dim=0).tolist())


if __name__ == "__main__":
    main(__doc__, run)
