"""The recipe of the embedded default: its stages run, and an interrupted one ends as an uninterrupted one."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reca_trainer import toy

RECIPE = Path(__file__).parents[2] / "recipes" / "pretrain_shapes.py"


@pytest.fixture
def recipe(monkeypatch):
    """The recipe, for a base of a hundredth of the size."""
    monkeypatch.syspath_prepend(RECIPE.parent)
    module = importlib.import_module(RECIPE.stem)
    for name, value in {"WIDTH": 32, "LAYERS": 2, "HEADS": 2, "FEED_FORWARD": 64}.items():
        monkeypatch.setattr(module, name, value)
    return module


def arguments(recipe, folder, **options):
    steps = {f"{name}_steps": 8 for name in recipe.STAGES}
    return recipe.Arguments(**{"output_dir": str(folder), "batch_size": 4, "scenes": 8, **steps, **options})


def test_a_base_is_made_stage_by_stage_and_loads(recipe, tmp_path):
    checkpoint = recipe.main(arguments(recipe, tmp_path / "whole"))
    for stage in recipe.STAGES:
        recipe.main(arguments(recipe, tmp_path / "parts", stages=[stage], scenes=8))
    record = json.loads((checkpoint / "pretraining.json").read_text())
    assert list(record["cpu_seconds"]) == list(recipe.STAGES) and record["world"] == toy.World().__dict__
    model, processor = toy.load(checkpoint)
    (image,) = model.generate_images(processor, text=["a red circle"], **toy.SAMPLING)
    assert image.size == (toy.World().resolution,) * 2
    for stage in ("autoencoder", "language"):  # neither needs another
        whole, part = (load_file(tmp_path / folder / f"{stage}.safetensors") for folder in ("whole", "parts"))
        assert whole.keys() == part.keys() and all(torch.equal(whole[key], part[key]) for key in whole)


@pytest.mark.parametrize("name", ["autoencoder", "generator"])
def test_a_stage_that_was_interrupted_ends_as_one_that_was_not(recipe, tmp_path, name):
    def run(folder, stop=None):
        options = arguments(recipe, folder)
        Path(folder).mkdir(exist_ok=True)
        torch.manual_seed(0)
        model, processor = recipe.build(toy.World())
        stage = recipe.STAGES[name](model, processor, toy.World(), options)
        step_loss = stage.loss_of_step

        def interrupted(step, rng):
            if step == stop:
                raise KeyboardInterrupt
            return step_loss(step, rng)

        object.__setattr__(stage, "loss_of_step", interrupted)
        recipe.fit(model, name, stage, 0, Path(folder), save_steps=3)
        return load_file(Path(folder) / f"{name}.safetensors")

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", stop=5)
    assert (tmp_path / "broken" / f"{name}.partial").is_file()
    resumed, whole = run(tmp_path / "broken"), run(tmp_path / "whole")
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    assert not (tmp_path / "broken" / f"{name}.partial").is_file()
