"""Image files of the kinds that the internet and careless disks produce, made on the spot."""

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, features

BLUE = (20, 60, 200)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Incompressible, so that cutting a file anywhere cuts pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(width: int, height: int, pixels: bytes, colour: int = 2, depth: int = 8, key: bytes = b"") -> bytes:
    """A PNG of compressed `pixels`, each row behind a zero, with `key` as its transparent colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    transparency = chunk(b"tRNS", key) if key else b""
    return b"\x89PNG\r\n\x1a\n" + header + transparency + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def png16(values: np.ndarray, key: tuple[int, ...] = ()) -> bytes:
    """A PNG of `[height, width, channels]` uint16; Pillow writes those of one channel only."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    return png(width, height, zlib.compress(rows), colour, 16, struct.pack(f">{len(key)}H", *key))


def tiff_row(data: bytes, width: int, bits: int, photometric: int = 1) -> bytes:
    """A TIFF of one row of unsigned grey values, `bits` wide, of the kinds that Pillow reads and does not write."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


def png_of_claimed_size(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes whose header claims `width` x `height` pixels."""
    return png(width, height, zlib.compress(bytes(1000)))


def half_written(data: bytes) -> bytes:
    """A file whose second half never reached the disk: as long as it should be, and zero."""
    return data[: len(data) // 2].ljust(len(data), b"\0")


def usable() -> dict[str, tuple[bytes, tuple[int, int], tuple[int, int, int]]]:
    """Name -> file, `(width, height)` after decoding, colour of the centre."""
    plain = Image.new("RGB", (30, 20), BLUE)
    sideways = Image.Exif()
    sideways[0x0112] = 6
    clear = Image.new("RGBA", (30, 20), (255, 0, 0, 0))
    half = Image.new("RGBA", (30, 20), (0, 0, 0, 128))
    palette = plain.convert("P", palette=Image.Palette.ADAPTIVE)
    see_through = Image.new("P", (30, 20), 1)
    see_through.putpalette([0, 0, 0, 255, 0, 0])
    second = Image.new("RGB", (30, 20), (255, 255, 0))
    grey16 = np.full((20, 30), 0x8080, np.uint16)
    return {
        "plain.png": (encoded(plain), (30, 20), BLUE),
        "plain.jpg": (encoded(plain, "JPEG", quality=100, subsampling=0), (30, 20), BLUE),
        "plain.webp": (encoded(plain, "WEBP", lossless=True), (30, 20), BLUE),
        "plain.bmp": (encoded(plain, "BMP"), (30, 20), BLUE),
        "plain.tif": (encoded(plain, "TIFF"), (30, 20), BLUE),
        "plain.jp2": (encoded(plain, "JPEG2000"), (30, 20), BLUE),
        "plain.ppm": (encoded(plain, "PPM"), (30, 20), BLUE),
        "png_named.jpg": (encoded(plain), (30, 20), BLUE),
        "sideways.jpg": (encoded(plain, "JPEG", quality=100, subsampling=0, exif=sideways), (20, 30), BLUE),
        "sideways.png": (encoded(plain, exif=sideways), (20, 30), BLUE),
        "sideways.tif": (encoded(plain, "TIFF", exif=sideways), (20, 30), BLUE),
        "broken_exif.jpg": (
            encoded(plain, "JPEG", quality=100, subsampling=0, exif=b"Exif\0\0II*\0" + b"\xff" * 9),
            (30, 20),
            BLUE,
        ),
        "palette.png": (encoded(palette), (30, 20), BLUE),
        "palette.gif": (encoded(palette, "GIF"), (30, 20), BLUE),
        "see_through.gif": (encoded(see_through, "GIF", transparency=1), (30, 20), (255, 255, 255)),
        "see_through.png": (encoded(see_through, transparency=1), (30, 20), (255, 255, 255)),
        "keyed.png": (encoded(Image.new("RGB", (30, 20), BLUE), transparency=BLUE), (30, 20), (255, 255, 255)),
        "clear.png": (encoded(clear), (30, 20), (255, 255, 255)),
        "half.png": (encoded(half), (30, 20), (127, 127, 127)),
        "half.webp": (encoded(half, "WEBP", lossless=True), (30, 20), (127, 127, 127)),
        "grey_alpha.png": (encoded(half.convert("LA")), (30, 20), (127, 127, 127)),
        "grey.png": (encoded(Image.new("L", (30, 20), 90)), (30, 20), (90, 90, 90)),
        "bilevel.png": (encoded(Image.new("1", (30, 20), 1)), (30, 20), (255, 255, 255)),
        "cmyk.jpg": (
            encoded(Image.new("CMYK", (30, 20), (255, 0, 0, 0)), "JPEG", quality=100),
            (30, 20),
            (0, 255, 255),
        ),
        "cmyk.tif": (encoded(Image.new("CMYK", (30, 20), (0, 255, 0, 0)), "TIFF"), (30, 20), (255, 0, 255)),
        "grey16.png": (encoded(Image.fromarray(grey16)), (30, 20), (128, 128, 128)),
        "grey16.tif": (encoded(Image.fromarray(grey16), "TIFF"), (30, 20), (128, 128, 128)),
        "float.tif": (encoded(Image.fromarray(np.full((20, 30), 0.5, np.float32)), "TIFF"), (30, 20), (128, 128, 128)),
        "float255.tif": (encoded(Image.fromarray(np.full((20, 30), 90, np.float32)), "TIFF"), (30, 20), (90, 90, 90)),
        "int32.tif": (encoded(Image.fromarray(np.full((20, 30), 90, np.int32)), "TIFF"), (30, 20), (90, 90, 90)),
        "grey12.tif": (
            encoded(Image.fromarray(np.full((20, 30), 2056, np.uint16)), "TIFF"),
            (30, 20),
            (128, 128, 128),
        ),
        "rgb16.png": (png16(np.full((20, 30, 3), np.multiply(BLUE, 257), np.uint16)), (30, 20), BLUE),
        "rgba16.png": (png16(np.full((20, 30, 4), (0, 0, 0, 0x8080), np.uint16)), (30, 20), (127, 127, 127)),
        "animated.gif": (encoded(plain, "GIF", save_all=True, append_images=[second]), (30, 20), BLUE),
        "animated.png": (encoded(plain, save_all=True, append_images=[second]), (30, 20), BLUE),
        "animated.webp": (
            encoded(plain, "WEBP", save_all=True, append_images=[second], lossless=True),
            (30, 20),
            BLUE,
        ),
        "one_pixel.png": (encoded(Image.new("RGB", (1, 1), BLUE)), (1, 1), BLUE),
        "strip.png": (encoded(Image.new("RGB", (20000, 3), BLUE)), (20000, 3), BLUE),
        "pole.png": (encoded(Image.new("RGB", (3, 20000), BLUE)), (3, 20000), BLUE),
    }


def unusable() -> dict[str, bytes]:
    """Name -> file that must be refused."""
    jpeg, picture = encoded(noise(40, 30), "JPEG"), encoded(noise(40, 30))
    bomb_bmp = bytearray(encoded(noise(4, 4), "BMP"))
    bomb_bmp[18:26] = struct.pack("<ii", 60000, 60000)
    return {
        "empty.png": b"",
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated.png": picture[: len(picture) // 2],
        "truncated.gif": encoded(noise(40, 30), "GIF")[:900],
        "truncated.webp": encoded(noise(40, 30), "WEBP")[:200],
        "truncated.tif": encoded(noise(40, 30), "TIFF")[:500],
        "truncated.bmp": encoded(noise(40, 30), "BMP")[:500],
        "half_written.png": half_written(picture),
        "half_written.jpg": half_written(jpeg),
        "half_written.webp": half_written(encoded(noise(40, 30), "WEBP")),
        "header_only.jpg": jpeg[:20],
        "signature_only.png": picture[:8],
        "text.jpg": b"I am not an image, whatever my name says.",
        "page.png": b"<html><body>404 Not Found</body></html>",
        "zeros.png": bytes(4096),
        "vector.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "bomb.png": png_of_claimed_size(60000, 60000),
        "bomb.bmp": bytes(bomb_bmp),
        "bomb.gif": b"GIF89a" + struct.pack("<HH", 65535, 65535) + encoded(noise(4, 4), "GIF")[10:],
        "no_pixels.png": png_of_claimed_size(0, 10),
        "short_of_data.png": png_of_claimed_size(4000, 4000),
    }


# Name -> format and options of Pillow's writer
WRITERS: dict[str, tuple[str, dict]] = {
    "png": ("PNG", {}),
    "jpeg": ("JPEG", {"quality": 90}),
    "progressive_jpeg": ("JPEG", {"quality": 90, "progressive": True}),
    "webp": ("WEBP", {"quality": 90}),
    "lossless_webp": ("WEBP", {"lossless": True}),
    "gif": ("GIF", {}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {}),
    "lzw_tiff": ("TIFF", {"compression": "tiff_lzw"}),
    "ppm": ("PPM", {}),
    "jpeg2000": ("JPEG2000", {}),
    **({"avif": ("AVIF", {"speed": 10})} if features.check("avif") else {}),
}
PLAIN = ("bmp", "tiff", "ppm")  # every pixel stands for itself


class Damage(NamedTuple):
    """A damaged file, with what was done to it and the first byte that was touched."""

    kind: str
    data: bytes
    place: int


def damaged(whole: bytes, seed: int, rounds: int = 14) -> Iterator[Damage]:
    """Five kinds of damage, `rounds` of each: a cut, a tail and a stretch of zeros, flipped bits, an edited header."""
    rng = np.random.default_rng(seed)
    size = len(whole)
    for _ in range(rounds):
        place = int(rng.integers(1, size))
        yield Damage("cut", whole[:place], place)
        place = int(rng.integers(64, size - 1024))
        yield Damage("zero tail", whole[:place].ljust(size, b"\0"), place)
        place, length = int(rng.integers(64, size - 64)), int(rng.integers(1, 64))
        yield Damage("zeros", whole[:place] + bytes(length) + whole[place + length :], place)
        data, places = bytearray(whole), rng.integers(64, size, 3)
        for index in places:
            data[index] ^= 1 << rng.integers(8)
        yield Damage("flips", bytes(data), int(places.min()))
        data, places = bytearray(whole), rng.integers(0, 64, 3)
        for index in places:
            data[index] = rng.integers(256)
        yield Damage("header", bytes(data), int(places.min()))


def write_corpus(folder: Path) -> tuple[set[str], set[str]]:
    """Write all of them; the names of the usable and of the unusable ones."""
    folder.mkdir(parents=True, exist_ok=True)
    good, bad = usable(), unusable()
    for name, (data, _, _) in good.items():
        (folder / name).write_bytes(data)
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    return set(good), set(bad)
