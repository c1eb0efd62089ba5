"""Every family frames pictures of any shape, in memory that does not grow with the square of their length."""

import resource

import pytest
import torch
from PIL import Image

from tests.models.test_contract import TASKS, build

COLOUR = (200, 30, 90)


@pytest.mark.parametrize("task", ["reconstruct", "generate", "caption"])
@pytest.mark.parametrize("family", TASKS)
def test_pictures_of_one_colour_keep_it_whatever_their_shape(family, task):
    _, processor = build(family)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in [(1, 1), (2, 257), (333, 3), (20_000, 3), (3, 20_000)]:
        target = processor.target_size(*size)
        batch = processor(
            images=[Image.new("RGB", size, COLOUR)],
            text=["a red circle"] if task != "reconstruct" else None,
            instruction="a blue square",
            task=task,
            size=None if task == "caption" else target,
        )
        for name in {"pixel_values", "condition_pixel_values"} & set(batch):
            assert torch.isfinite(batch[name]).all()
        if "pixel_values" in batch:
            expected = torch.tensor(COLOUR) / 127.5 - 1
            assert batch["pixel_values"].shape[2:] == target
            assert (batch["pixel_values"] - expected.view(1, 3, 1, 1)).abs().max() < 2 / 255
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6  # GB
    assert grown < 1
