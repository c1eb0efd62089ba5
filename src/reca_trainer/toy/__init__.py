"""The embedded default: a tiny world of rendered scenes, its captions, its detector and its score, and a tiny BAGEL
pretrained on it (`recipes/pretrain_shapes.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reca_trainer.toy.world import SPARSE, World

if TYPE_CHECKING:
    import datasets

    from reca_trainer.models.contract import UnifiedModel, UnifiedProcessor

__all__ = ["CHECKPOINT", "SAMPLING", "SPARSE", "World", "dataset", "load"]

CHECKPOINT = Path(__file__).parent / "checkpoint"
SAMPLING = {"num_inference_steps": 12, "guidance_scale": 2.0, "guidance_interval": (0.0, 1.0), "timestep_shift": 1.0}


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
