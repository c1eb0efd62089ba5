"""What every family's `generate_images` and `generate_text` take and refuse."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.models.test_contract import PICTURES, TASKS, TEXTS, build

FAMILIES = list(TASKS)
ANSWERING = [family for family, tasks in TASKS.items() if "caption" in tasks]
GUIDED = [family for family in FAMILIES if family != "sketch"]
SIDEWAYS = 6  # the Exif orientation that is turned by 90 degrees to be upright


def steps(family):
    return {} if family == "janus" else {"num_inference_steps": 2}  # Janus takes one per token


def seeds(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def draw(family, *inputs, **options):
    """The grey levels `[B, H, W, 3]` of generated images."""
    model, processor = build(family)
    images = model.generate_images(processor, *inputs, **{**steps(family), "generator": seeds(1)[0], **options})
    assert isinstance(images, list) and all(image.mode == "RGB" for image in images)
    return np.stack([np.asarray(image) for image in images])


def answer(family, *inputs, **options):
    model, processor = build(family)
    answers = model.generate_text(processor, *inputs, **{"max_new_tokens": 4, **options})
    assert isinstance(answers, list) and all(isinstance(text, str) for text in answers)
    return answers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_prompt_is_a_list_of_it(family):
    (alone,), (listed,), (empty,) = draw(family, "a red circle"), draw(family, ["a red circle"]), draw(family, "")
    assert np.array_equal(alone, listed) and not np.array_equal(alone, empty)


# Harmon and OpenUni word an empty caption as a caption.
@pytest.mark.parametrize("family", ["bagel", "embedded", "janus", "show_o", "show_o_plain"])
def test_an_empty_prompt_is_the_unconditional_picture(family):
    model, _ = build(family)
    alone, guided = (draw(family, [""], guidance_scale=scale) for scale in (model.no_guidance_scale, 4.0))
    assert np.array_equal(alone, guided)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_value_serves_all_samples(family):
    def reconstruct(*inputs, count):
        return draw(family, *inputs, task="reconstruct", generator=seeds(count))

    square = PICTURES[1]
    assert np.array_equal(reconstruct(None, square, count=1), reconstruct(None, [square], count=1))
    assert np.array_equal(
        reconstruct(TEXTS[0], [square, square], count=2), reconstruct([TEXTS[0]] * 2, [square] * 2, count=2)
    )
    assert np.array_equal(reconstruct(TEXTS[:2], square, count=2), reconstruct(TEXTS[:2], [square] * 2, count=2))


@pytest.mark.parametrize("family", ANSWERING)
def test_questions_and_pictures_come_singly_or_in_lists(family):
    picture = PICTURES[1]
    assert answer(family, "What is this?", picture) == answer(family, ["What is this?"], [picture])
    assert answer(family, TEXTS[:2], picture) == answer(family, TEXTS[:2], [picture] * 2)
    assert len(answer(family, "What is this?", PICTURES)) == 3
    assert len(answer(family, "")) == len(answer(family, "", picture)) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_are_seen_as_in_training(family, tmp_path):
    upright = Image.fromarray(
        np.kron(np.random.default_rng(1).integers(0, 255, (3, 4, 3), np.uint8), np.ones((12, 12, 1), np.uint8))
    )
    exif = Image.Exif()
    exif[0x0112] = SIDEWAYS
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    transparent = Image.new("RGBA", (48, 36), (200, 0, 0, 0))
    deep = Image.fromarray(np.asarray(upright)[..., 0].astype(np.uint16) * 257)
    for given, seen in [
        (Image.open(tmp_path / "turned.png"), upright),
        (tmp_path / "turned.png", upright),
        (transparent, Image.new("RGB", (48, 36), "white")),
        (deep, Image.fromarray(np.asarray(upright)[..., 0]).convert("RGB")),
    ]:
        images = [draw(family, None, picture, task="reconstruct") for picture in (given, seen)]
        assert np.array_equal(*images)


REFUSALS = [
    ({"text": TEXTS, "task": "recon"}, "task='recon', but .* makes images for generate, reconstruct"),
    ({"text": TEXTS, "task": "caption"}, "task='caption', but"),
    ({}, "task='generate' needs text"),
    ({"text": []}, "text is an empty list"),
    ({"text": 3}, "text is a string or a list of strings, not int"),
    ({"text": ["a", None]}, r"text\[1\] is a NoneType, not a string"),
    ({"text": "a", "images": PICTURES}, "task='generate' takes no images"),
    ({"text": "a", "task": "reconstruct"}, "task='reconstruct' needs images"),
    ({"images": PICTURES, "text": TEXTS[:2], "task": "reconstruct"}, "2 text and 3 images"),
    (
        {"images": PICTURES[0], "text": TEXTS, "task": "reconstruct", "generator": seeds(2)},
        "2 generators for 3 samples",
    ),
    ({"images": [PICTURES[0], b"no picture"], "task": "reconstruct"}, r"images\[1\]: not an image"),
    ({"text": "a", "num_inference_steps": 0}, "num_inference_steps is at least 1, got 0"),
    ({"text": "a", "guidance": 3.0}, "no use for guidance; it takes .*num_inference_steps"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_does_not_belong_together_is_refused(family):
    model, processor = build(family)
    for arguments, message in REFUSALS:
        with pytest.raises(ValueError, match=message):
            model.generate_images(processor, **arguments)
        assert not model.training


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        ("bagel", {"height": 33}, "height=33, but .* multiples of 16 pixels; use 32 or 48"),
        ("embedded", {"width": 21}, "width=21, but .* multiples of 12 pixels; use 12 or 24"),
        ("harmon", {"height": 33}, "height=33, but .* multiples of 4 pixels; use 32 or 36"),
        ("openuni", {"width": 33}, "width=33, but .* multiples of 4 pixels; use 32 or 36"),
        ("bagel", {"height": 8}, "height=8, but .* use 16"),
        ("bagel", {"width": 160}, "width=160, but .* use 128"),
        *[(family, {"height": 33}, "always has height=16") for family in ("janus", "show_o", "show_o_plain")],
        ("sketch", {"width": 33}, "always has width=8"),
    ],
)
def test_a_size_that_cannot_be_made_is_refused_with_the_nearest(family, size, message):
    model, processor = build(family)
    with pytest.raises(ValueError, match=message):
        model.generate_images(processor, "a red circle", **size)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_size_that_it_makes_anyway_may_be_named(family):
    _, processor = build(family)
    height, width = processor.fixed_size or processor.target_size(64, 64)
    assert draw(family, "a red circle", height=height, width=width).shape == (1, height, width, 3)


@pytest.mark.parametrize("family", GUIDED)
@pytest.mark.parametrize("task", ["generate", "reconstruct"])
def test_a_negative_prompt_leads_guidance(family, task):
    inputs = (["a red circle"] * 2, None if task == "generate" else [PICTURES[1]] * 2)

    def guided(**options):
        return draw(family, *inputs, task=task, generator=seeds(2), guidance_scale=4.0, **options)

    default, single = guided(), guided(negative_prompt="a small blue square at the left of a green triangle")
    each = guided(negative_prompt=["a small blue square at the left of a green triangle", "red"])
    assert not np.array_equal(default, single)
    assert np.abs(single[0].astype(int) - each[0]).max() <= 1  # rounding of sums of other lengths
    assert not np.array_equal(single[1], each[1])


@pytest.mark.parametrize("family", GUIDED)
def test_a_negative_prompt_that_is_the_prompt_is_no_guidance(family):
    model, _ = build(family)
    off = draw(family, "a red circle", guidance_scale=model.no_guidance_scale)
    same = draw(family, "a red circle", guidance_scale=4.0, negative_prompt="a red circle")
    assert np.abs(off.astype(int) - same).max() <= 1


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("bagel", {"image_guidance_scale": 2.0}),
        ("embedded", {"height": 24, "width": 24}),
        *[(family, {"mask_images": Image.new("L", (64, 64), 255)}) for family in ("show_o", "show_o_plain")],
    ],
)
def test_edits_take_the_same(family, options):
    """Pictures of two shapes, a text for both, and guidance away from another."""

    def edit(*inputs, count=2, **more):
        return draw(family, *inputs, task="edit", generator=seeds(count), **{"height": 16, "width": 16, **options}, **more)

    pictures = PICTURES[:2]
    together = edit(TEXTS[0], pictures)
    assert np.array_equal(together, edit([TEXTS[0]] * 2, pictures))
    assert np.abs(together[:1].astype(int) - edit(TEXTS[0], pictures[0], count=1)).max() <= 1
    assert not np.array_equal(together, edit(TEXTS[0], pictures, negative_prompt=TEXTS[1]))
    with pytest.raises(ValueError, match="task='edit' needs text"):
        edit(None, pictures)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_negative_prompt_without_guidance_is_refused(family):
    model, processor = build(family)
    if family not in GUIDED:
        with pytest.raises(ValueError, match="has no classifier-free guidance"):
            model.generate_images(processor, "red", negative_prompt="blue")
        return
    with pytest.raises(ValueError, match="needs guidance: a guidance_scale above"):
        model.generate_images(processor, "red", negative_prompt="blue", guidance_scale=model.no_guidance_scale)
    with pytest.raises(ValueError, match="3 text and 2 negative_prompt"):
        model.generate_images(processor, TEXTS, negative_prompt=["blue", "green"])


@pytest.mark.parametrize("family", FAMILIES)
def test_questions_that_cannot_be_asked_are_refused(family):
    model, processor = build(family)
    if family not in ANSWERING:
        with pytest.raises(ValueError, match="answers no questions"):
            model.generate_text(processor, "What is this?")
        return
    for arguments, message in [
        ({"text": None}, "text is a string or a list of strings, not NoneType"),
        ({"text": TEXTS[:2], "images": PICTURES}, "2 text and 3 images"),
        ({"text": "a", "generator": seeds(2)}, "2 generators for 1 samples"),
        ({"text": "a", "beauty": 1.0}, "beauty"),
        ({"text": "a", "images": b"no picture"}, "images: not an image"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.generate_text(processor, **arguments)


@pytest.mark.parametrize("family", ANSWERING)
def test_a_temperature_draws_and_a_generator_repeats_it(family):
    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return answer(family, "What is this?", generator=generator, temperature=5.0, max_new_tokens=8)

    assert drawn(1) == drawn(1) != drawn(2)
