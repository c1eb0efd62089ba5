"""Decode, validate and orient images.

Whatever is stored (palette, CMYK, 16 bits, alpha, an animation, a rotated photograph), training sees upright RGB. What
cannot be read is an `ImageError` that says which image and why.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

# Raster formats whose decoders run inside Pillow; EPS, for one, would start another program on the file's contents.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "AVIF")

# Twice the size Pillow warns of, half a gigabyte of RGB: anything larger is an attack sooner than a photograph.
MAX_PIXELS = 178_956_970

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image that cannot be used; the message names it and says why."""


def decode_image(source: Any, name: str = "") -> Image.Image:
    """Read an image as upright RGB.

    Exif orientation is applied, transparency is laid on white, the first frame of an animation is taken, 16-bit values
    are scaled to 8.

    Args:
        source: encoded bytes, a path, a binary file, a `PIL.Image.Image`, or the `{"bytes", "path"}` dict of a
            `datasets.Image(decode=False)` column (bytes first, path if there are none).
        name: what to call the image in errors; by default its path, if it has one.

    Returns:
        A fully loaded `PIL.Image.Image` of mode RGB that shares no file with `source`.

    Raises:
        ImageError: missing, not a regular file, not one of `FORMATS`, truncated, corrupt, or above `MAX_PIXELS`.
    """
    with _errors_named(name or _name(source)), _opened(source) as image:
        image.load()
        transpose = _UPRIGHT.get(_orientation(image))
        rgb = _to_rgb(image)
        return rgb if transpose is None else rgb.transpose(transpose)


def image_size(source: Any, name: str = "") -> tuple[int, int]:
    """`(width, height)` in pixels of the upright image, from its header only.

    Takes the same sources and raises the same `ImageError` as `decode_image`, except for damage behind the header.
    """
    with _errors_named(name or _name(source)), _opened(source) as image:
        width, height = image.size
        # Pillow reports a TIFF's size upright already.
        sideways = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)
        return (height, width) if sideways else (width, height)


@contextmanager
def _errors_named(name: str) -> Iterator[None]:
    """Turn whatever a decoder throws at damage (`OSError`, `SyntaxError`, `struct.error`, …) into `ImageError`."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image of a known format ({', '.join(FORMATS)}).") from error
    except Exception as error:
        raise ImageError(f"{name}: cannot be read as an image ({type(error).__name__}: {error}).") from error


@contextmanager
def _opened(source: Any) -> Iterator[Image.Image]:
    """The header of `source` as a lazy PIL image; files opened here are closed again."""
    if isinstance(source, Mapping):
        source = source.get("bytes") if source.get("bytes") is not None else source.get("path")
    if source is None:
        raise ImageError("there is no image here (neither bytes nor a path).")
    if isinstance(source, Image.Image):
        _check_size(source)
        yield source
        return
    borrowed = hasattr(source, "read")
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not len(source):
            raise ImageError("the file is empty (0 bytes).")
        source = io.BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        status = os.stat(source)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device could wait for ever
            raise ImageError("not a regular file.")
        if not status.st_size:
            raise ImageError("the file is empty (0 bytes).")
        source = Path(source)
    elif not borrowed:
        raise ImageError(f"expected bytes, a path, a file or a PIL image, got {type(source).__name__}.")
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large images and odd metadata; both are dealt with here
        image = Image.open(source, formats=[name for name in FORMATS if name in Image.OPEN])
        try:
            _check_size(image)
            yield image
        finally:
            if not borrowed:
                image.close()


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"the image has no pixels ({width}x{height}).")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width}x{height} pixels are more than the limit of {MAX_PIXELS:,} (decompression bomb?).")


def _orientation(image: Image.Image) -> int:
    try:
        # Not `image.getexif()`: a PNG would be decoded whole to look for metadata behind its pixels.
        return int(Image.Image.getexif(image).get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata does not spoil the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: transparency on white, integers above 8 bits as 16-bit grey, floats as [0, 1] or [0, 255]."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        grey = np.nan_to_num(np.asarray(image), nan=0.0, posinf=255.0, neginf=0.0)
        grey = grey * 255 if grey.max() <= 1 else grey
        image = Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    return image.convert("RGB")


def _name(source: Any) -> str:
    if isinstance(source, Mapping):
        source = source.get("path") or source.get("bytes")
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"image of {len(source)} bytes"
    return str(getattr(source, "filename", "") or getattr(source, "name", "") or type(source).__name__)


def list_problems(problems: list[str], headline: str) -> str:
    """A message: the headline, and below it the first ten of `problems`."""
    more = f"\n  … and {len(problems) - 10} more" if len(problems) > 10 else ""
    return "".join([headline, ":" if problems else ".", *(f"\n  {problem}" for problem in problems[:10]), more])
