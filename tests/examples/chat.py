"""A dialogue of two turns: the chat template is applied on the server, and the first turn's prefix is reused."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.examples.common import Example, main

QUESTIONS = ("What is the capital of France?", "And of Germany?")


def run(example: Example) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(example.model)
    model: Any = AutoModelForCausalLM.from_pretrained(example.model)
    messages: list[dict[str, str]] = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        found = example.client.generate(messages, model=example.name, max_tokens=16, temperature=0.0)
        text = found.outputs[0].text
        example.say(question, f"{text!r} ({found.usage.cached_prompt_tokens} of {found.usage.prompt_tokens} cached)")
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        output = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
        example.check("the answer", text, tokenizer.decode(output, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": text})


if __name__ == "__main__":
    main(__doc__, run)
