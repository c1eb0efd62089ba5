"""Encoded images kept on disk: the same losses as without, a file for whatever changes them, and refusals."""

import os

import datasets
import pytest
import torch
from PIL import Image

from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor, RecATrainer
from reca_trainer.data import Columns, Draw, RowDataset
from reca_trainer.data.collator import UnifiedCollator, pad_encoded
from reca_trainer.data.latent_cache import EncodedRows, check_encoders, encode_images, encoded_images
from tests import test_trainer
from tests.conftest import Golden
from tests.models.test_contract import PICTURES, TEXTS, build, fresh
from tests.test_trainer import CHECKPOINT, StopAt, config, losses, trained, trainer

dataset, processor = test_trainer.dataset, test_trainer.processor


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "reca_trainer"


def run(folder, dataset, processor, **options):
    options = {"text_to_image_weight": 0.5, "gradient_accumulation_steps": 2, **options}
    return trainer(AutoUnifiedModel.from_pretrained(CHECKPOINT), folder, dataset, processor, **options)


def test_losses_are_those_without_a_cache_and_resume_is_bit_exact(tmp_path, dataset, processor):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    plain = run(tmp_path / "plain", dataset, processor, max_steps=5)
    plain.train()
    cached = run(tmp_path / "cached", dataset, processor, cache_latents=True, **options)
    cached.train()
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-6)
    for name, weight in trained(plain).items():
        torch.testing.assert_close(trained(cached)[name], weight, rtol=1e-4, atol=1e-6, msg=name)

    first = run(tmp_path / "parts", dataset, processor, cache_latents=True, dataloader_num_workers=2, **options)
    first.add_callback(StopAt(3))
    first.train()
    second = run(tmp_path / "parts", dataset, processor, cache_latents=True, dataloader_num_workers=2, **options)
    second.train(resume_from_checkpoint=True)
    assert losses(second) == losses(cached)
    for name, weight in trained(cached).items():
        assert torch.equal(trained(second)[name], weight), name


@pytest.mark.parametrize("family", ["bagel", "harmon", "janus", "lance", "openuni", "show_o", "show_o_plain"])
def test_the_loss_from_encoded_images_is_that_from_pixels_to_the_bit(family):
    model, processor = build(family)
    for picture, text, dropped in [(PICTURES[0], TEXTS[0], False), (PICTURES[2], TEXTS[1], True)]:
        options = {"instruction": [text], "dropped": [dropped], "size": processor.target_size(48, 36)}
        batch = processor(images=[picture], task="reconstruct", **options)
        encoded = {name: tensor[0] for name, tensor in model.encode_batch(batch).items()}
        cached = {**processor(task="reconstruct", **options), **pad_encoded([encoded])}
        assert not {name for name in cached if "pixel" in name}
        draws = [model.sample_corruption(each, [torch.Generator().manual_seed(3)]) for each in (batch, cached)]
        assert model.count_supervised(batch, draws[0]) == model.count_supervised(cached, draws[1])
        plain, kept = (model(**each, corruption=draw) for each, draw in zip((batch, cached), draws, strict=True))
        assert torch.equal(kept.loss, plain.loss) and torch.equal(kept.prediction, plain.prediction)


def test_openuni_trains_on_encoded_images_too(tmp_path, dataset):
    folder = Golden("openuni").checkpoint
    squares = [
        row["image"].resize((64, 64)) for row in dataset
    ]  # of others a run without a cache cuts a random square
    runs = [
        trainer(
            AutoUnifiedModel.from_pretrained(folder),
            tmp_path / str(cached),
            datasets.Dataset.from_dict({"image": squares}),
            AutoUnifiedProcessor.from_pretrained(folder),
            lora=False,
            cache_latents=cached,
            max_steps=3,
        )
        for cached in (False, True)
    ]
    for each in runs:
        each.train()
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-6)
    keys = next(iter(runs[1].get_train_dataloader())).keys()
    assert {"condition_embeds", "latents"} < keys and not {name for name in keys if "pixel" in name}


def test_cached_batches_hold_no_pixels_of_reconstructions(tmp_path, dataset, processor):
    loader = run(tmp_path, dataset, processor, cache_latents=True).get_train_dataloader()
    assert isinstance(loader.dataset, EncodedRows)
    keys = {batch["task"]: batch.keys() for batch in loader}
    assert {"condition_embeds", "posterior"} < keys["reconstruct"] and "pixel_values" in keys["generate"]
    assert not {name for name in keys["reconstruct"] if "pixel" in name}


