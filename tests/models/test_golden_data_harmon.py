"""Harmon's framing and wording against the original's training loaders, one test per case.

| not as in the original | what ours does | reason |
|---|---|---|
| a photograph with an Exif rotation | it is turned upright | a sideways picture teaches sideways pictures |
| transparency | it lies on white | the colours under it were never meant to be seen |
| a prompt over the limit | the text is cut, the end of its turn and the assistant's header stay | the image starts there |
| the half-size detour of the tar files | it is no option; a test rebuilds it | it is off in the official configuration |
| a row without a picture | training leaves it out and counts it | the original stops at it |
| a mark missing, doubled or in a later turn | the row is left out and counted | the original's loss stops at it |
| order of rows and draws of the sampler | the library's own | four permutations from one seed repeat themselves |

Framing is exact for all pictures: those that the library reads otherwise are also given as the original read them.
"""

import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from reca_trainer.data.sampling import SamplingPlan
from reca_trainer.models import harmon
from tests.golden_pictures import DataGolden, crop_place, messages

data = DataGolden("harmon")
settings = data.family["settings"]

PICTURE = Image.new("RGB", (4, 4))


@pytest.fixture(scope="module")
def make():
    """Makes the processor of the official limits for pictures of one of the two sizes in the settings."""
    tokenizer = harmon.read_published_processor(data.checkpoint).tokenizer

    def make(size="tiny", max_caption_length=settings["max_length_caption"]):
        return harmon.Processor(
            tokenizer,
            image_size=settings[f"{size}_image_size"],
            image_token_id=settings["image_placeholder_id"],
            max_prompt_length=settings["max_length_reconstruct_and_generate"],
            max_caption_length=max_caption_length,
        )

    return make


def as_read(case):
    """The picture as the case's loader read it: `datasets` turns what it decodes, the others turn nothing."""
    stored = data.as_stored(case["image"])
    if case.get("via") != "hub decoded":
        return stored
    with Image.open(data.folder / data.images[case["image"]]["file"]) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def on_white(name):
    """The picture turned upright, and laid on white by hand."""
    with Image.open(data.folder / data.images[name]["file"]) as image:
        rgba = np.asarray(ImageOps.exif_transpose(image).convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    return Image.fromarray(np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8))


def check_frame(case, frame, expected):
    """Compare `frame(picture)` with the case; where the library reads the picture otherwise, also with our reading."""
    assert "sha256_float32" in expected
    data.check_pixels(frame(as_read(case)), expected)
    pixels = frame(data.upright(case["image"]))
    if data.reads_alike(case["image"]):
        data.check_pixels(pixels, expected)
    else:
        level = 2 / 255  # transparency is rounded
        torch.testing.assert_close(pixels, frame(on_white(case["image"])), atol=2 * level, rtol=0)


def prompt(processor, task, texts, dropped):
    """Ids of the prompt of one sample."""
    words = {"instruction": texts} if task == "reconstruct" else {"text": texts}
    batch = processor(images=[PICTURE], task=task, dropped=[dropped], **words)
    assert batch["input_ids"].shape == batch["attention_mask"].shape and batch["attention_mask"].all()
    return batch["input_ids"][0].tolist()


def check_prompt(processor, task, text, case):
    """Compare prompts; where the original cut the end of the turn and the header, they take the last tokens."""
    ids, expected = prompt(processor, task, [text], case["dropped"]), case["prompt_ids"]
    end = processor.tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    if expected[-len(end) :] != end:
        assert len(expected) == settings["max_length_reconstruct_and_generate"]
        expected = expected[: -len(end)] + end
    assert ids == expected


