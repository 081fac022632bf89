"""An answer out of a text, with where it stands there."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from tests.examples.common import Example, main
from torchrelay.v1 import classification_pb2 as cpb

QUESTION = "Where is the station?"
CONTEXT = "The station is between the river and the garden. Anna and Torben are at the bridge, because it is red."


def run(example: Example) -> None:
    request = cpb.AnswerQuestionRequest(model=example.name, question=QUESTION, context=CONTEXT, top_k=1)
    answer = example.client.run(request).answers[0]
    example.say(QUESTION, f"{answer.text!r} at {answer.start}-{answer.end}, {answer.score:.4f}")
    tokenizer: Any = AutoTokenizer.from_pretrained(example.model)
    model: Any = AutoModelForQuestionAnswering.from_pretrained(example.model)
    batch = tokenizer(QUESTION, CONTEXT, return_tensors="pt", return_token_type_ids=True)
    encoding, output = batch.encodings[0], model(**batch)
    own = [index for index, owner in enumerate(encoding.sequence_ids) if owner == 1]
    begin, end = (logits[0, [0, *own]].softmax(-1)[1:] for logits in (output.start_logits, output.end_logits))
    best = max(
        ((float(begin[i] * end[j]), own[i], own[j]) for i in range(len(own)) for j in range(i, min(len(own), i + 15))),
    )
    first, last = (encoding.word_ids[place] for place in best[1:])
    span = [encoding.word_to_chars(first, 1)[0], encoding.word_to_chars(last, 1)[1]]
    example.check("where", [answer.start, answer.end], span)
    example.check("score", answer.score, best[0])
    example.check("text", answer.text, CONTEXT[span[0] : span[1]])


if __name__ == "__main__":
    main(__doc__, run)
