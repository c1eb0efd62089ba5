"""Make the embedded default: a tiny BAGEL that understands the world of shapes well and paints it less well.

    python recipes/pretrain_shapes.py --output_dir runs/shapes

Four stages. Each writes its weights when it is done, and every few hundred steps all that it needs to go on, so the same
command continues an interrupted run. Scenes and noise of a step are a function of seed, stage and step. The first two
stages do not need each other: `--stages autoencoder` and `--stages language` may run side by side.

1. `autoencoder`: a KL autoencoder of rendered scenes.
2. `language`: the understanding expert answers questions about scenes given as text or as the words that an ideal image
   encoder would say. At first it is asked about places only: that way it learns within 300 steps to look an object up, which
   it does not in 800 steps of all questions together.
3. `vision`: image encoder and connector take the place of those words; the language model is frozen.
4. `generator`: the generation expert paints from *sparse* captions, understanding is frozen. Real captions leave most of an
   image unsaid, which is what RecA makes up for.

The matrices of the transformer layers are trained by Muon: the generator's validation loss after 300 steps of an earlier
base was 0.33, and 0.51 with AdamW at the better of two learning rates.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm
from transformers import HfArgumentParser, Qwen2Config, SiglipVisionConfig

from reca_trainer.files import replacing
from reca_trainer.models.bagel import Config, Model, Processor
from reca_trainer.models.bagel.modeling_bagel import build_autoencoder
from reca_trainer.toy.pretraining import DESCRIBE, warmup_and_cosine
from reca_trainer.toy.tokenizer import make_tokenizer
from reca_trainer.toy.world import QUESTION_KINDS, SPARSE, Scene, World

WIDTH, LAYERS, HEADS, FEED_FORWARD = 192, 5, 6, 576
# Pixels of a token's side. The understanding encoder says each object once, as a text does: a generator that learned from
# text takes what is said four times for four times the evidence, and unlearns to heed a single word.
CONDITION_PATCH, PATCH = 24, 12
QUESTIONS = (0, 0, 1, 1, 2, 3)  # indices of QUESTION_KINDS, drawn from: places are asked for most
PLACES = (0, 0, 0, 1)

Terms = dict[str, torch.Tensor]


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "where stages, curves and the finished checkpoint are written"})
    seed: int = field(default=0, metadata={"help": "of weights, scenes and noise"})
    stages: list[str] | None = field(default=None, metadata={"help": "run these at most, and write no checkpoint"})
    batch_size: int = field(default=32, metadata={"help": "scenes a step; half for language, twice for the generator"})
    autoencoder_steps: int = 2400
    language_steps: int = 2200
    vision_steps: int = 1500
    generator_steps: int = 4000
    scenes: int = field(default=16_000, metadata={"help": "different scenes that the generator is trained on"})


@dataclass(frozen=True)
class Stage:
    """What is trained how: `loss_of_step` gets the step and its random numbers, and its terms are summed."""

    modules: list[str]
    steps: int
    learning_rate: float
    loss_of_step: Callable[[int, np.random.Generator], Terms]


def build(world: World) -> tuple[Model, Processor]:
    """The architecture of BAGEL at the smallest size that learns the world, with random weights."""
    tokenizer = make_tokenizer()
    side = world.resolution
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
            patch_size=CONDITION_PATCH,
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
        latent_patch_size=PATCH // 4,
        max_latent_size=side // PATCH,
        vit_max_num_patch_per_side=side // CONDITION_PATCH,
        timestep_shift=3.0,  # where little but noise is seen it is decided what goes where
        bos_token_id=ids("<|im_start|>"),
        eos_token_id=ids("<|im_end|>"),
        image_start_token_id=ids("<|vision_start|>"),
        image_end_token_id=ids("<|vision_end|>"),
    )
    model = Model(config)
    model.vae = build_autoencoder(config.vae_config)  # initialised as convolutions are
    # Words must be as loud as the fixed positions that are added to image tokens (norm about 10).
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    sizes = {"condition_size": (side, side, CONDITION_PATCH), "understanding_size": (side, side, CONDITION_PATCH)}
    return model, Processor(tokenizer, generation_size=(side, side, PATCH), **sizes)


def pixels_of(world: World, scenes: list[Scene]) -> torch.Tensor:
    """Rendered scenes as `[B, 3, H, W]` float32 in [-1, 1]."""
    array = np.stack([np.asarray(world.render(scene)) for scene in scenes]).astype(np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def ask(
    processor: Processor,
    world: World,
    scenes: list[Scene],
    rng: np.random.Generator,
    each: int,
    kinds: tuple[int, ...] = QUESTIONS,
) -> dict[str, torch.Tensor]:
    """`each` questions a scene with their answers as labels, rows of one scene beside each other."""
    questions = [
        world.question(scene, rng, QUESTION_KINDS[kinds[rng.integers(len(kinds))]])
        for scene in scenes
        for _ in range(each)
    ]
    texts = {"instruction": [question.text for question in questions], "text": [q.answer for q in questions]}
    return processor(**texts, task="caption")


def describe(processor: Processor, world: World, scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """The full descriptions as labels behind their instruction."""
    return processor(text=[world.describe(scene) for scene in scenes], instruction=DESCRIBE, task="caption")


def visual_words(model: Model, processor: Processor, world: World, scenes: list[Scene]) -> torch.Tensor:
    """What an ideal image encoder says at each patch, object, place and background of its cell, as the sum of those
    words' embeddings: `[B, S, D]`."""
    ids, grid, side = processor.tokenizer.convert_tokens_to_ids, world.grid, world.resolution // CONDITION_PATCH
    words = np.full((len(scenes), grid**2, 6), -1, dtype=np.int64)
    for index, scene in enumerate(scenes):
        objects = {item.cell: [item.size, item.colour, item.shape] for item in scene.objects}
        for cell in range(grid**2):
            names = [*objects.get(cell, ["nothing"]), *world.places[cell].split(), scene.background]
            words[index, cell, : len(names)] = ids(names)
    cells = (np.arange(side) * grid) // side
    tokens = torch.from_numpy(words[:, (cells[:, None] * grid + cells[None, :]).reshape(-1)])  # [B, S, 6]
    return (model.embed(tokens.clamp(min=0)) * (tokens >= 0)[..., None]).sum(2)


