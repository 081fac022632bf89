"""What a model can be asked for. Pure."""

from __future__ import annotations

from common.errors import FailedPrecondition
from common.registry import ModelCard
from common.tasks import TaskName


def check_task(card: ModelCard, task: TaskName) -> None:
    """Raise FailedPrecondition for a task that the model does not serve; it names those that it does."""
    if task not in card.tasks:
        raise not_served(card)


def not_served(card: ModelCard) -> FailedPrecondition:
    """Return the refusal of a task that the model does not serve."""
    return FailedPrecondition(
        "the model does not serve this task", reason="TASK_NOT_SERVED", metadata={"tasks": ",".join(card.tasks)}
    )
