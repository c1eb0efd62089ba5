import io
import math
import os
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from reca_trainer.images import (
    MAX_PIXELS,
    ImageError,
    decode_image,
    image_size,
)
from tests.hostile_images import encoded, noise, png_of_claimed_size, unusable, usable

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


def test_damage_anywhere_gives_an_image_or_an_error_with_the_name():
    rng = np.random.default_rng(0)
    outcomes = set()
    for format in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000", "PPM"):
        whole = encoded(noise(17, 11), format)
        for trial in range(60):
            data = bytearray(whole[: rng.integers(1, len(whole))] if trial % 2 else whole)
            for place in rng.integers(0, min(len(data), 200), 4):
                data[place] = rng.integers(256)
            for read in (decode_image, image_size):
                try:
                    result = read(bytes(data), "row 7")
                    outcomes.add("image")
                    assert read is image_size or result.mode == "RGB"
                except ImageError as error:
                    outcomes.add("error")
                    assert str(error).startswith("row 7: ")
    assert outcomes == {"image", "error"}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(noise(7, 5), format, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    image = decode_image(data)
    assert np.array_equal(np.asarray(image), np.asarray(upright))
    assert image_size(data) == image.size == ((5, 7) if orientation > 4 else (7, 5))


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
