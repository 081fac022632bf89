"""What a model is asked for must be one of the tasks that its card names."""

from __future__ import annotations

from common.errors import FailedPrecondition
from common.registry import ModelCard
from common.tasks import TaskName


def check_task(card: ModelCard, task: TaskName) -> None:
    """Raise FailedPrecondition for a task that a model does not serve; its metadata names those that it does."""
    if task.value not in card.tasks:
        raise not_served(card, task)


def not_served(card: ModelCard, task: TaskName) -> FailedPrecondition:
    """Return the refusal."""
    return FailedPrecondition(
        f"the model does not serve the task {task.value}; it serves: {', '.join(card.tasks)}",
        reason="TASK_NOT_SERVED",
        metadata={"tasks": ",".join(card.tasks)},
    )
