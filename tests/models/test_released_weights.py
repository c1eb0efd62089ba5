"""Folders as the authors of RecA release them load by their names alone."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor
from tests.conftest import GOLDEN


def generator_norms(model):
    return {value for name, weight in model.named_parameters() if "norm" in name for value in weight.unique().tolist()}


def test_bagels_released_weights_are_read_before_the_average_beside_them(tmp_path):
    folder = shutil.copytree(GOLDEN / "bagel" / "checkpoint", tmp_path / "BAGEL-RecA")
    weights = load_file(folder / "ema.safetensors")
    name = "language_model.model.norm_moe_gen.weight"
    save_file({**weights, name: torch.full_like(weights[name], 0.5)}, folder / "model_bf16.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "ema.safetensors")}  # it lists another file
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model = AutoUnifiedModel.from_pretrained(folder)
    assert 0.5 in generator_norms(model)
    (folder / "ema.safetensors").unlink()
    model = AutoUnifiedModel.from_pretrained(folder)
    assert 0.5 in generator_norms(model)
    assert type(AutoUnifiedProcessor.from_pretrained(folder)).__name__ == "BagelProcessor"
