"""Make the embedded default: a tiny BAGEL that understands the world of shapes well and paints it less well.

    python recipes/pretrain_shapes.py --output_dir runs/shapes

Six stages, all deterministic in the seed on one machine. Each is resumed from its own file if that is there:

1. `autoencoder`: a KL autoencoder of rendered scenes.
2. `language`: the understanding expert answers questions about scenes given as text.
3. `language_again`: the same with other scenes, after a warm restart of the learning rate.
4. `vision`: image encoder and connector take the place of that text, the language model is frozen.
5. `generator`: the generation expert paints from *sparse* captions, understanding is frozen. Real captions leave most of
   an image unsaid, which is what RecA makes up for.
6. `answers`: the last layer of the understanding expert, as far as the generator does not see it, answers better.

The matrices of the transformer layers are trained by Muon: the generator's validation loss after 300 steps was 0.33, and
0.51 with AdamW at the better of two learning rates.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm
from transformers import HfArgumentParser, Qwen2Config, SiglipVisionConfig

from reca_trainer.models.bagel import Config, Model, Processor
from reca_trainer.models.bagel.modeling_bagel import build_autoencoder
from reca_trainer.toy.tokenizer import make_tokenizer
from reca_trainer.toy.world import QUESTION_KINDS, SPARSE, Scene, World

DESCRIBE = "describe the image in detail"
WIDTH, LAYERS, HEADS, FEED_FORWARD = 128, 4, 4, 384
AUTOENCODER_BATCH = 24


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "where stages, curves and the finished checkpoint are written"})
    seed: int = field(default=0, metadata={"help": "of weights, scenes and noise"})
    batch_size: int = field(default=32, metadata={"help": "scenes a step of the later stages"})
    autoencoder_steps: int = 1500
    language_steps: int = 1500
    language_again_steps: int = 1000
    vision_steps: int = 1200
    generator_steps: int = 3000
    answers_steps: int = 1500
    scenes: int = field(default=8000, metadata={"help": "different scenes that the generator is trained on"})


def build(world: World) -> tuple[Model, Processor]:
    """The architecture of BAGEL at the smallest size that learns the world, with random weights."""
    tokenizer = make_tokenizer()
    patch, side = 8, world.resolution
    ids = tokenizer.convert_tokens_to_ids
    config = Config(
        text_config=Qwen2Config(
            hidden_size=WIDTH,
            intermediate_size=FEED_FORWARD,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            vocab_size=-(-len(tokenizer) // 32) * 32,
            max_position_embeddings=1024,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=FEED_FORWARD,
            num_hidden_layers=3,
            num_attention_heads=HEADS,
            image_size=side,
            patch_size=patch,
            vision_use_head=False,
        ),
        vae_config={
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
            "block_out_channels": [16, 32, 48],
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 8,
            "scaling_factor": 1.0,
            "shift_factor": 0.0,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": False,
        },
        latent_patch_size=2,
        max_latent_size=side // patch,
        vit_max_num_patch_per_side=side // patch,
        bos_token_id=ids("<|im_start|>"),
        eos_token_id=ids("<|im_end|>"),
        image_start_token_id=ids("<|vision_start|>"),
        image_end_token_id=ids("<|vision_end|>"),
    )
    model = Model(config)
    # Words must be as loud as the fixed positions that are added to image tokens (norm about 8).
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    rule = (side, side, patch)
    return model, Processor(tokenizer, generation_size=rule, condition_size=rule, understanding_size=rule)


def pixels_of(world: World, scenes: list[Scene]) -> torch.Tensor:
    """Rendered scenes as `[B, 3, H, W]` float32 in [-1, 1]."""
    array = np.stack([np.asarray(world.render(scene)) for scene in scenes]).astype(np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def train(
    name: str,
    parameters: list[torch.nn.Parameter],
    matrices: list[torch.nn.Parameter],
    loss_of_step: Callable[[int], dict[str, torch.Tensor]],
    steps: int,
    learning_rate: float,
    curves: Path,
) -> None:
    """Muon for `matrices`, AdamW for the other `parameters`, a short warm-up and a cosine decay; the terms of
    `loss_of_step` are summed, and logged one by one."""
    optimizers = [torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=4 * learning_rate, adjust_lr_fn="match_rms_adamw"))
    warmup = min(50, steps // 10 + 1)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: min((s + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * s / steps)))
        )
        for optimizer in optimizers
    ]
    sums: dict[str, list[float]] = {}
    every, start = 50, time.time()
    with curves.open("a") as log, tqdm(total=steps, desc=name, unit="step", mininterval=5) as bar:
        for step in range(steps):
            with sdpa_kernel(SDPBackend.MATH):  # for so few tokens the CPU's fused kernel is the slower one
                terms = loss_of_step(step)
                sum(terms.values()).backward()
            torch.nn.utils.clip_grad_norm_(parameters + matrices, 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
            for key, value in terms.items():
                sums.setdefault(key, []).append(float(value.detach()))
            bar.update()
            if (step + 1) % every == 0 or step + 1 == steps:
                means = {key: round(sum(values) / len(values), 5) for key, values in sums.items()}
                row = {"stage": name, "step": step + 1, "seconds": round(time.time() - start, 1), **means}
                log.write(json.dumps(row) + "\n")
                log.flush()
                bar.set_postfix(means)
                sums = {}


def train_autoencoder(model: Model, world: World, texts: Texts, arguments: Arguments, curves: Path) -> None:
    """Absolute error and a weak pull of the posterior towards a standard normal; then the latents' shift and scale are
    measured, so that the generator's targets have unit variance."""
    torch.manual_seed(arguments.seed)
    model.vae = build_autoencoder(model.config.vae_config)
    vae, rng = model.vae, np.random.default_rng([arguments.seed, 1])
    moved = World(world.resolution, world.grid, jitter=2, max_objects=world.max_objects, seed=world.seed)

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        pixels = pixels_of(moved, [moved.sample(rng) for _ in range(AUTOENCODER_BATCH)])
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.mean + posterior.std * torch.randn_like(posterior.mean)).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return {"error": (decoded - pixels).abs().mean() + (decoded - pixels).square().mean(), "kl": 2e-3 * kl}

    vae.requires_grad_(True)
    train("autoencoder", list(vae.parameters()), [], loss_of_step, arguments.autoencoder_steps, 2e-3, curves)
    with torch.no_grad():
        means = vae.encode(pixels_of(world, [world.sample(rng) for _ in range(512)])).latent_dist.mean
    scale = {"shift_factor": round(float(means.mean()), 4), "scaling_factor": round(1 / float(means.std()), 4)}
    vae.register_to_config(**scale)
    model.config.vae_config.update(scale)


