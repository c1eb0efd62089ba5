"""A merged model in the published layout has what other programs open, docs/where_results_load.md says which."""

import json
import math

import pytest
import torch
from diffusers import AutoencoderDC
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, SiglipVisionConfig

from reca_trainer import AutoUnifiedModel
from reca_trainer.adapters import attach
from reca_trainer.cli import main
from tests.conftest import GOLDEN

BAGEL = GOLDEN / "bagel" / "checkpoint"


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bagel")
    attach(AutoUnifiedModel.from_pretrained(BAGEL), LoraConfig(r=2, init_lora_weights=False)).save_pretrained(
        folder / "adapter"
    )
    assert main(["merge", str(folder / "adapter"), str(folder / "merged"), "--layout", "published"]) == 0
    return folder / "merged"


def shapes(file):
    with safe_open(file, framework="pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
    return {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}


def test_the_original_code_finds_its_tensors_and_only_they_are_trained(merged):
    for name in ("ema.safetensors", "ae.safetensors"):
        assert shapes(merged / name) == shapes(BAGEL / name)
    before, after = load_file(BAGEL / "ema.safetensors"), load_file(merged / "ema.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("_moe_gen" in name and name.endswith("weight") for name in changed)


def test_vllm_omni_finds_its_files(merged):
    config = json.loads((merged / "config.json").read_text())
    assert config["vae_config"] == {"z_channels": 16, "downsample": 8}
    weight_map = json.loads((merged / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map.keys() >= shapes(merged / "ema.safetensors").keys()
    positions, _ = shapes(merged / weight_map["latent_pos_embed.pos_embed"])["latent_pos_embed.pos_embed"]
    assert math.isqrt(positions[0]) == config["max_latent_size"]
    vision = SiglipVisionConfig.from_json_file(merged / "vit_config.json")
    layers = {name.split(".")[4] for name in weight_map if name.startswith("vit_model.vision_model.encoder.layers.")}
    assert len(layers) == vision.num_hidden_layers - 1  # programs keep all but the last
    assert config["llm_config"]["layer_module"] == "Qwen2MoTDecoderLayer"
    tokens = AutoTokenizer.from_pretrained(merged)("a red circle")["input_ids"]
    assert tokens == AutoTokenizer.from_pretrained(BAGEL)("a red circle")["input_ids"]


def test_diffusers_loads_the_autoencoder_of_openuni(tmp_path):
    assert main(["export", str(GOLDEN / "openuni" / "checkpoint"), str(tmp_path / "openuni")]) == 0
    vae, problems = AutoencoderDC.from_pretrained(tmp_path / "openuni" / "dc-ae", output_loading_info=True)
    assert not any(problems[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    expected = AutoUnifiedModel.from_pretrained(tmp_path / "openuni").vae.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in vae.state_dict().items())
