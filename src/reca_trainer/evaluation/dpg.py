"""DPG-Bench (Hu et al., 2024, arXiv 2403.05135): yes/no questions about every statement of a dense prompt.

A question counts only if the questions it depends on were answered with yes. The published judge (mPLUG-large) needs
modelscope and fairseq; any judge of `reca_trainer.evaluation.judge` takes its place, so **scores are not comparable to
published ones unless the judge is the same**; the report names the judge.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import load_dataset
from PIL import Image

from reca_trainer.evaluation.generation import Prompt, image_path
from reca_trainer.files import replacing
from reca_trainer.images import decode_image

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
INSTRUCTION = "Answer with yes or no."


def read_prompts(source: str | Path, split: str = "train") -> list[Prompt]:
    """Prompts and questions in the published CSV form: one row per question.

    Args:
        source: a CSV file with the columns `item_id`, `text`, `proposition_id`, `dependency`, `tuple` and
            `question_natural_language` (others are ignored), or a Hub dataset with these columns.
        split: of the Hub dataset.

    Raises:
        ValueError: a column is missing, a row's numbers are none, a question is asked twice, depends on one that is not
            there, or on itself. The message names the file and line.
    """
    if Path(source).is_file():
        with open(source, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    elif str(source).endswith(".csv"):
        raise ValueError(f"There is no file {source}.")
    else:
        rows = list(load_dataset(str(source), split=split))
    missing = [column for column in COLUMNS if not rows or column not in rows[0]]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}; DPG-Bench's CSV has one row per question.")

    items: dict[str, dict[str, Any]] = {}
    for line, row in enumerate(rows, start=2):
        where = f"{source}, line {line}"
        item = items.setdefault(str(row["item_id"]), {"prompt": row["text"], "questions": {}})
        try:
            number = int(row["proposition_id"])
            parents = [int(parent) for parent in str(row["dependency"]).split(",")]
        except ValueError as error:
            raise ValueError(f"{where}: proposition_id and dependency must be whole numbers ({error}).") from error
        if str(number) in item["questions"]:
            raise ValueError(f"{where}: question {number} of {row['item_id']} is already there.")
        item["questions"][str(number)] = {
            "question": row["question_natural_language"].strip(),
            "level": re.sub(r"\s+", " ", row["tuple"].split("(")[0]).strip(),  # "entity - whole (dog)"
            "parents": [str(parent) for parent in parents if parent != 0],
        }
    for name, item in items.items():
        _check_dependencies(item["questions"], f"{source}, item {name}")
    return [Prompt(name, item["prompt"], item) for name, item in items.items()]


def _check_dependencies(questions: dict[str, dict[str, Any]], where: str) -> None:
    settled: set[str] = set()

    def settle(number: str, path: tuple[str, ...]) -> None:
        if number not in questions:
            raise ValueError(f"{where}: question {path[-1]} depends on question {number}, which is not there.")
        if number in path:
            raise ValueError(f"{where}: questions {' → '.join((*path, number))} depend on each other.")
        if number not in settled:
            for parent in questions[number]["parents"]:
                settle(parent, (*path, number))
            settled.add(number)

    for number in questions:
        settle(number, ())


def apply_dependencies(questions: dict[str, dict[str, Any]], yes: dict[str, bool]) -> dict[str, bool]:
    """Which questions count as met: those answered with yes whose parents, all the way up, are met too."""
    met: dict[str, bool] = {}

    def is_met(number: str) -> bool:
        if number not in met:
            met[number] = yes[number] and all(is_met(parent) for parent in questions[number]["parents"])
        return met[number]

    return {number: is_met(number) for number in questions}


def read_answer(answer: str) -> bool | None:
    """Yes, no, or neither: the first of the two words in a judge's answer."""
    word = re.search(r"\b(yes|no)\b", answer.lower())
    return None if word is None else word[0] == "yes"


