"""Calls the OpenAI door with the unmodified `openai` package, in an environment without any of ours.

Prints one line of JSON: what each call came to, by name.
"""

import json
import os
import sys

import openai

MODEL = os.environ["TORCHRELAY_MODEL"]
CAPITAL = "The capital of France is"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "sure": {"type": "boolean"}},
    "required": ["city", "sure"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["c", "f"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
client = openai.OpenAI(
    base_url=f"http://{os.environ['TORCHRELAY_OPENAI_ADDRESS']}/v1",
    api_key=os.environ["TORCHRELAY_API_KEY"],
    max_retries=0,
)


def completion(**fields):
    return client.completions.create(**{"model": MODEL, "prompt": CAPITAL, "max_tokens": 8, "temperature": 0, **fields})


def chat(**fields):
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 16, "temperature": 0, **fields}
    return client.chat.completions.create(**body)


def streamed_completion():
    chunks = list(completion(stream=True, stream_options={"include_usage": True}))
    return {
        "text": "".join(choice.text for chunk in chunks for choice in chunk.choices),
        "finish_reason": [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason],
        "completion_tokens": chunks[-1].usage.completion_tokens,
    }


def streamed_chat():
    with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, max_tokens=16, temperature=0, stream_options={"include_usage": True}
    ) as stream:
        kinds = sorted({event.type for event in stream})
        final = stream.get_final_completion()
    return {"kinds": kinds, "text": final.choices[0].message.content, "usage": final.usage.completion_tokens}


def tools():
    asked = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 100}
    choice = chat(**asked).choices[0]
    call = choice.message.tool_calls[0]
    with client.chat.completions.stream(model=MODEL, messages=QUESTION, temperature=0, **asked) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "7 degrees, rain"}
    answer = chat(messages=[*QUESTION, choice.message.model_dump(exclude_none=True), result], tools=[TOOL])
    return {
        "finish_reason": choice.finish_reason,
        "name": call.function.name,
        "arguments": json.loads(call.function.arguments),
        "streamed": json.loads(streamed.function.arguments),
        "answer": answer.choices[0].finish_reason,
    }


def json_schema():
    wanted = {"type": "json_schema", "json_schema": {"name": "capital", "schema": SCHEMA, "strict": True}}
    choice = chat(response_format=wanted, max_tokens=60).choices[0]
    return {"finish_reason": choice.finish_reason, "value": json.loads(choice.message.content)}


def logprobs():
    content = chat(logprobs=True, top_logprobs=2).choices[0].logprobs.content
    shown = completion(logprobs=2).choices[0].logprobs
    return {
        "chat": [len(entry.top_logprobs) for entry in content],
        "same": [entry.token == entry.top_logprobs[0].token for entry in content],
        "completion": [len(shown.tokens), len(shown.token_logprobs), len(shown.top_logprobs), len(shown.text_offset)],
    }


def error_of(call):
    try:
        call()
    except openai.APIStatusError as error:
        retry_after = error.response.headers.get("retry-after")
        return [type(error).__name__, error.status_code, error.param, error.code, retry_after]
    return None


def cancelled():
    """Break a stream off; the id lets the test look for the generation's end."""
    stream = completion(stream=True, max_tokens=1000, prompt="1, 2, 3,", extra_body={"ignore_eos": True})
    generation_id = ""
    for chunk in stream:
        generation_id = chunk.id
        break
    stream.close()
    return generation_id.removeprefix("cmpl-")


def limited():
    """Call with a key that may call once a minute."""
    poor = client.with_options(api_key=os.environ["POOR_KEY"])
    wish = {"model": MODEL, "prompt": CAPITAL, "max_tokens": 1}
    poor.completions.create(**wish)
    return error_of(lambda: poor.completions.create(**wish))


RESULTS = {
    "models": lambda: [model.id for model in client.models.list()],
    "completion": lambda: completion().choices[0].text,
    "prompts": lambda: [choice.index for choice in completion(prompt=["a", "b"], n=2, temperature=0.7).choices],
    "stop": lambda: [choice.finish_reason for choice in completion(stop=["Paris"], max_tokens=20).choices],
    "seed": lambda: len({completion(seed=7, temperature=1.2).choices[0].text for _ in range(2)}),
    "echo": lambda: completion(echo=True).choices[0].text,
    "extension": lambda: completion(extra_body={"no_repeat_ngram_size": 1, "top_k": 5}).usage.completion_tokens,
    "chat": lambda: chat().choices[0].message.content,
    "n": lambda: [choice.index for choice in chat(n=3, temperature=1).choices],
    "streamed_completion": streamed_completion,
    "streamed_chat": streamed_chat,
    "tools": tools,
    "json_schema": json_schema,
    "logprobs": logprobs,
    "no key": lambda: error_of(lambda: client.with_options(api_key="tr_wrong").models.list()),
    "no model": lambda: error_of(lambda: chat(model="other")),
    "bad value": lambda: error_of(lambda: chat(temperature=3)),
    "unknown": lambda: error_of(lambda: completion(suffix="x")),
    "limited": limited,
    "cancelled": cancelled,
}

if __name__ == "__main__":
    sys.stdout.write(json.dumps({name: call() for name, call in RESULTS.items()}) + "\n")
