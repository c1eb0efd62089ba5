"""What is scored with `--adapter` is the adapter: the strict loader, on the base of its training."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from reca_trainer import AutoUnifiedModel
from reca_trainer.adapters import attach
from reca_trainer.evaluation.generation import load_model
from reca_trainer.models.weights import CheckpointError
from tests.conftest import GOLDEN

CHECKPOINT = str(GOLDEN / "bagel" / "checkpoint")


def saved_adapter(folder, **options):
    model = attach(AutoUnifiedModel.from_pretrained(CHECKPOINT, **options), LoraConfig(r=2, init_lora_weights=False))
    model.save_pretrained(folder)
    return model


def test_the_adapter_is_what_is_loaded(tmp_path):
    trained = saved_adapter(tmp_path).state_dict()
    loaded, _ = load_model(CHECKPOINT, str(tmp_path), "float32")
    weights = {name: tensor for name, tensor in loaded.state_dict().items() if ".lora_" in name}
    assert weights and all(
        torch.equal(tensor, trained[f"base_model.model.{name}"]) for name, tensor in weights.items()
    )
    assert not loaded.training


def test_weights_put_on_the_device_one_by_one_give_the_same_picture():
    placed, processor = load_model(CHECKPOINT, None, "float32")
    whole = AutoUnifiedModel.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    options = {"text": "boat", "height": 32, "width": 32, "num_inference_steps": 2}
    first, second = (
        model.generate_images(processor, generator=torch.Generator().manual_seed(0), **options)[0]
        for model in (placed, whole)
    )
    assert first.tobytes() == second.tobytes()


def test_an_adapter_with_renamed_or_missing_keys_is_refused(tmp_path):
    saved_adapter(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file({name.replace("_moe_gen", "_gen"): tensor for name, tensor in weights.items()},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(CheckpointError, match="does not fit"):
        load_model(CHECKPOINT, str(tmp_path), "float32")
    save_file(dict(list(weights.items())[1:]), tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="it lacks"):
        load_model(CHECKPOINT, str(tmp_path), "float32")


def test_a_pickled_adapter_is_refused(tmp_path):
    saved_adapter(tmp_path)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="pickle"):
        load_model(CHECKPOINT, str(tmp_path), "float32")


def test_a_qlora_adapter_is_scored_on_the_quantised_base(tmp_path):
    saved_adapter(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    loaded, _ = load_model(CHECKPOINT, str(tmp_path), "float32")
    assert loaded.is_loaded_in_4bit and any(".absmax" in name for name in loaded.state_dict())
    plain = AutoUnifiedModel.from_pretrained(tmp_path, base_model=CHECKPOINT, quantization_config=None)
    assert not any(".absmax" in name for name in plain.state_dict())


def test_4_bits_are_those_of_the_training(tmp_path):
    """Double quantisation stays where the adapter was trained on it; without an adapter's word it is plain NF4."""
    nested = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    saved_adapter(tmp_path / "nested", quantization_config=nested)
    saved_adapter(tmp_path / "plain")
    for adapter, double in (("nested", True), ("plain", False), (None, False)):
        path = None if adapter is None else str(tmp_path / adapter)
        model, _ = load_model(CHECKPOINT, path, "float32", load_in_4bit=True)
        config = model.config.quantization_config
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", double)
        assert model.is_loaded_in_4bit
    assert not getattr(load_model(CHECKPOINT, str(tmp_path / "plain"), "float32")[0], "is_loaded_in_4bit", False)
