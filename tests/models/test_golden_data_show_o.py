"""Show-o's processor against the original's loaders, case by case.

Where ours is meant to differ, the tests assert what is right instead:

| original | ours | because |
|---|---|---|
| a rotated photograph stays rotated, transparency shows what is under it | upright, on white | a caption describes what a viewer shows; the frame is proven on the stored pixels |
| an unreadable file is an image of zeros, and its answer supervised | the file is refused or skipped | nothing can be learned from it |
| an instruction of too many tokens ends the run (CLIP) | its text is cut, the assistant's header stays | it is still an instruction |
| rows without an image are removed from the file | they are left out when drawn | the same rows are learned from |
| roles out of turn, a system message: the run ends | `conversation_problem` names it | one row should not end a run |
| an empty last answer or question, a trailing question: the row stays without labels | `conversation_problem` names it | a row without labels teaches nothing |
| a text that spells out the assistant's header or the end token: likewise | it is read as text | its answers are good |
| a conversation is also cut at the tokenizer's 2048 tokens | only at the run's length | which is shorter in every official run |
| captions at other sizes than 512 pixels (VQ) are cropped at 512 and shrunk without a filter | cropped at their size | no published run has them, and they alias |
| one instruction for a micro-batch (VQ) | one per image | the expected loss is the same, its variance lower |
| strips longer than 64 to 1 are enlarged whole, then cropped | their ends are cut off first | it would take gigabytes |

Not taken over: the draws themselves (`draws`, `uniforms`), which are the sampler's, and labels of the text in front of a
target, which the original's loss does not read.
"""

import io
import json
import math
import re
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image, ImageOps

from reca_trainer.data.columns import Columns
from reca_trainer.data.rows import RowDataset
from reca_trainer.data.sampling import Draw
from reca_trainer.models.show_o import read_published, read_published_processor
from reca_trainer.models.show_o.processing_show_o import SYSTEM_PROMPT
from tests.golden_pictures import DataGolden, messages

data = DataGolden("show_o")
SETTINGS = data.family["settings"]
FOLDERS = {  # by whether it is of the CLIP variant
    config["w_clip_vit"]: path.parent
    for path in sorted(data.checkpoint.glob("*/config.json"))
    if (config := json.loads(path.read_text())).get("_class_name") == "Showo"
}
CAPTION_VQ_SIZE = 512  # which the original's loader has in its code


@lru_cache
def model_of(clip):
    return read_published(FOLDERS[clip]).eval()


def processor_of(clip=True, **sizes):
    return read_published_processor(FOLDERS[clip], **sizes)


