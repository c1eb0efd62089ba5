"""OpenUni's pictures and prompts against what the official loaders make of them.

What differs on purpose, or is not the processor's to do:

| case | here | reason |
|---|---|---|
| pictures rotated by Exif | upright | models see photographs the right way up |
| transparent pictures | laid on white | the colours under transparency are arbitrary |
| over-long captions (`generate`) | the caption is cut, the turn keeps its end and the image start | the queries follow an opened image, as when sampling |
| random draws (crop, dropout, instruction) | arguments of the processor | the data path draws them; here the recorded ones are given |
| how often text is dropped | not checked | the trainer decides; here each form has the recorded length |
| sizes and shapes that the JSON data set refuses | accepted | the RecA data set refuses none |

Where a picture is read differently, the processor is also given the picture as the original saw it.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from transformers import Qwen2Tokenizer

from reca_trainer.models.openuni import Processor
from tests.golden_pictures import DataGolden, crop_place

DATA = DataGolden("openuni")
SETTINGS = DATA.family["settings"]
ORIENTATION = 0x0112  # number of the Exif tag


@pytest.fixture(scope="module")
def tokenizer():
    return Qwen2Tokenizer.from_pretrained(DATA.checkpoint / "internvl3")


@pytest.fixture(scope="module")
def build(tokenizer):
    """Makes the processor of a case: where its sizes do not matter, of the tiny ones."""

    def build_processor(case):
        sizes = SETTINGS[case.get("settings", "tiny")]
        return Processor(
            tokenizer,
            image_size=sizes["image_size"],
            condition_size=sizes["vit"],
            num_image_tokens=sizes["image_length"],
            max_caption_length=SETTINGS["max_length_generate"],
        )

    return build_processor


def seen_by_the_original(case):
    """A decoded column of the hub is upright; bytes are not turned."""
    image = DATA.as_stored(case["image"])
    if case.get("via") == "hub decoded":
        image.getexif()[ORIENTATION] = DATA.images[case["image"]]["exif_orientation"]
        image = ImageOps.exif_transpose(image)
    return image


def upright_on_white(name):
    with Image.open(DATA.folder / DATA.images[name]["file"]) as stored:
        image = ImageOps.exif_transpose(stored).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def framed(image, place, size):
    """A square of the longer side, resized: `[3, size, size]` float32 in [-1, 1]."""
    side, free = min(image.size), max(image.size) - min(image.size)
    offset = int(place * (free + 1))
    left, top = (offset, 0) if image.width > image.height else (0, offset)
    square = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    return 2 * (torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255) - 1


def as_condition(target, size):
    """`[B, 3, H, W]` in [-1, 1] to ImageNet's statistics, bilinear without antialiasing."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (target / 2 + 0.5 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    return F.interpolate(normalised, size=(size, size), mode="bilinear", antialias=False)


def prompt_end(processor):
    return processor.tokenizer("<|im_end|>\n<|im_start|>assistant\n<img>")["input_ids"]


def with_its_end(ids, processor):
    """Recorded ids of a generation prompt as they are here: one that was cut keeps the end of its turn."""
    end = prompt_end(processor)
    is_cut = len(ids) == SETTINGS["max_length_generate"] and ids[-len(end) :] != end
    return ids[: -len(end)] + end if is_cut else ids


def unpadded(batch):
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in rows]


def check_pictures(case, processor, task, **texts):
    """The target and the condition of one case, of the picture as the original saw it and as the library reads it.

    Returns:
        The first of the two batches.
    """
    image, name = seen_by_the_original(case), case["image"]
    place = crop_place(case["crop"], image)
    batch = processor(images=[image], task=task, crop=[place], **texts)
    DATA.check_pixels(batch["pixel_values"][0], case["target"])
    assert list(processor.fixed_size) == case["target"]["size"] == list(processor.target_size(*image.size))
    if "condition" in case:
        DATA.check_pixels(batch["condition_pixel_values"][0], case["condition"])

    upright = DATA.upright(name)
    batch_of_upright = processor(images=[upright], task=task, crop=[place], **texts)
    expected = framed(upright_on_white(name), place, processor.image_size)
    assert torch.equal(batch_of_upright["pixel_values"][0], expected)
    if DATA.reads_alike(name):
        assert torch.equal(batch_of_upright["pixel_values"], batch["pixel_values"])
    return batch


def check_reconstruct(case, processor):
    batch = check_pictures(case, processor, "reconstruct", instruction=[case["prompt"]])
    assert unpadded(batch) == [case["prompt_ids"]]
    expected = as_condition(batch["pixel_values"], processor.condition_size)
    torch.testing.assert_close(batch["condition_pixel_values"], expected, atol=2e-6, rtol=0)


