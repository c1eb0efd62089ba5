"""The options of `RecAConfig` that decide what a step sees."""

import datasets
import pytest
import torch
from datasets import Dataset, Features
from PIL import Image

from reca_trainer import RecAConfig
from reca_trainer.data.task_datasets import TaskDatasets
from reca_trainer.images import ImageError
from tests.hostile_images import encoded
from tests.test_trainer import dataset, model, processor, trainer  # noqa: F401 fixtures


def batches(run):
    return list(run.get_train_dataloader())


def test_image_sizes_bound_the_targets(tmp_path, model, dataset, processor):  # noqa: F811
    options = {"per_device_train_batch_size": 1}
    whole = batches(trainer(model, tmp_path, dataset, processor, **options))
    sizes = {tuple(batch["pixel_values"].shape[2:]) for batch in whole}
    assert sizes == {(64, 48), (48, 64), (64, 64)}
    small = batches(trainer(model, tmp_path, dataset, processor, max_image_size=32, min_image_size=16, **options))
    assert {max(batch["pixel_values"].shape[2:]) for batch in small} == {32}
    large = batches(trainer(model, tmp_path, dataset, processor, max_image_size=96, min_image_size=64, **options))
    assert {min(batch["pixel_values"].shape[2:]) for batch in large} == {64}
    with pytest.raises(ValueError, match="max_image_size 8"):
        batches(trainer(model, tmp_path, dataset, processor, max_image_size=8, **options))


def test_conditions_of_several_sizes_share_a_target_size(tmp_path, model, processor):  # noqa: F811
    shapes = [(41, 56), (49, 56)] * 8  # width, height
    assert {processor.target_size(*shape) for shape in shapes} == {(64, 48)}
    pictures = Dataset.from_dict({"image": [Image.new("RGB", size, (90, 10, 9)) for size in shapes]})
    run = trainer(model, tmp_path, pictures, processor, per_device_train_batch_size=4)
    conditions = [batch["condition_pixel_values"] for batch in batches(run)]
    assert any(isinstance(condition, list) for condition in conditions)
    assert {tuple(c.shape[1:]) for condition in conditions for c in condition} == {(42, 42), (42, 28)}
    run.train()
    assert run.state.global_step == 6


def test_instructions_come_from_a_file(tmp_path, model, dataset, processor):  # noqa: F811
    file = tmp_path / "instructions.txt"
    file.write_text("boat\n\n  kite \n")
    run = trainer(model, tmp_path, dataset, processor, instructions_file=str(file), instruction_dropout=0.0)
    words = {
        tuple(ids[ids != processor.tokenizer.pad_token_id].tolist()) for b in batches(run) for ids in b["input_ids"]
    }
    expected = {tuple(processor.tokenize([text])["input_ids"][0].tolist()) for text in ("boat", "kite")}
    assert {tuple(i for i in row if i != processor.eos_token_id) for row in words} == {
        tuple(i for i in row if i != processor.eos_token_id) for row in expected
    }
    file.write_text("\n")
    with pytest.raises(ValueError, match="has no instruction"):
        RecAConfig(output_dir=str(tmp_path), instructions_file=str(file))
    with pytest.raises(FileNotFoundError):
        RecAConfig(output_dir=str(tmp_path), instructions_file=str(tmp_path / "missing.txt"))


@pytest.mark.parametrize("weighting", ["target", "micro_batch"])
def test_micro_batches_count_by_their_targets_or_all_alike(tmp_path, model, dataset, processor, weighting):  # noqa: F811
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "token_weighting": weighting}
    run = trainer(model, tmp_path, dataset, processor, **options)
    step, _ = run.get_batch_samples(iter(batches(run)), 4, torch.device("cpu"))
    targets = [batch["supervised"] for batch in step]
    assert len(set(targets)) > 1
    expected = [count / sum(targets) for count in targets] if weighting == "target" else [0.25] * 4
    assert [batch["share"] for batch in step] == pytest.approx(expected)


@pytest.mark.parametrize(("option", "task"), [("instruction_dropout", "reconstruct"), ("caption_dropout", "generate")])
def test_every_text_can_be_dropped(tmp_path, model, dataset, processor, option, task):  # noqa: F811
    options = {"reca_weight": float(task == "reconstruct"), "text_to_image_weight": float(task == "generate")}
    run = trainer(model, tmp_path, dataset, processor, **options, **{option: 1.0})
    assert all("input_ids" not in batch for batch in batches(run))  # BAGEL's dropped texts leave no tokens
    run = trainer(model, tmp_path, dataset, processor, **options, **{option: 0.0})
    assert all("input_ids" in batch for batch in batches(run))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_dropout": 2.0}, "caption_dropout is a probability"),
        ({"instruction_dropout": -0.1}, "instruction_dropout is a probability"),
        ({"token_weighting": "sample"}, "'target' or 'micro_batch'"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        RecAConfig(output_dir=str(tmp_path), **options)


def test_more_bad_rows_than_allowed_end_the_run(tmp_path, model, processor):  # noqa: F811
    good = {"bytes": encoded(Image.new("RGB", (64, 64), (9, 9, 9))), "path": None}
    pictures = [{"bytes": good["bytes"][:60], "path": f"{i}.png"} if i % 4 == 0 else good for i in range(120)]
    rows = Dataset.from_dict({"image": pictures}, features=Features({"image": datasets.Image()}))
    options = {"on_bad_image": "skip", "per_device_train_batch_size": 8, "max_steps": 20}
    with pytest.raises(ImageError, match=r"\d+ of \d+ rows had to be left out, more than max_bad_share=0\.1"):
        trainer(model, tmp_path / "few", rows, processor, **options).train()
    run = trainer(model, tmp_path / "many", rows, processor, max_bad_share=0.5, **options)
    run.train()
    assert run.images_seen == 160 and 20 < run.skipped_images < 80
    with pytest.raises(ValueError, match="max_bad_share is a share"):
        RecAConfig(output_dir=str(tmp_path), max_bad_share=2.0)


def test_held_out_pictures_are_not_evaluated_on_the_captions_of_the_training_set(tmp_path):
    pictures = Dataset.from_dict({"image": [Image.new("RGB", (64, 48), (value, 10, 9)) for value in range(6)]})
    captioned = pictures.add_column("caption", ["night"] * 6)
    captioned.to_parquet(tmp_path / "captions.parquet")
    options = {"output_dir": str(tmp_path), "caption_dataset_name": str(tmp_path / "captions.parquet")}
    args = RecAConfig(**options, image_to_text_weight=1.0)
    assert TaskDatasets.open(pictures, args).serves("caption")
    assert not TaskDatasets.open(pictures, args, training=False).serves("caption")
    assert TaskDatasets.open(captioned, args, training=False).serves("caption")
    with pytest.raises(ValueError, match="both give a dataset for the task 'caption'"):
        TaskDatasets.open({"reconstruct": pictures, "caption": captioned}, args)
    assert TaskDatasets.open({"reconstruct": pictures}, args).serves("caption")
