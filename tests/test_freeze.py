"""Parts of the generator that a run keeps as they are."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image

from reca_trainer import RecAConfig, RecATrainer
from reca_trainer.adapters import name_in_base
from reca_trainer.cli.train import ModelArguments, RecipeParser
from reca_trainer.recipes import recipe_file
from tests.models.test_contract import fresh

IMAGES = Dataset.from_dict(
    {"image": [Image.effect_noise((64, 64), 60).convert("RGB") for _ in range(4)], "caption": ["a boat"] * 4}
)


def make(folder, family, peft_config=None, **options):
    model, processor = fresh(family)
    defaults = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 0}
    defaults |= {"adam_epsilon": 1e-8, "save_strategy": "steps", "save_steps": 1, "use_cpu": True, "report_to": "none"}
    args = RecAConfig(**{"output_dir": str(folder), "disable_tqdm": True, **defaults, **options})
    return RecATrainer(model, args, train_dataset=IMAGES, processing_class=processor, peft_config=peft_config)


def weights(trainer):
    return {name_in_base(name): p.detach().clone() for name, p in trainer.model.named_parameters()}


def changed(before, after):
    return {name for name, weight in before.items() if not torch.equal(weight, after[name])}


@pytest.mark.parametrize(
    ("family", "names", "adapter"),
    [
        ("openuni", ["transformer"], False),
        ("openuni", ["transformer.transformer_blocks.0", "meta_queries"], False),
        ("bagel", ["time_embedder", "language_model.model.layers.0"], False),
        ("bagel", ["language_model.model.layers.0"], True),
    ],
)
def test_what_is_frozen_stays_and_all_else_is_trained(tmp_path, family, names, adapter):
    peft_config = LoraConfig(r=2, init_lora_weights=False) if adapter else None
    whole = make(tmp_path / "whole", family, peft_config)
    trained = {name_in_base(name) for name, p in whole.model.named_parameters() if p.requires_grad}
    still = {name for name in trained if any(f"{name}.".startswith(f"{entry}.") for entry in names)}
    trainer = make(tmp_path / "run", family, peft_config, freeze_modules=names)
    before = weights(trainer)
    trainer.train()
    assert (
        still
        and {name_in_base(name) for name, p in trainer.model.named_parameters() if p.requires_grad} == trained - still
    )
    assert changed(before, weights(trainer)) == trained - still
    if adapter:  # a resumed run holds them too
        again = make(tmp_path / "run", family, peft_config, freeze_modules=names)
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
        assert not changed(weights(trainer), weights(again))
        with pytest.raises(ValueError, match="freeze_modules: "):
            make(tmp_path / "run", family, peft_config).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("family", "names", "adapter", "problem"),
    [
        ("openuni", ["transformers"], False, "'transformers', and nothing of that name is trained. What is trained begins with connector"),
        ("openuni", ["vae"], False, "'vae', and nothing of that name is trained"),
        ("bagel", ["language_model.model.layers.1", "language_model.model.lay"], False, "'language_model.model.lay', and nothing"),
        ("bagel", ["time_embedder"], True, "'time_embedder', and nothing of that name is trained. What is trained begins with language_model"),
        ("bagel", ["language_model"], True, r"freeze_modules=\['language_model'\] leaves nothing to train"),
    ],
)  # fmt: skip
def test_names_that_freeze_nothing_or_all_are_refused(tmp_path, family, names, adapter, problem):
    with pytest.raises(ValueError, match=problem):
        make(tmp_path, family, LoraConfig(r=2) if adapter else None, freeze_modules=names)


def test_the_card_says_what_was_not_trained(tmp_path):
    trainer = make(tmp_path, "openuni", freeze_modules=["transformer", "meta_queries"])
    assert "| not trained | transformer, meta_queries |" in str(trainer._model_card("me/it", merged=False))


def test_the_recipe_with_sana_frozen_has_the_official_values():
    parser = RecipeParser((RecAConfig, ModelArguments))
    argv = ["--config", str(recipe_file("openuni_3_6b_sft")), "--use_cpu", "true", "--bf16", "false"]
    args, _ = parser.parse_args_and_config(argv)
    assert args.freeze_modules == ["transformer"] and (args.reca_weight, args.text_to_image_weight) == (0, 1)
    assert (args.learning_rate, args.max_steps, args.per_device_train_batch_size) == (5e-7, 2000, 32)