class DPGBench:
    """Scores the images of a prompt with a judge.

    An image's `score` is the share of its questions that are met. As in the original, the scores per level (`entity`,
    `entity - whole`, …) are shares of all questions answered with yes, whatever they depend on.

    Args:
        judge: `judge(images, questions) -> answers`, see `reca_trainer.evaluation.judge`.
        instruction: added to each question; "" for a judge that answers yes or no by itself.
    """

    def __init__(self, judge: Callable[[list[Image.Image], list[str]], list[str]], instruction: str = INSTRUCTION):
        self.judge, self.instruction = judge, instruction

    @property
    def scorer(self) -> dict[str, Any]:
        """What the scores depend on besides the images."""
        return {"benchmark": "dpg", "judge": self.judge.source, "instruction": self.instruction}

    def __call__(self, prompt: Prompt, paths: list[Path]) -> list[dict[str, Any]]:
        """One row per image: `score`, the judge's answers, and the questions that failed."""
        questions = prompt.metadata["questions"]
        images = [decode_image(path) for path in paths]
        asked = [f"{entry['question']} {self.instruction}".strip() for entry in questions.values()]
        answers = self.judge([image for image in images for _ in asked], asked * len(images))
        return [
            self._row(questions, dict(zip(questions, answers[start : start + len(asked)], strict=True)))
            for start in range(0, len(answers), len(asked))
        ]

    def _row(self, questions: dict[str, dict[str, Any]], answers: dict[str, str]) -> dict[str, Any]:
        read = {number: read_answer(answer) for number, answer in answers.items()}
        yes = {number: answer is True for number, answer in read.items()}
        met = apply_dependencies(questions, yes)
        parts: dict[str, list[float]] = {}
        for number, entry in questions.items():
            for level in dict.fromkeys((entry["level"].split(" - ")[0], entry["level"])):
                part = parts.setdefault(level, [0, 0])
                part[0] += yes[number]
                part[1] += 1
        failed = [f"{questions[n]['question']} {answers[n]}" for n in questions if not yes[n]]
        return {
            "tag": "dpg",
            "score": sum(met.values()) / len(met),
            "categories": parts,
            "reason": "\n".join(failed),
            "answers": answers,
            "unreadable": sum(answer is None for answer in read.values()),
        }


# The published layout: one grid of 2 × 2 images per prompt


def write_grids(prompts: list[Prompt], images_of: Callable[[Prompt], list[Path]], grids: str | Path) -> None:
    """Put the first four images of each prompt into `grids`/<item id>.png, as the original scorer reads them.

    Raises:
        ValueError: a prompt has fewer than four images, or they differ in size.
    """
    for prompt in prompts:
        images = [decode_image(path) for path in images_of(prompt)[:4]]
        if len(images) < 4 or len({image.size for image in images}) > 1:
            raise ValueError(f"A grid of {prompt.id} takes four images of one size; there are {len(images)}.")
        width, height = images[0].size
        grid = Image.new("RGB", (2 * width, 2 * height))
        for index, image in enumerate(images):
            grid.paste(image, (index % 2 * width, index // 2 * height))
        with replacing(Path(grids) / f"{prompt.id}.png") as temporary:
            grid.save(temporary, format="PNG")


def find_grids(grids: str | Path) -> dict[str, Path]:
    """The PNG files of a folder by their names without `.png`, which may be written large."""
    return {path.stem: path for path in Path(grids).glob("*") if path.suffix.lower() == ".png"}


def read_grids(grids: str | Path, prompts: list[Prompt], folder: str | Path) -> None:
    """Cut the grids of `grids` into single images under `folder`.

    Raises:
        ValueError: a grid is missing or does not divide into four.
    """
    paths = find_grids(grids)
    for prompt in prompts:
        if prompt.id not in paths:
            raise ValueError(f"{grids} lacks {prompt.id}.png: there must be one grid per prompt.")
        path = paths[prompt.id]
        grid = decode_image(path)
        if grid.width % 2 or grid.height % 2:
            raise ValueError(f"{path} is {grid.width} × {grid.height}; a grid of 2 × 2 images has even sides.")
        width, height = grid.width // 2, grid.height // 2
        for index in range(4):
            x, y = index % 2 * width, index // 2 * height
            with replacing(image_path(Path(folder), prompt.id, index)) as temporary:
                grid.crop((x, y, x + width, y + height)).save(temporary, format="PNG")
