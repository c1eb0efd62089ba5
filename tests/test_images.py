import io
import math
import os
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from reca_trainer import images
from reca_trainer.evaluation.reconstruction import image_scores
from reca_trainer.images import MAX_PIXELS, ImageError, decode_image, image_size
from tests.hostile_images import (
    PLAIN,
    WRITERS,
    damaged,
    encoded,
    half_written,
    noise,
    png,
    png16,
    png_of_claimed_size,
    tiff_row,
    unusable,
    usable,
)

USABLE, UNUSABLE = usable(), unusable()


@pytest.mark.parametrize("name", USABLE)
def test_every_usable_file_becomes_upright_rgb(name):
    data, size, colour = USABLE[name]
    image = decode_image(data, name)
    assert (image.mode, image.size) == ("RGB", size)
    assert image_size(data) == size
    centre = image.getpixel((size[0] // 2, size[1] // 2))
    assert np.abs(np.subtract(centre, colour)).max() <= 3, centre  # JPEG and palettes round


@pytest.mark.parametrize("name", UNUSABLE)
def test_every_unusable_file_is_an_error_with_its_name(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=name):
            decode_image(UNUSABLE[name], name)


@pytest.mark.parametrize("name", WRITERS)
def test_a_damaged_file_is_refused_or_shows_what_is_undamaged(monkeypatch, name):
    monkeypatch.setenv("RECA_MAX_IMAGE_PIXELS", "10_000_000")  # edited headers ask for much memory
    format, options = WRITERS[name]
    whole = encoded(noise(96, 72), format, **options)
    right, outcomes = np.asarray(decode_image(whole)), set()
    for number, damage in enumerate(damaged(whole, seed=len(whole))):
        try:
            image = decode_image(damage.data, "row 7")
        except ImageError as error:
            assert str(error).startswith("row 7: ")
            outcomes.add("error")
            continue
        outcomes.add("image")
        assert image.mode == "RGB"
        if damage.kind == "header" and name != "png":
            continue  # another size or palette is another picture
        different = (np.asarray(image) != right).any(2)
        if name in PLAIN:
            touched = np.count_nonzero(np.frombuffer(damage.data, np.uint8) != np.frombuffer(whole, np.uint8))
            assert np.count_nonzero(different) <= touched, (number, damage.kind)
        elif name == "png" or damage.kind in ("cut", "zero tail"):
            assert not different.any(), (number, damage.kind)
        elif name == "jpeg":  # rows of blocks follow one another, and blur into their neighbours
            above = 72 * damage.place // len(whole) - 32
            assert not different[: max(above, 0)].any(), (number, damage.kind)
    assert outcomes == ({"error"} if name == "png" else {"image", "error"})


@pytest.mark.parametrize("name", [name for name in WRITERS if name not in PLAIN])
def test_a_half_written_file_is_refused(name):
    format, options = WRITERS[name]
    whole = encoded(noise(96, 72), format, **options)
    with pytest.raises(ImageError):
        decode_image(half_written(whole))
    if format in ("PNG", "JPEG", "WEBP"):
        opened = Image.open(io.BytesIO(half_written(whole)))
        with pytest.raises(ImageError):
            decode_image(opened)


def test_the_end_of_a_preview_is_not_the_end_of_its_photograph():
    whole, preview = encoded(noise(96, 72), "JPEG"), encoded(noise(8, 8), "JPEG")
    segment = b"\xff\xff\xff\xe2" + (len(preview) + 2).to_bytes(2, "big") + preview
    photograph = whole[:2] + segment + whole[2:]
    assert decode_image(photograph + bytes(9)).tobytes() == decode_image(whole).tobytes()
    with pytest.raises(ImageError, match="half-written"):
        decode_image(half_written(photograph))


@pytest.mark.parametrize("name", WRITERS)
def test_bytes_behind_the_end_of_a_file_do_no_harm(name):
    format, options = WRITERS[name]
    whole = encoded(noise(96, 72), format, **options)
    assert decode_image(whole + bytes(5000)).tobytes() == decode_image(whole).tobytes()


def test_there_are_enough_damaged_files():
    assert len(WRITERS) * len(list(damaged(bytes(4096), seed=0))) >= 500


def row(values: list, dtype: type, **tags) -> bytes:
    """A TIFF of one row of grey values."""
    tiffinfo = {281: tags["max_sample_value"]} if tags else {}
    return encoded(Image.fromarray(np.array([values], dtype)), "TIFF", tiffinfo=tiffinfo)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("data", "grey"),
    [
        (row([0, 0.5, 1], np.float32), [0, 128, 255]),
        (row([-1, 0.5, 1.5, NAN, INF, -INF], np.float32), [0, 128, 255, 0, 255, 0]),
        (row([-20, 0, 90, 255, 270], np.float32), [0, 0, 90, 255, 255]),
        (row([-20, 0, 500, 1000], np.float32), [0, 0, 128, 255]),
        (row([-3, -2, -1], np.float32), [0, 0, 0]),
        (row([0, 257, 32896, 65535], np.uint16), [0, 1, 128, 255]),
        (row([0, 2056, 4095], np.uint16), [0, 128, 255]),
        (row([0, 90, 255], np.uint16), [0, 90, 255]),
        (row([0, 512, 1023], np.uint16, max_sample_value=1023), [0, 128, 255]),
        (row([0, 257, 514], np.uint16, max_sample_value=65535), [0, 1, 2]),
        (row([-5, 0, 90, 255], np.int32), [0, 0, 90, 255]),
        (row([-5, 0, 32896, 65535], np.int32), [0, 0, 128, 255]),
        (row([-5, 0, 50_000, 100_000], np.int32), [0, 0, 128, 255]),
        (row([-5, 90, 255], np.int16), [0, 90, 255]),
        (png16(np.array([[[0], [257], [4095]]])), [0, 1, 16]),
        (png16(np.array([[[0], [257], [65535]]]), key=(257,)), [0, 255, 255]),
        (encoded(Image.frombytes("I;16B", (3, 1), b"\0\0\x08\x08\x0f\xff"), "TIFF"), [0, 128, 255]),
        (encoded(Image.new("I", (1, 1), 257), "PPM"), [1]),
        (tiff_row(b"\x00\x08\x08\xff\xf0", 3, bits=12), [0, 128, 255]),
        (tiff_row(b"\x00\x00\x10\x20\x30", 3, bits=12), [0, 1, 32]),
        (tiff_row(struct.pack("<3I", 0, 2**31, 2**32 - 1), 3, bits=32), [0, 128, 255]),
        (tiff_row(struct.pack("<3H", 0, 257, 65535), 3, bits=16, photometric=0), [255, 254, 0]),
    ],
)
def test_wide_grey_values_are_scaled_to_eight_bits(data, grey):
    values = np.asarray(decode_image(data))
    assert values[0].tolist() == [[value] * 3 for value in grey]


def test_sixteen_bit_colours_and_their_transparency():
    colours = np.array([[[0, 0x8080, 0xFFFF], [0x1234, 0x5678, 0x9ABC]]])
    assert np.asarray(decode_image(png16(colours))).tolist() == [[[0, 128, 255], [0x12, 0x56, 0x9A]]]
    keyed = np.asarray(decode_image(png16(colours, key=(0x1234, 0x5678, 0x9ABC))))
    assert keyed.tolist() == [[[0, 128, 255], [255, 255, 255]]]
    alpha = np.array([[[0, 0, 0, 0], [0, 0, 0, 0x8080], [0, 0x8080, 0xFFFF, 0xFFFF]]])
    assert np.asarray(decode_image(png16(alpha))).tolist() == [[[255] * 3, [127] * 3, [0, 128, 255]]]


def rotated(image: Image.Image, orientation: int, format: str = "PNG", **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, format, exif=exif, **options)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_strips_make_the_same_picture_as_one_piece(monkeypatch, mode, orientation):
    values = np.random.default_rng(0).integers(0, 2**16, (7, 5, 4), np.uint16)
    picture = Image.fromarray(values[..., 0] if mode == "I;16" else (values >> 8).astype(np.uint8)[..., : len(mode)])
    assert picture.mode == mode
    data = rotated(picture, orientation)
    whole = decode_image(data)
    monkeypatch.setattr(images, "_STRIP_PIXELS", 10)
    strips = decode_image(data)
    assert strips.size == whole.size and strips.tobytes() == whole.tobytes()
    unturned = decode_image(encoded(picture))
    unturned.getexif()[0x0112] = orientation
    assert ImageOps.exif_transpose(unturned).tobytes() == whole.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(format, orientation):
    options = {"lossless": True} if format == "WEBP" else {}
    data = rotated(noise(7, 5), orientation, format, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    image = decode_image(data)
    assert np.array_equal(np.asarray(image), np.asarray(upright))
    assert image_size(data) == image.size == ((5, 7) if orientation > 4 else (7, 5))


@pytest.mark.parametrize("name", USABLE)
def test_an_opened_image_is_the_picture_of_its_file_and_decoded_once_only(name):
    data, *_ = USABLE[name]
    image = decode_image(data)
    opened = Image.open(io.BytesIO(data))
    assert decode_image(opened).tobytes() == image.tobytes()
    assert decode_image(opened).tobytes() == image.tobytes()  # now that it is loaded
    assert image.info == {} and decode_image(image).tobytes() == image.tobytes()


def test_scores_take_opened_images_as_they_would_be_trained_on():
    data = rotated(noise(16, 12), 6)
    assert image_scores(Image.open(io.BytesIO(data)), decode_image(data))["psnr"] == math.inf


def test_all_sources_give_the_same_image(tmp_path):
    data = encoded(noise(9, 6))
    path = tmp_path / "a.png"
    path.write_bytes(data)
    expected = np.asarray(decode_image(data))
    link = tmp_path / "link.png"
    link.symlink_to(path)
    with open(path, "rb") as file:
        sources = [
            *(path, str(path), link, file, io.BytesIO(data), memoryview(data), Image.open(path)),
            *({"bytes": data, "path": "gone.png"}, {"bytes": None, "path": str(path)}),
        ]
        for source in sources:
            assert np.array_equal(np.asarray(decode_image(source)), expected)
            assert image_size(source) == (9, 6)
        assert not file.closed


def test_a_decoded_image_shares_nothing_with_its_source():
    source = noise(4, 4)
    decode_image(source).putpixel((0, 0), (1, 2, 3))
    assert source.getpixel((0, 0)) == noise(4, 4).getpixel((0, 0))


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), os.mkfifo, lambda p: p.symlink_to(p), lambda p: None])
def test_what_is_no_file_is_an_error_and_never_a_wait(tmp_path, make):
    path = tmp_path / "odd.png"
    make(path)
    for read in (decode_image, image_size):
        with pytest.raises(ImageError, match=r"odd\.png"):
            read(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_an_error_with_its_name(tmp_path):
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(noise(2, 2)))
    path.chmod(0)
    with pytest.raises(ImageError, match=r"secret\.png.*PermissionError"):
        decode_image(path)


