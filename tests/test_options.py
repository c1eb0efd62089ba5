"""The table of truth: of every option that a run, a model from the command line, the trainer's constructor and its methods
have in the installed versions, whether it works, is refused, or cannot be shown without other hardware.

A release that brings a new one fails here until somebody decides.
"""

import ast
import contextlib
import inspect
import itertools
import re
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from datasets import Dataset
from PIL import Image
from transformers import Trainer, TrainingArguments
from trl import ModelConfig

from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor, RecAConfig, RecATrainer
from reca_trainer.inherited_options import MEANINGLESS, NO_ARGUMENTS
from tests import test_model_options, test_option_effects

ROOT = Path(__file__).parents[1]
CHECKPOINT = Path(__file__).parent / "golden" / "bagel" / "checkpoint"
INHERITED = {field.name: field.default for field in fields(TrainingArguments)}
DECLARED = {field.name: field for field in fields(RecAConfig) if field.name in RecAConfig.__annotations__}
HELP = {name: field.metadata.get("help", "") for name, field in DECLARED.items()}
DEFAULTS = {name: field.default for name, field in DECLARED.items()}


class Works(NamedTuple):
    """The test in which another value than the default changes something that can be observed."""

    test: str


class Refused(NamedTuple):
    """Another value than the default, and the sentence that refuses it; `meaningless` if nothing here could honour it."""

    value: object
    sentence: str
    meaningless: bool = False


class NeedsHardware(NamedTuple):
    """What it needs; a test that shows what can be shown of it on CPUs, or with two processes, and by hand the rest."""

    what: str
    test: str | None = None


EFFECTS = "tests/test_option_effects.py::test_another_value_changes_what_is_observed"
MODEL = "tests/test_model_options.py::test_another_value_changes_the_model"
METHODS = "tests/test_trainer_methods.py::"
TWO = "tests/reliability/test_processes.py::test_options_of_several_processes_change_what_is_observed"
LAUNCHES = "tests/reliability/test_processes.py::test_our_launch_configurations_equal_one_process"
FROZEN = "tests/reliability/test_processes.py::test_a_frozen_process_ends_the_run_within_the_timeout"
HUB = "tests/test_hub.py::test_adapter_and_merged_model_travel"

CHANGED = {
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "use_cache": True,
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "words",
    "average_tokens_across_devices": False,
    "include_num_input_tokens_seen": True,
    "label_names": ["labels"],
    "remove_unused_columns": True,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "prediction_loss_only": True,
    "include_for_metrics": ["loss"],
    "batch_eval_metrics": True,
    "eval_accumulation_steps": 2,
    "eval_use_gather_object": True,
    "eval_do_concat_batches": False,
    "enable_jit_checkpoint": True,
    "do_train": False,
    "do_predict": True,
}

