"""Show-o against the original implementation, case by case."""

import json
import math
import re
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import get_cosine_schedule_with_warmup

from reca_trainer.models.common.pixels import to_images
from reca_trainer.models.show_o import Processor, read_published, read_published_processor
from reca_trainer.models.show_o.modeling_show_o import mask_ratio, mask_tokens
from reca_trainer.models.show_o.processing_show_o import SYSTEM_PROMPT
from tests.conftest import Golden
from tests.golden_pictures import RESIZES_AS_RECORDED

golden = Golden("show_o")
DIMS = golden.info.get("dims", {})
COND_DROPOUT_PROB = 0.1  # of a run that does not say

# Show-o's own folders, and which of them are of the plain variant
CHECKPOINTS = {
    path.parent.name: not config["w_clip_vit"]
    for path in sorted(golden.checkpoint.glob("*/config.json"))
    if (config := json.loads(path.read_text())).get("_class_name") == "Showo"
}


def tokenizer():
    return load_processor(next(iter(CHECKPOINTS)), {"max_seq_length": None}).tokenizer


@lru_cache
def all_tensors():
    return load_file(golden.folder / "cases.safetensors")


def load(name):
    tensors = all_tensors()
    return golden.info["cases"][name], {
        key.split("/", 1)[1]: tensors[key] for key in tensors if key.startswith(f"{name}/")
    }


@lru_cache
def load_model(checkpoint):
    model = read_published(golden.checkpoint / checkpoint)
    model.freeze_understanding()
    return model.train()


def load_processor(checkpoint, case):
    sizes = {"max_text_length": case["max_seq_length"], "recon_text_length": DIMS["recon_text_pad_length"]}
    return read_published_processor(golden.checkpoint / checkpoint, **sizes)


def pil(pixels):
    return [Image.fromarray(array) for array in pixels.numpy()]


def close(ours, reference, atol=1e-4, rtol=1e-4):
    torch.testing.assert_close(ours.float(), reference.float(), atol=atol, rtol=rtol)


def equal(ours, reference):
    assert ours.shape == reference.shape and torch.equal(ours.long(), reference.long())


def allowed(bits, length):
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1, count=length)).bool()


def draws(tensors, *names):
    """The draws of one kind in the order consumed."""
    order = sorted((key for key in tensors if key.startswith("draw.")), key=lambda key: int(key.split(".")[1]))
    return [tensors[key] for key in order if key.split(".", 2)[2] in names]


def published(name):
    return re.sub(r"^language_model\.", "showo.", name)


def messages(conversation):
    roles = {"human": "user", "gpt": "assistant"}
    return [
        {"role": roles[turn["from"]], "content": turn["value"].replace("<image>", "").strip()} for turn in conversation
    ]


def filled(batch, model, target=None, condition=None):
    """The sequences with ids in the places of their images."""
    ids = batch["input_ids"].clone()
    if target is not None:
        ids[ids == model.config.mask_token_id] = target.flatten()
    if condition is not None:
        ids[ids == -100] = condition.flatten()
    return ids


def attention(model, batch):
    return model.attention_mask(batch["task"], batch["input_ids"], batch["attention_mask"])[:, 0]


def check_logits(output, rows, tensors, task):
    """`rows`: sample and position of every supervised logit."""
    equal(rows, tensors[f"{task}.logit_rows"])
    equal(output.target, tensors[f"{task}.targets"])
    close(output.prediction, tensors[f"{task}.logits"])


def target_rows(batch, model, corruption, markers):
    sample, position = corruption["mask"].nonzero(as_tuple=True)
    length = batch["input_ids"].shape[1]
    start = length - model.config.num_vq_tokens - 1
    rows = torch.stack([sample, position + start], dim=1)
    if markers:
        ends = [[row, place] for row in range(len(batch["input_ids"])) for place in (start - 1, length - 1)]
        rows = torch.cat([rows, torch.tensor(ends)])
        rows = torch.stack(sorted(rows, key=lambda row: row.tolist()))
    return rows


