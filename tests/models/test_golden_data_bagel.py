"""BAGEL's data path against the official loaders, one test per case.

Where ours differs, and why:

| official | ours | reason |
|---|---|---|
| Exif is ignored, but not in a hub column of decoded images | pictures are upright | nobody learns from photographs upside down |
| transparency lies on white or is dropped, as the file's mode and source have it | it lies on white | colours under a transparent pixel are arbitrary |
| truncated files are filled up with grey or black | the data path refuses them | an invented half is no target |
| the loss of an answer's token weighs 1 / sqrt(tokens) | the loss is a mean over tokens | so it is in every family here |
| samples are packed to a number of tokens; one that meets a full buffer is lost | a batch is a rectangle | no row is lost; each sample's tokens, positions and pixels are those of the pack |
| a pack is filled with a masked pad sample | none | a rectangle needs none |
| a picture without a mark counts towards the size of a pack | not encoded | no token reads it |
| two messages that show the one picture end the loader | refused by name | there is no second picture |
| order of rows, draws of prompts, dropouts and timesteps | the data path's | a processor draws nothing; what was drawn is given to it |
"""

import functools
import hashlib
import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from reca_trainer.models.auto import AutoUnifiedModel, AutoUnifiedProcessor
from reca_trainer.models.bagel.modeling_bagel import BagelModel, SinCosPositions
from reca_trainer.models.bagel.processing_bagel import BagelProcessor, resized_size
from reca_trainer.models.common.latents import patchify
from tests.golden_pictures import RESIZES_AS_RECORDED, DataGolden, messages

DATA = DataGolden("bagel")
SPECIAL = DATA.family["special_token_ids"]
MARKERS = [SPECIAL["start_of_image"], SPECIAL["end_of_image"]]
TEXT, CONDITION, TARGET = "text", "vit_image", "vae_image"  # kinds of splits, as in `sequence_plan`


def rule(settings: str, kind: str) -> tuple[int, int, int]:
    values = DATA.family["settings"][settings][kind]
    return values["max_image_size"], values["min_image_size"], values["image_stride"]


@functools.cache
def processor_of(settings: str) -> BagelProcessor:
    vit = rule(settings, "vit")
    return AutoUnifiedProcessor.from_pretrained(
        DATA.checkpoint, generation_size=rule(settings, "vae"), condition_size=vit, understanding_size=vit
    )


@functools.cache
def model_of_checkpoint() -> BagelModel:
    return AutoUnifiedModel.from_pretrained(DATA.checkpoint).eval()


@functools.cache
def as_read(name: str, via: str = "tar") -> Image.Image:
    """The picture as BAGEL's loader reads it: `via` "hub decoded" it is upright RGB before transparency is looked at."""
    DATA.as_stored(name)  # asserts that this Pillow decodes it alike
    with Image.open(DATA.folder / DATA.images[name]["file"]) as image:
        if via == "hub decoded":
            image = ImageOps.exif_transpose(image).convert("RGB")
        if image.mode != "RGBA" and image.info.get("transparency") is None:
            return image.convert("RGB")
        rgba = image.convert("RGBA")
    white = Image.new("RGB", rgba.size, (255, 255, 255))
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


@functools.cache
def reconstruction(settings: str, name: str) -> dict[str, Any]:
    """The batch of a picture as the loader reads it from a tar file, without text."""
    return processor_of(settings)(images=[as_read(name)], task="reconstruct")


def check_pixels(pixels: torch.Tensor, expected: dict[str, Any]) -> None:
    """To the bit."""
    assert {"sha256_float32", "normalisation"} <= expected.keys()
    DATA.check_pixels(pixels, expected)


