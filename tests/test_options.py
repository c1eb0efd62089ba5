"""The options of `RecAConfig`: each says what it is, and its default is what its text says."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image
from transformers import TrainingArguments

from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor, RecAConfig, RecATrainer

INHERITED = {field.name: field.default for field in fields(TrainingArguments)}
DECLARED = {field.name: field for field in fields(RecAConfig) if field.name in RecAConfig.__annotations__}
HELP = {name: field.metadata.get("help", "") for name, field in DECLARED.items()}
DEFAULTS = {name: field.default for name, field in DECLARED.items()}
CHECKPOINT = Path(__file__).parent / "golden" / "bagel" / "checkpoint"


def test_every_option_has_a_help_text():
    assert {field.name for field in fields(RecAConfig)} == set(INHERITED) | set(HELP)
    assert [name for name, text in HELP.items() if not text.endswith(".")] == []


def test_options_declared_anew_have_other_defaults():
    same = [name for name in DEFAULTS if name in INHERITED and DEFAULTS[name] == INHERITED[name]]
    assert same == ["activation_checkpointing", "activation_checkpointing_kwargs"]  # which some versions lack


def test_the_learning_rate_warms_up_for_five_percent_and_stays():
    assert "warms up for 5 % of the run and then stays constant" in " ".join(RecAConfig.__doc__.split())
    assert (DEFAULTS["warmup_steps"], DEFAULTS["lr_scheduler_type"]) == (0.05, "constant_with_warmup")


def test_help_texts_list_the_choices_the_default_first(tmp_path):
    choices = {name: quoted for name, text in HELP.items() if (quoted := re.findall(r"'(\w+)'", text))}
    assert choices == {"token_weighting": ["target", "micro_batch"], "on_bad_image": ["raise", "skip"]}
    for name, quoted in choices.items():
        assert DEFAULTS[name] == quoted[0]
        for choice in quoted:
            assert getattr(RecAConfig(output_dir=str(tmp_path), use_cpu=True, **{name: choice}), name) == choice


def test_only_options_without_a_value_leave_their_default_to_the_run():
    explained = [name for name, text in HELP.items() if "Default: " in text]
    assert {name: DEFAULTS[name] for name in explained} == dict.fromkeys(
        ("image_to_text_weight", "task_mix", "image_column")
    )


@pytest.mark.parametrize(("shares_weights", "weight"), [(True, 1.0), (False, 0.0)])
def test_sharing_weights_decides_the_image_to_text_weight_and_weights_the_mix(tmp_path, shares_weights, weight):
    model = AutoUnifiedModel.from_pretrained(CHECKPOINT)
    model.shares_weights = shares_weights
    trainer = RecATrainer(
        model,
        args=RecAConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
        train_dataset=Dataset.from_list([{"image": Image.new("RGB", (64, 64)), "caption": "night"}]),
        processing_class=AutoUnifiedProcessor.from_pretrained(CHECKPOINT),
    )
    assert trainer.loss_weights == {"reconstruct": 1.0, "caption": weight, "generate": 0.0}
    assert trainer.task_pattern == {task: 1 for task, value in trainer.loss_weights.items() if value}