def test_whatever_changes_the_tensors_makes_another_file(tmp_path, processor, cache_folder):
    paths = [str(tmp_path / f"{index}.png") for index in range(3)]
    for index, path in enumerate(paths):
        Image.new("RGB", (64, 48), (80 * index, 0, 0)).save(path)
    images = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())

    def files(model=None, processor=processor, images=images, **options):
        model = model or AutoUnifiedModel.from_pretrained(CHECKPOINT)
        options = config(tmp_path / "run", cache_latents=True, **options)
        made = RecATrainer(model, options, train_dataset=images, processing_class=processor)
        made.get_train_dataloader()
        return len(list(cache_folder.iterdir()))

    assert files() == 1 and files() == 1
    changed = AutoUnifiedModel.from_pretrained(CHECKPOINT)
    changed.connector.fc1.bias.data[0] += 1e-3
    assert files(changed) == 2
    assert files(processor=processor.with_arguments(generation_size=(96, 32, 16))) == 3
    assert files(processor=processor.with_arguments(condition_size=(56, 56, 14))) == 4
    assert files(images=images.select([0, 1])) == 5
    assert files(bf16=True) == 6
    Image.new("RGB", (64, 48), (0, 0, 200)).save(paths[0])
    os.utime(paths[0], ns=(0, 0))
    assert files() == 7


def test_a_bad_image_is_replaced_as_without_a_cache(tmp_path, processor):
    paths = [str(tmp_path / f"{index}.png") for index in range(4)]
    for index, path in enumerate(paths):
        Image.new("RGB", (64, 48), (60 * index, 9, 9)).save(path)
    with open(paths[1], "r+b") as file:
        file.truncate(60)  # its header is whole
    images = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    runs = [
        run(tmp_path, images, processor, on_bad_image="skip", cache_latents=cached, text_to_image_weight=0.0)
        for cached in (False, True)
    ]
    for plain, cached in zip(*(each.get_train_dataloader() for each in runs), strict=True):
        assert plain["sources"] == cached["sources"] and plain["skipped"] == cached["skipped"]
        encoded = runs[0].model.get_base_model().encode_batch(plain)
        torch.testing.assert_close(cached["posterior"], encoded["posterior"], rtol=1e-4, atol=1e-5)


def test_refusals(tmp_path, dataset, processor):
    model = AutoUnifiedModel.from_pretrained(CHECKPOINT)
    with pytest.raises(ValueError, match=r"cannot keep the images of a stream.*precompute"):
        run(tmp_path, dataset.to_iterable_dataset(), processor, cache_latents=True).get_train_dataloader()
    options = config(tmp_path, cache_latents=True)
    with pytest.raises(ValueError, match="data_collator of your own"):
        RecATrainer(model, options, UnifiedCollator(processor), dataset, processing_class=processor)
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"weights of the encoders are trained \(vit_model"):
        check_encoders(model)
    with pytest.raises(ValueError, match="Model cannot train on encoded images"):
        check_encoders(build("sketch")[0])
    with pytest.raises(ValueError, match=r"Show.*draws one corruption an image"):
        trainer(fresh("show_o")[0], tmp_path, dataset, processor, lora=False, timesteps_per_image=2)
    with pytest.raises(ValueError, match="timesteps_per_image is 1 or more"):
        config(tmp_path, timesteps_per_image=0)


def test_processes_encode_their_share_and_go_on_where_they_were(tmp_path):
    paths = [str(tmp_path / f"{index}.png") for index in range(40)]
    for index, path in enumerate(paths):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(path)
    images = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    rows, sizes = RowDataset({"reconstruct": images}, {"reconstruct": Columns("image")}), [(8, 8)] * 40
    encoded = []

    def processor(images, **options):
        return {"value": torch.tensor([images[0].getpixel((0, 0))[0]])}

    def encode(batch, limit=1000):
        if len(encoded) == limit:
            raise KeyboardInterrupt
        encoded.append(int(batch["value"]))
        return batch

    folder = tmp_path / "encoded"
    encode_images(rows, sizes, processor, encode, folder, process_index=1, num_processes=2)
    assert encoded == [*range(8, 16), *range(24, 32)]
    with pytest.raises(ValueError, match="lacks 3 parts"):
        encoded_images(folder, 40)
    with pytest.raises(KeyboardInterrupt):
        encode_images(rows, sizes, processor, lambda batch: encode(batch, limit=30), folder, 0, 2)
    assert len(list(folder.iterdir())) == 3  # no half part
    encode_images(rows, sizes, processor, encode, folder)
    assert encoded[30:] == [*range(16, 24), *range(32, 40)]
    values = [int(row.tensors["value"]) for row in map(EncodedRows(rows, encoded_images(folder, 40)).__getitem__,
              (Draw("reconstruct", index, (8, 8), 0, "") for index in range(40)))]  # fmt: skip
    assert values == list(range(40))
