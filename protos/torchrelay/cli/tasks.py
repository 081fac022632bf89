"""`torchrelay embed`, `classify`, `entities`, `answer` and `rerank`: the tasks of encoder models."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from torchrelay.cli import connection as at
from torchrelay.cli import output
from torchrelay.cli.generate import ModelOption, choose_model
from torchrelay.v1 import classification_pb2 as cpb
from torchrelay.v1 import embedding_pb2 as epb
from torchrelay.v1 import generation_pb2 as pb

TextsArgument = Annotated[list[str], typer.Argument(metavar="TEXT...", help="The texts.")]
TruncateOption = Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long at their end.")]
_AGGREGATIONS = ("none", "simple", "first", "average", "max")


@at.connected
def embed(
    texts: TextsArgument,
    model: ModelOption = "",
    dimensions: Annotated[int | None, typer.Option("--dimensions", min=1, help="Only the first so many.")] = None,
    truncate: TruncateOption = False,
    *,
    connection: at.Connection,
) -> None:
    """Print the vector of each text, one JSON array a line."""
    request = epb.EmbedRequest(model=model, texts=texts, dimensions=dimensions, truncation=_truncation(truncate))
    for one in _run(connection, request).embeddings:
        output.write(json.dumps([round(value, 7) for value in one.values]) + "\n")


@at.connected
def classify(
    texts: TextsArgument,
    model: ModelOption = "",
    pair: Annotated[str | None, typer.Option("--pair", help="The second text of each pair.")] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="The best labels of each; 0 is all.")] = 1,
    truncate: TruncateOption = False,
    as_json: at.JsonOption = False,
    *,
    connection: at.Connection,
) -> None:
    """Label texts, or pairs of texts."""
    inputs = [cpb.ClassificationInput(text=text, pair=pair) for text in texts]
    request = cpb.ClassifyRequest(model=model, inputs=inputs, top_k=top_k, truncation=_truncation(truncate))
    response = _run(connection, request)
    rows = [
        (f"{label.score:.4f}", label.label, text)
        for text, one in zip(texts, response.classifications, strict=True)
        for label in one.labels
    ]
    _show(response, ("SCORE", "LABEL", "TEXT"), rows, as_json=as_json)


@at.connected
def entities(
    texts: TextsArgument,
    model: ModelOption = "",
    aggregation: Annotated[str, typer.Option("--aggregation", help="none, simple, first, average or max.")] = "simple",
    truncate: TruncateOption = False,
    as_json: at.JsonOption = False,
    *,
    connection: at.Connection,
) -> None:
    """Find entities in texts."""
    if aggregation not in _AGGREGATIONS:
        raise typer.BadParameter(f"must be one of {', '.join(_AGGREGATIONS)}", param_hint="--aggregation")
    chosen = cpb.Aggregation.Value(f"AGGREGATION_{aggregation.upper()}")
    request = cpb.ClassifyTokensRequest(model=model, texts=texts, aggregation=chosen, truncation=_truncation(truncate))
    response = _run(connection, request)
    rows = [
        (number, f"{one.start}-{one.end}", one.label, f"{one.score:.4f}", one.text)
        for number, text in enumerate(response.texts)
        for one in text.entities
    ]
    _show(response, ("TEXT", "WHERE", "LABEL", "SCORE", "ENTITY"), rows, as_json=as_json)


@at.connected
def answer(
    question: Annotated[str, typer.Argument(help="The question.")],
    context: Annotated[Path, typer.Argument(help="A file with the text to look in; - reads stdin.", allow_dash=True)],
    model: ModelOption = "",
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="So many answers.")] = 1,
    may_be_none: Annotated[bool, typer.Option("--may-be-none", help="The text may have no answer.")] = False,
    as_json: at.JsonOption = False,
    *,
    connection: at.Connection,
) -> None:
    """Find the part of a text that answers a question."""
    try:
        text = sys.stdin.read() if str(context) == "-" else context.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"cannot be read: {error}", param_hint="CONTEXT") from error
    request = cpb.AnswerQuestionRequest(
        model=model, question=question, context=text, top_k=top_k, allow_no_answer=may_be_none
    )
    response = _run(connection, request)
    rows = [(f"{one.score:.4f}", f"{one.start}-{one.end}", one.text or "(none)") for one in response.answers]
    _show(response, ("SCORE", "WHERE", "ANSWER"), rows, as_json=as_json)


@at.connected
def rerank(
    query: Annotated[str, typer.Argument(help="The query.")],
    documents: Annotated[list[str], typer.Argument(metavar="DOCUMENT...", help="The documents.")],
    model: ModelOption = "",
    top_n: Annotated[int, typer.Option("--top-n", min=0, help="The best; 0 is all.")] = 0,
    truncate: TruncateOption = False,
    as_json: at.JsonOption = False,
    *,
    connection: at.Connection,
) -> None:
    """Order documents by how well they fit a query."""
    request = cpb.RerankRequest(
        model=model, query=query, documents=documents, top_n=top_n, truncation=_truncation(truncate)
    )
    response = _run(connection, request)
    rows = [(f"{one.score:.4f}", one.index, documents[one.index]) for one in response.documents]
    _show(response, ("SCORE", "INDEX", "DOCUMENT"), rows, as_json=as_json)


def _truncation(truncate: bool) -> pb.Truncation.ValueType:
    return pb.TRUNCATION_END if truncate else pb.TRUNCATION_UNSPECIFIED


def _run(connection: at.Connection, request: Any) -> Any:
    with output.explained_errors(connection.address), connection.client() as client:
        request.model = choose_model(client, request.model)
        return client.run(request)


def _show(response: Any, columns: Sequence[str], rows: Sequence[Sequence[object]], *, as_json: bool) -> None:
    if as_json:
        output.print_json(response)
    else:
        output.print_table(columns, rows)