class Texts:
    """Sentences as padded token rows, and the questions of a scene."""

    def __init__(self, processor: Processor, world: World):
        self.processor, self.world = processor, world

    def questions(
        self, scenes: list[Scene], rng: np.random.Generator, each: int, kinds: Sequence[int] = (0, 1, 1, 0, 2, 3)
    ) -> dict[str, torch.Tensor]:
        """`each` questions a scene with their answers as labels, rows of one scene beside each other. `kinds` are drawn
        from, as indices of `QUESTION_KINDS`; by default places are asked for most."""
        drawn = [
            self.world.question(s, rng, QUESTION_KINDS[kinds[rng.integers(len(kinds))]])
            for s in scenes
            for _ in range(each)
        ]
        return self.processor.tokenize([one.text for one in drawn], answers=[one.answer for one in drawn])

    def descriptions(self, scenes: list[Scene]) -> dict[str, torch.Tensor]:
        answers = [self.world.describe(scene) for scene in scenes]
        return self.processor.tokenize([DESCRIBE] * len(scenes), answers=answers)

    def visual_words(self, scenes: list[Scene], side: int) -> torch.Tensor:
        """What an ideal image encoder says at each of `side × side` patches: `[B, side², 6]` token ids, -1 where there
        are fewer words. Object, place and background of the patch's cell."""
        ids, grid, world = self.processor.tokenizer.convert_tokens_to_ids, self.world.grid, self.world
        words = np.full((len(scenes), grid**2, 6), -1, dtype=np.int64)
        for b, scene in enumerate(scenes):
            there = {one.cell: [one.size, one.colour, one.shape] for one in scene.objects}
            for cell in range(grid**2):
                said = [*there.get(cell, ["nothing"]), *world.places[cell].split(), scene.background]
                words[b, cell, : len(said)] = ids(said)
        cells = (np.arange(side) * grid) // side
        index = (cells[:, None] * grid + cells[None, :]).reshape(-1)
        return torch.from_numpy(words[:, index])


