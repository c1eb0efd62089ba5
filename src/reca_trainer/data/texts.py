"""Captions and conversations of rows, as a processor takes them."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from datasets import Dataset

from reca_trainer.data.columns import Columns
from reca_trainer.data.edits import has_instructions
from reca_trainer.data.sampling import Draw
from reca_trainer.images import list_problems
from reca_trainer.models.contract import IMAGE_MARK, Conversation

# What others call the roles of transformers, in lower case.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}


def text_of(draw: Draw, record: dict[str, Any], columns: Columns, source: str) -> str | Conversation | None:
    """What a row teaches a task in words: a conversation or a caption; several captions are drawn from by the seed.

    Raises:
        ValueError: what should be a caption or a conversation is something else.
    """
    if draw.task == "reconstruct":
        return None
    if draw.task == "caption" and columns.conversation and (turns := _from_json(record[columns.conversation])):
        return messages(turns, source)
    captions = _captions(record[columns.caption]) if columns.caption else []
    for caption in captions:
        if not isinstance(caption, str):
            raise ValueError(
                f"{source}: a caption in column {columns.caption!r} is {type(caption).__name__}, not text."
            )
    captions = [caption for caption in captions if caption.strip()]
    return captions[draw.seed % len(captions)] if captions else None


def _captions(value: Any) -> list[Any]:
    """All captions in a cell: a text, a list of them, or an object of either, as such or as JSON."""
    stored = _from_json(value)
    if isinstance(stored, dict) or (isinstance(stored, list) and all(isinstance(item, str) for item in stored)):
        value = stored
    if isinstance(value, dict):
        value = [caption for part in value.values() for caption in (part if isinstance(part, list) else [part])]
    captions = value if isinstance(value, list) else [value]
    return [caption for caption in captions if caption is not None]


def _from_json(value: Any) -> Any:
    """What JSON text of an object or a list holds; anything else as it is, such as a caption that begins with a brace."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def check_texts(dataset: Dataset, task: str, columns: Columns) -> None:
    """Raises `ValueError` naming the rows that have no caption, answer or instruction for `task` to learn from."""
    missing = [f"row {row}" for row in rows_without_text(dataset, task, columns)]
    if missing:
        lacking = (
            "instruction for every step" if columns.has_chains else "instruction" if task == "edit" else "caption"
        )
        headline = (
            f"{len(missing)} of {len(dataset)} rows have no {lacking}, which the task {task!r} learns from; fill in or drop "
            "such rows, name another column, or give this task the weight 0"
        )
        raise ValueError(list_problems(missing, headline))


def rows_without_text(dataset: Dataset, task: str, columns: Columns) -> list[int]:
    """Numbers of the rows that have no caption or answer for `task` to learn from.

    Raises:
        ValueError: what should be a caption or a conversation is something else.
    """
    if task == "reconstruct":
        return []
    texts = dataset.with_format(None).select_columns(columns.texts)
    records = (
        dict(zip(batch, values, strict=True))
        for batch in texts.iter(batch_size=1000)
        for values in zip(*batch.values(), strict=True)
    )
    return [row for row, record in enumerate(records) if not has_text(record, task, columns, f"row {row}")]


def has_text(record: dict[str, Any], task: str, columns: Columns, source: str = "a row") -> bool:
    """Whether a row has a caption, an answer or the instructions for `task` to learn from."""
    if task == "edit":
        return has_instructions(record[columns.instruction or ""], columns.has_chains)
    return text_of(Draw(task, 0, (1, 1), 0, ""), record, columns, source) is not None


def messages(turns: Any, source: str) -> Conversation:
    """A conversation as `{"role", "content"}` messages, of `{from, value}`, `{role, content}` or `{user, assistant}`
    turns, or of JSON text of these; `<image>` stands where the picture is shown: before the first question, where no
    message says.

    Raises:
        ValueError: they are no such turns.
    """
    turns = _from_json(turns)
    if isinstance(turns, dict) and all(isinstance(values, list) for values in turns.values()):
        # A column of lists, as older `datasets` stored lists of dicts.
        turns = [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]
    turns = [turns] if isinstance(turns, dict) else turns
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(
            f"{source}: a conversation is a list of {{from, value}}, {{role, content}} or {{user, assistant}} turns."
        )
    turns = [part for turn in turns for part in _parts(turn)]
    conversation = []
    for place, turn in enumerate(turns):
        speaker, content = turn.get("from") or turn.get("role"), turn.get("value") or turn.get("content") or ""
        if isinstance(content, list):
            parts = [part for part in content if isinstance(part, dict)]
            content = "\n".join(
                IMAGE_MARK if part.get("type") == "image" else part.get("text") or "" for part in parts
            )
        role = speaker.strip().lower() if isinstance(speaker, str) else speaker
        role = ROLES.get(role, role)
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise ValueError(
                f"{source}: message {place} of the conversation is {type(content).__name__} of role {speaker!r}; roles "
                "are system, user (or human) and assistant (or gpt, chatgpt, model), and contents are text."
            )
        conversation.append({"role": role, "content": content})
    questions = [message for message in conversation if message["role"] == "user"]
    if questions and not any(IMAGE_MARK in message["content"] for message in conversation):
        questions[0]["content"] = f"{IMAGE_MARK}\n{questions[0]['content']}"
    return conversation


def _parts(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns of a `{user, assistant}` pair; any other turn is its own part."""
    roles = {role: name for name in turn if (role := str(name).strip().lower()) in ("system", "user", "assistant")}
    if not {"user", "assistant"} <= set(roles) or turn.get("from") or turn.get("role"):
        return [turn]
    order = ("system", "user", "assistant")
    return [{"role": role, "content": turn[roles[role]]} for role in order if role in roles and turn[roles[role]]]
