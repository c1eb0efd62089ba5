import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader

from reca_trainer.data import Columns, Draw, Row, RowDataset, SamplingPlan, TaskBatchSampler
from reca_trainer.data.collator import UnifiedCollator


class PixelProcessor:
    """The smallest processor of the contract: pixels as they are, strings handed through."""

    def __call__(self, images, text=None, instruction=None, task="reconstruct", size=None, *, crop=None, dropped=None):
        pixels = np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2)
        return {
            "task": task,
            "pixel_values": torch.tensor(pixels / 127.5 - 1, dtype=torch.float32),
            "text": text,
            "instruction": instruction,
            "size": size,
            "crop": crop,
            "dropped": dropped,
        }


collate = UnifiedCollator(PixelProcessor())


def row(task="reconstruct", text=None, size=(4, 6), seed=1, skipped=(), **draw):
    return Row(
        Draw(task, 0, size, seed, **{"instruction": "Look.", **draw}),
        f"row {seed}",
        Image.new("RGB", (9, 5), (255, 0, 0)),
        text,
        skipped=tuple(skipped),
    )


def test_a_batch_carries_seeds_sources_and_what_was_skipped():
    batch = collate([row(seed=3, skipped=["row 2: junk"]), row(seed=9)])
    assert (batch["seeds"], batch["sources"], batch["skipped"]) == ([3, 9], ["row 3", "row 9"], ["row 2: junk"])


def test_the_processor_gets_whole_pictures_and_what_was_drawn_for_each():
    batch = collate([row(instruction="Look.", crop=0.25), row(instruction="See.", dropped=True)])
    assert batch["pixel_values"].shape == (2, 3, 5, 9)
    assert (batch["task"], batch["text"], batch["size"]) == ("reconstruct", None, (4, 6))
    assert (batch["instruction"], batch["crop"]) == (["Look.", "See."], [0.25, None])
    assert batch["dropped"] == [False, True]


def test_captions_and_conversations_share_a_batch():
    conversation = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A dog."}]
    batch = collate([row("caption", "A cat."), row("caption", conversation)])
    assert (batch["text"], batch["instruction"]) == (["A cat.", conversation], ["Look.", "Look."])


@pytest.mark.parametrize("task", ["caption", "generate"])
@pytest.mark.parametrize("text", [None, ""])
def test_a_missing_caption_is_an_error_with_the_row(task, text):
    with pytest.raises(ValueError, match="row 8: no caption"):
        collate([row(task, "A cat."), row(task, text, seed=8)])


@pytest.mark.parametrize("other", [row("caption", "A cat.", seed=8), row(size=(6, 4), seed=8)])
def test_rows_of_another_task_or_size_are_refused(other):
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
    for batch, left, right in zip(whole, *halves, strict=True):
        assert batch["task"] == left["task"] == right["task"]
        repeated = len(batch["seeds"]) == 1
        for key in ("seeds", "sources", "text", "instruction", "crop"):
            joined = left[key] if repeated or batch[key] is None else left[key] + right[key]
            assert joined == batch[key]
        joined = left["pixel_values"] if repeated else torch.cat([left["pixel_values"], right["pixel_values"]])
        assert torch.equal(joined, batch["pixel_values"])
