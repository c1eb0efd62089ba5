"""A family from outside the package, known by `register_family` alone, goes the whole way."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image

from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor, RecAConfig, RecATrainer, register_family
from reca_trainer.models.registry import families
from reca_trainer.saving.describe import describe
from reca_trainer.saving.export import export
from reca_trainer.saving.merge import merge_adapter
from reca_trainer.toy.tokenizer import make_tokenizer
from tests.conftest import GOLDEN
from tests.models import sketch_family


def pictures(count):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sketch")
    torch.manual_seed(0)
    sketch_family.Model(sketch_family.Config()).save_pretrained(folder)
    sketch_family.Processor(make_tokenizer()).save_pretrained(folder)
    return folder


def draw(model, processor):
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    images = model.generate_images(processor, images=pictures(2), task="reconstruct", generator=generators)
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_it_trains_saves_loads_merges_and_generates(checkpoint, tmp_path):
    args = RecAConfig(output_dir=str(tmp_path / "run"), max_steps=4, learning_rate=0.1, report_to=[], use_cpu=True)
    images = Dataset.from_dict({"image": pictures(8)})
    trainer = RecATrainer(str(checkpoint), args, train_dataset=images, peft_config=LoraConfig(r=2))
    trainer.train()
    trainer.save_model()
    processor = AutoUnifiedProcessor.from_pretrained(checkpoint)
    adapted = AutoUnifiedModel.from_pretrained(tmp_path / "run", base_model=str(checkpoint))
    merge_adapter(str(checkpoint), tmp_path / "run", tmp_path / "merged")
    merged = AutoUnifiedModel.from_pretrained(tmp_path / "merged")
    expected = draw(trainer.model.get_base_model(), processor)
    assert np.abs(draw(AutoUnifiedModel.from_pretrained(checkpoint), processor) - expected).max() > 10
    assert np.array_equal(draw(adapted.get_base_model(), processor), expected)
    assert np.abs(draw(merged, processor) - expected).max() <= 1
    assert describe(tmp_path / "merged")["family"] == "sketch"


def test_another_package_cannot_take_a_name():
    assert "sketch" in families()
    with pytest.raises(ValueError, match="'sketch' is tests"):
        register_family("sketch", "reca_trainer.models.bagel")


def test_export_to_a_published_layout_it_has_not_is_refused_before_anything_is_written(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="no published layout"):
        export(str(checkpoint), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_class_derived_outside_the_package_exports_to_its_familys_layout(tmp_path):
    model = AutoUnifiedModel.from_pretrained(GOLDEN / "bagel" / "checkpoint")
    model.__class__ = type("DerivedBagel", (type(model),), {})
    export(model, tmp_path / "out")
    assert (tmp_path / "out" / "llm_config.json").is_file()
