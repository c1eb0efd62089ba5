"""Five updates of the official training loops against `RecATrainer` with the recipes of the paper, from picture files and
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

import numpy as np
import torch
import yaml
from datasets import Dataset
from PIL import Image
from transformers import TrainerCallback

from reca_trainer import RecAConfig, RecATrainer
from reca_trainer.callbacks import UnderstandingProbe
from reca_trainer.data.collator import UnifiedCollator
from reca_trainer.models import harmon
from reca_trainer.recipes import recipe_file
from tests.conftest import GOLDEN

FILES = [GOLDEN / "data" / "images" / name for name in ("square_64.png", "wide_300x200.png", "tall_200x300.png")] * 20
INSTRUCTIONS = ["Say all you see.", "What is it?", "Name each colour and each shape."]
TURNS = [("What stands where?", "A shed."), ("Which colour?", " Dark red, and grey.")]
UPDATES = 5


class Recorder(UnifiedCollator):
    """Keeps the draws of every micro-batch."""

    def __init__(self, processor):
        super().__init__(processor)
        self.draws = []

    def __call__(self, rows):
        self.draws.append([row["draw"] for row in rows])
        return super().__call__(rows)


def train(recipe, model, processor, folder, **overrides):
    """Five updates of the trainer: per micro-batch the task, the draws and the corruption; the weights; the rates."""
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
    """Of all trained weights, relative to how far the reference moved."""
    gap, moved = 0.0, 0.0
    names = [name for name, parameter in reference.named_parameters() if parameter.requires_grad]
    trained = dict(model.named_parameters())
    assert names == [name for name, parameter in trained.items() if parameter.requires_grad]
    for name in names:
        expected = dict(reference.named_parameters())[name].detach()
        gap += float((trained[name].detach() - expected).double().square().sum())
        moved += float((expected - start[name]).double().square().sum())
    assert moved > 0
    return math.sqrt(gap / moved)


def loop(model, steps, make_batch, groups, rate, betas, eps, clip, weight):
    """The official loop: `weight(loss, micro-batches of the step)` is what is differentiated."""
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=eps)
    model.train()
    for update, step in enumerate(steps):
        for task, draws, corruption in step:
            loss = model(task=task, corruption=corruption, **make_batch(task, draws)).loss
            (loss * weight(task, corruption, step)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"] = rate(update)
        optimizer.step()
        optimizer.zero_grad()


def floats(images):
    return (
        2 * (torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255) - 1
    )


def padded(rows, pad, side="right"):
    length = max(map(len, rows))
    if side == "right":
        return torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    return torch.tensor([[pad] * (length - len(row)) + row for row in rows])


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


def test_harmon(tmp_path):
    checkpoint = GOLDEN / "harmon" / "checkpoint"
    model, processor = (read(checkpoint) for read in (harmon.read_published, harmon.read_published_processor))
    reference = harmon.read_published(checkpoint).requires_grad_(True)
    reference.vae.requires_grad_(False)
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
        weight=lambda task, corruption, step: 1 / 4,
    )
    assert distance(model, reference, start) < 1e-4


def cosine(iteration, begin, end):
    """mmengine's cosine to zero between two iterations, as a factor."""
    return (1 + math.cos(math.pi * (iteration - begin) / (end - begin))) / 2
