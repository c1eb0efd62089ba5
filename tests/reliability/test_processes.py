"""Several processes give what one gives: rows, losses, weights, and errors that end all of them."""

import copy
import gc
import json
import os
import socket
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from PIL import ImageChops
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from reca_trainer import AutoUnifiedModel
from reca_trainer.saving.run_checkpoints import last_complete_checkpoint
from tests.reliability.run import CHECKPOINT, fork, start, start_together, trainer
from tests.test_option_effects import make

ROOT = Path(__file__).parents[2]

TOLERANCE = 1e-5  # of losses, relative; weights after Adam's steps of 1e-3: absolute, a hundredth of a step


def run(folder, processes=1, expect=0, **options):
    # Pictures of several shapes: what one process accumulates is what two share.
    options = {"max_steps": 7, "per_device_train_batch_size": 2, **options}
    options["gradient_accumulation_steps"] = 2 * options.get("gradient_accumulation_steps", 1) // processes
    together = processes > 1 or options.get("sharded")
    started = start_together(folder, processes, **options) if together else [start(folder, **options)]
    for process in started:
        process.join()
    log = "".join(path.read_text() for path in sorted(folder.glob("log*.txt")))
    assert [bool(process.exitcode) for process in started] == [bool(expect)] * processes, log
    return log


def losses(folder):
    return json.loads((folder / "losses.json").read_text())


def rows(folder):
    """Per step: the micro-batches' rows, those of all processes in turn."""
    parts = [json.loads(path.read_text()) for path in sorted(folder.glob("rows-*.json"))]
    return [list(chain(*zip(*step, strict=True))) for step in zip(*parts, strict=True)]


def assert_equal_runs(*folders):
    assert losses(folders[0]) == pytest.approx(losses(folders[1]), rel=TOLERANCE)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    deviation = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert deviation < TOLERANCE
    return deviation


LAYOUTS = {
    "epochs that end with one row": {"rows": 11, "per_device_train_batch_size": 1},
    "accumulation, and one row too few at the end": {
        "rows": 11,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
    },
    "every micro-batch alike": {
        "rows": 11,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "token_weighting": "micro_batch",
    },
    "accumulation": {"gradient_accumulation_steps": 3, "rows": 18},
    "no adapter, clipped": {"full": True, "max_grad_norm": 0.1, "rows": 18},
    "skipped images": {"bad_rows": [3, 11], "on_bad_image": "skip", "rows": 18},
}


@pytest.mark.parametrize(
    "name", [name if index < 3 else pytest.param(name, marks=pytest.mark.slow) for index, name in enumerate(LAYOUTS)]
)
def test_two_processes_equal_one(tmp_path, name, record_property):
    options = LAYOUTS[name]
    run(tmp_path / "one", **options)
    run(tmp_path / "two", processes=2, **options)
    if name == "no adapter, clipped":
        (tmp_path / "one" / "model.safetensors").rename(tmp_path / "one" / "adapter_model.safetensors")
        (tmp_path / "two" / "model.safetensors").rename(tmp_path / "two" / "adapter_model.safetensors")
    record_property("deviation", assert_equal_runs(tmp_path / "one", tmp_path / "two"))
    if name == "epochs that end with one row":
        assert any(len(step) == 1 for step in rows(tmp_path / "one"))
    for alone, shared in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        # One row on two processes is drawn by both, and counts once in the mean.
        assert list(dict.fromkeys(chain(*alone))) == list(dict.fromkeys(chain(*shared)))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "zero2", "zero3"])
def test_our_launch_configurations_equal_one_process(tmp_path, layout, record_property):
    if layout.startswith("zero"):
        pytest.importorskip("deepspeed")
    # An average too, where that is possible: it is sharded as the weights are, and what is saved in the end.
    options = {"max_steps": 4, "rows": 18, "ema_decay": 0.0 if layout == "zero3" else 0.4}
    run(tmp_path / "one", **options)
    (tmp_path / "two").mkdir()
    saving = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
    for steps in (2, 4):  # resumed in the middle
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launch = [
            "--config_file",
            ROOT / "src" / "reca_trainer" / "recipes" / "accelerate" / f"{layout}.yaml",
            "--num_processes",
            2,
        ]
        script = ["-m", "tests.reliability.run", tmp_path / "two"]
        arguments = json.dumps({**options, **saving, "max_steps": steps, "resume": steps == 4})
        command = ["-m", "accelerate.commands.launch", *launch, "--main_process_port", port, *script, arguments]
        done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
    record_property("deviation", assert_equal_runs(tmp_path / "one", tmp_path / "two"))


def test_a_bad_image_on_one_process_ends_all_and_is_named(tmp_path):
    log = run(tmp_path, processes=2, bad_rows=[3], max_steps=12, expect=1)
    assert "ImageError: row 3 (3.png): " in log


def test_a_step_that_is_not_finite_on_one_process_is_left_out_by_all(tmp_path):
    run(tmp_path / "one", nonfinite=[0, 3], max_nonfinite_steps=1, rows=18)
    log = run(tmp_path / "two", processes=2, nonfinite=[1, 3], max_nonfinite_steps=1, rows=18)
    assert "The reconstruction loss is nan at step 3 on row " in log
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=0, atol=TOLERANCE, msg=name)


