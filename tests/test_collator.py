import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader

from reca_trainer.data import Columns, Draw, RowDataset, SamplingPlan, TaskBatchSampler
from reca_trainer.data.collator import UnifiedCollator


class PixelProcessor:
    """The smallest processor of the contract: pixels as they are, strings handed through."""

    def __call__(self, images=None, text=None, instruction=None, task="reconstruct", size=None):
        pixels = np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2)
        assert pixels.shape[2:] == size
        return {
            "task": task,
            "pixel_values": torch.tensor(pixels / 127.5 - 1, dtype=torch.float32),
            "text": text,
            "instruction": instruction,
        }


collate = UnifiedCollator(PixelProcessor())


def row(task="reconstruct", text=None, question=None, size=(4, 6), seed=1, skipped=(), instruction="Look."):
    return {
        "task": task,
        "image": Image.new("RGB", size[::-1], (255, 0, 0)),
        "text": text,
        "question": question,
        "draw": Draw(task, 0, size, seed, instruction),
        "source": f"row {seed}",
        "skipped": list(skipped),
    }


def test_a_batch_carries_seeds_sources_and_what_was_skipped():
    batch = collate([row(seed=3, skipped=["row 2: junk"]), row(seed=9)])
    assert batch["pixel_values"].shape == (2, 3, 4, 6)
    assert (batch["task"], batch["text"], batch["instruction"]) == ("reconstruct", None, "Look.")
    assert (batch["seeds"], batch["sources"], batch["skipped"]) == ([3, 9], ["row 3", "row 9"], ["row 2: junk"])


def test_captions_bring_their_own_questions_or_share_one():
    batch = collate([row("caption", "A cat."), row("caption", "A dog.")])
    assert (batch["text"], batch["instruction"]) == (["A cat.", "A dog."], "Look.")
    batch = collate([row("caption", "A cat.", "What is it?"), row("caption", "A dog.")])
    assert batch["instruction"] == ["What is it?", "Look."]


@pytest.mark.parametrize("task", ["caption", "generate"])
@pytest.mark.parametrize("text", [None, ""])
def test_a_missing_caption_is_an_error_with_the_row(task, text):
    with pytest.raises(ValueError, match="row 8: no caption"):
        collate([row(task, "A cat."), row(task, text, seed=8)])


@pytest.mark.parametrize("other", [row("caption", "A cat.", seed=8), row(size=(6, 4), seed=8)])
def test_rows_of_another_task_or_bucket_are_refused(other):
    with pytest.raises(ValueError, match="row 8"):
        collate([row(), other])


def test_two_processes_with_workers_collate_what_one_collates():
    images = [Image.new("RGB", (8, 8), (value, value, value)) for value in range(9)]
    dataset = Dataset.from_dict({"image": images, "text": [f"caption {value}" for value in range(9)]})
    tasks = ("reconstruct", "caption")
    rows = RowDataset(dict.fromkeys(tasks, dataset), dict.fromkeys(tasks, Columns("image", "text")))

    def batches(**options):
        plan = SamplingPlan({"reconstruct": 2, "caption": 1}, **options)
        sampler = TaskBatchSampler(dict.fromkeys(tasks, [(8, 8)] * 9), plan)
        return list(DataLoader(rows, batch_sampler=sampler, collate_fn=collate, num_workers=1))

    whole = batches(batch_size=4)
    halves = [batches(batch_size=2, num_processes=2, process_index=index) for index in (0, 1)]
    for one, left, right in zip(whole, *halves, strict=True):
        assert one["task"] == left["task"] == right["task"]
        assert one["instruction"] == left["instruction"] == right["instruction"]
        repeated = len(one["seeds"]) == 1
        for key in ("seeds", "sources", "text"):
            joined = left[key] if repeated or one[key] is None else left[key] + right[key]
            assert joined == one[key]
        joined = left["pixel_values"] if repeated else torch.cat([left["pixel_values"], right["pixel_values"]])
        assert torch.equal(joined, one["pixel_values"])
