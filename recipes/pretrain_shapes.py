"""Make the embedded default: a tiny BAGEL that understands the world of shapes well and paints it less well.

    python recipes/pretrain_shapes.py --output_dir runs/shapes

Four stages, each resumed from its own file if that is there, all deterministic in the seed on one machine:

1. `autoencoder`: a KL autoencoder of rendered scenes.
2. `language`: the understanding expert answers questions about scenes given as text.
3. `vision`: image encoder and connector take the place of that text, the language model is frozen.
4. `generator`: the generation expert paints from *sparse* captions, understanding is frozen. Real captions leave most of
   an image unsaid, which is what RecA makes up for.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from reca_trainer.models.bagel import Model
from reca_trainer.shapes.world import Scene, World

DESCRIBE = "describe the image in detail"


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "where stages, curves and the finished checkpoint are written"})
    seed: int = field(default=0, metadata={"help": "of weights, scenes and noise"})
    batch_size: int = field(default=64, metadata={"help": "samples a step, in every stage"})
    autoencoder_steps: int = 1500
    language_steps: int = 1500
    vision_steps: int = 2500
    generator_steps: int = 4000


def pixels_of(world: World, scenes: list[Scene]) -> torch.Tensor:
    """Rendered scenes as `[B, 3, H, W]` float32 in [-1, 1]."""
    array = np.stack([np.asarray(world.render(scene)) for scene in scenes]).astype(np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def train(
    name: str,
    parameters: list[torch.nn.Parameter],
    loss_of_step: Callable[[int], dict[str, torch.Tensor]],
    steps: int,
    learning_rate: float,
    curves: Path,
) -> None:
    """AdamW with a short warm-up and a cosine decay; the terms of `loss_of_step` are summed, and logged one by one."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = min(100, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * s / steps)))
    )
    sums: dict[str, float] = {}
    every, start = 50, time.time()
    with curves.open("a") as log, tqdm(total=steps, desc=name, unit="step", mininterval=5) as bar:
        for step in range(steps):
            terms = loss_of_step(step)
            loss = sum(terms.values())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            for key, value in terms.items():
                sums[key] = sums.get(key, 0.0) + float(value.detach())
            bar.update()
            if (step + 1) % every == 0 or step + 1 == steps:
                count = step % every + 1
                means = {key: round(value / count, 5) for key, value in sums.items()}
                row = {"stage": name, "step": step + 1, "seconds": round(time.time() - start, 1), **means}
                log.write(json.dumps(row) + "\n")
                log.flush()
                bar.set_postfix(means)
                sums = {}


def train_autoencoder(model: Model, world: World, arguments: Arguments, curves: Path) -> None:
    """Absolute error and a weak pull of the posterior towards a standard normal; then the latents' shift and scale are
    measured, so that the generator's targets have unit variance."""
    vae, rng = model.vae, np.random.default_rng([arguments.seed, 1])
    moved = World(world.resolution, world.grid, jitter=2, max_objects=world.max_objects, seed=world.seed)

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        scenes = [moved.sample(rng) for _ in range(arguments.batch_size)]
        pixels = pixels_of(moved, scenes)
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.mean + posterior.std * torch.randn_like(posterior.mean)).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return {"error": (decoded - pixels).abs().mean() + (decoded - pixels).square().mean(), "kl": 2e-3 * kl}

    vae.requires_grad_(True)
    train("autoencoder", list(vae.parameters()), loss_of_step, arguments.autoencoder_steps, 2e-3, curves)
    with torch.no_grad():
        means = vae.encode(pixels_of(world, [world.sample(rng) for _ in range(512)])).latent_dist.mean
    scale = {"shift_factor": round(float(means.mean()), 4), "scaling_factor": round(1 / float(means.std()), 4)}
    vae.register_to_config(**scale)
    model.config.vae_config.update(scale)
