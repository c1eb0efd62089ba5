"""Gives the tiny model of a family, whose weights are random, an autoencoder that knows the world of shapes, a first
understanding of it, and a generator that paints it less well: what RecA starts from, in minutes on a CPU, and kept for
the next run."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from huggingface_hub.constants import HF_HOME
from safetensors.torch import load_model, save_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from reca_trainer.files import replacing
from reca_trainer.models.contract import UnifiedModel, UnifiedProcessor
from reca_trainer.toy.world import SPARSE, Scene, World

DESCRIBE = "describe the image in detail"
NOISE = 0.1  # added to continuous latents of unit variance, so that near latents decode alike


def pretrain(
    build: Callable[[], tuple[UnifiedModel, UnifiedProcessor]],
    autoencoder: str,
    encode: Callable[[UnifiedModel, Tensor], Tensor],
    decode: Callable[[UnifiedModel, Tensor], Tensor],
    *,
    continuous: bool,
    autoencoder_steps: int = 600,
    understanding_steps: int = 500,
    generator_steps: int = 300,
    batch_size: int = 16,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> tuple[UnifiedModel, UnifiedProcessor]:
    """Build a tiny model and fit it to the world, or load the weights of an earlier call with the same arguments.

    Args:
        build: makes model and processor; runs with the random numbers of `seed`.
        autoencoder: name of the submodule that `encode` and `decode` go through, which are all that is trained of it.
        encode: model, pixels `[B, 3, H, W]` in [-1, 1] -> what its generator predicts, differentiably: latents, or
            codes with straight-through gradients.
        decode: model, latents or codes -> pixels.
        continuous: latents are drawn to mean 0 and variance 1 and decoded with a little noise; the channels of codes to
            mean 0 and unit covariance.
        autoencoder_steps, understanding_steps, generator_steps: optimizer steps of the stages.
        batch_size: scenes a step.
        cache_dir: where weights are kept; by default the Hugging Face cache.
    """
    cache = Path(cache_dir or Path(HF_HOME) / "reca_trainer")
    with torch.random.fork_rng(devices=[]), PartialState().local_main_process_first():
        torch.manual_seed(seed)
        model, processor = build()
        functions = (build, encode, decode, ask, _minimise, warmup_and_cosine)
        recipe = [model.config.to_json_string(), repr(World()), *map(inspect.getsource, functions)]
        stages = {
            fit_autoencoder: (processor, autoencoder, encode, decode, continuous, autoencoder_steps, batch_size, seed),
            fit_understanding: (processor, autoencoder, understanding_steps, batch_size, seed),
            fit_generator: (processor, generator_steps, batch_size, seed),
        }
        for fit, arguments in stages.items():
            recipe += [inspect.getsource(fit), str([value for value in arguments if isinstance(value, str | int)])]
            digest = hashlib.sha256("\0".join(recipe).encode()).hexdigest()[:16]
            path = cache / f"{model.config.model_type}-{fit.__name__.removeprefix('fit_')}-{digest}.safetensors"
            if not path.is_file():
                fit(model, *arguments)
                model.requires_grad_(True)
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as temporary:
                    save_model(model, str(temporary))
            load_model(model, path)
    return model.eval(), processor


def fit_autoencoder(
    model: UnifiedModel,
    processor: UnifiedProcessor,
    autoencoder: str,
    encode: Callable[[UnifiedModel, Tensor], Tensor],
    decode: Callable[[UnifiedModel, Tensor], Tensor],
    continuous: bool,
    steps: int,
    batch_size: int,
    seed: int,
    learning_rate: float = 1.5e-3,
) -> None:
    """Minimise the absolute and squared error of decoded scenes, see `pretrain` for the arguments."""
    world, rng = World(), np.random.default_rng([seed, 1])
    images = [world.render(world.sample(rng)) for _ in range(512)]
    pixels = processor(images=images, instruction=DESCRIBE, task="reconstruct")["pixel_values"]
    eye = torch.eye(encode(model, pixels[:1]).shape[1])

    def loss_of_step(step: int) -> Tensor:
        target = pixels[torch.from_numpy(rng.integers(len(pixels), size=batch_size))]
        latents = encode(model, target)
        if continuous:
            moments = latents.mean().square() + (latents.std() - 1).square()
            latents = latents + NOISE * torch.randn_like(latents)
        else:  # else most codes are never used
            channels = latents.transpose(0, 1).flatten(1)  # [C, tokens]
            moments = channels.mean(dim=1).square().mean() + (torch.cov(channels) - eye).square().mean()
        error = decode(model, latents) - target
        return error.abs().mean() + error.square().mean() + 0.1 * moments

    model.requires_grad_(False)
    module = model.get_submodule(autoencoder).requires_grad_(True)
    _minimise("autoencoder", loss_of_step, module, steps, learning_rate)


def fit_understanding(
    model: UnifiedModel,
    processor: UnifiedProcessor,
    autoencoder: str,
    steps: int,
    batch_size: int,
    seed: int,
    learning_rate: float = 2e-3,
) -> None:
    """Train everything but the autoencoder on the model's own caption task: descriptions and questions in turn."""
    world, rng = World(), np.random.default_rng([seed, 2])

    def loss_of_step(step: int) -> Tensor:
        scenes = [world.sample(rng) for _ in range(batch_size)]
        if step % 2:
            texts = ask(world, scenes, rng)
        else:
            texts = {"instruction": [DESCRIBE] * batch_size, "text": [world.describe(scene) for scene in scenes]}
        images = [world.render(scene) for scene in scenes]
        return model(**processor(images=images, **texts, task="caption")).loss

    model.get_submodule(autoencoder).requires_grad_(False)
    _minimise("understanding", loss_of_step, model, steps, learning_rate)