def answer_loss(model: Model, context, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Next-token cross-entropy of the supervised tokens of a text behind `context`, as in the caption task."""
    mask = batch.get("attention_mask")
    hidden, _, _ = model._read(context, model.embed(batch["input_ids"]), causal=True, mask=mask, keep=False)
    supervised = batch["labels"][:, 1:] != -100
    logits = model.language_model.lm_head(model.language_model.model.norm(hidden)[:, :-1][supervised])
    return F.cross_entropy(logits.float(), batch["labels"][:, 1:][supervised])


def autoencoder(model: Model, processor: Processor, world: World, arguments: Arguments) -> Stage:
    """Absolute and squared error, and a weak pull of the posterior towards a standard normal; objects are moved out of their
    places."""
    vae, jitter = model.vae, round(world.cell_size * 0.125)
    moved = World(world.resolution, world.grid, jitter=jitter, max_objects=world.max_objects, seed=world.seed)

    def loss_of_step(step: int, rng: np.random.Generator) -> Terms:
        pixels = pixels_of(moved, [moved.sample(rng) for _ in range(24)])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            latents = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
            decoded = vae.decode(latents).sample.float()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return {"error": (decoded - pixels).abs().mean() + (decoded - pixels).square().mean(), "kl": 2e-3 * kl}

    return Stage(["vae"], arguments.autoencoder_steps, 2e-3, loss_of_step)


@torch.no_grad()
def standardise_latents(model: Model, world: World) -> None:
    """Measure shift and scale of the latents, so that the generator's targets have unit variance."""
    rng = np.random.default_rng(world.seed)
    means = model.vae.encode(pixels_of(world, [world.sample(rng) for _ in range(512)])).latent_dist.mean
    scale = {"shift_factor": round(float(means.mean()), 4), "scaling_factor": round(1 / float(means.std()), 4)}
    model.vae.register_to_config(**scale)
    model.config.vae_config.update(scale)


def language(model: Model, processor: Processor, world: World, arguments: Arguments) -> Stage:
    """The understanding expert reads a scene, in turns as an ideal image encoder's words and as a full caption in any order,
    answers questions about it and at times describes it, and continues sparse captions. The first eighth of the steps asks
    about the places of objects in images only."""
    count, steps = arguments.batch_size // 2, arguments.language_steps

    def loss_of_step(step: int, rng: np.random.Generator) -> Terms:
        scenes = [world.sample(rng) for _ in range(count)]
        context, terms = model.new_context(count), {}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if visual := step < steps // 8 or step % 2 == 0:
                tokens = visual_words(model, processor, world, scenes)
                size = (world.resolution, world.resolution)
                context = model.read_image(context, tokens + 0.1 * torch.randn_like(tokens), size)
            else:
                sparse = processor(text=[world.caption(scene, rng, SPARSE) for scene in scenes], task="caption")
                terms["caption"] = 0.2 * answer_loss(model, context, sparse)
                full = processor.tokenize([world.caption(scene, rng, 1.0) for scene in scenes])
                context = model.read_text(context, full["input_ids"], full.get("attention_mask"))
            name = "image" if visual else "text"
            each, kinds = (8, PLACES) if step < steps // 8 else (6, QUESTIONS)
            asked = ask(processor, world, scenes, rng, each, kinds)
            terms[f"{name} answers"] = answer_loss(model, context.repeat(each), asked)
            if step >= steps // 8 and step % 8 in (0, 1):
                terms[f"{name} description"] = answer_loss(model, context, describe(processor, world, scenes))
        return terms

    experts = [name for name in model.understanding_modules if name.startswith("language_model.")]
    return Stage(experts, steps, 1e-3, loss_of_step)


def vision(model: Model, processor: Processor, world: World, arguments: Arguments) -> Stage:
    """Image encoder and connector learn to say those words (as contrastive pretraining aligns an encoder with text); in
    the last fifth also to be understood by the frozen language model."""
    count, steps = arguments.batch_size, arguments.vision_steps

    def loss_of_step(step: int, rng: np.random.Generator) -> Terms:
        scenes = [world.sample(rng) for _ in range(count)]
        pixels = pixels_of(world, scenes)
        with torch.no_grad():
            wanted = visual_words(model, processor, world, scenes)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embeds = model.encode_condition(pixels)
            terms = {"words": (embeds.float() - wanted).square().mean() / wanted.var()}
            if step >= 0.8 * steps:
                context = model.read_image(model.new_context(count), embeds, pixels.shape[-2:])
                terms["answers"] = answer_loss(model, context, ask(processor, world, scenes, rng, 1))
        return terms

    return Stage(["vit_model", "connector"], steps, 1.5e-3, loss_of_step)


def generator(model: Model, processor: Processor, world: World, arguments: Arguments) -> Stage:
    """The generation expert, begun as a copy of the understanding expert, learns text-to-image from sparse captions; one
    in ten is left out, for guidance."""
    weights = model.state_dict()
    twins = {name: weights[name.replace("_moe_gen", "")] for name in weights if "_moe_gen" in name}
    model.load_state_dict(twins, strict=False)
    scenes = [world.sample(world.rng("train", arguments.seed, index)) for index in range(arguments.scenes)]
    latents = []
    for start in tqdm(range(0, len(scenes), 250), desc="encode", unit="batch"):
        pixels = pixels_of(world, scenes[start : start + 250])
        channels, side = model.config.vae_config["latent_channels"], world.resolution // model.config.vae_scale_factor
        latents.append(model.encode_target(pixels, torch.zeros(len(pixels), channels, side, side)))
    latents = torch.cat(latents)

    def loss_of_step(step: int, rng: np.random.Generator) -> Terms:
        chosen = rng.integers(len(scenes), size=2 * arguments.batch_size)
        captions = ["" if rng.random() < 0.1 else world.caption(scenes[i], rng, SPARSE) for i in chosen]
        batch = {"task": "generate", "latents": latents[chosen], **processor.tokenize(captions)}
        corruption = model.sample_corruption({**batch, "timesteps_per_image": 2})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return {"velocity": model(corruption=corruption, **batch).loss}

    return Stage(model.generation_modules, arguments.generator_steps, 2e-3, loss_of_step)


STAGES = {make.__name__: make for make in (autoencoder, language, vision, generator)}


def fit(model: Model, name: str, stage: Stage, seed: int, output: Path, save_steps: int = 300) -> None:
    """Muon for the matrices of transformer layers, AdamW for all else, a short warm-up and a cosine decay; the stage's
    weights are in `output/<name>.safetensors` at the end."""
    model.requires_grad_(False)
    weights = {
        key: parameter
        for module in stage.modules
        for key, parameter in model.get_submodule(module).requires_grad_(True).named_parameters(module)
    }
    matrices = [weight for key, weight in weights.items() if ".layers." in key and weight.ndim == 2]
    others = [weight for key, weight in weights.items() if not (".layers." in key and weight.ndim == 2)]
    rate, steps = stage.learning_rate, stage.steps
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
        *([torch.optim.Muon(matrices, lr=4 * rate, adjust_lr_fn="match_rms_adamw")] if matrices else []),
    ]
    schedules = [warmup_and_cosine(optimizer, steps) for optimizer in optimizers]
    stateful, partial = [*optimizers, *schedules], output / f"{name}.partial"
    first, seconds, sums = 0, 0.0, {}
    if partial.is_file():
        state = torch.load(partial, weights_only=True)
        first, seconds = state["step"], state["seconds"]
        model.load_state_dict(state["weights"], strict=False)
        for item, saved in zip(stateful, state["stateful"], strict=True):
            item.load_state_dict(saved)
    model.train()
    start = time.process_time() - seconds
    with (output / "curves.jsonl").open("a") as log, tqdm(total=steps, initial=first, desc=name, mininterval=5) as bar:
        for step in range(first, steps):
            torch.manual_seed(int(np.random.SeedSequence([seed, *name.encode(), step]).generate_state(1)[0]))
            rng = np.random.default_rng([seed, *name.encode(), step])
            with sdpa_kernel(SDPBackend.MATH):  # for so few tokens the CPU's fused kernel is the slower one
                terms = stage.loss_of_step(step, rng)
                sum(terms.values()).backward()
            torch.nn.utils.clip_grad_norm_(others + matrices, 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
            for key, value in terms.items():
                sums.setdefault(key, []).append(float(value.detach()))
            bar.update()
            if (step + 1) % 50 == 0 or step + 1 == steps:
                means = {key: round(sum(values) / len(values), 5) for key, values in sums.items()}
                row = {"stage": name, "step": step + 1, "cpu_seconds": round(time.process_time() - start, 1), **means}
                log.write(json.dumps(row) + "\n")
                log.flush()
                bar.set_postfix(means)
                sums = {}
            if (step + 1) % save_steps == 0:
                state = {"step": step + 1, "seconds": time.process_time() - start, "weights": weights}
                with replacing(partial) as temporary:
                    torch.save({**state, "stateful": [item.state_dict() for item in stateful]}, temporary)
    with replacing(output / f"{name}.safetensors") as temporary:
        save_file({key: weight.detach() for key, weight in weights.items()}, temporary)
    partial.unlink(missing_ok=True)
    model.requires_grad_(True).eval()


def main(arguments: Arguments) -> Path:
    """Run the stages that are not there yet and, after all of them, write `checkpoint/`, in bfloat16 but for the
    autoencoder.

    Returns:
        The folder of the finished checkpoint, whose `pretraining.json` says how it was made; of some stages, the output
        folder.
    """
    world, output = World(), Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    model, processor = build(world)
    for name in STAGES:
        path = output / f"{name}.safetensors"
        if not path.is_file() and arguments.stages and name not in arguments.stages:
            continue
        if not path.is_file():
            fit(model, name, STAGES[name](model, processor, world, arguments), arguments.seed, output)
        model.load_state_dict(load_file(path), strict=False)
        if name == "autoencoder":
            standardise_latents(model, world)

    if arguments.stages:
        return output
    checkpoint = output / "checkpoint"
    for name, parameter in model.named_parameters():
        if not name.startswith("vae."):
            parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    curves = [json.loads(line) for line in (output / "curves.jsonl").read_text().splitlines()]
    record = {
        "world": asdict(world),
        "arguments": {key: value for key, value in asdict(arguments).items() if key not in ("output_dir", "stages")},
        "cpu_seconds": {row["stage"]: row["cpu_seconds"] for row in curves},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sha256": hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest(),
    }
    (checkpoint / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
    return checkpoint


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    print(main(parsed))