def corruption_of(tensors, task):
    (time,), (noise,) = draws(tensors, f"{task}_time"), draws(tensors, f"{task}_perm")
    close(mask_ratio(time), tensors[f"{task}.mask_prob"], atol=1e-6)
    corruption = {"mask": mask_tokens(time, noise)}
    equal(corruption["mask"], tensors[f"{task}.image_labels"] != -100)
    return corruption


def t2i_step(case, tensors, model, processor):
    images = pil(tensors["raw.t2i"])
    (uniform,) = draws(tensors, "t2i_cond_drop")
    dropped = uniform < case.get("cond_dropout_prob", COND_DROPOUT_PROB)
    batch = processor(images, text=case["t2i_texts"], task="generate", dropped=dropped.tolist(), padding="max_length")
    if "loss_recon" not in case:  # Show-o's own run crops instead of squeezing
        batch["pixel_values"] = processor.crop(images)
    if "t2i.pixel_values" in tensors:
        close(batch["pixel_values"], tensors["t2i.pixel_values"])
    corruption = corruption_of(tensors, "t2i")
    tokens = model.encode_target(batch["pixel_values"])
    equal(tokens - model.config.image_token_offset, tensors["t2i.vq_indices"])
    masked = tokens.masked_fill(corruption["mask"], model.config.mask_token_id)
    equal(masked, tensors["t2i.masked_image_ids"])
    ids = filled(batch, model, target=masked)
    length = ids.shape[1]
    equal(attention(model, batch), allowed(tensors["t2i.attn_allowed_bits"], length))
    output = model(corruption=corruption, **batch)
    check_logits(output, target_rows(batch, model, corruption, markers=True), tensors, "t2i")
    assert model.count_supervised(batch, corruption) == len(output.target)
    return output, ids


def mmu_step(case, tensors, model, processor):
    if "mmu_conversations" in case:
        text, instruction = [messages(turns) for turns in case["mmu_conversations"]], None
    else:
        text, instruction = case["mmu_texts"], None
    images = pil(tensors["raw.mmu"])
    batch = processor(images, text=text, instruction=instruction, task="caption", padding="max_length")
    if (
        "loss_recon" in case and not model.config.w_clip_vit
    ):  # RecA's plain run loads these at 512 whatever it trains at
        large = Processor(processor.tokenizer, image_size=512, clip_image_size=None).crop(images)
        batch["condition_pixel_values"] = F.interpolate(
            large, batch["condition_pixel_values"].shape[-2:], mode="bilinear"
        )
    if "mmu.pixel_values" in tensors:
        close(batch["condition_pixel_values"], tensors["mmu.pixel_values"])
    if "mmu.text_ids" in tensors:
        tail = tensors["mmu.text_ids"].shape[1]
        equal(batch["input_ids"][:, -tail:], tensors["mmu.text_ids"])
        equal(batch["labels"][:, -tail:], tensors["mmu.text_labels"])
    if "mmu.clip_features" in tensors:
        close(tower_features(model, batch), tensors["mmu.clip_features"])
    if "mmu.input_ids_no_image" in tensors:
        ids = batch["input_ids"]
        equal(ids[ids != -100].view(len(ids), -1), tensors["mmu.input_ids_no_image"])
    length = batch["input_ids"].shape[1]
    equal(attention(model, batch), allowed(tensors["mmu.attn_allowed_bits"], length))
    output = model(**batch)
    if "mmu.vq_indices" in tensors:
        tokens = model.encode_target(batch["condition_pixel_values"])
        equal(tokens - model.config.image_token_offset, tensors["mmu.vq_indices"])
    if "mmu.understanding_embeds" in tensors:
        close(output.understanding_embeds, tensors["mmu.understanding_embeds"])
    check_logits(output, (batch["labels"][:, 1:] != -100).nonzero(), tensors, "mmu")
    assert model.count_supervised(batch, {}) == len(output.target)
    return output, batch


def tower_features(model, batch):
    pixels = batch["condition_pixel_values"]
    return model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:].detach()


