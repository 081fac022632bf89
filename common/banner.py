"""What `torchrelay serve` prints: where things are, and lines to try that fit the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from torchrelay.cli.connection import DEFAULT_ADDRESS, credentials_file
from torchrelay.v1 import model_pb2

_QUESTION: Final = "What is the capital of France?"
_TEXT: Final = "The capital of France is Paris."
_GENERATE: Final = "GenerationService/StreamGenerate"
# Of each task: the command's words, gRPC's method, and its request without the model's name.
_TASKS: Final[Mapping[int, tuple[str, str, Mapping[str, Any]]]] = {
    model_pb2.TASK_EMBED: (f'embed "{_TEXT}"', "EmbeddingService/Embed", {"texts": [_TEXT]}),
    model_pb2.TASK_CLASSIFY: (
        f'classify "{_TEXT}"', "ClassificationService/Classify", {"inputs": [{"text": _TEXT}]},
    ),
    model_pb2.TASK_CLASSIFY_TOKENS: (f'entities "{_TEXT}"', "ClassificationService/ClassifyTokens", {"texts": [_TEXT]}),
    model_pb2.TASK_ANSWER_QUESTION: (
        f'answer "{_QUESTION}" README.md',
        "ClassificationService/AnswerQuestion",
        {"question": _QUESTION, "context": _TEXT},
    ),
}  # fmt: skip


def banner(
    model: model_pb2.Model,
    address: str,
    admin_address: str,
    openai_address: str,
    metrics_addresses: Sequence[str],
    key: str,
    program: str,
) -> str:
    """Return how to call what is served."""
    where = "" if address == DEFAULT_ADDRESS else f" --address {address}"
    words, method, request, path, body = _lines(model)
    verb, _, rest = words.partition(" ")
    openai = curl = metrics = ""
    if any(metrics_addresses):
        metrics = f"  metrics  {' '.join(f'http://{address}/metrics' for address in metrics_addresses)}\n"
    if openai_address:
        openai = f"  openai   http://{openai_address}/v1 (completions, chat completions, embeddings, models)\n"
        if path:
            curl = (
                f"  curl http://{openai_address}/v1/{path} -H 'authorization: Bearer {key}' \\\n"
                f"    -d '{json.dumps({'model': model.name, **body})}'\n\n"
            )
    return (
        f"\n  gateway  {address} (gRPC, reflection on)   admin {admin_address}\n"
        f"{openai}{metrics}"
        f"  model    {model.name} ({model.family}, {model.dtype}, context {model.context_length})\n"
        f"  key      {key}   for development; kept in {credentials_file()}\n\n"
        f"  {program} {verb}{where} {rest}\n\n"
        f"  grpcurl -plaintext -H 'authorization: Bearer {key}' \\\n"
        f"    -d '{json.dumps({'model': model.name, **request})}' \\\n"
        f"    {address} torchrelay.v1.{method}\n\n"
        f"{curl}"
    )


def _lines(model: model_pb2.Model) -> tuple[str, str, Mapping[str, Any], str, Mapping[str, Any]]:
    """Return the command's words, gRPC's method and request, OpenAI's path (empty: none) and body."""
    config = {"max_tokens": 16}
    if model_pb2.TASK_TRANSLATE in model.tasks:
        languages: dict[str, str] = {}
        options = ""
        if model.languages:
            languages = {"source_language": model.languages[0], "target_language": model.languages[-1]}
            options = f"--translate-from {model.languages[0]} --translate-to {model.languages[-1]} "
        asked = {"input": {"translation": {"text": _TEXT, **languages}}, "config": config}
        return f'generate {options}"{_TEXT}"', _GENERATE, asked, "", {}
    if model_pb2.TASK_SUMMARIZE in model.tasks:
        asked = {"input": {"summarization": {"text": _TEXT}}, "config": config}
        return f'generate --summarize "{_TEXT}"', _GENERATE, asked, "", {}
    found = next((_TASKS[task] for task in model.tasks if task in _TASKS), None)
    if found is not None:
        words, method, request = found
        is_embedding = method.endswith("Embed")
        return words, method, request, "embeddings" if is_embedding else "", {"input": _TEXT}
    asked = {"input": {"text": "The capital of France is"}, "config": config}
    messages = [{"role": "user", "content": _QUESTION}]
    return (
        f'generate "{_QUESTION}"', _GENERATE, asked,
        "chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 32},
    )  # fmt: skip
