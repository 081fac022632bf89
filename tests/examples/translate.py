"""A translation, greedy and with four beams; `--model` may be a T5, Marian, mBART, M2M100 or NLLB."""

from __future__ import annotations

from tests.examples.common import Example, main
from tests.examples.seq2seq import Reference
from torchrelay.v1 import generation_pb2 as pb

TEXT = "abba cab jig, and the garden is red."


def run(example: Example) -> None:
    languages = list(next(model for model in example.client.models() if model.name == example.name).languages)
    source, target = (languages[0], languages[-1]) if languages else ("", "")
    if {"en", "de"} <= set(languages):
        source, target = "en", "de"
    wanted = pb.TranslationInput(text=TEXT, source_language=source, target_language=target)
    prompt = pb.GenerationInput(translation=wanted)
    reference = Reference(example.model)
    for beams in (1, 4):
        found = example.client.generate(prompt, model=example.name, max_tokens=20, num_beams=beams, temperature=0.0)
        example.say(f"{source} to {target}, beams: {beams}", repr(found.outputs[0].text))
        text = reference.prefix(f"translation_{source}_to_{target}") + TEXT
        ours = list(found.outputs[0].token_ids)
        example.check("tokens", ours, reference.generate(text, 20, source=source, target=target, beams=beams))


if __name__ == "__main__":
    main(__doc__, run)
