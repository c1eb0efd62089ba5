"""The embedded default: a tiny world of rendered scenes, its captions, its detector and its score, and a tiny BAGEL
pretrained on it (`recipes/pretrain_shapes.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reca_trainer.toy.world import SPARSE, World

if TYPE_CHECKING:
    import datasets
    from PIL import Image

    from reca_trainer.models.contract import UnifiedModel, UnifiedProcessor

__all__ = ["CHECKPOINT", "SAMPLING", "SPARSE", "World", "dataset", "judge", "load", "prompts"]

CHECKPOINT = Path(__file__).parent / "checkpoint"
SAMPLING = {"num_inference_steps": 12, "guidance_scale": 2.0, "guidance_interval": (0.0, 1.0)}


def load(folder: str | Path = CHECKPOINT) -> tuple[UnifiedModel, UnifiedProcessor]:
    """The pretrained tiny model, in float32, and its processor; from the package, no download.

    Args:
        folder: another checkpoint of `recipes/pretrain_shapes.py`.
    """
    import torch

    from reca_trainer.models.auto import AutoUnifiedModel, AutoUnifiedProcessor

    model = AutoUnifiedModel.from_pretrained(folder, dtype=torch.float32)
    return model, AutoUnifiedProcessor.from_pretrained(folder)


def dataset(split: str = "train", size: int = 1000, seed: int = 0) -> datasets.Dataset:
    """Scenes of the default world with the columns `image`, `text` (a sparse caption), `question`, `answer`, and
    `conversations`: the latter two as an exchange, which is what the image-to-text term learns from."""
    rows = World().dataset(split, size, seed)
    exchanges = [
        [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        for question, answer in zip(rows["question"], rows["answer"], strict=True)
    ]
    return rows.add_column("conversations", exchanges)


def prompts(size: int = 8, seed: int = 0) -> list[str]:
    """Prompts drawn by `seed`: of each category of short prompts in turn, and every fourth a whole description of a
    held-out scene."""
    from reca_trainer.toy.score import CATEGORIES, held_out_scenes, short_prompt

    world, texts = World(), []
    for index in range(size):
        short = index - (index + 1) // 4
        rng = np.random.default_rng([seed, index])
        if index % 4 == 3:
            texts.append(world.describe(held_out_scenes(world, 1, seed + index)[0]))
        else:
            texts.append(short_prompt(world, CATEGORIES[short % len(CATEGORIES)], rng)[0])
    return texts


def judge(prompts: Sequence[str], images: Sequence[Image.Image]) -> list[bool | None]:
    """Whether all that a prompt states is detected in its image; `None` for prompts in other words than the world's."""
    from reca_trainer.toy.detector import Detector

    world = World()
    facts = [world.stated_facts(prompt) for prompt in prompts]
    scenes = Detector(world)(images)
    return [
        None if stated is None else all(fact.holds(scene) for fact in stated)
        for stated, scene in zip(facts, scenes, strict=True)
    ]
