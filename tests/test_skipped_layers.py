"""Layers that stay unquantised: in the model, in its adapter's merge, in what is exported and what is planned."""

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from reca_trainer import AutoUnifiedModel, plan
from reca_trainer.adapters import attach, read_quantization
from reca_trainer.cli.export import main as export
from reca_trainer.models.auto import open_lazily
from reca_trainer.saving.merge import merge_adapter
from tests.conftest import GOLDEN

CHECKPOINT = GOLDEN / "bagel" / "checkpoint"
SKIPPED = ["mlp_moe_gen.down_proj", r".*layers\.1\.self_attn"]


def nf4(skipped=SKIPPED):
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped)


def packed(model):
    return {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}


def test_skipped_layers_stay_as_they_are_beside_all_that_never_are_quantised():
    every = packed(AutoUnifiedModel.from_pretrained(CHECKPOINT, quantization_config=nf4(None)))
    some = packed(AutoUnifiedModel.from_pretrained(CHECKPOINT, quantization_config=nf4()))
    left_out = {name for name in every if name.endswith(SKIPPED[0]) or "layers.1.self_attn" in name}
    assert left_out and some == every - left_out


def test_the_merge_of_an_adapter_knows_which_layers_were_skipped(tmp_path):
    model = attach(AutoUnifiedModel.from_pretrained(CHECKPOINT, quantization_config=nf4()), LoraConfig(r=2))
    model.save_pretrained(tmp_path / "adapter")  # whose B is zero: the merge is the base as it was in training
    assert read_quantization(tmp_path / "adapter")[0].llm_int8_skip_modules[1:] == SKIPPED
    merge_adapter(CHECKPOINT, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    before, after = (AutoUnifiedModel.from_pretrained(path).state_dict() for path in (CHECKPOINT, tmp_path / "merged"))
    changed = {name.removesuffix(".weight") for name in before if not torch.equal(before[name], after[name])}
    assert changed == packed(AutoUnifiedModel.from_pretrained(CHECKPOINT, quantization_config=nf4()))


def test_an_entry_that_is_no_quantised_layer_is_refused(tmp_path):
    message = r"llm_int8_skip_modules has 'mlp_moe_gen\.dwn_proj', which is none of the \d+ layers"
    with pytest.raises(ValueError, match=message):
        AutoUnifiedModel.from_pretrained(CHECKPOINT, quantization_config=nf4(["mlp_moe_gen.dwn_proj"]))
    words = [str(CHECKPOINT), str(tmp_path / "exported"), "--llm_int8_skip_modules", "mlp_moe_gen.dwn_proj"]
    with pytest.raises(ValueError, match=message):
        export([*words, "--quantize", "nf4"])
    with pytest.raises(ValueError, match="add --quantize"):
        export(words)
    assert not list(tmp_path.iterdir())


def test_an_export_keeps_and_remembers_them(tmp_path):
    words = [str(CHECKPOINT), str(tmp_path / "exported"), "--quantize", "nf4", "--llm_int8_skip_modules", *SKIPPED]
    export(words)
    again = AutoUnifiedModel.from_pretrained(tmp_path / "exported")
    assert packed(again) == packed(AutoUnifiedModel.from_pretrained(CHECKPOINT, quantization_config=nf4()))


def test_the_plan_counts_what_they_take():
    every, some = (
        plan.step_cost(model, model.example_batch(1), "qlora", skipped=skipped)
        for model, skipped in ((open_lazily(CHECKPOINT), ()), (open_lazily(CHECKPOINT), SKIPPED))
    )
    model = open_lazily(CHECKPOINT)
    saved = sum(plan.quantized_weights(model)) - sum(plan.quantized_weights(model, SKIPPED))
    assert some.weights - every.weights == pytest.approx(saved * (2 - plan.NF4_BYTES))
    assert every.unsharded - some.unsharded == pytest.approx(saved * plan.NF4_BYTES)
