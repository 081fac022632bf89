"""Text generation with GPT-2's parameters: lengths that count the prompt, no repeated n-grams, several sequences."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.examples.common import Example, main

PROMPT = "The quick brown fox"


def run(example: Example) -> None:
    found = example.client.generate(PROMPT, model=example.name, max_length=40, no_repeat_ngram_size=2, temperature=0.0)
    example.say("greedy, max_length 40, no_repeat_ngram_size 2", repr(found.outputs[0].text))
    beams = example.client.generate(
        PROMPT, model=example.name, max_tokens=12, num_beams=4, num_outputs=2, early_stopping=True
    )
    example.say("two of four beams", [output.text for output in beams.outputs])

    tokenizer: Any = AutoTokenizer.from_pretrained(example.model)
    model: Any = AutoModelForCausalLM.from_pretrained(example.model)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids

    def new_tokens(**parameters: Any) -> list[list[int]]:
        outputs = model.generate(ids, attention_mask=ids != -1, do_sample=False, pad_token_id=-1, **parameters)
        return [[token for token in row[ids.shape[1] :] if token != -1] for row in outputs.tolist()]

    greedy = new_tokens(max_length=40, no_repeat_ngram_size=2)
    example.check("tokens of the greedy text", [list(found.outputs[0].token_ids)], greedy)
    searched = new_tokens(max_new_tokens=12, num_beams=4, num_return_sequences=2, early_stopping=True)
    example.check("tokens of the beams", [list(output.token_ids) for output in beams.outputs], searched)
    grams = list(zip(found.outputs[0].token_ids, found.outputs[0].token_ids[1:], strict=False))
    example.check("repeated pairs of tokens", len(grams) - len(set(grams)), 0)


if __name__ == "__main__":
    main(__doc__, run)
