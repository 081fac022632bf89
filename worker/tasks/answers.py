"""What a request with a task is answered, of what the model's forward pass gave of each of its texts. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.tasks import (
    AnswerQuestionTask,
    Answers,
    ClassifyTask,
    ClassifyTokensTask,
    Embeddings,
    EmbedTask,
    Entities,
    Labels,
    Ranking,
    RerankTask,
    Task,
    TaskName,
    TaskResult,
)
from worker.tasks.entities import find_entities
from worker.tasks.facts import EncoderFacts
from worker.tasks.labels import Array, best_labels, ranked
from worker.tasks.spans import find_answers


def name_of(task: Task) -> TaskName:
    """Return the task's name, as model cards have it."""
    match task:
        case EmbedTask():
            return TaskName.EMBED
        case ClassifyTask():
            return TaskName.CLASSIFY
        case RerankTask():
            return TaskName.RERANK
        case ClassifyTokensTask():
            return TaskName.CLASSIFY_TOKENS
        case AnswerQuestionTask():
            return TaskName.ANSWER_QUESTION


def answer(task: Task, outputs: Sequence[Array], facts: EncoderFacts) -> TaskResult:
    """Return the answer to a task that `facts` lists; `outputs` are of its texts, shaped as the head says."""
    match task:
        case EmbedTask():
            return _embeddings(task, outputs, facts)
        case ClassifyTask(top_k=top_k):
            function = task.function or facts.function
            return Labels(tuple(best_labels(logits, facts.labels, function, top_k) for logits in outputs))
        case RerankTask():
            return Ranking(ranked(np.concatenate(outputs), task.function or facts.function, task.top_n))
        case ClassifyTokensTask():
            parts = zip(outputs, task.spans, task.sources, strict=True)
            found = (
                find_entities(logits, spans, source, facts.labels, task.aggregation, task.ignored_labels)
                for logits, spans, source in parts
            )
            return Entities(tuple(found))
        case AnswerQuestionTask():
            return Answers(find_answers(task, outputs))


def _embeddings(task: EmbedTask, outputs: Sequence[Array], facts: EncoderFacts) -> Embeddings:
    dimensions = task.dimensions or facts.dimensions
    vectors = np.stack(outputs)[:, :dimensions].astype("<f4")
    if facts.normalizes if task.normalize is None else task.normalize:
        lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
        vectors = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return Embeddings(dimensions, tuple(vector.tobytes() for vector in vectors))