def lm_step(case, tensors, model, processor):
    batch = processor(text=case["lm_texts"], task="caption", padding="max_length")
    length = batch["input_ids"].shape[1]
    equal(attention(model, batch), allowed(tensors["lm.attn_allowed_bits"], length))
    output = model(**batch)
    check_logits(output, (batch["labels"][:, 1:] != -100).nonzero(), tensors, "lm")
    return output, batch


def recon_step(case, tensors, model, processor):
    images, choices = pil(tensors["raw.recon"]), case["random_choices"]
    choices = choices * len(images) if len(choices) == 1 else choices
    batch = processor(images, instruction=choices, task="reconstruct", padding="max_length")
    if not RESIZES_AS_RECORDED:
        pytest.xfail("before Pillow 13 pictures that are higher than wide are resized otherwise")
    close(batch["pixel_values"], tensors["recon.pixel_values"])
    if model.config.w_clip_vit:
        close(batch["condition_pixel_values"], tensors["recon.clip_pixel_values"])
        close(tower_features(model, batch), tensors["recon.clip_features"])
        condition = None
    else:
        close(batch["condition_pixel_values"], tensors["recon.condition_pixel_values"])
        condition = model.encode_target(batch["condition_pixel_values"])
        equal(condition - model.config.image_token_offset, tensors["recon.condition_vq_indices"])
    tokens = model.encode_target(batch["pixel_values"])
    equal(tokens - model.config.image_token_offset, tensors["recon.vq_indices"])
    corruption = corruption_of(tensors, "recon")
    masked = tokens.masked_fill(corruption["mask"], model.config.mask_token_id)
    equal(masked, tensors["recon.masked_image_ids"])
    equal(filled(batch, model, masked, condition), tensors["recon.input_ids"])
    length = batch["input_ids"].shape[1]
    equal(attention(model, batch), allowed(tensors["recon.attn_allowed_bits"], length))
    output = model(corruption=corruption, **batch)
    if "recon.input_embeds" in tensors:
        places = batch["input_ids"] == -100
        expected = tensors["recon.input_embeds"][places].view_as(output.understanding_embeds)
        close(output.understanding_embeds, expected)
    check_logits(output, target_rows(batch, model, corruption, markers=False), tensors, "recon")
    assert model.count_supervised(batch, corruption) == len(output.target)
    return output


def check_losses(case, tensors, model, losses):
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {published(name) for name in parameters} == set(case["trainable_parameters"])
    total = sum(case["coefficients"][name] * loss for name, loss in losses.items())
    named = {f"loss_{name}": loss for name, loss in losses.items()} | {"loss": total}
    for name, loss in named.items():
        assert loss.item() == pytest.approx(case[name], abs=1e-5, rel=1e-5), name
    for name, loss in named.items():
        key = "total" if name == "loss" else name
        norms = case[f"grad_norm.{key}"]
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter = published(parameter)
            if gradient is None or not gradient.any():
                assert parameter in case[f"no_grad_or_zero.{key}"]
                continue
            assert gradient.norm().item() == pytest.approx(norms[parameter], rel=1e-4, abs=1e-7), (key, parameter)
            if key == "total" and f"grad.total.{parameter}" in tensors:
                close(gradient, tensors[f"grad.total.{parameter}"])


def check_reca(case, tensors):
    model, processor = load_model(case["checkpoint"]), load_processor(case["checkpoint"], case)
    if not model.config.w_clip_vit:
        processor.down_scale, processor.resize_back = case["down_scale"], case["resize_back"]
    t2i, ids = t2i_step(case, tensors, model, processor)
    equal(ids, tensors["t2i.input_ids"])
    mmu, batch = mmu_step(case, tensors, model, processor)
    if "mmu.input_ids" in tensors:
        condition = model.encode_target(batch["condition_pixel_values"])
        equal(filled(batch, model, condition=condition), tensors["mmu.input_ids"])
    equal(batch["labels"], tensors["mmu.labels"])
    recon = recon_step(case, tensors, model, processor)
    check_losses(case, tensors, model, {"recon": recon.loss, "mmu": mmu.loss, "t2i": t2i.loss})