@pytest.mark.parametrize("source", [None, {}, {"bytes": None, "path": None}, 7, [1, 2]])
def test_what_is_no_image_at_all_is_an_image_error(source):
    with pytest.raises(ImageError, match="row 3"):
        decode_image(source, "row 3")


@pytest.mark.parametrize("pillow_limit", [Image.MAX_IMAGE_PIXELS, None])
def test_the_size_limit_is_checked_before_any_pixel_is_decoded(monkeypatch, pillow_limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)  # many scripts switch Pillow's own limit off
    side = math.isqrt(MAX_PIXELS)
    assert image_size(png_of_claimed_size(side, side)) == (side, side)
    for read in (decode_image, image_size):
        with pytest.raises(ImageError, match=r"bomb\.png"):
            read(png_of_claimed_size(side + 1, side + 1), "bomb.png")


def test_the_limit_can_be_set(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # put back afterwards
    monkeypatch.setenv("RECA_MAX_IMAGE_PIXELS", "120")
    assert image_size(encoded(noise(12, 10))) == decode_image(noise(12, 10)).size
    for read in (decode_image, image_size):
        with pytest.raises(ImageError, match=r"13x10.*limit of 120.*RECA_MAX_IMAGE_PIXELS"):
            read(encoded(noise(13, 10)))
    monkeypatch.setenv("RECA_MAX_IMAGE_PIXELS", "400_000_000")
    assert image_size(png_of_claimed_size(20_000, 20_000)) == (20_000, 20_000)
    with pytest.raises(ImageError, match="limit of 400,000,000"):
        image_size(png_of_claimed_size(20_000, 20_001))


@pytest.mark.parametrize("text", ["many", "0", "-1", "1e9"])
def test_a_limit_that_is_no_number_is_not_taken_for_a_bad_image(monkeypatch, text):
    monkeypatch.setenv("RECA_MAX_IMAGE_PIXELS", text)
    with pytest.raises(ValueError, match="RECA_MAX_IMAGE_PIXELS is a number of pixels above 0") as error:
        decode_image(encoded(noise(2, 2)))
    assert not isinstance(error.value, ImageError)


PEAK = """
import sys
from reca_trainer.images import decode_image, image_size

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

image_size(sys.argv[1])  # loads the decoders
before = peak()
image = decode_image(sys.argv[1])
print((peak() - before) / (3 * image.width * image.height))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux' accounts of memory")
@pytest.mark.parametrize("kind", ["rgba16.png", "grey16.png", "rotated_rgba.png", "rotated.jpg", "float.tif"])
def test_decoding_takes_at_most_three_times_the_memory_of_its_result(tmp_path, kind):
    side = 4000

    def empty(colour: int, channels: int) -> bytes:
        return png(side, side, zlib.compress(bytes((1 + 2 * channels * side) * side), 1), colour, 16)

    write = {
        "rgba16.png": lambda: empty(6, 4),
        "grey16.png": lambda: empty(0, 1),
        "rotated_rgba.png": lambda: rotated(Image.new("RGBA", (side, side)), 6, compress_level=1),
        "rotated.jpg": lambda: rotated(Image.new("RGB", (side, side)), 6, "JPEG"),
        "float.tif": lambda: encoded(Image.new("F", (side, side), 0.5), "TIFF"),
    }
    (tmp_path / kind).write_bytes(write[kind]())
    run = subprocess.run([sys.executable, "-c", PEAK, tmp_path / kind], capture_output=True, text=True, check=True)
    assert float(run.stdout) <= 3