RUN = {
    **{name: Works(f"{EFFECTS}[{name}]") for name in test_option_effects.CASES},
    "dataloader_in_order": NeedsHardware("workers of unequal speed: chance", f"{EFFECTS}[dataloader_in_order]"),
    # --- works, and has a test of its own ---
    "auto_find_batch_size": Works("tests/test_honest_options.py::test_a_batch_that_does_not_fit_is_halved"),
    "ignore_data_skip": Works("tests/test_resume.py::test_ignore_data_skip_is_for_the_data_alone"),
    "push_to_hub": Works(HUB),
    "hub_token": Works("tests/test_hub.py::test_a_hub_that_will_not_take_the_model_is_named_before_it_is_loaded"),
    "hub_private_repo": Works(HUB),
    "hub_model_id": Works(HUB),
    "hub_strategy": Works("tests/test_hub.py::test_options_of_the_hub_change_what_is_uploaded"),
    "hub_revision": Works("tests/test_hub.py::test_options_of_the_hub_change_what_is_uploaded"),
    "hub_always_push": Works("tests/test_hub.py::test_options_of_the_hub_change_what_is_uploaded"),
    "image_to_text_weight": Works("tests/test_options.py::test_weights_of_the_losses_decide_the_mix"),
    "instruction_dropout": Works("tests/test_data_options.py::test_every_text_can_be_dropped"),
    "caption_dropout": Works("tests/test_data_options.py::test_every_text_can_be_dropped"),
    "condition_token_dropout": Works("tests/test_condition_dropout.py::test_a_run_drops_in_training_alone"),
    "freeze_modules": Works("tests/test_freeze.py::test_what_is_frozen_stays_and_all_else_is_trained"),
    "edit_weight": Works("tests/test_edit.py::test_both_layouts_train_mixed_with_reconstruction"),
    "edit_dataset_name": Works("tests/test_edit.py::test_both_layouts_train_mixed_with_reconstruction"),
    "edit_source_dropout": Works("tests/test_edit.py::test_a_run_drops_the_share_of_sources_that_it_is_told"),
    "instructions_file": Works("tests/test_data_options.py::test_instructions_come_from_a_file"),
    "token_weighting": Works("tests/test_data_options.py::test_micro_batches_count_by_their_targets_or_all_alike"),
    "max_image_size": Works("tests/test_data_options.py::test_image_sizes_bound_the_targets"),
    "min_image_size": Works("tests/test_data_options.py::test_image_sizes_bound_the_targets"),
    "timesteps_per_image": Works("tests/test_trainer.py::test_accumulation_equals_one_large_batch"),
    "on_bad_image": Works("tests/test_data_options.py::test_more_bad_rows_than_allowed_end_the_run"),
    "max_bad_share": Works("tests/test_data_options.py::test_more_bad_rows_than_allowed_end_the_run"),
    "data_files": Works("tests/test_sources.py::test_the_option_chooses_files"),
    "cache_latents": Works("tests/test_cache.py::test_cached_batches_hold_no_pixels_of_reconstructions"),
    # --- meaningless here ---
    **{name: Refused(CHANGED[name], f"{name}=.* would change nothing: ", meaningless=True) for name in MEANINGLESS},
    "do_eval": Refused(True, "do_eval=True would change nothing: set eval_strategy", meaningless=True),
    "local_rank": Refused(3, "local_rank=3 would change nothing: a launcher says it", meaningless=True),
    # --- refused ---
    "parallelism_config": Refused("tp_size=2", "parallelism_config tp_size=2 is not supported"),
    "save_on_each_node": Refused(True, "save_on_each_node=True is not supported: one process writes checkpoints"),
    "optim_target_modules": Refused(["mlp"], "optim_target_modules=.* acts on all trained weights"),
    # --- cannot be shown on the CPUs of one machine ---
    "use_cpu": NeedsHardware("a GPU that is not to be used"),
    "fp16": NeedsHardware("a GPU", "tests/test_options.py::test_values_that_mean_nothing_are_refused"),
    "tf32": NeedsHardware("an Ampere GPU", "tests/test_options.py::test_values_that_mean_nothing_are_refused"),
    "torch_empty_cache_steps": NeedsHardware("a GPU, whose cache is emptied"),
    "dataloader_pin_memory": NeedsHardware("a GPU"),
    "ddp_timeout": NeedsHardware("several processes", FROZEN),
    "ddp_backend": NeedsHardware("GPUs: on CPUs there is gloo alone"),
    "fsdp": NeedsHardware("GPUs", "tests/test_options.py::test_values_that_mean_nothing_are_refused"),
    "fsdp_config": NeedsHardware("GPUs", "tests/test_options.py::test_values_that_mean_nothing_are_refused"),
    "deepspeed": NeedsHardware("GPUs and the package deepspeed", LAUNCHES),
    **dict.fromkeys(
        ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
        NeedsHardware("several processes", TWO),
    ),
    **dict.fromkeys(("log_on_each_node", "log_level_replica"), NeedsHardware("several machines", TWO)),
}

COMMAND_LINE_MODEL = {
    **{name: Works(f"{MODEL}[{name}]") for name in test_model_options.CASES},
    "attn_implementation": Works("tests/test_recipes.py::test_options_of_loading_reach_the_model"),
    "model_revision": Works("tests/test_hub.py::test_the_command_line_trains_the_revision_that_it_names"),
    "lora_task_type": Refused(*test_model_options.REFUSED["lora_task_type"], meaningless=True),
}