def tiny_processor(case, **sizes):
    """With as many image tokens as the case, and its own number for the condition."""
    side = SETTINGS["tiny_image_size"]
    sizes = {"image_size": side, "vq_scale_factor": side // math.isqrt(SETTINGS["tiny_num_vq_tokens"]), **sizes}
    return processor_of(case.get("variant", "clip") == "clip", **sizes)


def tensor(case, name):
    return data.tensors[case[name]]


def blank(count):
    return [Image.new("RGB", (8, 8))] * count


def equal(ours, reference):
    assert ours.shape == reference.shape and torch.equal(ours.long(), reference.long())


# pictures


def seen(name):
    """What a viewer shows of a picture, in Pillow's own words."""
    with Image.open(data.folder / data.images[name]["file"]) as image:
        rgba = ImageOps.exif_transpose(image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def check_frame(case, frame, expected):
    """The stored pixels are framed as in the original, and the picture as it is read like them."""
    name = case["image"]
    data.check_pixels(frame(data.as_stored(name)), expected)
    upright = frame(data.upright(name))
    if data.reads_alike(name):
        return data.check_pixels(upright, expected)
    difference = np.abs(np.asarray(data.upright(name), dtype=int) - np.asarray(seen(name), dtype=int))
    assert difference.max() <= 1, "not what a viewer shows"
    torch.testing.assert_close(upright, frame(seen(name)), atol=0.05, rtol=0)


def check_reconstruct(case):
    width, height = case["target"]["size"]
    assert width == height
    kinds = {name: re.fullmatch(r"condition_(clip|vq)(?:_(down|blur)(\d+))?", name) for name in case}
    kinds = {name: match.groups() for name, match in kinds.items() if match}
    assert kinds and set(case) <= {"task", "image", "via", "settings", "target", *kinds}
    for name, (variant, bottleneck, scale) in kinds.items():
        if variant == "clip":
            processor = processor_of(image_size=width, clip_image_size=case[name]["size"][0])
        else:
            sizes = {"image_size": width, "down_scale": int(scale), "resize_back": bottleneck == "blur"}
            sizes["vq_scale_factor"] = width // int(scale)  # or a tiny picture would have no token
            processor = processor_of(False, **sizes)

        def batch_of(image, processor=processor):
            return processor([image], instruction="What is here?", size=(height, width))

        check_frame(case, lambda image: batch_of(image)["pixel_values"][0], case["target"])
        check_frame(case, lambda image, name=name: batch_of(image)["condition_pixel_values"][0], case[name])
    generate = processor([data.as_stored(case["image"])], text=["A caption."], task="generate", crop=[0.9])
    data.check_pixels(generate["pixel_values"][0], case["target"])


def check_shards(case):
    processor = processor_of(image_size=case["pixels"]["size"][0])
    check_frame(case, lambda image: processor.crop([image])[0], case["pixels"])


def check_caption_pixels(case, clip):
    side = case["pixels"]["size"][0]
    processor = processor_of(
        clip, **({"clip_image_size": side, "clip_patch_size": side} if clip else {"image_size": side})
    )

    def frame(image):
        return processor([image], text=["An answer."], task="caption")["condition_pixel_values"][0]

    check_frame(case, frame, case["pixels"])


def check_caption_pixels_resized(case):
    side = case["pixels"]["size"][0]
    large, small = processor_of(False, image_size=CAPTION_VQ_SIZE), processor_of(False, image_size=side)

    def frame(image):
        return F.interpolate(large.understanding_pixels([image]), (side, side), mode="bilinear")[0]

    check_frame(case, frame, case["pixels"])
    image = data.upright(case["image"])
    ours = small([image], text=["An answer."], task="caption")["condition_pixel_values"]
    assert torch.equal(ours, small.crop([image])) and ours[0].shape == frame(image).shape


# prompts


def check_supervised(case, batch, clip, segment):
    """Of the image and its markers the model supervises what the original does; the text is not in its loss."""
    model, tokens = model_of(clip), tensor(case, "image_ids")
    labels = tensor(case, "labels" if "labels" in case else "labels_before_image_slots")[:, -tokens.shape[1] - 2 :]
    equal(labels[:, 1:-1], tensor(case, "image_labels"))
    corruption = {"mask": labels[:, 1:-1] != -100}
    labels = labels if segment == "with markers" else labels[:, 1:-1]
    condition = torch.zeros(
        len(tokens), int((batch["input_ids"][0] == -100).sum()), model.config.text_config.hidden_size
    )
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(model, "encode_target", lambda _: tokens)
        patch.setattr(model, "encode_condition", lambda _: condition)
        output = model(corruption=corruption, **batch)
    equal(output.target, labels[labels != -100])
    assert model.count_supervised(batch, corruption) == len(output.target)


def filled(batch, processor, case):
    """The sequences `[B, L]` with the case's masked ids in the target's places."""
    places = batch["input_ids"] == processor.mask_token_id
    assert (places.sum(1) == tensor(case, "image_ids").shape[1]).all()
    return batch["input_ids"].masked_scatter(places, tensor(case, "masked_image_ids"))


def check_reconstruct_sequence(case):
    clip, count = case["variant"] == "clip", tensor(case, "image_ids").shape[1]
    sizes = {}
    if not clip:
        given = tensor(case, "given_image_ids").shape[1]
        sizes = {"max_text_length": case["max_seq_length"], "resize_back": given == count}
        sizes["down_scale"] = max(2, round(math.sqrt(count / given)))
    processor = tiny_processor(case, **sizes)
    images = blank(len(case["prompts"]))
    batch = processor(images, instruction=case["prompts"], task="reconstruct", padding="max_length")
    ids = filled(batch, processor, case)
    slots = ids == -100
    if clip:
        start, number = case["image_slots_inserted_after_index"], int(slots[0].sum())
        assert number == (processor.clip_image_size // processor.clip_patch_size) ** 2
        assert slots[:, start : start + number].all() and (slots.sum(1) == number).all()
        equal(ids[~slots].view(len(ids), -1), tensor(case, "input_ids_before_image_slots"))
    else:
        equal(ids.masked_scatter(slots, tensor(case, "given_image_ids")), tensor(case, "input_ids"))
    check_supervised(case, batch, clip, "without markers")


def check_reconstruct_text(case):
    clip = case["variant"] == "clip"
    processor = tiny_processor(case)
    batch = processor(blank(1), instruction=case["prompt"], task="reconstruct", padding="max_length")
    (ids,) = batch["input_ids"]
    prefix = [index for index in ids[: -processor.num_image_tokens - 2].tolist() if index != -100]
    if case["result"] == "sequence":
        assert prefix == case["prefix_ids"]
        return
    assert case["result"] == "error" and clip

    def tokens(text):
        return processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    head = [processor.mmu_id, processor.soi_id, processor.eoi_id, processor.eos_id]
    whole, closing = tokens(f"USER: \n {case['prompt']} ASSISTANT:"), [*tokens(" ASSISTANT:"), processor.eos_id]
    kept = processor.recon_text_length - len(head) - len(closing)
    assert len(whole) > kept + len(closing) - 1, "this one fits"
    assert prefix == head + whole[:kept] + closing


def check_generate_sequence(case):
    captions, dropped = case["captions"], case["dropped"]
    processor = tiny_processor(case, max_text_length=case["max_seq_length"])
    arguments = {"text": captions, "task": "generate", "padding": "max_length"}
    batch = processor(blank(len(captions)), dropped=dropped, **arguments)
    equal(filled(batch, processor, case), tensor(case, "input_ids"))
    equal(batch["attention_mask"], tensor(case, "input_ids") != processor.pad_id)
    without = processor(blank(len(captions)), **arguments)["input_ids"]
    for caption, drop, ours, kept in zip(captions, dropped, batch["input_ids"], without, strict=True):
        assert torch.equal(ours, kept) != (drop and bool(caption))
    check_supervised(case, batch, True, "with markers")


# conversations


def conversation_processor(clip, length, clip_tokens=None):
    """One that cuts conversations at `length` tokens."""
    processor = tiny_processor({"variant": "clip" if clip else "vq"})
    if clip_tokens:
        processor.clip_image_size = math.isqrt(clip_tokens) * processor.clip_patch_size
    processor.max_text_length += length - processor.max_conversation_length
    assert processor.max_conversation_length == length
    return processor


def worded(processor, conversations):
    """The batch, and how many tokens the head in front of the conversations has."""
    batch = processor(blank(len(conversations)), text=conversations, task="caption", padding="max_length")
    head = batch["input_ids"].shape[1] - processor.max_conversation_length
    assert (batch["labels"][:, :head] == -100).all() and batch["attention_mask"][:, :head].all()
    assert (batch["input_ids"][:, head - 1] == processor.eoi_id).all()
    return batch, head


def check_caption(case):
    conversation = messages(case["conversations"])
    if case["result"] == "row removed":
        return check_rows_without_image(case)
    for clip in FOLDERS:
        limit = processor_of(clip).tokenizer.model_max_length
        processor = conversation_processor(clip, limit)
        problem = processor.conversation_problem(conversation)
        if case["result"] == "error" or case["length_mismatch_reported"]:
            if case["result"] == "sample" and spells_out_template(processor, conversation):
                batch, _ = worded(processor, [conversation])
                assert problem is None and (batch["labels"] != -100).any()
                continue
            assert problem
            with pytest.raises(ValueError, match=re.escape(problem)):
                worded(processor, [conversation])
            continue
        assert case["result"] == "sample" and (problem is None) == (case["supervised"] > 0)
        batch, head = worded(processor, [conversation])
        length = int(batch["attention_mask"].sum()) - head
        assert batch["input_ids"][0, head : head + length].tolist() == case["input_ids"]
        assert batch["labels"][0, head : head + length].tolist() == case["labels"]
        assert (batch["labels"] != -100).sum() == case["supervised"]
        if clip:
            assert batch["input_ids"][0, 1 : 1 + len(case["system_ids"])].tolist() == case["system_ids"]


def spells_out_template(processor, conversation):
    texts = [f" {message['content']} " for message in conversation]
    return any(mark in text for text in texts for mark in (" ASSISTANT: ", processor.tokenizer.eos_token))


def check_rows_without_image(case):
    """The data path draws the next row instead."""
    assert case["image"] is None
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "png")
    answer = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Black."}]
    columns = {"image": [None, {"bytes": picture.getvalue(), "path": None}], "turns": [case["conversations"], answer]}
    rows = Dataset.from_dict(columns)
    processor = conversation_processor(True, 200)
    draw = Draw("caption", 0, processor.fixed_size, 0, "What is it?")
    drawn = RowDataset({"caption": rows}, {"caption": Columns("image", conversation="turns")},
                       conversation_problem=processor.conversation_problem)[draw]  # fmt: skip
    assert drawn.text == messages(answer) and len(drawn.skipped) == 1


def rows_of(case):
    """The conversations that a collation refers to, by the last part of their cases' names."""
    captions = data.names("caption")
    names = [next(name for name in captions if f".{name}".endswith(f".{row}")) for row in case["rows"]]
    return [messages(data.cases[name]["conversations"]) for name in names]


def room(max_length):
    """Of a collation: it leaves out as many tokens as the system prompt has, in the VQ variant too."""
    return max_length - len(processor_of()._tokenize(SYSTEM_PROMPT))


def check_collate(case):
    clip = "system_ids" in case
    processor = conversation_processor(clip, room(case["max_length"]))
    conversations = rows_of(case)
    batch, head = worded(processor, conversations)
    for name in ("input_ids", "labels", "attention_mask"):
        equal(batch[name][:, head:], tensor(case, name))
    short = processor(blank(len(conversations)), text=conversations, task="caption")
    for name in ("input_ids", "labels", "attention_mask"):
        equal(short[name], batch[name][:, : short[name].shape[1]])
    if "with_long_row_shape" in case:
        samples = [data.cases[name] for name in data.names("caption") if "input_ids" in data.cases[name]]
        long = max(samples, key=lambda sample: len(sample["input_ids"]))
        batch, head = worded(processor, [*conversations, messages(long["conversations"])])
        assert list(batch["input_ids"][:, head:].shape) == case["with_long_row_shape"]
        assert (batch["labels"] != -100).sum(1).tolist() == case["with_long_row_supervised"]


def check_caption_sequence(case):
    clip = case["variant"] == "clip"
    processor = conversation_processor(clip, room(case["collate_max_length"]), case.get("clip_tokens"))
    batch, _ = worded(processor, rows_of(case))
    ids, slots = batch["input_ids"], batch["input_ids"] == -100
    if clip:
        start, number = case["image_slots_inserted_after_index"], case["clip_tokens"]
        assert slots[:, start : start + number].all() and (slots.sum(1) == number).all()
        equal(ids[~slots].view(len(ids), -1), tensor(case, "input_ids_before_image_slots"))
        equal(batch["labels"], tensor(case, "labels_with_image_slots"))
        assert ids.shape[1] == case["embeddings_length"]
    else:
        equal(ids.masked_scatter(slots, tensor(case, "image_ids")), tensor(case, "input_ids"))
        equal(batch["labels"], tensor(case, "labels"))


CHECKS = {
    "reconstruct": check_reconstruct,
    "generate pixels from tar shards": check_shards,
    "caption pixels, CLIP variant": lambda case: check_caption_pixels(case, clip=True),
    "caption pixels, VQ variant": lambda case: check_caption_pixels(case, clip=False),
    "caption pixels, VQ variant, at another resolution": check_caption_pixels_resized,
    "reconstruct sequence": check_reconstruct_sequence,
    "reconstruct text": check_reconstruct_text,
    "generate sequence": check_generate_sequence,
    "caption": check_caption,
    "collate": check_collate,
    "caption sequence": check_caption_sequence,
}


def check_of(case):
    check = CHECKS.get(case["task"])
    assert check is not None, f"no check for a case of the task {case['task']!r}"
    return check


@pytest.mark.parametrize("name", data.cases)
def test_golden_data_show_o(name):
    check_of(data.cases[name])(data.cases[name])


def test_golden_data_show_o_leaves_no_case_out():
    assert sorted(data.names(*CHECKS)) == sorted(data.cases)
    with pytest.raises(AssertionError, match="no check"):
        check_of({"task": "an unknown task"})


@pytest.mark.parametrize("clip", FOLDERS)
def test_golden_data_show_o_has_the_recorded_ids(clip):
    processor = processor_of(clip)
    markers = {"<|sot|>": processor.eos_id, "<|eot|>": processor.eos_id, "<|pad|>": processor.pad_id}
    for token, index in SETTINGS["special_token_ids"].items():
        assert markers.get(token, processor.tokenizer.convert_tokens_to_ids(token)) == index
    assert (len(processor.tokenizer), processor.mask_token_id) == (SETTINGS["image_id_offset"], SETTINGS["mask_id"])
