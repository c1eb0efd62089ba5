"""Decode, validate and orient images.

Whatever is stored (palette, CMYK, 16 bits, floats, alpha, an animation, a rotated photograph), training sees upright
RGB. What cannot be read is an `ImageError` that says which image and why.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

# Raster formats whose decoders run inside Pillow; EPS, for one, would start another program on the file's contents.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "AVIF")

# Twice the size Pillow warns of, half a gigabyte of RGB: anything larger is an attack sooner than a photograph.
MAX_PIXELS = 178_956_970

# The environment variable that sets another limit; processes and workers inherit it.
MAX_PIXELS_VARIABLE = "RECA_MAX_IMAGE_PIXELS"

# Pixels converted at once, so that a conversion needs little more memory than its input and its result.
_STRIP_PIXELS = 2**18

_ORIENTATION_TAG = 0x0112
_BITS_TAG = 258
_PHOTOMETRIC_TAG = 262
_MAX_SAMPLE_VALUE_TAG = 281
_SAMPLE_FORMAT_TAG = 339
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

    Exif orientation is applied, transparency is laid on white, the first frame of an animation is taken. Colours of 16
    bits keep the upper 8. Grey values that are not 8 bits wide are scaled from [0, white] to [0, 255]; larger ones are
    white, negative ones and NaN black. White is

    - of integers: what the file states (PNG, PPM and JPEG2000 fill 16 bits; a TIFF may have `MaxSampleValue`, or fewer
      than 16 `BitsPerSample`), else the smallest of 255, 4095 and 65535 that no value exceeds, else the largest value;
    - of floats: 1 if the largest value is at most 16 (highlights), 255 if it is at most 510, else the largest value.

    A PNG's checksums are verified. A JPEG without an end, and a WEBP or AVIF whose data end in 256 equal bytes, are
    half-written. Plain pixels (BMP, PPM, most TIFF) show no such damage, a loaded `PIL.Image.Image` shows none at all.

    At its peak, reading a PNG, baseline JPEG, GIF, BMP, PPM or TIFF takes less than three times the 3 bytes a pixel of
    the result; the decoders of AVIF, WEBP and JPEG2000 take up to 3.5, 5.6 and 6.5 times.

    Args:
        source: encoded bytes, a path, a binary file, a `PIL.Image.Image`, or the `{"bytes", "path"}` dict of a
            `datasets.Image(decode=False)` column (bytes first, path if there are none).
        name: what to call the image in errors; by default its path, if it has one.

    Returns:
        A fully loaded `PIL.Image.Image` of mode RGB that shares no file with `source` and carries no metadata, so that
        decoding it again changes nothing.

    Raises:
        ImageError: missing, not a regular file, not one of `FORMATS`, truncated, corrupt, or of more pixels than
            `pixel_limit()`.
    """
    limit = pixel_limit()
    with _errors_named(name or _name(source)), _opened(source, limit) as image:
        _check_whole(image)
        image.load()
        return _to_rgb(image, _orientation(image))


def image_size(source: Any, name: str = "") -> tuple[int, int]:
    """`(width, height)` in pixels of the upright image, from its header only.

    Takes the same sources and raises the same `ImageError` as `decode_image`, except for damage behind the header.
    """
    limit = pixel_limit()
    with _errors_named(name or _name(source)), _opened(source, limit) as image:
        width, height = image.size
        # Pillow reports a TIFF's size upright already.
        sideways = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)
        return (height, width) if sideways else (width, height)


def pixel_limit() -> int:
    """Pixels above which an image is refused: `MAX_PIXELS`, or the environment variable `RECA_MAX_IMAGE_PIXELS`.

    Raises:
        ValueError: the variable is no positive whole number.
    """
    text = os.environ.get(MAX_PIXELS_VARIABLE, "").replace("_", "")
    if not text:
        return MAX_PIXELS
    if not (text.isdecimal() and int(text)):
        raise ValueError(f"{MAX_PIXELS_VARIABLE} is a number of pixels above 0, got {text!r}.")
    limit = int(text)
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow refuses what has twice its own limit
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, limit)
    return limit


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
def _opened(source: Any, limit: int) -> Iterator[Image.Image]:
    """The header of `source` as a lazy PIL image; files opened here are closed again."""
    if isinstance(source, Mapping):
        source = source.get("bytes") if source.get("bytes") is not None else source.get("path")
    if source is None:
        raise ImageError("there is no image here (neither bytes nor a path).")
    if isinstance(source, Image.Image):
        _check_size(source, limit)
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
            _check_size(image, limit)
            yield image
        finally:
            if not borrowed:
                image.close()