ARGUMENTS = {
    "model": Works("tests/test_honest_options.py::test_things_of_another_kind_are_refused"),
    "args": Works("tests/test_honest_options.py::test_things_of_another_kind_are_refused"),
    "data_collator": Works(f"{EFFECTS}[dataloader_num_workers]"),
    "train_dataset": Works("tests/test_trainer.py::test_data_is_checked_before_the_model_is_loaded"),
    "eval_dataset": Works(f"{METHODS}test_sets_by_name_are_evaluated_each_with_its_scores"),
    "processing_class": Works("tests/test_resume.py::test_another_processor_is_refused"),
    "compute_metrics": Works("tests/test_honest_options.py::test_metrics_are_computed_from_the_losses_of_all_samples"),
    "callbacks": Works(f"{EFFECTS}[restore_callback_states_from_checkpoint]"),
    "optimizers": Works("tests/test_resume.py::test_another_optimizer_object_is_refused"),
    "optimizer_cls_and_kwargs": Works("tests/test_honest_options.py::test_an_optimizer_class_is_used"),
    **{
        name: Refused(None, f"{name} is no argument of RecATrainer: {why}", True) for name, why in NO_ARGUMENTS.items()
    },
}

CALLBACKS = Works(f"{METHODS}test_callbacks_are_added_and_taken_away")
PRECISION = Works(f"{METHODS}test_precision_is_left_to_the_forward_that_accelerate_wraps")
STEP = Works(f"{METHODS}test_a_step_is_its_batches_losses_and_gradients")
OPTIMIZER = Works(f"{METHODS}test_optimizer_and_schedule_are_made")
LAYOUT = Works(f"{METHODS}test_layout_is_that_of_the_launch")
LOSSES = Works(f"{METHODS}test_evaluations_and_predictions_are_losses")
METRICS = Works(f"{METHODS}test_metrics_are_logged_shown_and_saved")
NO_TRIALS = Refused(None, "one model|the model that it was given")
METHOD = {
    **dict.fromkeys(("add_callback", "pop_callback", "remove_callback"), CALLBACKS),
    **dict.fromkeys(("autocast_smart_context_manager", "compute_loss_context_manager"), PRECISION),
    **dict.fromkeys(
        ("compute_loss", "floating_point_ops", "get_batch_samples", "num_examples", "training_step"), STEP
    ),
    **dict.fromkeys(("get_train_dataloader",), STEP),
    **dict.fromkeys(("create_optimizer", "create_optimizer_and_scheduler", "create_scheduler"), OPTIMIZER),
    **dict.fromkeys(("get_decay_parameter_names", "get_learning_rates", "get_num_trainable_parameters"), OPTIMIZER),
    **dict.fromkeys(("get_optimizer_cls_and_kwargs", "get_optimizer_group"), OPTIMIZER),
    **dict.fromkeys(("create_accelerator_and_postprocess", "get_total_train_batch_size"), LAYOUT),
    **dict.fromkeys(("get_cp_size", "get_sp_size", "get_tp_size", "set_initial_training_values"), LAYOUT),
    **dict.fromkeys(("is_local_process_zero", "is_world_process_zero"), LAYOUT),
    **dict.fromkeys(("evaluate", "evaluation_loop", "get_eval_dataloader", "get_test_dataloader"), LOSSES),
    **dict.fromkeys(("predict", "prediction_step"), LOSSES),
    **dict.fromkeys(("log", "log_metrics", "metrics_format", "save_metrics", "save_state", "store_flos"), METRICS),
    "train": Works("tests/test_trainer.py::test_resume_is_bit_exact"),
    "save_model": Works("tests/test_adapter_kinds.py::test_kind_works_from_the_first_step_to_the_merged_model"),
    "end": Works(f"{METHODS}test_a_trainer_ends"),
    "create_model_card": Works("tests/test_hub.py::test_options_of_the_hub_change_what_is_uploaded"),
    "push_to_hub": Works(HUB),
    "init_hf_repo": Works("tests/test_hub.py::test_options_of_the_hub_change_what_is_uploaded"),
    **dict.fromkeys(("hyperparameter_search", "call_model_init"), NO_TRIALS),
}
# Options that only older releases have: two set one that is in the tables, and the last is refused (tests/test_recipes.py).
OLDER = {"logging_dir", "warmup_ratio", "trust_remote_code"}
TABLES = {"RecAConfig": RUN, "ModelConfig": COMMAND_LINE_MODEL, "Trainer.__init__": ARGUMENTS, "Trainer": METHOD}