def fit_generator(
    model: UnifiedModel,
    processor: UnifiedProcessor,
    steps: int,
    batch_size: int,
    seed: int,
    learning_rate: float = 2e-3,
) -> None:
    """Train the generator to paint sparse captions, and to answer questions too where it understands with the same
    weights."""
    world, rng = World(), np.random.default_rng([seed, 3])

    def loss_of_step(step: int) -> Tensor:
        scenes = [world.sample(rng) for _ in range(batch_size)]
        images, captions = [world.render(scene) for scene in scenes], [world.caption(s, rng, SPARSE) for s in scenes]
        loss = model(**processor(images=images, text=captions, task="generate")).loss
        if model.shares_weights:
            asked = processor(images=images, **ask(world, scenes, rng), task="caption")
            loss = loss + 0.5 * model(**asked).loss
        return loss

    model.freeze_understanding()
    _minimise("generator", loss_of_step, model, steps, learning_rate)


def ask(world: World, scenes: list[Scene], rng: np.random.Generator) -> dict[str, list[str]]:
    """A question about each scene, as the `instruction` of a caption batch, and its answer as the `text`."""
    questions = [world.question(scene, rng) for scene in scenes]
    return {
        "instruction": [question.text for question in questions],
        "text": [question.answer for question in questions],
    }


def _minimise(
    name: str,
    loss_of_step: Callable[[int], Tensor],
    module: torch.nn.Module,
    steps: int,
    learning_rate: float,
) -> None:
    """Muon for the matrices of linear layers, AdamW for all else that requires gradients; a short warm-up and a cosine
    decay."""
    head = getattr(module, "get_output_embeddings", lambda: None)()
    linear = [layer.weight for layer in module.modules() if isinstance(layer, torch.nn.Linear) and layer is not head]
    matrices = [weight for weight in linear if weight.requires_grad]
    chosen = {id(weight) for weight in matrices}
    rest = [weight for weight in module.parameters() if weight.requires_grad and id(weight) not in chosen]
    muon = {"lr": 4 * learning_rate, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
        *([torch.optim.Muon(matrices, **muon)] if matrices else []),
    ]
    schedules = [warmup_and_cosine(optimizer, steps) for optimizer in optimizers]
    bar = tqdm(range(steps), desc=f"fit {name} to the shapes", unit="step", mininterval=2)
    for step in bar:
        with sdpa_kernel(SDPBackend.MATH):  # for so few tokens the CPU's fused kernel is the slower one
            loss = loss_of_step(step)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(rest + matrices, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0 or step == steps - 1:
            bar.set_postfix(loss=f"{loss.item():.4f}")


def warmup_and_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A schedule of at most 50 steps of warm-up and a cosine decay to a fiftieth."""
    warmup = min(50, steps // 10 + 1)

    def share(step: int) -> float:
        return min((step + 1) / warmup, 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)
