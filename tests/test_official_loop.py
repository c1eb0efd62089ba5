"""Three updates of the official training loops against `RecATrainer` with the recipes of the paper, from picture files and
sentences to weights.

The loops here are plain torch, in our own words: pixels by Pillow, token ids by hand, optimiser groups, schedule,
clipping and weighting as the official scripts have them. What was drawn at random (rows, instructions, crops, dropout,
timesteps, masks) is recorded from the trainer and fed to the loop; the models' forward passes have reference cases of
their own.

| family | official groups | official schedule | clipping | weight of a micro-batch |
|---|---|---|---|---|
| BAGEL | all alike, no decay | linear warm-up over 1,000 updates | 1.0 | by its targets |
| Harmon | no decay of vectors and the diffusion head | counted in micro-batches, see below | 1.0 | 1 / 4 |
| OpenUni | no decay of vectors | counted in micro-batches, see below | 1.0 | 1 / 4 |
| Show-o | no decay of biases | linear warm-up over 1,000 updates | none | (reconstruct + caption) / 5 |

Harmon's and OpenUni's schedules advance with every micro-batch, ours with every update: while the rate warms up over
125 (25) updates, ours is up to one update behind. They are compared behind the warm-up, and the rates by themselves.
"""

import math
import re

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from PIL import Image
from transformers import TrainerCallback, get_scheduler

from reca_trainer import RecAConfig, RecATrainer
from reca_trainer.callbacks import UnderstandingProbe
from reca_trainer.data.collator import UnifiedCollator
from reca_trainer.models import bagel, harmon, openuni, show_o
from reca_trainer.recipes import recipe_file
from tests.conftest import GOLDEN

FILES = [GOLDEN / "data" / "images" / name for name in ("square_64.png", "wide_300x200.png", "tall_200x300.png")] * 20
INSTRUCTIONS = ["Say all you see.", "What is it?", "Name each colour and each shape."]
TURNS = [("What stands where?", "A shed."), ("Which colour?", " Dark red, and grey.")]
UPDATES = 3


class Recorder(UnifiedCollator):
    """Keeps the draws of every micro-batch."""

    def __init__(self, processor):
        super().__init__(processor)
        self.draws = []

    def __call__(self, rows):
        self.draws.append([row.draw for row in rows])
        return super().__call__(rows)


def train(recipe, model, processor, folder, **overrides):
    """Three updates of the trainer: per micro-batch the task, the draws and the corruption; the weights; the rates."""
    values = yaml.safe_load(recipe_file(recipe).read_text())
    values = {name: value for name, value in values.items() if name in RecAConfig.__dataclass_fields__}
    for name in ("dataset_name", "caption_dataset_name", "image_root", "preview_steps", "eval_size", "eval_steps"):
        values.pop(name, None)
    (folder / "instructions.txt").write_text("\n".join(INSTRUCTIONS))
    values |= {"output_dir": str(folder / "out"), "bf16": False, "use_cpu": True, "eval_strategy": "no"}
    values |= {"save_strategy": "no", "report_to": "none", "dataloader_num_workers": 0, "logging_steps": 1}
    values |= {"activation_checkpointing": False, "instructions_file": str(folder / "instructions.txt"), **overrides}
    turns = [turn for q, a in TURNS for turn in ({"from": "human", "value": q}, {"from": "gpt", "value": a})]
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    dataset = Dataset.from_dict({"image": [str(file) for file in FILES], "conversations": [turns] * len(FILES)})
    collator, corruptions = Recorder(processor), []
    draw = model.sample_corruption

    def sample_corruption(batch, generator=None):
        corruptions.append(draw(batch, generator))
        return corruptions[-1]

    model.sample_corruption = sample_corruption
    args = RecAConfig(**{**values, "num_train_epochs": 1000, "max_steps": values["max_steps"]})
    trainer = RecATrainer(model, args, collator, dataset, processing_class=processor)
    trainer.remove_callback(UnderstandingProbe)  # it draws, too
    trainer.add_callback(StopAt(UPDATES))
    trainer.train()
    del model.sample_corruption
    accumulation = args.gradient_accumulation_steps
    count = UPDATES * accumulation
    batches = [
        (draws[0].task, draws, corruption) for draws, corruption in zip(collator.draws, corruptions, strict=False)
    ]
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    steps = [batches[start : start + accumulation] for start in range(0, count, accumulation)]
    return steps, rates