def reconstruct(case, make):
    processor, halved = make(case["settings"]), "half-size" in case["via"]
    side = processor.image_size

    def frame(image):
        if halved:
            image = image.resize((side // 2, side // 2)).resize((side, side))
        batch = processor(images=[image], instruction="a", task="reconstruct")
        assert "condition_pixel_values" not in batch  # the model encodes the target
        return batch["pixel_values"][0]

    assert case["condition"] == "same tensor as target"
    check_frame(case, frame, case["target"])
    if "prompt_ids" in case:
        check_prompt(processor, "reconstruct", case["prompt"], case)


def reconstruct_text(case, make):
    check_prompt(make(), "reconstruct", case["prompt"], case)


def generate(case, make):
    processor = make(case["settings"])
    place = crop_place(case["crop"], as_read(case))

    def frame(image):
        return processor(images=[image], text=["a"], task="generate", crop=[place])["pixel_values"][0]

    check_frame(case, frame, case["target"])
    check_prompt(processor, "generate", case["caption"], case)


def generate_text(case, make):
    check_prompt(make(), "generate", case["caption"], case)


def caption_pixels(case, make):
    processor = make(case["settings"])

    def frame(image):
        batch = processor(images=[image], text=["a"], instruction="b", task="caption")
        return batch["condition_pixel_values"][0]

    check_frame(case, frame, case["pixels"])


def caption(case, make):
    """What the original words comes out the same; what it cannot learn from has a problem."""
    processor, conversation = make(max_caption_length=case["max_length"]), messages(case["conversations"])
    worded = "input_ids" in case
    if worded:
        assert processor.conversation(conversation) == (case["input_ids"], case["labels"])
    learns = case["result"] == "sample" and case["placeholder_at_index_3"] and case["image_placeholders"] == 1
    problem = processor.conversation_problem(conversation)
    assert (problem is None) == learns, problem

    def check_batch(images):
        batch = processor(images=images, text=[conversation], task="caption")
        assert (batch["input_ids"].tolist(), batch["labels"].tolist()) == ([case["input_ids"]], [case["labels"]])

    if learns:
        check_batch([PICTURE])
    elif case["result"] != "row removed":
        with pytest.raises(ValueError, match=re.escape(problem)):
            processor(images=[PICTURE], text=[conversation], task="caption")
    if worded and case["image"] is None and not case["image_placeholders"]:
        check_batch(None)


def dropout(case, make):
    """Rows are the number of the instruction, the uniform draw and the number of tokens."""
    processor, share = make(), settings["unconditional"]
    prompts = {case["prompt_index"]: case["prompt"] for case in data.cases.values() if "prompt_index" in case}
    assert prompts
    for index, uniform, length in case["rows"]:
        dropped = uniform < share
        if dropped or index in prompts:
            ids = prompt(processor, "reconstruct", [prompts.get(index, "a")], dropped)
            assert len(ids) == length and (ids == case["uncond_ids"]) == dropped
    assert prompt(processor, "reconstruct", ["a"], True) == case["uncond_ids"]


def collate(case, make):
    """Rows are token ids, or names of conversations, which their ids tell too."""
    processor, rows = make(), case["rows"]
    pictures = [PICTURE] * len(rows)
    expected = {key: data.tensors[case[key]] for key in ("input_ids", "labels", "attention_mask") if key in case}
    if "labels" in case:
        captions = [data.cases[name] for name in data.names("caption")]
        turns = {tuple(row["input_ids"]): row["conversations"] for row in captions if "input_ids" in row}
        padded = zip(expected["input_ids"], expected["attention_mask"].bool(), strict=True)
        text = [messages(turns[tuple(ids[mask].tolist())]) for ids, mask in padded]
        batch = processor(images=pictures, text=text, task="caption")
    else:
        input_ids, attention_mask = processor.pad(rows)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    for key, value in expected.items():
        assert torch.equal(batch[key].to(value.dtype), value), key
    if shape := case.get("pixel_values_shape"):
        batch = processor(images=pictures, instruction="a", task="reconstruct")
        assert list(batch["pixel_values"].shape) == shape


def batches(case, make):
    """Each micro-batch has one task, and they take turns as ours do."""
    order, size = case["order"], case["batch_size"]
    pattern = SamplingPlan(dict(zip(order, case["repeat"], strict=True))).pattern
    lengths = zip(order, case["dataset_lengths"], strict=True)
    task_of = [task for task, length in lengths for _ in range(length)]
    for rows in case["concatenated_indices"].values():
        assert rows
        for place, row in enumerate(rows):
            assert task_of[row] == pattern[place // size % len(pattern)]


TASKS = {
    "reconstruct": reconstruct,
    "reconstruct text": reconstruct_text,
    "generate": generate,
    "generate text": generate_text,
    "caption": caption,
    "caption pixels": caption_pixels,
    "dropout": dropout,
    "collate": collate,
    "batches": batches,
}


def check(case, make):
    assert case["task"] in TASKS, f"no test for the task {case['task']!r}"
    TASKS[case["task"]](case, make)


@pytest.mark.parametrize("name", data.cases)
def test_golden_data_harmon(name, make):
    check(data.cases[name], make)


def test_every_case_has_a_test_and_an_unknown_task_fails(make):
    assert sorted(data.names(*TASKS)) == sorted(data.cases)
    with pytest.raises(AssertionError, match="'paint'"):
        check({"task": "paint"}, make)


def test_a_turn_ends_with_the_token_that_pads(make):
    assert make().end_id == settings["pad_id"]
    assert make().fixed_size == (settings["tiny_image_size"],) * 2
