"""The tasks a unified multimodal model learns from: one table, which every other module reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One term of the loss.

    Args:
        index: sets the task's random draws apart from those of the others. It is part of every published run: a new
            task takes the next number.
        weight_option: the argument of `RecAConfig` that weights the term.
        loss_name: what the term is called in logs.
        columns: the fields of `data.Columns` that hold the text it learns from, in order of preference; none where
            the image is enough.
    """

    index: int
    weight_option: str
    loss_name: str
    columns: tuple[str, ...] = ()


TASKS = {
    "reconstruct": Task(0, "reca_weight", "reconstruction_loss"),
    "caption": Task(1, "image_to_text_weight", "image_to_text_loss", ("conversation", "caption")),
    "generate": Task(2, "text_to_image_weight", "text_to_image_loss", ("caption",)),
    "edit": Task(3, "edit_weight", "edit_loss", ("instruction",)),
}


def parse_task_mix(task_mix: str) -> dict[str, int]:
    """`"reconstruct=2,caption=1"` as `{"reconstruct": 2, "caption": 1}`.

    Raises:
        ValueError: a name is no task, a task stands twice, or a count is no whole number.
    """
    counts: dict[str, int] = {}
    for part in task_mix.split(","):
        task, _, count = (word.strip() for word in part.partition("="))
        if task not in TASKS or task in counts or not count.isdecimal():
            raise ValueError(
                f"task_mix names tasks ({', '.join(TASKS)}) with whole numbers, each once, such as "
                f"reconstruct=2,caption=1; got {task_mix!r}."
            )
        counts[task] = int(count)
    return counts