def check_train(case, tensors):
    model, processor = load_model(case["checkpoint"]), load_processor(case["checkpoint"], case)
    t2i, t2i_ids = t2i_step(case, tensors, model, processor)
    lm, lm_batch = lm_step(case, tensors, model, processor)
    mmu, mmu_batch = mmu_step(case, tensors, model, processor)
    ids = torch.cat([t2i_ids, lm_batch["input_ids"]])
    if model.config.w_clip_vit:
        equal(ids, tensors["t2i_lm.input_ids"])
    else:
        condition = model.encode_target(mmu_batch["condition_pixel_values"])
        equal(torch.cat([ids, filled(mmu_batch, model, condition=condition)]), tensors["input_ids"])
    equal(torch.cat([lm_batch["labels"], mmu_batch["labels"]]), tensors["labels"][len(t2i_ids) :])
    check_losses(case, tensors, model, {"t2i": t2i.loss, "lm": lm.loss, "mmu": mmu.loss})


@torch.no_grad()
def check_t2i_generation(case, tensors):
    model, processor = load_model(case["checkpoint"]), load_processor(case["checkpoint"], case)
    config, guidance, steps = model.config, case["guidance_scale"], case["timesteps"]
    batch = {"task": "generate", **processor.prompts(case["prompts"], padding="max_length")}
    ids, mask = batch["input_ids"], batch["attention_mask"]
    known = None
    if "raw.mask" in tensors:
        image, token_mask = tensors["raw.image"], model.token_mask([Image.fromarray(tensors["raw.mask"].numpy())])
        token_mask = token_mask.expand(len(ids), -1)
        equal(token_mask, tensors["token_mask"])
        tokens = model.encode_target(processor.crop(pil(image.expand(len(ids), -1, -1, -1))))
        equal(tokens, tensors["vq_ids_with_offset"])
        known = tokens.masked_fill(token_mask, config.mask_token_id)
        equal(filled(batch, model, target=known), tensors["input_ids"])
    else:
        equal(ids, tensors["input_ids"])
    allowed_here = attention(model, batch)
    if guidance > 0:
        empty = model.drop_text(ids, mask, torch.ones(len(ids)).bool())
        empty = {"task": "generate", "input_ids": empty[0], "attention_mask": empty[1]}
        equal(filled(empty, model, target=known), tensors["uncond_input_ids"])
        allowed_here = torch.cat([allowed_here, attention(model, empty)])
    equal(allowed_here, allowed(tensors["attn_allowed_bits"], ids.shape[1]))

    noise = [
        (exponential.view(len(ids), -1, config.codebook_size), uniform)
        for exponential, uniform in zip(
            draws(tensors, *[f"step{i}.exp" for i in range(steps)]),
            draws(tensors, *[f"step{i}.uniform" for i in range(steps)]),
            strict=True,
        )
    ]
    if "step0.probs" in tensors:
        close(first_probabilities(model, batch, known, guidance), tensors["step0.probs"].view(noise[0][0].shape))
    history = list(model.generate_tokens(ids, mask, noise, steps, guidance, case["temperature"], known=known))
    assert len(history) == steps
    unknown = torch.ones_like(history[0][0]).bool() if known is None else known == config.mask_token_id
    for step, (sampled, following) in enumerate(history):
        # the recorded samples are those of all positions, before known tokens are put back
        equal((sampled - config.image_token_offset)[unknown], tensors[f"step{step}.sampled"][unknown])
        unknown = following == config.mask_token_id
        equal(following == config.mask_token_id, tensors[f"step{step}.remask"])
    tokens = history[-1][0]
    equal(tokens - config.image_token_offset, tensors["token_ids"])
    pixels = model.decode_target(tokens)
    if "image_float_sample0" in tensors:
        close(pixels[0], tensors["image_float_sample0"])
    images = to_images(pixels, rounding="down")
    difference = np.stack([np.asarray(image) for image in images]).astype(int) - tensors["image_uint8"].numpy()
    assert abs(difference).max() <= 1


