"""From a row to a whole, upright RGB image and its text."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from typing import Any

import fsspec
import torch
from datasets import Dataset, Features, List, Value

from reca_trainer.data.columns import Columns, check_columns, first_image, needed_columns, undecoded
from reca_trainer.data.sampling import Draw, mixed_hash
from reca_trainer.images import ImageError, decode_image, image_size, list_problems
from reca_trainer.models.contract import IMAGE_MARK, Conversation

# So many unreadable images one after the other mean that something else is wrong than a few bad files.
MAX_BAD_IN_A_ROW = 1000


# What others call the roles of transformers, in lower case.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}

ConversationProblem = Callable[[Conversation], str | None]


class RowDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """The rows that a `TaskBatchSampler` draws, decoded: `dataset[draw]`.

    Args:
        datasets: each task's `datasets.Dataset` (two tasks may share one).
        columns: each task's `Columns`.
        on_bad_image: `"raise"` an `ImageError` that names row and file, or `"skip"`: put another row in its
            place, drawn from all, and list what was wrong in `skipped`.
        conversation_problem: why a family cannot learn from a conversation (`UnifiedProcessor.conversation_problem`);
            another row takes its place, listed in `skipped`.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        columns: Mapping[str, Columns],
        on_bad_image: str = "raise",
        conversation_problem: ConversationProblem | None = None,
    ):
        check_on_bad_image(on_bad_image)
        check_columns(columns)
        self.columns = dict(columns)
        self.on_bad_image = on_bad_image
        self.conversation_problem = conversation_problem
        self.datasets = {
            task: undecoded(dataset, needed_columns(dataset, columns[task]), columns[task].image)
            for task, dataset in datasets.items()
        }

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets.values())

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        """One row, ready for the collator.

        Returns:
            `task`, `image` (RGB, whole and upright), `text` (caption, conversation or `None`), `draw`, `source` (row
            and file), `skipped` (what was wrong with the rows this one stands in for).

        Raises:
            ImageError: the image cannot be used; with `"skip"`, neither can any of those drawn in its place, up to all
                rows or `MAX_BAD_IN_A_ROW`.
            ValueError: what should be a caption or a conversation is something else.
        """
        dataset = self.datasets[draw.task]
        candidates = ((row, dataset[row]) for row in with_substitutes(draw.row, len(dataset)))
        return first_good_row(draw, candidates, self.columns[draw.task], self.on_bad_image, self.conversation_problem)


def with_substitutes(wanted: int, rows: int) -> Iterator[int]:
    """The wanted row, then what stands in for it: others of all `rows`, in an order that hangs on it alone, none twice. A
    damaged shard so is not replaced by its one neighbour."""
    tried = {wanted}
    yield wanted
    for attempt in count():
        if len(tried) == min(rows, MAX_BAD_IN_A_ROW):
            return
        row = mixed_hash(5, wanted, attempt) % rows
        if row not in tried:
            tried.add(row)
            yield row


def row_sizes(
    dataset: Dataset, column: str, on_bad_image: str = "raise", num_proc: int | None = None
) -> list[tuple[int, int]]:
    """`(width, height)` in pixels of every row: from columns of those names, else from the images' headers.

    Headers are read once, with a progress bar; `datasets` caches the result beside the dataset.

    Args:
        column: the image column.
        on_bad_image: what to do where a header cannot be read: `"raise"`, or `"skip"`: count the row as square, for
            `RowDataset` to replace, unless there is no other.
        num_proc: processes that read headers.

    Raises:
        ImageError: rows whose header cannot be read, each named.
    """
    check_on_bad_image(on_bad_image)
    features = dataset.features
    if all(isinstance(features.get(n), Value) and "int" in features[n].dtype for n in ("width", "height")):
        sizes = list(zip(dataset["width"], dataset["height"], strict=True))
        if all(width and height and width > 0 and height > 0 for width, height in sizes):
            return sizes
    headers = undecoded(dataset, [column], column).map(
        _read_header,
        with_indices=True,
        input_columns=[column],
        remove_columns=[column],
        features=Features({"size": List(Value("int64")), "problem": Value("string")}),
        num_proc=num_proc,
        desc="Reading image sizes",
    )
    problems = [problem for problem in headers["problem"] if problem]
    if problems and (on_bad_image == "raise" or len(problems) == len(dataset)):
        raise ImageError(list_problems(problems, f"{len(problems)} of {len(dataset)} images cannot be used"))
    return [tuple(size) for size in headers["size"]]