# --- the table is complete, and what it names is there ---


def test_every_option_of_a_run_is_decided():
    assert {field.name for field in fields(RecAConfig)} - RUN.keys() <= OLDER


def test_every_option_of_a_model_is_decided():
    assert {field.name for field in fields(ModelConfig)} - COMMAND_LINE_MODEL.keys() <= OLDER


def test_every_argument_of_a_trainer_is_decided():
    arguments = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert arguments - ARGUMENTS.keys() == set()
    accepted = set(inspect.signature(RecATrainer.__init__).parameters)
    assert {name for name, entry in ARGUMENTS.items() if isinstance(entry, Works)} <= accepted


def test_every_method_of_a_trainer_is_decided():
    methods = {name for name, value in inspect.getmembers(Trainer, callable) if not name.startswith("_")}
    assert methods - METHOD.keys() == set()


@cache
def definitions(file):
    """The statements of a file that give something a name, by that name."""
    named = {}
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.Assign):
            named |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            named[node.name] = node
    return named


def syntax(test):
    """All of a named test's syntax: its function, and whatever of its file that uses; code in strings too."""
    file, function = test.partition("[")[0].split("::")
    used, names = {}, [function]
    while names:
        name = names.pop()
        if name in definitions(file) and name not in used:
            used[name] = list(ast.walk(definitions(file)[name]))
            names += [node.id for node in used[name] if isinstance(node, ast.Name)]
            names += [node.arg for node in used[name] if isinstance(node, ast.arg)]  # fixtures
    for node in itertools.chain.from_iterable(used.values()):
        yield node
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" in node.value:
            with contextlib.suppress(SyntaxError):
                yield from ast.walk(ast.parse(node.value))


def values_given(test, name):
    """The syntax of every value that a test gives an option or argument. A command line, and a list of cases that has the
    name in it, stand for a value."""
    for node in syntax(test):
        if isinstance(node, ast.keyword) and node.arg == name:
            yield node.value
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            yield from (value for key, value in pairs if isinstance(key, ast.Constant) and key.value == name)
        elif isinstance(node, ast.Constant) and f"--{name} " in str(node.value):
            yield node
        elif isinstance(node, ast.List | ast.Tuple):
            yield from (part for part in node.elts if isinstance(part, ast.Constant) and part.value == name)


def is_default(value, default):
    try:
        return ast.literal_eval(value) == default
    except ValueError:  # computed
        return False


NAMED = [
    (table, name, entry.test)
    for table, entries in TABLES.items()
    for name, entry in entries.items()
    if isinstance(entry, Works)
]


@pytest.mark.parametrize(("table", "name", "test"), NAMED, ids=lambda value: value.rpartition("::")[2])
def test_a_named_test_gives_another_value_than_the_default(table, name, test):
    """That it fails with the default is shown by `tests/reliability/test_option_table.py`."""
    file, function = test.partition("[")[0].split("::")
    assert function in definitions(file)
    if table == "Trainer":
        assert any(name in (getattr(node, "attr", None), getattr(node, "value", None)) for node in syntax(test))
    elif "[" in test:
        cases = {EFFECTS: test_option_effects.CASES, MODEL: test_model_options.CASES}[test.partition("[")[0]]
        assert test.partition("[")[2].removesuffix("]") in cases
    else:
        standard = {"RecAConfig": RecAConfig, "ModelConfig": ModelConfig}.get(table)
        default = getattr(standard, name, None)  # the class has the defaults that are no lists or dicts
        assert not all(is_default(value, default) for value in values_given(test, name))


