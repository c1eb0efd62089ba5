"""Is understanding still there? Questions with short answers, asked before and after a training: your own, or those of
lmms-eval's tasks."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from reca_trainer.evaluation.generation import batched
from reca_trainer.evaluation.report import Z
from reca_trainer.images import decode_image
from reca_trainer.models.contract import UnifiedModel, UnifiedProcessor

ARTICLES = ("a", "an", "the")

# The paper's table "understanding is not lost": tasks of lmms-eval, and the metric of each that the table shows.
TASKS = {
    "mme": "mme_perception_score",  # of 2,000
    "pope": "pope_accuracy",
    "gqa": "exact_match",
    "mmmu_val": "mmmu_acc",
    "seedbench": "seed_image",
}


def score_tasks(
    model: str, tasks: Sequence[str], limit: int | None = None, include_path: str | Path | None = None, **options: Any
) -> tuple[dict[str, dict[str, float | None]], str]:
    """A model's results on tasks of lmms-eval, whose own prompts and metrics hold.

    Args:
        model: folder or Hub id.
        tasks: their names in lmms-eval. The metric of the paper's table is kept for the paper's tasks, and every metric for others.
        limit: ask only so many questions of each, the first ones.
        include_path: folder with tasks of your own, as `--include_path` of lmms-eval.
        options: as for `lmms_eval_model.RecALmms`: `adapter`, `dtype`, `load_in_4bit`, `batch_size`, and what
            `generate_text` takes.

    Returns:
        Per result, called `<task>` or `<task> <metric>`, its `mean` and 95 % `margin` (`None` where lmms-eval gives none),
        and the version of lmms-eval. Under `accelerate launch` nothing but on the main process.

    Raises:
        ValueError: lmms-eval has no such task.
        ImportError: lmms-eval is not installed.
    """
    try:
        import lmms_eval.tasks
        from lmms_eval.evaluator import simple_evaluate
    except ImportError as error:
        raise ImportError(f"Tasks of lmms-eval need it ({error}): pip install 'reca-trainer[lmms]'.") from error
    from reca_trainer.evaluation.lmms_eval_model import RecALmms

    manager = lmms_eval.tasks.TaskManager("WARNING", include_path and str(include_path), model_name="reca_trainer")
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(f"lmms-eval has no task {unknown[0]!r}.")
    results = simple_evaluate(
        RecALmms(model, mode="text", **options),
        tasks=list(tasks),
        limit=limit,
        task_manager=manager,
        log_samples=False,
    )
    means: dict[str, dict[str, float | None]] = {}
    for task, values in (results or {"results": {}})["results"].items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or "_stderr" in metric or metric != TASKS.get(task, metric):
                continue
            if not isinstance(value, int | float):  # lmms-eval has text for what it could not compute
                raise ValueError(f"lmms-eval gives no {metric} of {task}, but {value!r}.")
            errors = (values.get(f"{metric}_{kind},{filtered}") for kind in ("stderr_clt", "stderr"))
            error = next((e for e in errors if isinstance(e, int | float) and math.isfinite(e)), None)
            name = task if task in TASKS else f"{task} {metric}"
            means[name] = {"mean": float(value), "margin": None if error is None else Z * error}
    return means, version("lmms-eval")


def understanding_accuracy(
    model: UnifiedModel,
    processor: UnifiedProcessor,
    questions: Sequence[dict[str, Any]],
    batch_size: int = 1,
    **sampling: Any,
) -> float:
    """Share of the questions that the model answers right; arguments as for `answer_questions`."""
    if not len(questions):
        raise ValueError("The understanding probe needs at least one question.")
    rows = answer_questions(model, processor, questions, batch_size=batch_size, **sampling)
    return sum(row["correct"] for row in rows) / len(rows)


def answer_questions(
    model: UnifiedModel,
    processor: UnifiedProcessor,
    questions: Sequence[dict[str, Any]],
    indices: Iterable[int] | None = None,
    batch_size: int = 1,
    **sampling: Any,
) -> list[dict[str, Any]]:
    """Ask the model and mark its answers.

    Args:
        questions: `image` (PIL), `question` and `answer` (a string, or a list of strings that are all right).
        indices: which of `questions`; all by default.
        sampling: passed to `generate_text`: `max_new_tokens`, …

    Returns:
        Per question its `index`, `question`, `answer`, the model's `prediction`, and whether that is `correct`.
    """
    marked: list[dict[str, Any]] = []
    indices = list(range(len(questions)) if indices is None else indices)
    with tqdm(total=len(indices), desc="understanding", unit="question") as progress:
        for chunk in batched(indices, batch_size):
            rows = [questions[index] for index in chunk]
            texts, images = [row["question"] for row in rows], [decode_image(row["image"]) for row in rows]
            predictions = model.generate_text(processor, texts, images, **sampling)
            for index, row, prediction in zip(chunk, rows, predictions, strict=True):
                answers = [row["answer"]] if isinstance(row["answer"], str) else list(row["answer"])
                marked.append(
                    {
                        "index": index,
                        "question": row["question"],
                        "answer": row["answer"],
                        "prediction": prediction,
                        "correct": any(is_right(prediction, answer) for answer in answers),
                    }
                )
            progress.update(len(chunk))
    return marked


def is_right(prediction: str, answer: str) -> bool:
    """Whether a prediction is the answer or begins with it, letter case, punctuation and a leading article aside: "No, it
    is not." answers "no"; "nothing" and "not a cat" do not."""
    given, wanted = _words(prediction), _words(answer)
    if len(wanted) > 1 and wanted[0] in ARTICLES:
        wanted = wanted[1:]
    if given and given[0] in ARTICLES and given[:1] != wanted[:1]:  # the answer may be a choice called A
        given = given[1:]
    return bool(wanted) and given[: len(wanted)] == wanted


def _words(text: str) -> list[str]:
    return re.sub(f"[{re.escape(string.punctuation)}]", " ", text.lower()).split()