def _read_header(image: Any, row: int) -> dict[str, Any]:
    source = source_name(row, image)
    try:
        return {"size": image_size(read_source(image, source), source), "problem": ""}
    except ImageError as error:
        return {"size": (1, 1), "problem": str(error)}


def first_good_row(
    draw: Draw,
    candidates: Iterable[tuple[int, dict[str, Any]]],
    columns: Columns,
    on_bad_image: str,
    conversation_problem: ConversationProblem | None = None,
) -> dict[str, Any]:
    skipped = []
    for row, record in candidates:
        source = source_name(row, record[columns.image], record.get("__url__"))
        text = _text(draw, record, columns, source)
        if isinstance(text, list):
            problem = "no image" if has_no_image(record[columns.image]) else None
            if problem is None and conversation_problem is not None:
                problem = conversation_problem(text)
            if problem is not None:
                skipped.append(f"{source}: the conversation is left out: {problem}.")
                continue
        try:
            image = decode_image(read_source(record[columns.image], source), source)
        except ImageError as error:
            if on_bad_image == "raise":
                raise
            skipped.append(str(error))
            continue
        return {
            "task": draw.task,
            "image": image,
            "text": text,
            "draw": draw,
            "source": source,
            "skipped": skipped,
        }
    raise ImageError(list_problems(skipped, f"None of {len(skipped)} rows, one after the other, can be used"))


def has_no_image(image: Any) -> bool:
    """Whether an undecoded image cell is empty."""
    image = first_image(image)
    if isinstance(image, Mapping):
        return image.get("bytes") is None and not image.get("path")
    return image is None or image == ""


def _text(draw: Draw, record: dict[str, Any], columns: Columns, source: str) -> str | Conversation | None:
    if draw.task == "reconstruct":
        return None
    if draw.task == "caption" and columns.conversation and (turns := _from_json(record[columns.conversation])):
        return messages(turns, source)
    captions = _captions(record[columns.caption]) if columns.caption else []
    caption = captions[draw.seed % len(captions)] if captions else None
    if caption is not None and not isinstance(caption, str):
        raise ValueError(f"{source}: the caption in column {columns.caption!r} is {type(caption).__name__}, not text.")
    return caption if caption and caption.strip() else None


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
    """Raises `ValueError` naming the rows that have no caption or answer for `task` to learn from."""
    missing = [f"row {row}" for row in rows_without_text(dataset, task, columns)]
    if missing:
        headline = (
            f"{len(missing)} of {len(dataset)} rows have no caption, which the task {task!r} learns from; fill in or drop "
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
    texts = dataset.with_format(None).select_columns([name for name in columns[1:] if name])
    records = (
        dict(zip(batch, values, strict=True))
        for batch in texts.iter(batch_size=1000)
        for values in zip(*batch.values(), strict=True)
    )
    return [row for row, record in enumerate(records) if not has_text(record, task, columns, f"row {row}")]


def has_text(record: dict[str, Any], task: str, columns: Columns, source: str = "a row") -> bool:
    """Whether a row has a caption or an answer for `task` to learn from."""
    return _text(Draw(task, 0, (1, 1), 0, ""), record, columns, source) is not None


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


def read_source(image: Any, source: str) -> Any:
    """What `decode_image` can open: rows may point into an archive or, streamed, into a Hub repository."""
    image = first_image(image)
    path = image.get("path") if isinstance(image, Mapping) and image.get("bytes") is None else image
    if not isinstance(path, str) or "://" not in path:
        return image
    if not {part.split("://")[0] for part in path.split("::") if "://" in part} <= {"hf", "zip", "tar", "file"}:
        raise ImageError(f"{source}: the image is a remote address; download it first.")
    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except Exception as error:
        raise ImageError(f"{source}: cannot be read ({type(error).__name__}: {error}).") from error


def source_name(row: int, image: Any, archive: str | None = None) -> str:
    image = first_image(image)
    path = image.get("path") if isinstance(image, Mapping) else image if isinstance(image, str) else None
    where = " in ".join(part for part in (path, archive) if part)
    return f"row {row} ({where})" if where else f"row {row}"


def check_on_bad_image(on_bad_image: str) -> None:
    if on_bad_image not in ("raise", "skip"):
        raise ValueError(f"on_bad_image is 'raise' or 'skip', got {on_bad_image!r}.")
