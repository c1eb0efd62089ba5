"""Gives the tiny model of a family, whose weights are random, an autoencoder that knows the world of shapes and a first
understanding of it: what RecA starts from, in a minute or two on a CPU, and kept for the next run."""

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
from tqdm.auto import tqdm

from reca_trainer.models.unified import UnifiedModel, UnifiedProcessor
from reca_trainer.shapes.world import World

DESCRIBE = "describe the image in detail"
NOISE = 0.1  # added to continuous latents of unit variance, so that near latents decode alike


def pretrain(
    build: Callable[[], tuple[UnifiedModel, UnifiedProcessor]],
    autoencoder: str,
    encode: Callable[[UnifiedModel, Tensor], Tensor],
    decode: Callable[[UnifiedModel, Tensor], Tensor],
    *,
    continuous: bool,
    autoencoder_steps: int = 900,
    autoencoder_batch_size: int = 8,
    understanding_steps: int = 400,
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
        autoencoder_steps, understanding_steps: optimizer steps of either stage.
        autoencoder_batch_size: scenes a step.
        cache_dir: where weights are kept; by default the Hugging Face cache.
    """
    cache = Path(cache_dir or Path(HF_HOME) / "reca_trainer")
    with torch.random.fork_rng(devices=[]), PartialState().local_main_process_first():
        torch.manual_seed(seed)
        model, processor = build()
        recipe = [model.config.to_json_string(), *map(inspect.getsource, (build, encode, decode, _minimise))]
        stages = {
            fit_autoencoder: (
                processor,
                autoencoder,
                encode,
                decode,
                continuous,
                autoencoder_steps,
                autoencoder_batch_size,
                seed,
            ),
            fit_understanding: (processor, autoencoder, understanding_steps, seed),
        }
        for fit, arguments in stages.items():
            recipe += [inspect.getsource(fit), str([one for one in arguments if isinstance(one, str | int)])]
            digest = hashlib.sha256("\0".join(recipe).encode()).hexdigest()[:16]
            path = cache / f"{model.config.model_type}-{fit.__name__.removeprefix('fit_')}-{digest}.safetensors"
            if not path.is_file():
                fit(model, *arguments)
                path.parent.mkdir(parents=True, exist_ok=True)
                save_model(model, str(path.with_suffix(".partial")))
                path.with_suffix(".partial").rename(path)
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
    batch_size: int = 8,
    seed: int = 0,
    learning_rate: float = 3e-3,
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
    _minimise("autoencoder", loss_of_step, list(module.parameters()), steps, learning_rate)
    model.requires_grad_(True)


def fit_understanding(
    model: UnifiedModel,
    processor: UnifiedProcessor,
    autoencoder: str,
    steps: int,
    seed: int = 0,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
) -> None:
    """Train everything but the autoencoder on the model's own caption task: descriptions and questions in turn."""
    world, rng = World(), np.random.default_rng([seed, 2])

    def loss_of_step(step: int) -> Tensor:
        scenes = [world.sample(rng) for _ in range(batch_size)]
        if step % 2:
            asked = [world.question(scene, rng) for scene in scenes]
            questions, answers = [one.text for one in asked], [one.answer for one in asked]
        else:
            questions, answers = [DESCRIBE] * batch_size, [world.describe(scene) for scene in scenes]
        images = [world.render(scene) for scene in scenes]
        return model(**processor(images=images, text=answers, instruction=questions, task="caption")).loss

    model.get_submodule(autoencoder).requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _minimise("understanding", loss_of_step, trained, steps, learning_rate)
    model.requires_grad_(True)


def _minimise(
    name: str,
    loss_of_step: Callable[[int], Tensor],
    parameters: list[torch.nn.Parameter],
    steps: int,
    learning_rate: float,
) -> None:
    """AdamW with a short warm-up and a cosine decay."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    warmup = min(50, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
    )
    bar = tqdm(range(steps), desc=f"fit {name} to the shapes", unit="step", mininterval=2)
    for step in bar:
        loss = loss_of_step(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0 or step == steps - 1:
            bar.set_postfix(loss=f"{loss.item():.4f}")
