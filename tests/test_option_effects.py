"""Options of a run, each tried with another value than its default: something that a user can observe changes."""

import gc
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from PIL import Image
from torch import nn
from transformers import EarlyStoppingCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from reca_trainer import RecAConfig, RecATrainer
from reca_trainer.data.collator import UnifiedCollator
from reca_trainer.toy.tokenizer import make_tokenizer
from tests.models import sketch_family

PICTURES = 8


class Layer(GradientCheckpointingLayer):
    """Counts how often it is computed."""

    calls = 0

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden):
        Layer.calls += 1
        return hidden + self.linear(hidden)


class Model(sketch_family.Model):
    """The sketch, with two layers that can be compiled, and computed again in the backward pass."""

    supports_gradient_checkpointing = True
    _no_split_modules = ("Layer",)

    def __init__(self, config):
        super().__init__(config)
        self.generator.insert(1, nn.Sequential(Layer(64), Layer(64)))
        self.post_init()


class Recorder(RecATrainer):
    """Writes down what its run does."""

    def __init__(self, *args, **kwargs):
        self.steps, self.evaluated_batches = [], 0
        super().__init__(*args, **kwargs)

    def get_batch_samples(self, *args):
        batches, count = super().get_batch_samples(*args)
        self.steps.append([(batch["task"], tuple(batch["sources"])) for batch in batches])
        return batches, count

    def compute_loss(self, model, *args, **kwargs):
        self.evaluated_batches += not model.training
        return super().compute_loss(model, *args, **kwargs)


class Collator(UnifiedCollator):
    """Notes its process and the one that started it, in place of the rows' names."""

    def __call__(self, rows):
        return {**super().__call__(rows), "sources": [(os.getpid(), os.getppid())] * len(rows)}


class Trackio(ModuleType):
    """Stands in for the package of that name, and keeps what it is told."""

    def __init__(self):
        super().__init__("trackio")
        self.__spec__, self.__version__, self.calls, self.config = ModuleSpec("trackio", None), "1.0", [], Config()
        self.context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: self.space))

    def init(self, **options):
        self.space = options["space_id"]
        self.calls.append(options)

    def freeze(self, **options):
        self.calls.append({"frozen": options["new_space_id"]})
        return options["new_space_id"]

    def log(self, entry):
        pass

    def finish(self):
        pass


class Config(dict):
    def update(self, entries, allow_val_change):
        super().update(entries)


class Run(NamedTuple):
    trainer: Any
    metrics: dict[str, float]
    error: Exception | None
    folder: Path
    text: str  # what was printed and logged


SETTINGS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "adam_epsilon": 1e-6,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}
EVALUATED = {"eval_size": 3, "eval_strategy": "steps", "eval_steps": 1}
WHOLE = {"save_strategy": "steps", "save_steps": 1}
SAVED = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}


def pictures(count: int = PICTURES, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(count)]


def dataset(count: int = PICTURES) -> Dataset:
    words = ["a red boat", "two kites", "a harbour", "stones"]
    return Dataset.from_dict({"image": pictures(count), "caption": [words[index % 4] for index in range(count)]})


def make(folder: Path, **options: Any) -> Recorder:
    """A trainer of the whole sketch; `options` are those of `RecAConfig` and of `RecATrainer`."""
    passed = {name: options.pop(name) for name in PASSED if name in options}
    bad_step, bad_weights = options.pop("bad_step", None), options.pop("bad_weights", False)
    if options.pop("early_stopping", False):
        passed["callbacks"] = [EarlyStoppingCallback(early_stopping_patience=20)]
    processor = sketch_family.Processor(make_tokenizer())
    if options.pop("names_processes", False):
        passed["data_collator"] = Collator(processor)
    torch.manual_seed(0)
    model = passed.pop("model", None) or Model(sketch_family.Config())
    passed.setdefault("train_dataset", None if "dataset_name" in options else dataset())
    args = RecAConfig(**{"output_dir": str(folder / "run"), **SETTINGS, **options})
    trainer = Recorder(model, args, processing_class=processor, **passed)
    if bad_step:
        trainer.model.register_forward_hook(partial(spoil, trainer, bad_step))
    if bad_weights:
        torch.nn.init.constant_(trainer.model.generator[0].bias, float("inf"))
    return trainer


def spoil(trainer, step, module, args, output):
    if trainer.state.global_step + 1 == step:
        output.loss = output.loss * float("nan")