class StopAt(TrainerCallback):
    """Ends a run whose schedule is longer."""

    def __init__(self, updates):
        self.updates = updates

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.updates


def distance(model, reference, start):
    """Of all trained weights, relative to how far the reference moved. Biases of keys are left out: attention does not
    depend on what all keys share, so their gradient is rounding alone, which Adam makes as large as any."""
    gap, moved = 0.0, 0.0
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    expected = {name: weight.detach() for name, weight in reference.named_parameters() if weight.requires_grad}
    assert trained.keys() == expected.keys()
    for name, weight in expected.items():
        if not re.search(r"\b(to_k|k_proj|k_layernorm)\.bias$", name):
            gap += float((trained[name].detach() - weight).double().square().sum())
            moved += float((weight - start[name]).double().square().sum())
    assert moved > 0
    return math.sqrt(gap / moved)


def loop(model, steps, make_batch, groups, rate, betas, eps, clip, weight):
    """The official loop: `weight(loss, micro-batches of the step)` is what is differentiated."""
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=eps)
    model.train()
    for update, step in enumerate(steps):
        for task, draws, corruption in step:
            loss = model(task=task, corruption=corruption, **make_batch(task, draws)).loss
            (loss * weight(task, draws, step)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"] = rate(update)
        optimizer.step()
        optimizer.zero_grad()


def floats(images):
    """Pictures of one size as `[B, 3, H, W]` in [-1, 1], each row after row: the layout decides how convolutions round."""
    levels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return 2 * (levels.permute(0, 3, 1, 2).contiguous().float() / 255) - 1


def padded(rows, pad, side="right"):
    length = max(map(len, rows))
    if side == "right":
        return torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    return torch.tensor([[pad] * (length - len(row)) + row for row in rows])


@pytest.fixture
def record(record_property):
    """Keep a number in the test report."""

    def record(value):
        record_property("distance", value)
        print(f"distance relative to the update: {value:.2g}")
        return value

    return record


# --- Harmon ---


def harmon_batch(tokenizer, side):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    close = "<|im_end|>\n<|im_start|>assistant\n"

    def ids(text):
        return tokenizer.encode(text, add_special_tokens=False)

    def make(task, draws):
        pictures = [Image.open(FILES[draw.row]).convert("RGB") for draw in draws]
        if task == "caption":
            framed = []
            for picture in pictures:
                square = Image.new("RGB", (max(picture.size),) * 2, (127, 127, 127))
                square.paste(picture, tuple((max(picture.size) - length) // 2 for length in picture.size))
                framed.append(square.resize((side, side)))
            row = [*ids("<|im_start|>user\n"), -200, *ids(f"\n{TURNS[0][0]}{close}")]
            labels = [-100] * len(row)
            for place, (question, answer) in enumerate(TURNS):
                if place:
                    asked = ids(f"<|im_start|>user\n{question}{close}")
                    row, labels = row + asked, labels + [-100] * len(asked)
                answered = ids(f"{answer}<|im_end|>")
                row, labels = row + answered + ids("\n"), labels + answered + [-100]
            batch = {"input_ids": torch.tensor([row] * len(draws)), "labels": torch.tensor([labels] * len(draws))}
            batch["condition_pixel_values"] = floats(framed)
        else:
            rows = []
            for draw in draws:
                asked = "Generate an image." if draw.dropped else f"\n{draw.instruction}"
                row = ids(f"<|im_start|>user\n{asked}{close}")
                rows.append([*row[:3], -200, *row[3:]])
            batch = {"input_ids": padded(rows, end)}
            squeezed = [picture.resize((max(picture.size),) * 2).resize((side, side)) for picture in pictures]
            batch["pixel_values"] = floats(squeezed)
            lengths = torch.tensor([len(row) for row in rows])
            batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
            return batch
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        return batch

    return make


def test_harmon(tmp_path, record):
    checkpoint = GOLDEN / "harmon" / "checkpoint"
    model, processor = (read(checkpoint) for read in (harmon.read_published, harmon.read_published_processor))
    processor.image_size = 64
    reference = harmon.read_published(checkpoint).requires_grad_(True)
    reference.vae.requires_grad_(False)
    for module in [*model.modules(), *reference.modules()]:  # dropout in the decoder would need the same random state
        for name in ("attn_dropout", "p"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
    start = {name: parameter.detach().clone() for name, parameter in reference.named_parameters()}
    steps, _ = train("harmon_1_5b", model, processor, tmp_path, per_device_train_batch_size=3, warmup_steps=0)
    assert {task for step in steps for task, *_ in step} == {"reconstruct", "caption"}
    trained = [(name, p) for name, p in reference.named_parameters() if p.requires_grad]
    spared = [p for name, p in trained if p.ndim == 1 or name.endswith(".bias") or "diffloss" in name]
    decayed = [p for name, p in trained if not (p.ndim == 1 or name.endswith(".bias") or "diffloss" in name)]
    loop(
        reference,
        steps,
        harmon_batch(processor.tokenizer, processor.image_size),
        [{"params": spared, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.02}],
        rate=lambda update: 1e-5 * cosine(500 + 4 * update + 3, 500, 50_000),
        betas=(0.9, 0.95),
        eps=1e-8,
        clip=1.0,
        weight=lambda task, draws, step: 1 / 4,
    )
    assert record(distance(model, reference, start)) < 1e-4


@pytest.mark.parametrize(("warmup", "micro_batches"), [(125, 500), (25, 100)], ids=["harmon", "openuni"])
def test_a_rate_that_warms_up_by_micro_batches_is_at_most_one_update_ahead(warmup, micro_batches):
    """mmengine's `LinearLR` from 1e-5 of the rate, advanced four times an update, against the trainer's schedule."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler("constant_with_warmup", optimizer, warmup)
    for update in range(warmup):
        iteration = 4 * update + 3  # whose gradient completes the update
        official = 1e-5 + (1 - 1e-5) * iteration / (micro_batches - 1)
        assert 0 <= official - schedule.get_last_lr()[0] < 1.0001 / warmup
        optimizer.step()
        schedule.step()


def cosine(iteration, begin, end):
    """mmengine's cosine to zero between two iterations, as a factor."""
    return (1 + math.cos(math.pi * (iteration - begin) / (end - begin))) / 2


# --- BAGEL ---


def official_size(width, height, longest, shortest, stride):
    """Of a target or a condition; for pictures below the original's limit of pixels."""

    def scaled(sides, factor):
        return tuple(max(stride, round(round(side * factor) / stride) * stride) for side in sides)

    sides = scaled((width, height), max(min(longest / max(width, height), 1.0), shortest / min(width, height)))
    return sides if max(sides) <= longest else scaled(sides, longest / max(sides))


def bagel_batch(tokenizer):
    begin, end = (tokenizer.convert_tokens_to_ids(f"<|im_{name}|>") for name in ("start", "end"))

    def make(task, draws):
        [draw] = draws
        picture = Image.open(FILES[draw.row]).convert("RGB")
        sizes = (official_size(*picture.size, *rule) for rule in ((64, 32, 16), (42, 42, 14)))
        target, condition = (floats([picture.resize(size, Image.Resampling.BICUBIC)]) for size in sizes)
        batch = {"pixel_values": target, "condition_pixel_values": condition}
        if not draw.dropped:
            words = tokenizer.encode(draw.instruction, add_special_tokens=False)
            batch["input_ids"] = torch.tensor([[begin, *words, end]])
        return batch

    return make


def test_bagel(tmp_path, record):
    checkpoint = GOLDEN / "bagel" / "checkpoint"
    model, processor = (read(checkpoint) for read in (bagel.read_published, bagel.read_published_processor))
    processor.condition_size = (42, 42, 14)
    reference = bagel.read_published(checkpoint).requires_grad_(False)
    for name, parameter in reference.named_parameters():  # the generation expert and what carries latents in and out
        carries = name.split(".")[0] in ("vae2llm", "llm2vae", "time_embedder")
        parameter.requires_grad_("moe_gen" in name or carries)
    start = {name: parameter.detach().clone() for name, parameter in reference.named_parameters()}
    sizes = {"max_image_size": 64, "min_image_size": 32, "per_device_train_batch_size": 1}
    steps, rates = train("bagel_paper", model, processor, tmp_path, learning_rate=4e-3, **sizes)
    assert {draw.size for step in steps for _, draws, _ in step for draw in draws} == {(64, 64), (48, 64), (64, 48)}
    assert any(draw.dropped for step in steps for _, draws, _ in step for draw in draws)

    def tokens(draws):
        return sum(draw.size[0] // 16 * (draw.size[1] // 16) for draw in draws)

    loop(
        reference,
        steps,
        bagel_batch(processor.tokenizer),
        [{"params": [p for p in reference.parameters() if p.requires_grad], "weight_decay": 0.0}],
        rate=lambda update: 4e-3 * update / 1000,
        betas=(0.9, 0.95),
        eps=1e-15,
        clip=1.0,
        weight=lambda task, draws, step: tokens(draws) / sum(tokens(draws) for _, draws, _ in step),
    )
    assert rates == pytest.approx([4e-6 * update for update in range(UPDATES)])
    assert record(distance(model, reference, start)) < 1e-4


# --- OpenUni ---


def openuni_batch(processor):
    tokenizer, side = processor.tokenizer, processor.image_size

    def make(task, draws):
        pictures, rows = [], []
        for draw in draws:
            picture = Image.open(FILES[draw.row]).convert("RGB")
            width, height = picture.size
            edge = min(width, height)
            offset = int(draw.crop * (max(width, height) - edge + 1))
            left, top = (offset, 0) if width > height else (0, offset)
            pictures.append(picture.crop((left, top, left + edge, top + edge)).resize((side, side)))
            context = "<IMG_CONTEXT>" * processor.num_image_tokens
            turn = (
                f"<|im_start|>user\n<img>{context}</img>\n{draw.instruction}<|im_end|>\n<|im_start|>assistant\n<img>"
            )
            rows.append(tokenizer.encode(turn, add_special_tokens=False))
        target = floats(pictures)
        mean, deviation = (
            torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        seen = ((target + 1) / 2 - mean) / deviation
        condition = torch.nn.functional.interpolate(seen, (processor.condition_size,) * 2, mode="bilinear")
        input_ids = padded(rows, 0, "left")
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(input_ids.shape[1]) >= input_ids.shape[1] - lengths[:, None]
        return {
            "input_ids": input_ids,
            "attention_mask": mask.long(),
            "pixel_values": target,
            "condition_pixel_values": condition,
        }

    return make


def test_openuni(tmp_path, record):
    checkpoint, file = GOLDEN / "openuni" / "checkpoint", "openuni_finetune.pth"

    def read():
        return openuni.read_published(checkpoint, variant=file, internvl=checkpoint / "internvl3")

    model, processor = read(), openuni.read_published_processor(checkpoint, variant=file)
    reference = read().requires_grad_(False)
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(not name.startswith(("internvl.", "vae.")))
    start = {name: parameter.detach().clone() for name, parameter in reference.named_parameters()}
    steps, _ = train("openuni_1_6b", model, processor, tmp_path, per_device_train_batch_size=3, warmup_steps=0)
    assert not any(draw.dropped for step in steps for _, draws, _ in step for draw in draws)
    trained = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    loop(
        reference,
        steps,
        openuni_batch(processor),
        [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.05},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ],
        rate=lambda update: 1e-5 * cosine(100 + 4 * update, 100, 10_100),
        betas=(0.9, 0.95),
        eps=1e-8,
        clip=1.0,
        weight=lambda task, draws, step: 1 / 4,
    )
    assert record(distance(model, reference, start)) < 1e-4


# --- Show-o ---


def show_o_batch(processor):
    tokenizer, side = processor.tokenizer, processor.image_size
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("soi", "eoi", "mmu")}
    ids["pad"] = tokenizer.convert_tokens_to_ids("[PAD]")
    end, slots = tokenizer.eos_token_id, (processor.clip_image_size // processor.clip_patch_size) ** 2
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    # statistics of CLIP
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def words(text):
        return tokenizer.encode(text, add_special_tokens=False)

    def cut(picture):
        edge, (width, height) = processor.clip_image_size, picture.size
        size = (edge, int(edge * height / width)) if width < height else (int(edge * width / height), edge)
        left, top = ((length - edge) // 2 for length in size)
        picture = picture.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + edge, top + edge))
        levels = torch.from_numpy(np.asarray(picture)).permute(2, 0, 1).float() / 255
        return (levels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(deviation).view(3, 1, 1)

    def make(task, draws):
        pictures = [Image.open(FILES[draw.row]).convert("RGB") for draw in draws]
        if task == "caption":
            row = [ids["mmu"], *words(system), ids["soi"], *[-100] * slots, ids["eoi"]]
            labels = [-100] * len(row)
            for question, answer in TURNS:
                asked, answered = words(f"USER: {question} ASSISTANT:"), [*words(f" {answer}"), end]
                row, labels = row + asked + answered, labels + [-100] * len(asked) + answered
            batch = {"input_ids": torch.tensor([row] * len(draws)), "labels": torch.tensor([labels] * len(draws))}
            batch["condition_pixel_values"] = torch.stack([cut(picture) for picture in pictures])
            return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
        target = floats([picture.resize((side, side), Image.Resampling.BICUBIC) for picture in pictures])
        condition = torch.nn.functional.interpolate(target, (processor.clip_image_size,) * 2, mode="bilinear")
        rows = []
        for draw in draws:
            text = [end, *words(f"USER: \n {draw.instruction} ASSISTANT:"), end]
            text += [ids["pad"]] * (processor.recon_text_length - 3 - len(text))
            image = [ids["soi"], *[processor.mask_token_id] * processor.num_image_tokens, ids["eoi"]]
            rows.append([ids["mmu"], ids["soi"], *[-100] * slots, ids["eoi"], *text, *image])
        input_ids = torch.tensor(rows)
        return {
            "input_ids": input_ids,
            "attention_mask": (input_ids != ids["pad"]).long(),
            "pixel_values": target,
            "condition_pixel_values": condition,
        }

    return make


def test_show_o(tmp_path, record):
    checkpoint = GOLDEN / "show_o" / "checkpoint" / "show-o-w-clip-vit"
    model, reference = show_o.read_published(checkpoint), show_o.read_published(checkpoint)
    processor = show_o.read_published_processor(checkpoint, max_text_length=1000)
    reference.requires_grad_(False)
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(name.startswith(("language_model.", "mm_projector.")))
    start = {name: parameter.detach().clone() for name, parameter in reference.named_parameters()}
    steps, rates = train("show_o_clip_512", model, processor, tmp_path, learning_rate=5e-4)
    trained = [(name, p) for name, p in reference.named_parameters() if p.requires_grad]
    loop(
        reference,
        steps,
        show_o_batch(processor),
        [
            {"params": [p for name, p in trained if not name.endswith("bias")], "weight_decay": 0.01},
            {"params": [p for name, p in trained if name.endswith("bias")], "weight_decay": 0.0},
        ],
        rate=lambda update: 5e-4 * update / 1000,
        betas=(0.9, 0.999),
        eps=1e-8,
        clip=None,
        weight=lambda task, draws, step: 1 / 5,
    )
    assert rates == pytest.approx([5e-7 * update for update in range(UPDATES)])
    assert record(distance(model, reference, start)) < 1e-4
