"""A summary of a text that is longer than the model reads: cut where that is asked for, refused otherwise."""

from __future__ import annotations

from tests.examples.common import Example, main
from tests.examples.seq2seq import Reference
from torchrelay.client import RelayError
from torchrelay.v1 import generation_pb2 as pb

TEXT = "The garden is red, and abba has a cab. " * 3


def run(example: Example) -> None:
    reference = Reference(example.model)
    prompt = pb.GenerationInput(summarization=pb.SummarizationInput(text=TEXT))
    found = example.client.generate(prompt, model=example.name, max_tokens=20, num_beams=1, temperature=0.0)
    example.say("summary", repr(found.outputs[0].text))
    text = reference.prefix("summarization") + TEXT
    example.check("tokens", list(found.outputs[0].token_ids), reference.generate(text, 20))
    long = pb.GenerationInput(summarization=pb.SummarizationInput(text=TEXT * 1000))
    try:
        example.client.generate(long, model=example.name, max_tokens=20)
    except RelayError as error:
        example.say("a text that is too long", f"refused: {error.reason}")
    else:
        example.check("a text that is too long", "taken", "refused")
    long.summarization.truncation = pb.TRUNCATION_END
    cut = example.client.generate(long, model=example.name, max_tokens=5, num_beams=1, temperature=0.0)
    most = next(model for model in example.client.models() if model.name == example.name).max_source_tokens
    example.check("tokens that are read of it", cut.usage.prompt_tokens, most)


if __name__ == "__main__":
    main(__doc__, run)
