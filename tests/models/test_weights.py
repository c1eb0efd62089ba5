"""Weights that bitsandbytes packed in parts, that a configuration calls tied, that an adapter is wrapped around."""

import json

import pytest
import torch
from peft import LoKrConfig, LoraConfig
from safetensors.torch import load_file

from reca_trainer import AutoUnifiedModel
from reca_trainer.adapters import attach, base_state_dict
from reca_trainer.models.auto import open_lazily
from reca_trainer.models.weights import CheckpointError, LazyTensor, dequantized
from reca_trainer.saving.export import export
from tests.models.test_contract import build, fresh


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["layer.weight", "layer.weight.stray"], r"layer\.weight is packed in parts .*stray"),
        (["layer.weight.absmax"], r"layer\.weight\.absmax is there without layer\.weight"),
        (["layer.SCB"], r"layer\.weight\.SCB is there without layer\.weight"),
    ],
)
def test_parts_that_do_not_fit_are_named(keys, message):
    with pytest.raises(CheckpointError, match=message):
        dequantized({key: LazyTensor(torch.zeros(2, 2)) for key in keys})


def test_what_a_configuration_calls_tied_and_a_file_has_apart_is_written(tmp_path):
    """Janus' published configuration leaves `tie_word_embeddings` out, whose default is to tie."""
    model, processor = build("janus")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for part in (config, config["text_config"]):
        part.pop("tie_word_embeddings", None)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert "lm_head.weight" in open_lazily(tmp_path / "model").all_tied_weights_keys
    export(tmp_path / "model", tmp_path / "exported", layout="transformers")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "exported"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    again = AutoUnifiedModel.from_pretrained(tmp_path / "exported")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("config", [LoraConfig(r=2), LoKrConfig(r=2)], ids=["lora", "lokr"])
def test_a_loaded_model_is_exported_without_its_adapter(tmp_path, config):
    model, processor = fresh("bagel")
    names = model.state_dict().keys()
    adapted = attach(model, config)
    assert base_state_dict(adapted.get_base_model()).keys() == names
    export(adapted.get_base_model(), tmp_path / "exported", layout="transformers", processor=processor)
    assert load_file(tmp_path / "exported" / "model.safetensors").keys() <= names