def _check_size(image: Image.Image, limit: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"the image has no pixels ({width}x{height}).")
    if width * height > limit:
        raise ImageError(
            f"{width}x{height} pixels are more than the limit of {limit:,} (decompression bomb?). "
            f"{MAX_PIXELS_VARIABLE} sets another."
        )


def _check_whole(image: Image.Image) -> None:
    """Refuse a half-written file where the decoder would take what is missing for pixels."""
    check, file = _WHOLE.get(image.format or ""), getattr(image, "fp", None)
    if check is None or file is None or file.closed:
        return
    place = file.tell()
    try:
        check(file)
    finally:
        file.seek(place)


def _check_png(file: IO[bytes]) -> None:
    """Verify the checksums of the chunks with pixels; Pillow does not. It takes 3 % of the time of decoding."""
    file.seek(8)
    while len(header := file.read(8)) == 8 and header[4:].isalpha():
        length, kind = int.from_bytes(header[:4], "big"), header[4:]
        if kind not in (b"IHDR", b"PLTE", b"tRNS", b"IDAT"):
            file.seek(length + 4, os.SEEK_CUR)
            continue
        checksum = zlib.crc32(kind)
        while length and (piece := file.read(min(length, 2**20))):
            checksum, length = zlib.crc32(piece, checksum), length - len(piece)
        stored = file.read(4)
        if len(stored) < 4:
            return  # truncated, as Pillow will say if pixels are missing
        if stored != checksum.to_bytes(4, "big"):
            raise ImageError(f"the checksum of its {kind.decode()} chunk is wrong (damaged or half-written).")


def _check_jpeg(file: IO[bytes]) -> None:
    """Look for the end-of-image marker behind the header; previews inside the header have their own."""
    file.seek(-2, os.SEEK_END)
    if file.read(2) == b"\xff\xd9":
        return
    file.seek(2)
    while len(header := file.read(4)) == 4 and header[0] == 0xFF and header[1] != 0xDA:
        filled = header[1] == 0xFF  # any number of such bytes may precede a marker
        file.seek(-3 if filled else max(int.from_bytes(header[2:], "big") - 2, 0), os.SEEK_CUR)
    last = b""
    while piece := file.read(2**20):
        if b"\xff\xd9" in last + piece:
            return
        last = piece[-1:]
    raise ImageError("the end-of-image marker is missing (half-written).")


def _check_webp(file: IO[bytes]) -> None:
    file.seek(0)
    header = file.read(12)
    if header[:4] + header[8:] != b"RIFFWEBP":
        return
    while len(header := file.read(8)) == 8:
        length = int.from_bytes(header[4:], "little")
        if header[:4] in (b"VP8 ", b"VP8L", b"ANMF"):
            _check_tail(file, file.tell() + length, length)
            return
        file.seek(length + length % 2, os.SEEK_CUR)


def _check_avif(file: IO[bytes]) -> None:
    end, place = file.seek(0, os.SEEK_END), 0
    while place < end:
        file.seek(place)
        header = file.read(16)
        length = int.from_bytes(header[:4], "big")
        if length == 1:
            length = int.from_bytes(header[8:], "big")
        length = length or end - place
        if length < 8 or (place == 0 and header[4:8] != b"ftyp"):
            return
        if header[4:8] == b"mdat":
            _check_tail(file, place + length, length)
        place += length


def _check_tail(file: IO[bytes], end: int, length: int, tail: int = 256) -> None:
    """Refuse `length` bytes of entropy-coded data whose last `tail` before `end` are equal; no encoder writes such."""
    if length >= 2 * tail:
        file.seek(end - tail)
        if len(set(file.read(tail))) == 1:
            raise ImageError("its data end in nothing but equal bytes (half-written).")