def first_probabilities(model, batch, known, guidance):
    """Of the first step, from the whole sequence at once: without keys and values kept from the prompt."""
    config = model.config
    ids, mask = batch["input_ids"], batch["attention_mask"]
    count = int((ids[0] == config.mask_token_id).sum())
    codebook = slice(config.image_token_offset, config.mask_token_id)

    def logits(ids, mask):
        embeds = model.embed(ids, target=known)
        hidden = model.attend(embeds, model.attention_mask("generate", ids, mask))
        return model.language_model.lm_head(hidden[:, -1 - count : -1])[..., codebook]

    guided = logits(ids, mask)
    if guidance > 0:
        empty = model.drop_text(ids, mask, torch.ones(len(ids)).bool())
        guided = (1 + guidance) * guided - guidance * logits(*empty)
    return guided.softmax(-1)


@torch.no_grad()
def check_text_generation(case, tensors):
    model, processor = load_model(case["checkpoint"]), read_published_processor(golden.checkpoint / case["checkpoint"])
    (ids,) = processor.questions([case["question"]], with_image=True)
    images = pil(tensors["raw.image"])
    pixels = processor.understanding_pixels(images)
    condition = model.encode_condition(pixels)
    if "input_ids_no_image" in tensors:
        equal(ids[ids != -100][None], tensors["input_ids_no_image"])
        close(tower_features(model, {"condition_pixel_values": pixels}), tensors["clip_features"])
        close(condition, tensors["understanding_embeds"])
    else:
        equal(filled({"input_ids": ids}, model, condition=model.encode_target(pixels)), tensors["input_ids"])
    mask = model.attention_mask("caption", ids, None)[:, 0]
    equal(mask, allowed(tensors["attn_allowed_bits"], ids.shape[1]))
    answer, logits = model.answer(ids, condition, case["max_new_tokens"])
    equal(torch.tensor(answer), tensors["token_ids"])
    close(logits, tensors["last_logits"])
    text = model.generate_text(processor, [case["question"]], images, max_new_tokens=case["max_new_tokens"])
    assert text == [processor.tokenizer.decode(tensors["token_ids"], skip_special_tokens=True).strip()]


@torch.no_grad()
def check_magvit(case, tensors):
    vq_model = load_model(next(iter(CHECKPOINTS))).vq_model
    pixels = Processor(tokenizer(), image_size=DIMS["resolution"]).crop(pil(tensors["raw.images"]))
    close(pixels, tensors["pixel_values"])
    close(vq_model.encoder(pixels), tensors["encoder_output"])
    equal(vq_model.encode(pixels), tensors["indices"])
    codes = vq_model.codes(tensors["indices"])
    close(codes.unflatten(2, tensors["quantized"].shape[2:]), tensors["quantized"])
    head = torch.arange(len(tensors["codebook_head"]))
    close(vq_model.codes(head[None])[0].T, tensors["codebook_head"])
    close(vq_model.decode(tensors["indices"]), tensors["reconstruction"])
    close(vq_model.decode(tensors["rect_indices"], tuple(case["rect_shape"])), tensors["rect_reconstruction"])


def check_preprocessing(case, tensors):
    processor = Processor(tokenizer(), image_size=case["resolution"], clip_image_size=DIMS["clip_image_size"])
    for index in range(sum(key.startswith("raw.") for key in tensors)):
        images = pil(tensors[f"raw.{index}"])
        close(processor.crop(images)[0], tensors[f"resize_crop.{index}"])
        close(processor.understanding_pixels(images)[0], tensors[f"clip.{index}"])
        close(processor(images, task="reconstruct")["pixel_values"][0], tensors[f"square_resize.{index}"])


