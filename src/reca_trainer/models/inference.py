"""Arguments of inference: texts and pictures, single or in lists, become one of each per sample, or are refused by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image
from transformers.utils import logging

from reca_trainer.images import decode_image

logger = logging.get_logger(__name__)


def read_text(name: str, value: Any) -> str | list[str]:
    """A string, or the strings of a list or tuple.

    Raises:
        ValueError: something else; the message calls it `name`.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} is a string or a list of strings, not {type(value).__name__}.")
    for index, text in enumerate(value):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{index}] is a {type(text).__name__}, not a string.")
    return list(value)


def read_images(name: str, value: Any) -> Image.Image | list[Image.Image]:
    """A picture, or those of a list or tuple, decoded as for training: upright RGB, see `images.decode_image`.

    Raises:
        ImageError: one of them is no picture.
    """
    if isinstance(value, (list, tuple)):
        return [decode_image(image, f"{name}[{index}]") for index, image in enumerate(value)]
    return decode_image(value, name)


def spread(inputs: dict[str, Any]) -> dict[str, list[Any] | None]:
    """Each of `inputs` as a list with one entry per sample: a list stays, one value for all is repeated, `None` stays.

    Raises:
        ValueError: a list is empty, or two lists differ in length.
    """
    lists = {name: value for name, value in inputs.items() if isinstance(value, list)}
    for name, value in lists.items():
        if not value:
            raise ValueError(f"{name} is an empty list.")
    if len(set(map(len, lists.values()))) > 1:
        counts = " and ".join(f"{len(value)} {name}" for name, value in lists.items())
        raise ValueError(f"Got {counts}; pass lists of one length, or one value for all samples.")
    count = max(map(len, lists.values()), default=1)
    return {
        name: value if isinstance(value, list) or value is None else [value] * count for name, value in inputs.items()
    }


# Arguments of sampling that have an entry for each sample.
PER_SAMPLE = ("negative_prompt", "latents", "posterior_noise")


def differ_in_size(text: list[str] | None, images: list[Image.Image] | None) -> bool:
    """Whether images differ in size, so that they cannot be one tensor."""
    return images is not None and len({image.size for image in images}) > 1


def singly_where(
    condition: Callable[[list[str] | None, list[Image.Image] | None], bool],
) -> Callable[[Callable[..., list[Any]]], Callable[..., list[Any]]]:
    """Decorate `_generate_images` or `_generate_text`: where `condition(text, images)` is true, samples are made one by one,
    each with its entry of the arguments `PER_SAMPLE` and of a list of generators."""

    def decorate(method: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        @functools.wraps(method)
        def sample(
            model: Any,
            processor: Any,
            text: list[str] | None,
            images: list[Image.Image] | None,
            *,
            generator: Any,
            **sampling: Any,
        ) -> list[Any]:
            if not condition(text, images):
                return method(model, processor, text, images, generator=generator, **sampling)
            rows = {name: sampling.pop(name) for name in PER_SAMPLE if sampling.get(name) is not None}
            (rows if isinstance(generator, list) else sampling)["generator"] = generator
            result = []
            for index in range(len(text or images or [])):
                entry = slice(index, index + 1)
                inputs = (None if values is None else values[entry] for values in (text, images))
                entries = {name: values[entry] for name, values in rows.items()}
                result += method(model, processor, *inputs, **sampling, **entries)
            return result

        return sample

    return decorate


def check_generators(generator: Any, count: int) -> None:
    """Raise `ValueError` unless a list of generators has one for each of `count` samples."""
    if isinstance(generator, (list, tuple)) and len(generator) != count:
        raise ValueError(f"Got {len(generator)} generators for {count} samples; pass one per sample, or one for all.")


def check_side(model: str, name: str, value: int | None, sides: range) -> None:
    """Raise `ValueError` unless the side called `name` is one of the `sides` in pixels that `model` can make; the message
    gives the nearest of them."""
    if value is None or value in sides:
        return
    if len(sides) == 1:
        raise ValueError(f"{name}={value}, but {model} always has {name}={sides[0]}.")
    below = [side for side in sides if side < value][-1:]
    above = [side for side in sides if side > value][:1]
    raise ValueError(
        f"{name}={value}, but {model} makes multiples of {sides.step} pixels; use {' or '.join(map(str, below + above))}."
    )


def check_sampling(model: str, method: Callable[..., Any], sampling: Iterable[str]) -> None:
    """Raise `ValueError` if `sampling` has names that are not keywords of `method`, unless it takes any keyword."""
    parameters = inspect.signature(method).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    if unknown := sorted(set(sampling) - set(known)):
        raise ValueError(f"{model} has no use for {', '.join(unknown)}; it takes {', '.join(known)}.")


@contextmanager
def warning_of_cut_texts(processor: Any) -> Iterator[None]:
    """Log a warning if the processor shortens texts inside this context."""
    before = processor.texts_cut
    yield
    if count := processor.texts_cut - before:
        logger.warning(f"Texts longer than {type(processor).__name__} takes lost their end: {count}.")
