"""Texts as token ids: names of special tokens as words, and the lengths of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def word_ids(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text in which names of special tokens, such as `<|im_end|>`, are words like all others."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def fits(tokenize: Callable[[str], list[int]], texts: Sequence[str], length: int) -> bool:
    """Whether `tokenize` makes at most `length` tokens of all texts together.

    Short texts are not tokenised: a token stands for a byte or more, and a Unicode normal form has at most three times the
    bytes of its text.
    """
    if 3 * sum(len(text.encode(errors="surrogatepass")) for text in texts) <= length:
        return True
    return sum(len(tokenize(text)) for text in texts) <= length