PASSED = ("model", "train_dataset", "eval_dataset", "callbacks", "compute_metrics", "data_collator", "optimizers", "judge")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sources of images: `{data}` in the value of an option."""
    folder = tmp_path_factory.mktemp("data")
    for number, place in enumerate(("pictures/train", "pictures/validation", "others", "root", "tables")):
        (folder / place).mkdir(parents=True)
        for index, picture in enumerate(pictures(4, seed=number)):
            picture.save(folder / place / f"{index}.png")
    names = {"image": [f"{index}.png" for index in range(4)]}
    Dataset.from_dict(names).to_json(folder / "tables" / "paths.jsonl")
    (folder / "configs").mkdir()
    for number, name in enumerate(("a", "b")):
        Dataset.from_dict({"image": pictures(4, seed=number)}).to_parquet(folder / "configs" / f"{name}.parquet")
    entries = "".join(
        f"- config_name: {name}\n  data_files:\n  - {{split: train, path: {path}.parquet}}\n"
        for name, path in (("default", "a"), ("second", "b"))
    )
    (folder / "configs" / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    texts = {"caption": ["a boat"] * 4, "words": ["two kites"] * 4, "photo": pictures(4, seed=9)}
    turns = [[{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A boat."}]] * 4
    columns = {"image": pictures(4), **texts, "conversations": turns, "chat": turns}
    Dataset.from_dict(columns).to_parquet(folder / "columns.parquet")
    torch.manual_seed(0)
    sketch_family.Model(sketch_family.Config()).save_pretrained(folder / "model")
    sketch_family.Processor(make_tokenizer()).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _quick_garbage_collection():
    """A trainer collects garbage when it starts; what has been imported is none."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _settings_of_the_process():
    sys.modules["trackio"] = Trackio()
    environment, verbosity = dict(os.environ), transformers.logging.get_verbosity()
    propagate = logging.getLogger("transformers").propagate
    logging.getLogger("transformers").propagate = True
    yield
    os.environ.clear()
    os.environ.update(environment)
    transformers.logging.set_verbosity(verbosity)
    logging.getLogger("transformers").propagate = propagate
    torch.use_deterministic_algorithms(False)
    del sys.modules["trackio"]


# --- what can be observed of a run ---


def weights(run: Run) -> list[list[float]]:
    return [p.detach().flatten().tolist() for p in run.trainer.model.parameters() if p.requires_grad]


def steps(run: Run) -> list[Any]:
    """The micro-batches of every step: task and rows."""
    return run.trainer.steps


def logged(*names: str) -> Callable[[Run], Any]:
    def values(run: Run) -> list[Any]:
        history = run.trainer.state.log_history
        return [{name: entry[name] for name in ("step", *names) if name in entry} for entry in history
                if not names or entry.keys() & set(names)]  # fmt: skip

    return values


def names_logged(run: Run) -> set[str]:
    return {name for entry in run.trainer.state.log_history for name in entry}