def check_prompting(case, tensors):
    model = load_model(next(name for name, plain in CHECKPOINTS.items() if plain))
    tokens, labels = tensors["image_ids"], tensors["image_labels"]
    count, length = tokens.shape[1], case["max_text_len"]
    side = math.isqrt(count) * model.config.vq_scale_factor
    processor = Processor(
        tokenizer(),
        image_size=side,
        vq_scale_factor=model.config.vq_scale_factor,
        codebook_size=model.config.codebook_size,
        clip_image_size=None,
        max_text_length=length,
    )
    markers = {"<|sot|>": processor.eos_id, "<|eot|>": processor.eos_id, "<|pad|>": processor.pad_id}
    for token, index in case["special_ids"].items():
        assert markers.get(token, processor.tokenizer.convert_tokens_to_ids(token)) == index
    assert len(processor.tokenizer) == case["len_tokenizer"] and processor.mask_token_id == case["mask_token_id"]
    for text, ids in zip(case["texts"], case["text_token_ids"], strict=True):
        assert processor._tokenize(text) == ids
    assert processor._tokenize(SYSTEM_PROMPT) == case["system_prompt_ids"]

    batch = {"task": "generate", **processor.prompts(case["texts"], padding="max_length")}
    equal(filled(batch, model, target=tokens), tensors["t2i_gen.input_ids"])
    equal(attention(model, batch), allowed(tensors["t2i_gen.attn_allowed_bits"], batch["input_ids"].shape[1]))
    drop = draws(tensors, "t2i_cond_drop")[0] < case["cond_dropout_prob"]
    batch["input_ids"], batch["attention_mask"] = model.drop_text(batch["input_ids"], batch["attention_mask"], drop)
    equal(filled(batch, model, target=tokens), tensors["t2i.input_ids"])
    equal(attention(model, batch), allowed(tensors["t2i.attn_allowed_bits"], batch["input_ids"].shape[1]))
    equal(labels, tensors["t2i.labels"][:, -1 - count : -1])

    pixels = [Image.new("RGB", (side, side))] * len(tokens)
    batch = processor(pixels, text=case["texts"], task="caption", padding="max_length")
    equal(filled(batch, model, condition=tokens), tensors["mmu.input_ids"])
    equal(batch["labels"], tensors["mmu.labels"])
    equal(attention(model, batch), allowed(tensors["mmu.attn_allowed_bits"], batch["input_ids"].shape[1]))

    processor.max_text_length = tensors["lm.input_ids"].shape[1] - count - 3
    batch = processor(text=case["texts"], task="caption", padding="max_length")
    equal(batch["input_ids"], tensors["lm.input_ids"])
    equal(batch["labels"], tensors["lm.labels"])
    equal(attention(model, batch), allowed(tensors["lm.attn_allowed_bits"], batch["input_ids"].shape[1]))


def check_schedules(case, tensors):
    close(mask_ratio(tensors["t"]), tensors["cosine_mask_ratio"], atol=1e-6)
    for key in tensors:
        if not key.startswith("lr_mult_"):
            continue
        warmup, total = map(int, re.fullmatch(r"lr_mult_(\d+)_of_(\d+)", key).groups())
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
        factor = get_cosine_schedule_with_warmup(optimizer, warmup, total).lr_lambdas[0]
        ours = torch.tensor([factor(step) for step in case["lr_steps"]], dtype=torch.float64)
        torch.testing.assert_close(ours, tensors[key], atol=1e-9, rtol=1e-6)


CHECKS = {
    "loss_recon": check_reca,
    "loss_lm": check_train,
    "prompts": check_t2i_generation,
    "question": check_text_generation,
    "rect_shape": check_magvit,
    "text_token_ids": check_prompting,
    "lr_steps": check_schedules,
    "resolution": check_preprocessing,
}


@pytest.mark.parametrize("name", golden.case_names)
def test_golden_show_o(name):
    case, tensors = load(name)
    check = next((check for content, check in CHECKS.items() if content in case), None)
    assert check is not None, f"no check for a case of {', '.join(case)}"
    check(case, tensors)