def check_reconstruct_text(case, processor):
    prompts = processor(instruction=[case["prompt"]], task="reconstruct")
    assert prompts["input_ids"].tolist() == [case["prompt_ids"]]
    context = processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert context == SETTINGS["image_context_id"]
    assert case["prompt_ids"].count(context) == processor.num_image_tokens


def check_generate(case, processor):
    batch = check_pictures(case, processor, "generate", text=[case["caption"]], dropped=[case["dropped"]])
    assert unpadded(batch) == [with_its_end(case["prompt_ids"], processor)]


def check_generate_text(case, processor):
    image = Image.new("RGB", (8, 8))
    batch = processor(images=[image], text=[case["caption"]], task="generate", dropped=[case["dropped"]])
    ids = with_its_end(case["prompt_ids"], processor)
    assert batch["input_ids"].tolist() == [ids]
    assert len(ids) <= SETTINGS["max_length_generate"] and ids[-len(prompt_end(processor)) :] == prompt_end(processor)


def check_sampling(case, processor):
    """A prompt and its unconditional form, padded with the tokenizer's own token."""
    batch = processor(text=[case["caption"]] * 2, task="generate", dropped=[False, True])
    assert batch["input_ids"].tolist() == case["input_ids"]
    assert batch["attention_mask"].tolist() == case["attention_mask"]


def check_collate(case, processor):
    texts = [processor.tokenizer.decode(row) for row in case["rows"]]
    images = [Image.new("RGB", (8, 8), (40 * number, 90, 200)) for number in range(len(texts))]
    ids, mask = (DATA.tensors[case[name]] for name in ("input_ids", "attention_mask"))
    if "source_equals_target" in case:
        side = "left"
        instructions = [text.split("</img>\n")[1].split("<|im_end|>")[0] for text in texts]
        batch = processor(images=images, instruction=instructions, task="reconstruct")
        assert case["source_equals_target"]
        expected = as_condition(batch["pixel_values"], processor.condition_size)
        torch.testing.assert_close(batch["condition_pixel_values"], expected, atol=2e-6, rtol=0)
        assert list(batch["pixel_values"].shape) == case["pixel_values_shape"]
        assert len(batch) == 1 + len(case["keys"])  # `task` beside the original's, of which two have other names
        rows = case["rows"]
    else:
        side = "right"
        requests = [text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0] for text in texts]
        captions = [request.removeprefix("Generate an image").removeprefix(": ") for request in requests]
        dropped = [request == "Generate an image." for request in requests]
        batch = processor(images=images, text=captions, task="generate", dropped=dropped)
        rows = [with_its_end(row, processor) for row in case["rows"]]
    assert SETTINGS["batch_pads"]["reconstruct" if side == "left" else "generate"] == side
    assert unpadded(batch) == rows
    assert torch.equal(batch["attention_mask"], mask.to(torch.int64))
    assert (batch["input_ids"][mask == 0] == SETTINGS["pad_id"]).all()
    if rows == case["rows"]:
        assert torch.equal(batch["input_ids"], ids)


def check_dropout(case, processor):
    """The rate is the trainer's. A reconstruction never lost its instruction; a dropped caption leaves the request."""
    if "distinct_lengths" in case:
        instructions = [DATA.cases[name]["prompt"] for name in DATA.names("reconstruct", "reconstruct text")]
        lengths = {len(row) for row in unpadded(processor(instruction=instructions, task="reconstruct"))}
        (dropped,) = unpadded(processor(instruction=instructions[:1], task="reconstruct", dropped=[True]))
        assert set(case["distinct_lengths"]) <= lengths
        assert case["rows_with_unconditional_prompt"] == 0 and len(dropped) not in case["distinct_lengths"]
        return
    captions = [DATA.cases[name]["caption"] for name in DATA.names("generate", "generate text")]
    prompts = unpadded(processor(text=captions, task="generate"))
    caption_of_length = {len(prompt): caption for prompt, caption in zip(prompts, captions, strict=True)}
    dropped = [uniform < SETTINGS["unconditional"] for uniform, _ in case["rows"]]
    lengths = [length for _, length in case["rows"]]
    texts = [captions[0] if drop else caption_of_length[n] for drop, n in zip(dropped, lengths, strict=True)]
    batch = processor(text=texts, task="generate", dropped=dropped)
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert len(set(dropped)) == 2


CHECKS = {
    "reconstruct": check_reconstruct,
    "reconstruct text": check_reconstruct_text,
    "generate": check_generate,
    "generate text": check_generate_text,
    "generate at sampling": check_sampling,
    "collate": check_collate,
    "dropout": check_dropout,
}


@pytest.mark.parametrize("name", DATA.cases)
def test_golden_data_openuni(name, build):
    case = DATA.cases[name]
    assert case["task"] in CHECKS, f"no check for the task {case['task']!r}"
    CHECKS[case["task"]](case, build(case))


def test_every_kind_of_case_has_a_check():
    assert sorted(DATA.names(*CHECKS)) == sorted(DATA.cases)