def files(run: Run) -> set[str]:
    return {path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*")}


def loading_processes(run: Run) -> set[tuple[int, int]]:
    """Ids of the processes that made the batches, each with the id of its parent."""
    return {ids for step in run.trainer.steps for _, sources in step for ids in sources}


def batches_ordered(run: Run) -> int:
    """How many batches the worker has been told to load by the time the first is there."""
    batches = iter(run.trainer.get_train_dataloader())
    next(batches)
    return batches._send_idx


def says(text: str) -> Callable[[Run], bool]:
    return lambda run: text in run.text


def layer_calls(run: Run) -> int:
    return Layer.calls


def tracked(run: Run) -> list[dict[str, Any]]:
    return list(sys.modules["trackio"].calls)


def graphs_of_a_layer(run: Run) -> int:
    """How many graphs a layer's call gives the compiler, whose default backend would need one for C++."""
    layer, graphs = next(module for module in run.trainer.model.modules() if type(module) is Layer), []
    with torch.compiler.set_stance(force_backend=lambda graph, inputs: graphs.append(graph) or graph.forward):
        layer(torch.zeros(1, 64))
    return len(graphs)


def graphs_with_gradients(run: Run) -> int:
    """How many graphs the compiler's own autograd has split, which the backend `eager` does without."""
    return torch._dynamo.utils.counters["aot_autograd"]["total"]


class Case(NamedTuple):
    other: dict[str, Any]  # the option with another value, and nothing else
    observed: Callable[[Run], Any]
    setting: Mapping[str, Any] = MappingProxyType({})  # what both runs have besides
    before: dict[str, Any] | None = None  # options of a run in the same folder before
    trains: bool = True


CASES = {
    # --- how much is trained, and how ---
    "output_dir": Case({"output_dir": "{folder}/elsewhere"}, files, SAVED),
    "per_device_train_batch_size": Case({"per_device_train_batch_size": 3}, steps),
    "num_train_epochs": Case({"num_train_epochs": 1}, steps, {"max_steps": -1}),
    "max_steps": Case({"max_steps": 2}, steps),
    "learning_rate": Case({"learning_rate": 0.02}, weights),
    "lr_scheduler_type": Case({"lr_scheduler_type": "linear"}, logged("learning_rate")),
    "lr_scheduler_kwargs": Case({"lr_scheduler_kwargs": {"power": 2.0}}, weights, {"lr_scheduler_type": "polynomial"}),
    "warmup_steps": Case({"warmup_steps": 2}, logged("learning_rate"), {"lr_scheduler_type": "constant_with_warmup"}),
    "optim": Case({"optim": "adafactor"}, weights),
    "optim_args": Case({"optim_args": "momentum=0.9"}, weights, {"optim": "sgd"}),
    "weight_decay": Case({"weight_decay": 0.1}, weights),
    "adam_beta1": Case({"adam_beta1": 0.5}, weights),
    "adam_beta2": Case({"adam_beta2": 0.5}, weights),
    "adam_epsilon": Case({"adam_epsilon": 1.0}, weights),
    "gradient_accumulation_steps": Case({"gradient_accumulation_steps": 2}, steps),
    "max_grad_norm": Case({"max_grad_norm": 0.01}, weights, {"optim": "sgd"}),
    "bf16": Case({"bf16": True}, weights),
    "activation_checkpointing": Case({"activation_checkpointing": True}, layer_calls),
    "activation_checkpointing_kwargs": Case(
        {"activation_checkpointing_kwargs": {"every_n_layers": 2}}, layer_calls, {"activation_checkpointing": True}
    ),
    "gradient_checkpointing": Case({"gradient_checkpointing": True}, layer_calls),
    "gradient_checkpointing_kwargs": Case(
        {"gradient_checkpointing_kwargs": {"every_n_layers": 2}}, layer_calls, {"gradient_checkpointing": True}
    ),
    "full_determinism": Case({"full_determinism": True}, lambda run: torch.are_deterministic_algorithms_enabled()),
    "seed": Case({"seed": 7}, steps),
    "data_seed": Case({"data_seed": 7}, steps),
    "accelerator_config": Case({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}, steps),
    "skip_memory_metrics": Case(
        {"skip_memory_metrics": False}, lambda run: "train_mem_cpu_alloc_delta" in run.metrics
    ),
    # --- logs ---
    "logging_strategy": Case({"logging_strategy": "epoch"}, logged("loss"), {"max_steps": 4}),
    "logging_steps": Case({"logging_steps": 2}, logged("loss")),
    "logging_first_step": Case({"logging_first_step": True}, logged("loss"), {"logging_steps": 2}),
    "log_level": Case({"log_level": "info"}, lambda run: transformers.logging.get_verbosity()),
    "logging_nan_inf_filter": Case(
        {"logging_nan_inf_filter": False},
        lambda run: [math.isnan(entry["loss"]) for entry in run.trainer.state.log_history if "loss" in entry],
        {"bad_step": 2, "max_nonfinite_steps": 1},
    ),
    "max_nonfinite_steps": Case({"max_nonfinite_steps": 1}, lambda run: type(run.error), {"bad_step": 2}),
    "debug": Case({"debug": "underflow_overflow"}, lambda run: type(run.error), {"bad_weights": True}),
    "disable_tqdm": Case({"disable_tqdm": False}, says(" 3/3 [")),
    "report_to": Case({"report_to": "trackio"}, tracked),
    "run_name": Case({"run_name": "mine"}, tracked, {"report_to": "trackio"}),
    "project": Case({"project": "mine"}, tracked, {"report_to": "trackio"}),
    "trackio_space_id": Case({"trackio_space_id": "me/space"}, lambda run: tracked(run)[0], {"report_to": "trackio"}),
    "trackio_bucket_id": Case({"trackio_bucket_id": "me/bucket"}, tracked, {"report_to": "trackio"}),
    "trackio_static_space_id": Case(
        {"trackio_static_space_id": "me/static"},
        lambda run: {"frozen": "me/static"} in tracked(run),
        {"report_to": "trackio", "trackio_space_id": "me/space"},
    ),
    # --- evaluations ---
    "eval_strategy": Case({"eval_strategy": "epoch"}, logged("eval_loss"), {**EVALUATED, "max_steps": 6}),
    "eval_steps": Case({"eval_steps": 2}, logged("eval_loss"), EVALUATED),
    "eval_delay": Case({"eval_delay": 2}, logged("eval_loss"), EVALUATED),
    "eval_on_start": Case({"eval_on_start": True}, logged("eval_loss"), EVALUATED),
    "per_device_eval_batch_size": Case(
        {"per_device_eval_batch_size": 1}, lambda run: run.trainer.evaluated_batches, EVALUATED
    ),
    "eval_size": Case({"eval_size": 4}, steps, EVALUATED),
    "score_images": Case({"score_images": 1}, logged("eval_reconstruction_psnr"), EVALUATED),
    # --- checkpoints ---
    "save_strategy": Case({"save_strategy": "epoch"}, files, {**SAVED, "max_steps": 4}),
    "save_steps": Case({"save_steps": 2}, files, SAVED),
    "save_total_limit": Case({"save_total_limit": 1}, files, SAVED),
    "save_only_model": Case({"save_only_model": False}, files, SAVED),
    "load_best_model_at_end": Case(
        {"load_best_model_at_end": True},
        weights,
        {**SAVED, **EVALUATED, "learning_rate": 1.0, "metric_for_best_model": "loss"},
    ),
    "metric_for_best_model": Case(
        {"metric_for_best_model": "reconstruction_psnr"},
        lambda run: run.trainer.state.best_metric,
        {**SAVED, **EVALUATED, "load_best_model_at_end": True, "score_images": 1},
    ),
    "greater_is_better": Case(
        {"greater_is_better": True},
        lambda run: run.trainer.state.best_global_step,
        {**SAVED, **EVALUATED, "learning_rate": 1.0, "load_best_model_at_end": True},
    ),
    "resume_from_checkpoint": Case({"resume_from_checkpoint": "true"}, steps, WHOLE, before={"max_steps": 2}),
    "restore_callback_states_from_checkpoint": Case(
        {"restore_callback_states_from_checkpoint": True},
        lambda run: run.trainer.pop_callback(EarlyStoppingCallback).early_stopping_patience_counter,
        {
            **WHOLE,
            **EVALUATED,
            "metric_for_best_model": "loss",
            "greater_is_better": True,
            "learning_rate": 1e-4,
            "early_stopping": True,
            "resume_from_checkpoint": "true",
        },
        before={"max_steps": 2},
    ),
    # --- loading ---
    "dataloader_drop_last": Case(
        {"dataloader_drop_last": True},
        steps,
        {"per_device_train_batch_size": 3, "max_steps": -1, "num_train_epochs": 1},
    ),
    "dataloader_num_workers": Case(
        {"dataloader_num_workers": 1},
        lambda run: {worker for worker, _ in loading_processes(run)} == {os.getpid()},
        {"names_processes": True},
    ),
    "dataloader_persistent_workers": Case(
        {"dataloader_persistent_workers": True},
        lambda run: len(loading_processes(run)),
        {"names_processes": True, "dataloader_num_workers": 1, "max_steps": -1, "num_train_epochs": 2},
    ),
    "dataloader_prefetch_factor": Case(
        {"dataloader_prefetch_factor": 3}, batches_ordered, {"dataloader_num_workers": 1}, trains=False
    ),
    "dataloader_in_order": Case(
        {"dataloader_in_order": False},
        lambda run: run.trainer.get_train_dataloader().in_order,
        {"dataloader_num_workers": 1},
        trains=False,
    ),
    "dataloader_multiprocessing_context": Case(
        {"dataloader_multiprocessing_context": "forkserver"},
        lambda run: {parent for _, parent in loading_processes(run)} == {os.getpid()},
        {"names_processes": True, "dataloader_num_workers": 1},
    ),
    # --- the data ---
    "dataset_name": Case({"dataset_name": "{data}/others"}, weights, {"dataset_name": "{data}/pictures"}),
    "dataset_split": Case({"dataset_split": "validation"}, weights, {"dataset_name": "{data}/pictures"}),
    "dataset_config_name": Case({"dataset_config_name": "second"}, weights, {"dataset_name": "{data}/configs"}),
    "dataset_streaming": Case(
        {"dataset_streaming": True}, lambda run: run.trainer.images.is_streaming, {"dataset_name": "{data}/others"}
    ),
    "caption_dataset_name": Case(
        {"caption_dataset_name": "{data}/columns.parquet"},
        lambda run: run.trainer.images.serves("caption"),
        {"dataset_name": "{data}/others"},
    ),
    "image_root": Case({"image_root": "{data}/root"}, weights, {"dataset_name": "{data}/tables/paths.jsonl"}),
    "image_column": Case({"image_column": "photo"}, weights, {"dataset_name": "{data}/columns.parquet"}),
    "caption_column": Case(
        {"caption_column": "words"}, weights, {"dataset_name": "{data}/columns.parquet", "text_to_image_weight": 1.0}
    ),
    "conversation_column": Case(
        {"conversation_column": "chat"},
        lambda run: run.trainer.images.columns["caption"],
        {"dataset_name": "{data}/columns.parquet"},
    ),
    # --- the model ---
    "model_init_kwargs": Case(
        {"model_init_kwargs": {"dtype": "bfloat16"}},
        lambda run: run.trainer.model.dtype,
        {"model": "{data}/model"},
        trains=False,
    ),
    "processor_kwargs": Case(
        {"processor_kwargs": {"max_text_length": 5}},
        lambda run: run.trainer.processing_class.max_text_length,
        trains=False,
    ),
    "torch_compile": Case({"torch_compile": True}, graphs_of_a_layer, trains=False),
    "torch_compile_backend": Case(
        {"torch_compile_backend": "aot_eager"}, graphs_with_gradients, {"torch_compile_backend": "eager"}
    ),
    "torch_compile_mode": Case(
        {"torch_compile_mode": "reduce-overhead"}, says("reduce-overhead"), {"torch_compile_backend": "eager"}
    ),
    # --- the objective ---
    "reca_weight": Case({"reca_weight": 2.0}, logged("loss")),
    "text_to_image_weight": Case({"text_to_image_weight": 1.0}, names_logged),
    "task_mix": Case({"task_mix": "reconstruct=2,generate=1"}, steps, {"text_to_image_weight": 1.0, "max_steps": 6}),
    "ema_decay": Case({"ema_decay": 0.5}, weights),
    "collapse_threshold": Case({"collapse_threshold": 1e6}, says("Collapse alarm")),
    # --- previews ---
    "preview_steps": Case({"preview_steps": 2}, files),
    "preview_images": Case({"preview_images": 2}, lambda run: preview(run).width, {"preview_steps": 2}),
    "preview_prompts": Case({"preview_prompts": ["a boat"]}, lambda run: preview(run).tobytes(), {"preview_steps": 2}),
    "preview_generation_kwargs": Case(
        {"preview_generation_kwargs": {"num_inference_steps": 1}},
        lambda run: preview(run).tobytes(),
        {"preview_steps": 2},
    ),
}


def preview(run: Run) -> Image.Image:
    return Image.open(run.folder / "run" / "previews" / "step-000000.png")


def observe(folder: Path, data: Path, case: Case, options: dict[str, Any], capfd: Any, caplog: Any) -> Any:
    folder.mkdir()
    Layer.calls = 0
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    sys.modules["trackio"].calls.clear()
    options = {**case.setting, **options}
    places = {"data": data, "folder": folder}
    options = {name: x.format(**places) if isinstance(x, str) else x for name, x in options.items()}
    if case.before is not None:
        make(folder, **{**options, "resume_from_checkpoint": None, **case.before}).train()
    capfd.readouterr()
    caplog.clear()
    trainer, metrics, error = make(folder, **options), {}, None
    try:
        if case.trains:
            metrics = trainer.train().metrics
    except (FloatingPointError, ValueError) as raised:
        error = raised
    printed = capfd.readouterr()
    return case.observed(Run(trainer, metrics, error, folder, printed.out + printed.err + caplog.text))


@pytest.mark.parametrize("name", [name for name in CASES if name in RecAConfig.__dataclass_fields__])  # of this release
def test_another_value_changes_what_is_observed(tmp_path, data, capfd, caplog, name):
    case = CASES[name]
    assert case.other.keys() == {name}
    standard = observe(tmp_path / "standard", data, case, {}, capfd, caplog)
    again = observe(tmp_path / "again", data, case, {}, capfd, caplog)
    assert again == standard, "this cannot tell two runs of the same options apart"
    assert observe(tmp_path / "other", data, case, case.other, capfd, caplog) != standard