_WHOLE: dict[str, Callable[[IO[bytes]], None]] = {
    "PNG": _check_png,
    "JPEG": _check_jpeg,
    "MPO": _check_jpeg,
    "WEBP": _check_webp,
    "AVIF": _check_avif,
}


def _orientation(image: Image.Image) -> int:
    try:
        # Not `image.getexif()`: a PNG would be decoded whole to look for metadata behind its pixels.
        return int(Image.Image.getexif(image).get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata does not spoil the pixels
        return 1


def _to_rgb(image: Image.Image, orientation: int) -> Image.Image:
    """Any mode to RGB, turned by its Exif `orientation`, in strips."""
    transpose = _UPRIGHT.get(orientation)
    if image.mode == "RGB" and not image.has_transparency_data:
        rgb = image.copy() if transpose is None else image.transpose(transpose)
        rgb.info = {}
        return rgb
    width, height = image.size
    sideways, from_the_end = orientation in (5, 6, 7, 8), orientation in (3, 4, 6, 7)
    deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
    limit = _value_range(image) if deep else 0.0
    rgb = Image.new("RGB", (height, width) if sideways else (width, height))
    for top, strip in _strips(image):
        bottom = top + strip.height
        strip = _grey_to_rgb(strip, image, limit) if deep else _on_white(strip)
        if transpose is not None:
            strip = strip.transpose(transpose)
        place = height - bottom if from_the_end else top
        rgb.paste(strip, (place, 0) if sideways else (0, place))
    return rgb


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Whole rows of the image, from the top, each with the number of its first."""
    width, height = image.size
    rows = max(_STRIP_PIXELS // width, 1)
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(top + rows, height)))


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # Pillow keeps the upper 8 bits of 16, but not those of the key
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _grey_to_rgb(strip: Image.Image, image: Image.Image, limit: float) -> Image.Image:
    """A strip of an `image` whose values lie in [0, `limit`]."""
    values = _values(strip, image)
    grey = np.rint(np.clip(np.nan_to_num(values, nan=0.0), 0, limit) * 255 / limit).astype(np.uint8)
    if _tag(image, _PHOTOMETRIC_TAG) == 0:  # white is 0; Pillow turns such values over for up to 8 bits only
        grey = 255 - grey
    if isinstance(key := image.info.get("transparency"), int):
        grey[values == key] = 255
    return Image.fromarray(grey).convert("RGB")


def _values(strip: Image.Image, image: Image.Image) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`[height, width]` float64."""
    values = np.asarray(strip)
    unsigned = _tag(image, _BITS_TAG) == 32 and _tag(image, _SAMPLE_FORMAT_TAG) in (None, 1)
    if image.mode == "I" and unsigned:  # Pillow has signed integers only
        values = values.view(np.uint32)
    return values.astype(np.float64)


def _value_range(image: Image.Image) -> float:
    """The value that becomes white, by the rules of `decode_image`."""
    if image.mode != "F" and image.format in ("PNG", "PPM", "JPEG2000"):
        return 65535.0
    largest = 0.0
    for _, strip in _strips(image):
        values = _values(strip, image)
        largest = max(largest, float(np.max(values, where=np.isfinite(values), initial=0.0)))
    if image.mode == "F":
        return 1.0 if largest <= 16 else 255.0 if largest <= 510 else largest
    bits, stated = _tag(image, _BITS_TAG), _tag(image, _MAX_SAMPLE_VALUE_TAG)
    ranges = [255.0, 4095.0, 65535.0]
    if stated is not None or (bits is not None and bits < 16):
        ranges = [float(stated if stated is not None else 2**bits - 1)]
    return next((limit for limit in ranges if limit >= largest and limit > 0), max(largest, 1.0))


def _tag(image: Image.Image, tag: int) -> Any:
    """The (first) value of a TIFF tag; `None` without one."""
    value = getattr(image, "tag_v2", {}).get(tag)
    return value[0] if isinstance(value, tuple) and value else value


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
