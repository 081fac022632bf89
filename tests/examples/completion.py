"""A completion with an API key through the unmodified `openai` client."""

from __future__ import annotations

from typing import Any

from openai import AuthenticationError, OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.examples.common import Example, main

PROMPT = "Once upon a time"


def run(example: Example) -> None:
    client = OpenAI(base_url=example.openai_url, api_key=example.key)
    found = client.completions.create(model=example.name, prompt=PROMPT, max_tokens=12, temperature=0)
    example.say("completion", repr(found.choices[0].text))
    pieces = client.completions.create(model=example.name, prompt=PROMPT, max_tokens=12, temperature=0, stream=True)
    example.check("streamed text", "".join(piece.choices[0].text for piece in pieces), found.choices[0].text)
    try:
        OpenAI(base_url=example.openai_url, api_key="wrong").models.list()
    except AuthenticationError as error:
        example.say("a wrong key", f"refused with {error.status_code}")
    else:
        example.check("a wrong key", "taken", "refused")

    tokenizer: Any = AutoTokenizer.from_pretrained(example.model)
    model: Any = AutoModelForCausalLM.from_pretrained(example.model)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    output = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    example.check("text", found.choices[0].text, tokenizer.decode(output, skip_special_tokens=True))


if __name__ == "__main__":
    main(__doc__, run)