def answer_loss(model: Model, context, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Next-token cross-entropy of the supervised tokens of a text behind `context`, as in the caption task."""
    mask = batch["attention_mask"]
    hidden, _, _ = model._read(context, model.embed(batch["input_ids"]), causal=True, mask=mask, keep=False)
    supervised = batch["labels"][:, 1:] != -100
    logits = model.language_model.lm_head(model.language_model.model.norm(hidden)[:, :-1][supervised])
    return F.cross_entropy(logits.float(), batch["labels"][:, 1:][supervised])


def visual_tokens(model: Model, words: torch.Tensor) -> torch.Tensor:
    """The sum of the embeddings of a patch's words: `[B, S, 6]` ids -> `[B, S, D]`."""
    embeds = model.embed(words.clamp(min=0))
    return (embeds * (words >= 0)[..., None]).sum(2)


def train_language(
    model: Model, world: World, texts: Texts, arguments: Arguments, curves: Path, again: bool = False
) -> None:
    """The understanding expert reads a scene, as a full caption in any order or as the words that an ideal image encoder
    would say, answers questions about it, describes it in reading order, and continues captions."""
    rng = np.random.default_rng([arguments.seed, 5 if again else 2])
    count, each = arguments.batch_size // 2, 3
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        scenes = [world.sample(rng) for _ in range(count)]
        asked = texts.questions(scenes, rng, each)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if step % 3:
                said = texts.processor.tokenize([world.caption(scene, rng, 1.0) for scene in scenes])
                context = model.read_text(model.new_context(count), said["input_ids"], said["attention_mask"])
                sparse = [world.caption(scene, rng, SPARSE) for scene in scenes]
                captions = texts.processor.tokenize([""] * count, answers=sparse)
                own = {"caption": 0.2 * answer_loss(model, model.new_context(count), captions)}
            else:
                tokens = visual_tokens(model, texts.visual_words(scenes, side))
                tokens = tokens + 0.1 * torch.randn_like(tokens)
                size = (model.config.vision_config.image_size,) * 2
                context = model.read_image(model.new_context(count), tokens, size)
                own = {}
            kind = "text" if step % 3 else "visual"
            return {
                f"{kind} answers": answer_loss(model, context.repeat(each), asked),
                f"{kind} description": answer_loss(model, context, texts.descriptions(scenes)),
                **own,
            }

    expert = [n for n in model.understanding_modules if n.startswith("language_model.")]
    steps = arguments.language_again_steps if again else arguments.language_steps
    train_modules(model, expert, "language", loss_of_step, steps, 2e-3, curves)


def train_vision(model: Model, world: World, texts: Texts, arguments: Arguments, curves: Path) -> None:
    """Image encoder and connector learn to say those words (as contrastive pretraining aligns an encoder with text); in
    the last fifth also to be understood by the frozen language model."""
    rng, count = np.random.default_rng([arguments.seed, 3]), arguments.batch_size
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        scenes = [world.sample(rng) for _ in range(count)]
        pixels = pixels_of(world, scenes)
        with torch.no_grad():
            wanted = visual_tokens(model, texts.visual_words(scenes, side))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embeds = model.encode_condition(pixels)
            terms = {"words": (embeds.float() - wanted).square().mean() / wanted.var()}
            if step >= 0.8 * arguments.vision_steps:
                context = model.read_image(model.new_context(count), embeds, pixels.shape[-2:])
                terms["answers"] = answer_loss(model, context, texts.questions(scenes, rng, 1))
        return terms

    train_modules(model, ["vit_model", "connector"], "vision", loss_of_step, arguments.vision_steps, 1.5e-3, curves)


def train_generator(model: Model, world: World, texts: Texts, arguments: Arguments, curves: Path) -> None:
    """The generation expert, begun as a copy of the understanding expert, learns text-to-image from sparse captions; one
    in ten is left out, for guidance."""
    rng = np.random.default_rng([arguments.seed, 4])
    weights = model.state_dict()
    twins = {name: weights[name.replace("_moe_gen", "")] for name in weights if "_moe_gen" in name}
    model.load_state_dict(twins, strict=False)
    scenes, latents = [world.sample(rng) for _ in range(arguments.scenes)], []
    for start in tqdm(range(0, len(scenes), 256), desc="encode", unit="batch"):
        pixels = pixels_of(world, scenes[start : start + 256])
        channels, side = model.config.vae_config["latent_channels"], world.resolution // model.config.vae_scale_factor
        latents.append(model.encode_target(pixels, torch.zeros(len(pixels), channels, side, side)))
    latents = torch.cat(latents)

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        chosen = rng.integers(len(scenes), size=arguments.batch_size)
        captions = ["" if rng.random() < 0.1 else world.caption(scenes[i], rng, SPARSE) for i in chosen]
        batch = {"task": "generate", "latents": latents[chosen], **texts.processor.tokenize(captions)}
        corruption = model.sample_corruption({**batch, "timesteps_per_image": 2})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return {"velocity": model(corruption=corruption, **batch).loss}

    train_modules(model, model.generation_modules, "generator", loss_of_step, arguments.generator_steps, 3e-3, curves)


def train_answers(model: Model, world: World, texts: Texts, arguments: Arguments, curves: Path) -> None:
    """What comes after the last keys and values of the understanding expert learns to answer better, above all where
    something is. The generator reads nothing but those keys and values, so it stays as it is."""
    rng, count, each = np.random.default_rng([arguments.seed, 6]), arguments.batch_size // 2, 4
    layer = f"language_model.model.layers.{LAYERS - 1}"
    parts = ("self_attn.q_proj", "self_attn.q_norm", "self_attn.o_proj", "post_attention_layernorm", "mlp")
    names = [*(f"{layer}.{part}" for part in parts), "language_model.model.norm", "language_model.lm_head"]

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        scenes = [world.sample(rng) for _ in range(count)]
        pixels = pixels_of(world, scenes)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            context = model.read_image(model.new_context(count), model.encode_condition(pixels), pixels.shape[-2:])
            asked = texts.questions(scenes, rng, each, kinds=(0, 0, 0, 1, 2, 3))
            return {
                "answers": answer_loss(model, context.repeat(each), asked),
                "description": answer_loss(model, context, texts.descriptions(scenes)),
            }

    train_modules(model, names, "answers", loss_of_step, arguments.answers_steps, 2e-3, curves)


def train_modules(
    model: Model, names: list[str], stage: str, loss_of_step: Callable, steps: int, learning_rate: float, curves: Path
) -> None:
    model.requires_grad_(False)
    parameters = []
    for name in names:
        parameters += model.get_submodule(name).requires_grad_(True).named_parameters(name)
    matrices = [one for name, one in parameters if ".layers." in name and one.ndim == 2]
    others = [one for name, one in parameters if not (".layers." in name and one.ndim == 2)]
    model.train()
    train(stage, others, matrices, loss_of_step, steps, learning_rate, curves)
    model.requires_grad_(True).eval()


STAGES = {
    "autoencoder": train_autoencoder,
    "language": train_language,
    "language_again": partial(train_language, again=True),
    "vision": train_vision,
    "generator": train_generator,
    "answers": train_answers,
}


def main(arguments: Arguments) -> Path:
    """Run the stages that are not there yet and write `checkpoint/`, in bfloat16 but for the autoencoder.

    Returns:
        The folder of the finished checkpoint; `pretraining.json` in it says how it was made.
    """
    world, output = World(), Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    model, processor = build(world)
    texts, seconds = Texts(processor, world), {}
    for index, (name, train_stage) in enumerate(STAGES.items()):
        folder = output / name
        if (folder / "model.safetensors").is_file():
            model = Model.from_pretrained(folder, dtype=torch.float32)
        else:
            torch.manual_seed(1000 * (index + 1) + arguments.seed)
            start = time.time()
            train_stage(model, world, texts, arguments, output / "curves.jsonl")
            (output / f"{name}.seconds").write_text(f"{time.time() - start:.0f}")
            model.save_pretrained(folder)
        seconds[name] = int((output / f"{name}.seconds").read_text())

    checkpoint = output / "checkpoint"
    for name, parameter in model.named_parameters():
        if not name.startswith("vae."):
            parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    weights = (checkpoint / "model.safetensors").read_bytes()
    record = {
        "world": asdict(world),
        "arguments": {key: value for key, value in asdict(arguments).items() if key != "output_dir"},
        "seconds": seconds,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    (checkpoint / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
    return checkpoint


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    print(main(parsed))
