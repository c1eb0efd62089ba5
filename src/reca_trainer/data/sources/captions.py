"""Captions and conversations in the files of a source: in a text file, in a JSON object."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from reca_trainer.data.columns import CAPTION_COLUMNS, CONVERSATION_COLUMNS
from reca_trainer.data.sources.files import printable

logger = logging.getLogger(__name__)

PATH_COLUMNS = (
    "file_name",
    "filename",
    "image",
    "img",
    "image_path",
    "file_path",
    "path",
    "file",
    "images",
    "picture",
)
METADATA = ("metadata.jsonl", "metadata.csv", "captions.jsonl", "captions.csv")


def caption_file(name: str, contents: bytes) -> dict[str, str]:
    if name.lower().endswith(".json"):
        return texts_of(contents)
    try:
        return {"text": contents.decode("utf-8-sig").rstrip("\r\n")}
    except UnicodeDecodeError:
        logger.warning(f"{printable(name)}: not a caption in UTF-8.")
        return {}


def texts_of(contents: bytes | Mapping[str, Any]) -> dict[str, str]:
    """Caption and conversation of a JSON object, those that are not text as JSON."""
    try:
        record = json.loads(contents) if isinstance(contents, bytes) else contents
    except (ValueError, RecursionError):
        return {}
    texts = {}
    for column, names in (("text", CAPTION_COLUMNS), ("conversations", CONVERSATION_COLUMNS)):
        value = (
            next((record[name] for name in names if record.get(name)), None) if isinstance(record, Mapping) else None
        )
        if value is not None:
            texts[column] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return texts