@pytest.mark.slow
def test_a_frozen_process_ends_the_run_within_the_timeout(tmp_path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "ddp_timeout": 5}
    first, frozen = start_together(tmp_path, 2, freeze_at=[1, 3], **options)
    first.join(120)
    try:
        assert first.exitcode, (tmp_path / "log-0.txt").read_text()  # `None` if it still waits
        assert "5000ms" in (tmp_path / "log-0.txt").read_text()
    finally:
        first.kill(), frozen.kill()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_the_best_model_is_loaded_by_all(tmp_path):
    options = {"eval_size": 4, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    options |= {"greater_is_better": True, "learning_rate": 1e-2, "max_steps": 3}  # the first, as losses fall
    log = run(tmp_path, 2, save_strategy="steps", save_steps=1, load_best_model_at_end=True, **options)
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-1")
    assert "Could not locate the best model" not in log


def test_another_number_of_processes_resumes_or_is_refused(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4, "rows": 18}
    run(tmp_path / "one", **saving)
    run(tmp_path / "parts", processes=2, max_steps=4, **saving)
    log = run(tmp_path / "parts", resume=True, per_device_train_batch_size=4, expect=1, **saving)
    assert "cannot be resumed exactly" in log and "per_device_train_batch_size: 2, now 4" in log
    run(tmp_path / "parts", resume=True, **saving)
    assert_equal_runs(tmp_path / "one", tmp_path / "parts")


def test_fully_sharded_gradients_equal_those_of_one_process(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [fork(sharded_step, rank, port, str(tmp_path)) for rank in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0


def sharded_step(rank, port, folder):
    """The same batch on both processes, sharded (FSDP2) and not: same loss, same gradients, same pictures."""
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    recorder = trainer(folder, False, True, 4, per_device_train_batch_size=4)
    batch = next(iter(recorder.get_train_dataloader()))
    [batch], _ = recorder.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    whole, sharded = recorder.model, AutoUnifiedModel.from_pretrained(CHECKPOINT)
    sharded.freeze_understanding()
    for layer in sharded.modules():
        if type(layer).__name__ in sharded._no_split_modules:
            fully_shard(layer)
    fully_shard(sharded)
    results = []
    for model in (whole, sharded):
        model.train()
        loss = recorder.compute_loss(model, dict(batch)) / 2
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients))
    (loss, gradients), (sharded_loss, sharded_gradients) = results
    torch.testing.assert_close(sharded_loss, loss, rtol=TOLERANCE, atol=0)
    assert gradients.keys() == sharded_gradients.keys()
    for name, gradient in sharded_gradients.items():
        assert isinstance(gradient, DTensor)
        torch.testing.assert_close(gradient.full_tensor(), gradients[name], rtol=1e-4, atol=1e-6, msg=name)
    register_fsdp_forward_method(sharded, "generate_images")
    pictures = [
        model.generate_images(
            recorder.processing_class,
            text=["boat"],
            height=32,
            width=32,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
        )[0]
        for model in (whole, sharded)
    ]
    assert ImageChops.difference(*pictures).getextrema() <= ((0, 1),) * 3
    dist.destroy_process_group()


# Of each option a value that is not its default, and what shows it on the second of two machines.
OPTIONS_OF_PROCESSES = {
    "ddp_find_unused_parameters": (True, "find_unused_parameters", {}),
    "ddp_bucket_cap_mb": (1, "bucket_bytes_cap", {}),
    "ddp_broadcast_buffers": (False, "broadcast_buffers", {}),
    "ddp_static_graph": (True, "static_graph", {}),
    "log_on_each_node": (False, "verbosity", {"log_level": "info"}),
    "log_level_replica": ("error", "verbosity", {"log_level": "info", "log_on_each_node": False}),
}


def test_options_of_several_processes_change_what_is_observed(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    layout = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": 0}
    processes = [fork(observe_options, str(tmp_path), {**layout, "RANK": rank}) for rank in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    observed = json.loads((tmp_path / "observed.json").read_text())
    for name, (_, attribute, _) in OPTIONS_OF_PROCESSES.items():
        standard, again, other = (run[attribute] for run in observed[name])
        assert again == standard != other, name


def observe_options(folder, layout):
    """As the second of two machines with one process each."""
    os.environ.update({name: str(value) for name, value in layout.items()})
    torch.set_num_threads(1)
    gc.freeze()  # a trainer collects garbage when it starts; what has been imported is none
    observed = {}
    for name, (value, _, setting) in OPTIONS_OF_PROCESSES.items():
        observed[name] = []
        for options in ({}, {}, {name: value}):
            trainer = make(Path(folder), **{**copy.deepcopy(setting), **options})
            trainer.train()
            names = ("find_unused_parameters", "bucket_bytes_cap", "broadcast_buffers", "static_graph")
            attributes = {name: getattr(trainer.model_wrapped, name) for name in names}
            observed[name].append({**attributes, "verbosity": transformers.logging.get_verbosity()})
    if layout["RANK"] == 1:
        (Path(folder) / "observed.json").write_text(json.dumps(observed))
    del trainer
    gc.collect()  # a reducer that goes after its process group waits for the group's thread, which waits for Python
    dist.destroy_process_group()
