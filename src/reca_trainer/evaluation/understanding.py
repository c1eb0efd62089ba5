"""Is understanding still there? Questions with short answers, asked before and after a training."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from typing import Any

from tqdm.auto import tqdm

from reca_trainer.evaluation.generation import batched
from reca_trainer.images import decode_image
from reca_trainer.models.contract import UnifiedModel, UnifiedProcessor

ARTICLES = ("a", "an", "the")


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