def check_ours(name: str, processor: BagelProcessor) -> None:
    """The picture as the library reads it: the loader's where they agree, else upright and on white."""
    upright = DATA.upright(name)
    pixels = processor(images=[upright], task="reconstruct")["pixel_values"]
    assert tuple(pixels.shape[-2:]) == processor.target_size(*upright.size)
    with Image.open(DATA.folder / DATA.images[name]["file"]) as image:
        rgba = np.asarray(ImageOps.exif_transpose(image).convert("RGBA"), np.float64)
    alpha = rgba[..., 3:] / 255
    right = Image.fromarray((rgba[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8))
    tolerance = 2 / 127.5 if DATA.images[name]["transparency"] else 0  # roundings of the blend
    expected = processor(images=[right], task="reconstruct")["pixel_values"]
    torch.testing.assert_close(pixels, expected, atol=tolerance + 1e-7, rtol=0)
    if DATA.reads_alike(name):
        assert torch.equal(pixels, processor(images=[as_read(name)], task="reconstruct")["pixel_values"])


def unwrapped(input_ids: torch.Tensor) -> list[int]:
    """The ids of a batch of one text split, without its begin and end."""
    (ids,) = input_ids.tolist()
    assert (ids[0], ids[-1]) == (SPECIAL["bos_token_id"], SPECIAL["eos_token_id"])
    return ids[1:-1]


def count_patches(pixels: torch.Tensor, stride: int) -> int:
    return (pixels.shape[-2] // stride) * (pixels.shape[-1] // stride)


def plan(*splits: tuple[str, int, int]) -> list[dict[str, Any]]:
    return [dict(zip(("type", "enable_cfg", "loss"), split, strict=True)) for split in splits]


def check_reconstruct(name: str) -> None:
    case = DATA.cases[name]
    processor = processor_of(case["settings"])
    picture = as_read(case["image"], case["via"])
    batch = processor(images=[picture], instruction=[case["prompt"]], task="reconstruct")
    check_pixels(batch["pixel_values"][0], case["target"])
    check_pixels(batch["condition_pixel_values"][0], case["condition"])
    assert list(processor.target_size(*picture.size)) == case["target"]["size"][::-1]
    assert unwrapped(batch["input_ids"]) == case["prompt_ids"] and "attention_mask" not in batch
    if "num_tokens" in case:
        counts = [
            count_patches(batch["condition_pixel_values"], processor.condition_size[2]),
            len(case["prompt_ids"]),
            count_patches(batch["pixel_values"], processor.generation_size[2]),
        ]
        assert sum(counts) == case["num_tokens"]
    if "sequence_plan" in case:
        assert case["sequence_plan"] == plan((CONDITION, 0, 0), (TEXT, 1, 0), (TARGET, 0, 1))
    dropped = processor(images=[picture], instruction=[case["prompt"]], task="reconstruct", dropped=[True])
    assert "input_ids" not in dropped and torch.equal(dropped["pixel_values"], batch["pixel_values"])
    check_ours(case["image"], processor)


def check_generate(name: str) -> None:
    case = DATA.cases[name]
    processor = processor_of(case["settings"])
    caption = case["captions"][case["caption_index"]] if case["captions"] else None
    batch = processor(images=[as_read(case["image"])], text=[caption], task="generate")
    check_pixels(batch["pixel_values"][0], case["target"])
    assert unwrapped(batch["input_ids"]) == case["prompt_ids"]
    latents = count_patches(batch["pixel_values"], processor.generation_size[2])
    assert len(case["prompt_ids"]) + latents == case["num_tokens"]
    assert case["sequence_plan"] == plan((TEXT, 1, 0), (TARGET, 0, 1))
    check_ours(case["image"], processor)


def read_splits(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """What the model reads in a batch of one sample, split by split: `positions`, `length` and `mode`."""
    model, splits = model_of_checkpoint(), []
    decoder = model.language_model.model

    def on_positions(_module, args):
        splits.append({"positions": args[1][0].tolist(), "length": args[1].shape[1]})

    def on_layer(_module, args):
        _, generation, _, _, attention_mask, is_causal, _ = args
        length = splits[-1]["length"]
        causal = is_causal
        if attention_mask is not None:
            here = attention_mask[..., -length:]
            causal = torch.equal(here, torch.ones_like(here).tril())
        splits[-1]["mode"] = "noise" if generation is not None else "causal" if causal else "full"

    hooks = [
        decoder.rotary_emb.register_forward_pre_hook(on_positions),
        decoder.layers[0].register_forward_pre_hook(on_layer),
    ]
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return splits


def check_packed(batches: list[dict[str, Any]], packed: dict[str, list[int]]) -> None:
    """Compare samples, read one by one, with what the loader makes of them in one sequence."""
    lengths, modes, positions, ids = [], [], [], []
    indexes: dict[str, list[int]] = {TEXT: [], CONDITION: [], TARGET: []}
    for batch in batches:
        splits = read_splits(batch)
        kinds = [CONDITION] if "condition_pixel_values" in batch else []
        kinds += [TEXT] if "input_ids" in batch else []
        for kind, split in zip([*kinds, TARGET], splits, strict=True):
            places = list(range(sum(lengths), sum(lengths) + split["length"]))
            if kind == TEXT:
                indexes[TEXT] += places
                ids += batch["input_ids"][0].tolist()
            else:
                indexes[TEXT] += [places[0], places[-1]]
                indexes[kind] += places[1:-1]
                ids += MARKERS
            lengths.append(split["length"])
            modes.append(split["mode"])
            positions += split["positions"]
    count = len(lengths)  # a pack ends with its pad sample
    assert packed["split_lens"][:count] == lengths and packed["attn_modes"][:count] == modes
    assert packed["packed_position_ids"][: len(positions)] == positions
    assert packed["packed_text_ids"] == ids and packed["packed_text_indexes"] == indexes[TEXT]
    assert packed["packed_vae_token_indexes"] == packed["mse_loss_indexes"] == indexes[TARGET]
    assert packed["packed_vit_token_indexes"] == indexes[CONDITION]


def check_sequence(name: str) -> None:
    case = DATA.cases[name]
    processor, task = processor_of(case["settings"]), case["task"].split()[0]
    words = [processor.tokenizer.decode(case["prompt_ids"])]
    text = {"instruction": words} if task == "reconstruct" else {"text": words}
    batch = processor(images=[as_read(case["image"])], **text, task=task, dropped=[case["dropped"]])
    if not case["dropped"]:
        assert unwrapped(batch["input_ids"]) == case["prompt_ids"]
    check_packed([batch], case)
    assert case["sample_lens"] == [sum(case["split_lens"])]


def check_pack(name: str) -> None:
    """Every sample of every pack has the splits, tokens and pixels of its batch here."""
    case = DATA.cases[name]
    processor, settings = processor_of(case["settings"]), case["settings"]
    texts = processor.tokenize(case["prompts"])
    masks = texts.get("attention_mask", torch.ones_like(texts["input_ids"])).bool()
    rows = [ids[mask] for ids, mask in zip(texts["input_ids"], masks, strict=True)]
    assert [row[1:-1].tolist() for row in rows] == case["prompt_ids"]
    for step in case["steps"]:
        batches = [dict(reconstruction(settings, image)) for image in step["images"]]
        conditions = [batch["condition_pixel_values"] for batch in batches]
        targets = [batch["pixel_values"] for batch in batches]
        condition_stride, target_stride = processor.condition_size[2], processor.generation_size[2]
        assert step["vit_token_seqlens"] == [count_patches(pixels, condition_stride) for pixels in conditions]
        grids = [[side // target_stride for side in pixels.shape[-2:]] for pixels in targets]
        assert step["latent_shapes"] == grids
        assert step["loss_tokens"] == sum(height * width for height, width in grids)
        assert step["images_per_step"] == len(batches)

        packed = {key: DATA.tensors[value].tolist() for key, value in step.items() if is_tensor_name(value)}
        splits, read = list(zip(step["split_lens"], step["attn_modes"], strict=True)), 0
        for batch, dropped, length in zip(batches, step["text_dropped"], step["sample_lens"], strict=False):
            assert splits.pop(0) == (count_patches(batch["condition_pixel_values"], condition_stride) + 2, "full")
            tokens = 2
            if not dropped:
                text, mode = splits.pop(0)
                assert mode == "causal" and text in [len(row) for row in rows]
                candidates = [row[None] for row in rows if len(row) == text]
                if packed:
                    ids = packed["packed_text_ids"][read + 2 : read + 2 + text]
                    candidates = [row for row in candidates if row[0].tolist() == ids]
                batch["input_ids"] = candidates[0]
                tokens += text
            assert splits.pop(0) == (count_patches(batch["pixel_values"], target_stride) + 2, "noise")
            read += tokens + 2
            sizes = (batch["condition_pixel_values"], condition_stride), (batch["pixel_values"], target_stride)
            assert length == sum(count_patches(*size) for size in sizes) + tokens + 2
        assert len(splits) <= 1  # the pad sample
        if packed:
            check_packed(batches, {**step, **packed})
            check_tables(packed, conditions, grids)
        if "padded_images_sha256_float32" in step:
            canvas = torch.zeros(step["padded_images_shape"])
            for index, pixels in enumerate(targets):
                canvas[index, :, : pixels.shape[2], : pixels.shape[3]] = pixels[0]
            assert digest(canvas) == step["padded_images_sha256_float32"] or not RESIZES_AS_RECORDED
        if "packed_vit_tokens_sha256_float32" in step:
            patches = [patchify(pixels, condition_stride)[0][0] for pixels in conditions]
            assert digest(torch.cat(patches)) == step["packed_vit_tokens_sha256_float32"] or not RESIZES_AS_RECORDED


def is_tensor_name(value: Any) -> bool:
    return isinstance(value, str) and value in DATA.tensors


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def check_tables(packed: dict[str, list[int]], conditions: list[torch.Tensor], grids: list[list[int]]) -> None:
    """The rows of both position tables that a pack looks up; the loader has its own idea of how large a table is."""
    patch = model_of_checkpoint().config.vision_config.patch_size
    patches = [[side // patch for side in pixels.shape[-2:]] for pixels in conditions]
    for key, sizes in (("packed_latent_position_ids", grids), ("packed_vit_position_ids", patches)):
        rows, read = packed[key], 0
        side = None
        for height, width in sizes:
            side = side or (rows[read + width] if height > 1 else None)  # the start of a second row
            read += height * width
        table = SinCosPositions(side, 16)
        assert torch.equal(table.table[rows], torch.cat([table(*size) for size in sizes]))


def check_caption(name: str) -> None:
    case = DATA.cases[name]
    processor, conversation = processor_of(case["settings"]), messages(case["conversations"])
    images = [as_read(case["image"])] if case["image"] else None
    if case["result"] != "sample":
        assert case["result"] == "row skipped" and processor.conversation_problem(conversation) == "no answer"
        with pytest.raises(ValueError, match="no answer"):
            processor(images=images, text=[conversation], task="caption")
        return
    assert processor.conversation_problem(conversation) is None
    batch = processor(images=images, text=[conversation], task="caption")
    (ids,) = batch["input_ids"].tolist()
    splits = [[SPECIAL["bos_token_id"], *text, SPECIAL["eos_token_id"]] for text in case["text_ids"]]
    assert ids == list(itertools.chain(*splits)) and "attention_mask" not in batch

    kinds = [(split["type"], split["loss"]) for split in case["sequence_plan"]]
    image_at = next((place for place, (kind, _) in enumerate(kinds) if kind == CONDITION), None)
    shown = image_at is not None
    before = sum(len(split) for split in splits[:image_at]) if shown else None  # tokens before the image
    assert ("condition_pixel_values" in batch) == shown
    assert ("image_position" in batch) == bool(before)
    if before:
        assert batch["image_position"].tolist() == [before]

    packed = zip(case["packed_text_indexes"], case["packed_text_ids"], strict=True)
    places, words = zip(*[(place, token) for place, token in packed if token not in MARKERS], strict=True)
    assert list(words) == ids
    labels = [-100] * len(ids)
    for place, label in zip(case["ce_loss_indexes"], case["packed_label_ids"], strict=True):
        labels[places.index(place) + 1] = label  # theirs lie at the token that predicts them
    assert batch["labels"].tolist() == [labels]
    losses = [loss for kind, loss in kinds if kind == TEXT]
    learned = [split[1:] for split, loss in zip(splits, losses, strict=True) if loss]
    assert [label for label in labels if label != -100] == list(itertools.chain(*learned))
    count = sum(map(len, case["text_ids"]))
    if images:
        pixels = processor.to_conditions(images, processor.understanding_size)
        count += count_patches(pixels, processor.understanding_size[2])
    assert count == case["num_tokens"]

    read = list(itertools.chain(*(split["positions"] for split in read_splits(batch))))
    image_tokens = len(read) - len(ids)  # all images lie before all texts in memory
    image, text, front = read[:image_tokens], read[image_tokens:], before or 0
    assert text[:front] + image + text[front:] == case["packed_position_ids"]
    check_order(batch, splits, image_at)


def check_order(batch: dict[str, Any], splits: list[list[int]], image_at: int | None) -> None:
    """The loss of the dense batch is that of reading split by split."""
    model = model_of_checkpoint()
    with torch.no_grad():
        context, hidden = model.new_context(1), []
        for place, split in enumerate([*splits, None]):
            if place == image_at:
                pixels = batch["condition_pixel_values"]
                context = model.read_image(context, model.encode_condition(pixels), pixels.shape[-2:])
            if split is not None:
                states, _, context = model._read(context, model.embed(torch.tensor([split])), causal=True)
                hidden.append(states)
        states = model.language_model.model.norm(torch.cat(hidden, dim=1))
        logits = model.language_model.lm_head(states)[0, :-1]
        loss = F.cross_entropy(logits, batch["labels"][0, 1:])
        torch.testing.assert_close(model(**batch).loss, loss, rtol=1e-5, atol=1e-6)


CHECKS = {
    "reconstruct": check_reconstruct,
    "generate": check_generate,
    "reconstruct sequence": check_sequence,
    "generate sequence": check_sequence,
    "pack": check_pack,
    "caption": check_caption,
}


@pytest.mark.parametrize("name", DATA.cases)
def test_golden_data_bagel(name):
    CHECKS[DATA.cases[name]["task"]](name)


def test_golden_data_bagel_knows_every_task():
    assert DATA.cases and {case["task"] for case in DATA.cases.values()} <= set(CHECKS)
    assert sorted(DATA.names(*CHECKS)) == sorted(DATA.cases)


@pytest.mark.parametrize("row", DATA.family["resolution"], ids=lambda row: "x".join(map(str, row["input"])))
def test_golden_data_bagel_sizes(row):
    rules = {f"{name}_{kind}": rule(name, kind) for name in ("official", "tiny") for kind in ("vae", "vit")}
    rules["inference_vit"] = BagelProcessor(processor_of("official").tokenizer).understanding_size
    compared = {key: list(resized_size(*row["input"], *rules[key])) for key in row if key in rules}
    assert compared == {key: row[key] for key in compared} and len(compared) == len(rules)
    assert list(processor_of("official").target_size(*row["input"])) == row["official_vae"][::-1]
    patches = (
        (side[0] // rules[key][2]) * (side[1] // rules[key][2])
        for key, side in compared.items()
        if key.startswith("official")
    )
    markers = 2 + 2 + 2  # around two images and a text
    assert sum(patches) + markers == row["official_sample_tokens_without_text"]
