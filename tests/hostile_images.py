"""Image files of the kinds that the internet and careless disks produce, made on the spot."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

BLUE = (20, 60, 200)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Incompressible, so that cutting a file anywhere cuts pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_of_claimed_size(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes whose header claims `width` x `height` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


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
    jpeg, png = encoded(noise(40, 30), "JPEG"), encoded(noise(40, 30))
    bomb_bmp = bytearray(encoded(noise(4, 4), "BMP"))
    bomb_bmp[18:26] = struct.pack("<ii", 60000, 60000)
    return {
        "empty.png": b"",
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated.png": png[: len(png) // 2],
        "truncated.gif": encoded(noise(40, 30), "GIF")[:900],
        "truncated.webp": encoded(noise(40, 30), "WEBP")[:200],
        "truncated.tif": encoded(noise(40, 30), "TIFF")[:500],
        "truncated.bmp": encoded(noise(40, 30), "BMP")[:500],
        "header_only.jpg": jpeg[:20],
        "signature_only.png": png[:8],
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


def write_corpus(folder: Path) -> tuple[set[str], set[str]]:
    """Write all of them; the names of the usable and of the unusable ones."""
    folder.mkdir(parents=True, exist_ok=True)
    good, bad = usable(), unusable()
    for name, (data, _, _) in good.items():
        (folder / name).write_bytes(data)
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    return set(good), set(bad)