def test_what_is_shown_of_hardware_is_there():
    for entry in RUN.values():
        if isinstance(entry, NeedsHardware) and entry.test:
            file, function = entry.test.partition("[")[0].split("::")
            assert function in definitions(file)


# --- what is refused says why ---


def tensor_parallel():
    from accelerate import ParallelismConfig

    return ParallelismConfig(tp_size=2)


@pytest.mark.parametrize("name", [name for name, entry in RUN.items() if isinstance(entry, Refused)])
def test_an_option_that_would_be_ignored_is_refused(name, tmp_path):
    value, sentence, _ = RUN[name]
    value = tensor_parallel() if name == "parallelism_config" else value
    with pytest.raises(ValueError, match=sentence):
        RecAConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})


@pytest.mark.parametrize("name", MEANINGLESS)
def test_the_default_of_a_refused_option_is_accepted(name, tmp_path):
    [default] = [getattr(RecAConfig(output_dir=str(tmp_path), use_cpu=True), name)]
    RecAConfig(output_dir=str(tmp_path), use_cpu=True, **{name: default})


@pytest.mark.parametrize("name", NO_ARGUMENTS)
def test_an_argument_that_would_be_ignored_is_refused(name, tmp_path):
    with pytest.raises(TypeError, match=re.escape(ARGUMENTS[name].sentence)):
        RecATrainer("a/model", RecAConfig(output_dir=str(tmp_path), use_cpu=True), **{name: lambda: None})


@pytest.mark.parametrize("name", [name for name, entry in METHOD.items() if isinstance(entry, Refused)])
def test_a_method_that_would_start_from_another_model_is_refused(name):
    with pytest.raises(NotImplementedError, match=METHOD[name].sentence):
        getattr(RecATrainer, name)(object())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accelerator_config": {"split_batches": True}}, "split_batches=True would change nothing"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True would change nothing"),
        ({"accelerator_config": {"even_batches": False}}, "even_batches=False would change nothing"),
        ({"optim_args": "momentum=0.9"}, "optim_args='momentum=0.9' would change nothing"),
        ({"debug": "tpu_metrics_debug"}, "needs a TPU"),
        ({"max_steps": 0}, "max_steps=0 trains nothing"),
        ({"fp16": True}, "needs a GPU"),
        ({"tf32": True}, "Ampere"),
        ({"fsdp": True}, "fsdp=True needs GPUs"),
        ({"fsdp_config": {"reshard_after_forward": False}}, "fsdp_config=.* would change nothing: fsdp is not set"),
        (
            {"hub_strategy": "checkpoint"},
            "hub_strategy is 'end' or 'every_save', not 'checkpoint': a model is uploaded",
        ),
        ({"dataset_split": "validation"}, "dataset_split='validation' is about dataset_name, which is not set"),
        ({"dataset_streaming": True}, "dataset_streaming=True is about dataset_name, which is not set"),
    ],
    ids=str,
)
def test_values_that_mean_nothing_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        RecAConfig(output_dir=str(tmp_path), use_cpu=True, **options)


# --- texts and defaults ---


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


@pytest.mark.parametrize(
    ("shares_weights", "options", "weight"),
    [(True, {}, 1.0), (False, {}, 0.0), (True, {"image_to_text_weight": 0.25}, 0.25)],
)
def test_weights_of_the_losses_decide_the_mix(tmp_path, shares_weights, options, weight):
    model = AutoUnifiedModel.from_pretrained(CHECKPOINT)
    model.shares_weights = shares_weights
    trainer = RecATrainer(
        model,
        args=RecAConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options),
        train_dataset=Dataset.from_list([{"image": Image.new("RGB", (64, 64)), "caption": "night"}]),
        processing_class=AutoUnifiedProcessor.from_pretrained(CHECKPOINT),
    )
    assert trainer.loss_weights == {"reconstruct": 1.0, "caption": weight, "generate": 0.0, "edit": 0.0}
    assert trainer.task_pattern == {task: 1 for task, value in trainer.loss_weights.items() if value}
