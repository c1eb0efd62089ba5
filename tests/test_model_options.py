"""Options of TRL's `ModelConfig`, each tried from the command line with another value than its default."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image

from reca_trainer.cli.train import run
from reca_trainer.toy.tokenizer import make_tokenizer
from tests.models import sketch_family
from tests.test_adapter_kinds import describe_layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("model", "other")):
        torch.manual_seed(seed)
        sketch_family.Model(sketch_family.Config()).save_pretrained(folder / name)
        sketch_family.Processor(make_tokenizer()).save_pretrained(folder / name)
    (folder / "pictures").mkdir()
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{index}.png")
    (folder / "empty.yaml").write_text("{}\n")
    return folder


def modules(model):
    return {type(module).__name__ for module in model.modules()}


def quantized(model):
    [weight] = [module.base_layer.weight for name, module in model.named_modules() if name.endswith("generator.2")]
    state = getattr(weight, "quant_state", None)
    return weight.dtype, state and (state.quant_type, state.nested)


class Case(NamedTuple):
    other: str
    observed: Callable[[Any], Any]
    setting: str = ""


ADAPTER, FOUR_BITS = "--use_peft --lora_r 4", "--use_peft --lora_r 4 --load_in_4bit"
CASES = {
    "model_name_or_path": Case("{folder}/other", lambda model: model.encoder.weight.tolist()),
    "dtype": Case("bfloat16", lambda model: model.dtype, "--bf16"),
    "use_peft": Case("", lambda model: isinstance(model, PeftModel)),
    "lora_r": Case("4", describe_layers, "--use_peft"),
    "lora_alpha": Case("4", describe_layers, ADAPTER),
    "lora_dropout": Case("0", describe_layers, ADAPTER),
    "lora_target_modules": Case("generator.0", describe_layers, ADAPTER),
    "lora_target_parameters": Case("generator.0.weight", describe_layers, f"{ADAPTER} --lora_dropout 0"),
    "lora_modules_to_save": Case("embedding", describe_layers, ADAPTER),
    "use_rslora": Case("", describe_layers, ADAPTER),
    "use_dora": Case("", describe_layers, ADAPTER),
    "load_in_8bit": Case("", modules, ADAPTER),
    "load_in_4bit": Case("", modules, ADAPTER),
    "bnb_4bit_quant_type": Case("fp4", quantized, FOUR_BITS),
    "use_bnb_nested_quant": Case("", quantized, FOUR_BITS),
    "bnb_4bit_quant_storage": Case("float32", quantized, FOUR_BITS),
}


def observe(folder, output_dir, name, case, value):
    options = f"--dataset_name {folder}/pictures --output_dir {output_dir} --config {folder}/empty.yaml --use_cpu"
    options += " --max_steps 1 --save_strategy no --report_to none --disable_tqdm true"
    options += "" if value is not None and name == "model_name_or_path" else f" --model_name_or_path {folder}/model"
    changed = [] if value is None else [f"--{name}", *value.format(folder=folder).split()]
    trainer = run(None, "", [*options.split(), *case.setting.split(), *changed])
    return case.observed(trainer.model)


@pytest.mark.parametrize("name", CASES)
def test_another_value_changes_the_model(folder, tmp_path, name):
    case = CASES[name]
    standard, again = (observe(folder, tmp_path / place, name, case, None) for place in ("standard", "again"))
    assert again == standard, "this cannot tell two runs of the same options apart"
    assert observe(folder, tmp_path / "other", name, case, case.other) != standard


REFUSED = {
    "model_revision": ("--model_revision v2", "is about a model on the Hub, and .* is a folder"),
    "lora_task_type": ("--use_peft --lora_task_type SEQ_CLS", "--lora_task_type would change nothing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_that_would_change_nothing_is_refused(folder, tmp_path, name):
    options, message = REFUSED[name]
    argv = (
        f"--config {folder}/empty.yaml --output_dir {tmp_path} --use_cpu --model_name_or_path {folder}/model {options}"
    )
    with pytest.raises(ValueError, match=message):
        run(None, "", argv.split())
