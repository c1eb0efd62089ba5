"""Folders as the authors of RecA release them load by their names alone."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor
from reca_trainer.models.registry import detect, family
from reca_trainer.models.weights import CheckpointError
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


def copied(source, folder, *left_out):
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*left_out))
    for path in folder.glob("**/*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def assert_same(model, other):
    weights, others = model.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def test_harmons_released_weights_are_shards_beside_code_that_is_never_run(tmp_path):
    folder = copied(GOLDEN / "harmon" / "checkpoint", tmp_path / "Harmon-1.5B-RecA", "original")
    expected = AutoUnifiedModel.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), 1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({key: weights[key] for key in names}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_harmon.HarmonModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_harmon.py").write_text("raise SystemExit('code of a repository was run')")
    assert_same(AutoUnifiedModel.from_pretrained(folder), expected)
    assert type(AutoUnifiedProcessor.from_pretrained(folder)).__name__ == "HarmonProcessor"


@pytest.mark.parametrize("name", ["show-o", "show-o-w-clip-vit"])
def test_show_os_released_weights_may_be_a_safetensors_or_a_torch_file(tmp_path, name):
    parts = copied(GOLDEN / "show_o" / "checkpoint", tmp_path / "parts")
    folder, expected = parts / name, AutoUnifiedModel.from_pretrained(parts / name)
    file = next(folder.glob("pytorch_model.*"))
    weights = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    file.unlink()
    for written, save in (
        ("pytorch_model.bin", torch.save),
        ("model.safetensors", save_file),
        ("pytorch_model.safetensors", save_file),
    ):
        save(weights, folder / written)
        assert_same(AutoUnifiedModel.from_pretrained(folder), expected)
        (folder / written).unlink()


@pytest.mark.parametrize("name", ["iter_5000.pth", "model.pth"])
@pytest.mark.parametrize("of", ["openuni", "harmon"])
def test_files_of_a_training_run_are_known_by_their_keys(tmp_path, of, name):
    source = GOLDEN / of / "checkpoint"
    if of == "openuni":
        folder = copied(source, tmp_path / "OpenUni-RecA", "openuni_pretrain.pth")
        file = folder / "openuni_finetune.pth"
    else:
        folder = copied(source / "original", tmp_path / "exp18")
        shutil.copy(source / "config.json", folder)
        file = folder / "harmon_tiny.pth"
    expected = AutoUnifiedModel.from_pretrained(folder)
    file.rename(folder / name)
    assert_same(AutoUnifiedModel.from_pretrained(folder), expected)
    torch.save({"weight": torch.ones(1)}, folder / name)
    if of == "openuni":
        with pytest.raises(CheckpointError, match="no checkpoint of a known family"):
            AutoUnifiedModel.from_pretrained(folder)


def test_the_names_of_released_files_say_their_family_alone(tmp_path):
    (tmp_path / "openuni_l_internvl3_2b_sana_1_6b_512_hf_blip3o60k.pth").touch()
    assert detect(tmp_path) == (family("openuni"), True)
