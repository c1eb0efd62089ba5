"""Between PIL images and pixels in [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image


def to_pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """Images of one size -> `[B, 3, H, W]` float32 in [-1, 1].

    Raises:
        ValueError: the images differ in size.
    """
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise ValueError(
            f"The images of one batch come out at different sizes (width, height): {sizes}. "
            "Batch images of one aspect ratio, or pass `size`."
        )
    arrays = [np.asarray(image if image.mode == "RGB" else image.convert("RGB")) for image in images]
    pixels = np.stack(arrays).astype(np.float32) / 255.0
    return torch.from_numpy((pixels - 0.5) / 0.5).permute(0, 3, 1, 2).contiguous()


def cut_to_shape(image: Image.Image, size: tuple[int, int], place: float | None = None) -> Image.Image:
    """The largest part of an image with the aspect ratio of `size = (height, width)`.

    Args:
        place: in [0, 1), where along the longer side: of `n + 1` possible offsets, number `int(place * (n + 1))`; `None` is
            the centre.
    """
    height, width = size
    scale = min(image.width / width, image.height / height)
    part = max(round(width * scale), 1), max(round(height * scale), 1)
    left, top = (
        free // 2 if place is None else int(place * (free + 1))
        for free in (image.width - part[0], image.height - part[1])
    )
    return image.crop((left, top, left + part[0], top + part[1]))


def to_images(pixels: torch.Tensor, rounding: Literal["nearest", "down"] = "nearest") -> list[Image.Image]:
    """`[B, 3, H, W]`, about [-1, 1] -> RGB images of 8 bits.

    Args:
        rounding: to the nearest of the 256 levels, or down, as some originals do.
    """
    pixels = pixels.float()
    levels = 127.5 * pixels + 128 if rounding == "nearest" else (pixels * 0.5 + 0.5) * 255
    array = levels.clamp(0, 255).permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()
    return [Image.fromarray(np.ascontiguousarray(image)) for image in array]
