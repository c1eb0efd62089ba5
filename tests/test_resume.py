"""A run goes on exactly from where it was, or says why it cannot."""

import contextlib
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import time
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerCallback

from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor, RecAConfig, RecATrainer
from reca_trainer.cli import main
from reca_trainer.saving import run_checkpoints
from reca_trainer.saving.run_checkpoints import last_complete_checkpoint, read_seal, seal, sole_run
from tests.reliability.run import CHECKPOINT, dataset, fork, start

STEPS = 4
NEW_RUN = "start a new run from these weights: pass the checkpoint's folder as the model"


@pytest.fixture(scope="module")
def processor():
    return AutoUnifiedProcessor.from_pretrained(
        CHECKPOINT, generation_size=(64, 32, 16), condition_size=(42, 42, 14), understanding_size=(70, 28, 14)
    )


@pytest.fixture(scope="module")
def images():
    return dataset(12)


def make(folder, images, processing_class, model=None, peft_config=None, **options):
    """A trainer of an adapter on the tiny BAGEL; `options` are those of `RecAConfig` and `RecATrainer`."""
    passed = {name: options.pop(name) for name in ("optimizers", "optimizer_cls_and_kwargs") if name in options}
    defaults = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-6,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return RecATrainer(
        AutoUnifiedModel.from_pretrained(CHECKPOINT) if model is None else model,
        RecAConfig(**{**defaults, **options}),
        train_dataset=images,
        processing_class=processing_class,
        peft_config=peft_config or (LoraConfig(r=4) if model is None else None),
        **passed,
    )


@pytest.fixture
def run(tmp_path, images, processor):
    return partial(make, tmp_path, images, processor)


@pytest.fixture(scope="module")
def written(tmp_path_factory, images, processor):
    """The checkpoints of steps 2 and 4, and the losses on the way."""
    folder = tmp_path_factory.mktemp("written")
    trainer = make(folder, images, processor)
    trainer.train()
    return folder, losses(trainer)


@pytest.fixture
def checkpoint(tmp_path, written):
    """That of step 2, where it may be changed."""
    shutil.copytree(written[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    return tmp_path / "checkpoint-2"


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING)
    logging.getLogger("transformers").propagate = True
    return caplog


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def refusal(trainer, checkpoint=True):
    with pytest.raises(ValueError) as refused:
        trainer.train(resume_from_checkpoint=checkpoint)
    return str(refused.value)


DIFFERENCES = {
    "learning_rate: 0.001, now 0.002": {"learning_rate": 2e-3},
    "lr_scheduler_type: constant_with_warmup, now cosine": {"lr_scheduler_type": "cosine"},
    "lr_scheduler_kwargs: None, now {'timescale': 3}": {"lr_scheduler_kwargs": {"timescale": 3}},
    "warm-up steps: 1, now 3": {"warmup_steps": 3},
    ", now sgd": {"optim": "sgd"},
    "optim_args: None, now momentum=0.9": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "adam_beta1: 0.9, now 0.8": {"adam_beta1": 0.8},
    "adam_beta2: 0.95, now 0.9": {"adam_beta2": 0.9},
    "adam_epsilon: 1e-06, now 1e-08": {"adam_epsilon": 1e-8},
    "weight_decay: 0.0, now 0.1": {"weight_decay": 0.1},
    "max_grad_norm: 1.0, now 2.0": {"max_grad_norm": 2.0},
    "bf16: False, now True": {"bf16": True},
    "ema_decay: 0.0, now 0.4": {"ema_decay": 0.4},
    "loss weights: {'reconstruct': 1.0, 'caption': 0.0, 'generate': 0.0, 'edit': 0.0}, now {'reconstruct': 2.0,": {
        "reca_weight": 2.0
    },
    "instruction_dropout: 0.1, now 0.2": {"instruction_dropout": 0.2},
    "caption_dropout: 0.1, now 0.2": {"caption_dropout": 0.2},
    "edit_source_dropout: 0.3, now 0.2": {"edit_source_dropout": 0.2},
    "token_weighting: target, now micro_batch": {"token_weighting": "micro_batch"},
    "timesteps_per_image: 1, now 2": {"timesteps_per_image": 2},
    "max_image_size: None, now 48": {"max_image_size": 48},
    "min_image_size: None, now 16": {"min_image_size": 16},
    "micro-batches of each task: {'reconstruct': 1}, now {'reconstruct': 1, 'generate': 1}": {
        "text_to_image_weight": 1.0
    },
    "seed: 42, now 7": {"seed": 7},
    "dataloader_drop_last: False, now True": {"dataloader_drop_last": True},
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_a_run_that_differs_is_refused(run, checkpoint, difference):
    message = refusal(run(**DIFFERENCES[difference]))
    assert f"{checkpoint} cannot be resumed exactly, because these differ: " in message
    assert difference in message


def test_all_differences_are_named_with_the_way_out(run, checkpoint):
    message = refusal(run(learning_rate=2e-3, max_grad_norm=2.0, seed=7, peft_config=LoraConfig(r=8)))
    for difference in (
        "learning_rate: 0.001, now 0.002",
        "max_grad_norm: 1.0, now 2.0",
        "seed: 42, now 7",
        "r: 4, now 8",
    ):
        assert difference in message
    assert message.endswith(f"Restore them, or {NEW_RUN}.")


def test_other_instructions_are_refused(run, checkpoint, tmp_path):
    (tmp_path / "instructions.txt").write_text("Describe it.\n")
    assert ", now 1, digest " in refusal(run(instructions_file=str(tmp_path / "instructions.txt")))


def test_other_weights_are_refused(run, checkpoint):
    model = AutoUnifiedModel.from_pretrained(CHECKPOINT)
    with torch.no_grad():
        next(model.get_input_embeddings().parameters())[0, 0] += 1
    assert "digest of frozen weights: " in refusal(run(model, peft_config=LoraConfig(r=4)))
    model = AutoUnifiedModel.from_pretrained(CHECKPOINT, dtype=torch.bfloat16)
    assert "frozen weights: {'float32': " in refusal(run(model, peft_config=LoraConfig(r=4)))


def test_another_processor_is_refused(checkpoint, tmp_path, images):
    other = AutoUnifiedProcessor.from_pretrained(
        CHECKPOINT, generation_size=(48, 32, 16), condition_size=(42, 42, 14), understanding_size=(70, 28, 14)
    )
    message = refusal(make(tmp_path, images, other))
    assert "processor's generation_size: [64, 32, 16], now [48, 32, 16]" in message


def test_another_optimizer_object_is_refused(run, checkpoint):
    model = get_peft_model(
        AutoUnifiedModel.from_pretrained(CHECKPOINT), LoraConfig(r=4, target_modules=["q_proj_moe_gen"])
    )
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5)
    message = refusal(run(model, optimizers=(optimizer, None)))
    assert "the optimizer passed: None, now SGD {'lr': 0.5" in message


def test_another_optimizer_class_is_refused(run, checkpoint):
    message = refusal(run(optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5})))
    assert "optimizer_cls_and_kwargs: None, now SGD {'lr': 0.5}" in message


@pytest.mark.parametrize(
    ("before", "now", "difference"),
    [
        ({"lr_scheduler_type": "linear"}, {"max_steps": 6}, "steps that the schedule spans: 4, now 6"),
        ({"lr_scheduler_type": "linear", "max_steps": -1, "num_train_epochs": 1}, {"num_train_epochs": 2}, ", now 12"),
        ({"lr_scheduler_type": "linear", "warmup_steps": 1}, {"warmup_steps": 2}, "warm-up steps: 1, now 2"),
        ({"warmup_steps": 1}, {"warmup_steps": 2, "max_steps": 5}, None),
        ({"lr_scheduler_type": "constant"}, {"warmup_steps": 4, "max_steps": 5}, None),
    ],
    ids=["length", "epochs", "warm-up before a slope", "a warm-up that is over", "no warm-up"],
)
def test_a_schedule_is_compared_where_it_goes_on(run, tmp_path, before, now, difference):
    run(**before, save_total_limit=None).train()
    resumed, first = run(**{**before, **now}), tmp_path / "checkpoint-2"
    if difference:
        assert difference in refusal(resumed, first)
    else:
        assert resumed.train(resume_from_checkpoint=first).global_step == 5


def test_ignore_data_skip_is_for_the_data_alone(run, checkpoint):
    message = refusal(run(seed=7))
    assert message.endswith("pass ignore_data_skip=True to go on from these weights at the beginning of an epoch.")
    assert run(seed=7, ignore_data_skip=True).train(resume_from_checkpoint=True).global_step == STEPS
    assert NEW_RUN in refusal(run(seed=7, ignore_data_skip=True, learning_rate=2e-3))


def test_a_new_run_starts_from_a_checkpoint_as_its_model(run, checkpoint, tmp_path):
    trainer = run(str(checkpoint), learning_rate=2e-3, output_dir=str(tmp_path / "next"), max_steps=1)
    start, saved = get_peft_model_state_dict(trainer.model), load_file(checkpoint / "adapter_model.safetensors")
    assert start.keys() == saved.keys() and all(torch.equal(start[name], saved[name]) for name in saved)
    assert trainer.train().global_step == 1


def test_other_versions_are_a_warning(run, checkpoint, written, warnings):
    entries = read_seal(checkpoint)
    entries["rounding"] |= {"torch": "1.0"}
    seal(checkpoint, **entries)
    trainer = run()
    trainer.train(resume_from_checkpoint=True)
    assert f"torch: 1.0, now {torch.__version__}" in warnings.text
    assert losses(trainer) == written[1]


def zero(path):
    """Overwrite 16 kB in the middle, or half of less, at the same length."""
    contents = bytearray(path.read_bytes())
    middle = slice(len(contents) // 4, len(contents) // 4 + min(16_000, len(contents) // 2))
    assert any(contents[middle])
    contents[middle] = bytes(middle.stop - middle.start)
    path.write_bytes(contents)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_changed_file_is_named_and_the_checkpoint_before_is_used(run, written, tmp_path, warnings, name):
    for step in (2, 4):
        shutil.copytree(written[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    zero(tmp_path / "checkpoint-4" / name)
    message = refusal(run(), tmp_path / "checkpoint-4")
    assert message.startswith(f"{tmp_path / 'checkpoint-4'} is damaged: {name} has changed since it was written.")
    assert message.endswith("resume_from_checkpoint=True goes on from the newest in output_dir that is whole.")
    trainer = run()
    trainer.train(resume_from_checkpoint=True)
    assert trainer.resumed_from == str(tmp_path / "checkpoint-2") and losses(trainer) == written[1]
    assert f"{name} has changed since it was written. Looking for another one." in warnings.text


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_missing_state_is_named(run, checkpoint, name):
    (checkpoint / name).unlink()
    assert f"{checkpoint} is not complete: {name} should have" in refusal(run(), checkpoint)


def test_a_changed_seal_is_named(run, checkpoint):
    file = checkpoint / "checkpoint_files.json"
    file.write_text(file.read_text().replace('"learning_rate": 0.001', '"learning_rate": 0.002'))
    assert "its checkpoint_files.json is damaged" in refusal(run(learning_rate=2e-3), checkpoint)


def test_weights_alone_are_not_resumed(run, tmp_path, warnings):
    run(save_only_model=True, max_steps=2).train()
    assert "save_only_model=True leaves the state of optimizer, schedule and random numbers out" in warnings.text
    message = refusal(run())
    assert "was written with save_only_model=True, so optimizer and schedule would start again" in message
    assert NEW_RUN in message


def test_a_clock_that_runs_backwards_does_not_change_the_order(run, tmp_path, monkeypatch):
    now = time.time()
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: now - 3600 * time.monotonic())
        run(save_steps=1, save_total_limit=2).train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}
    os.utime(tmp_path / "checkpoint-4", (0, 0))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


# --- one run in a folder ---


def test_a_second_run_is_refused_before_its_model_is_loaded(tmp_path, images):
    args = RecAConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with (
        sole_run(tmp_path),
        pytest.raises(BlockingIOError, match=rf"Another run \(process {os.getpid()} on .*Choose another"),
    ):
        RecATrainer("no/such/model", args, train_dataset=images)


def test_the_command_line_says_it_in_one_line(tmp_path, capsys):
    (tmp_path / "empty.yaml").write_text("{}\n")
    argv = f"train --config {tmp_path}/empty.yaml --model_name_or_path no/such/model --dataset_name none --use_cpu"
    with sole_run(tmp_path / "."):
        assert main([*argv.split(), "--output_dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith(f"reca-trainer train: Another run (process {os.getpid()} on ")


def test_a_second_run_in_a_process_of_its_own_is_refused(tmp_path):
    with sole_run(tmp_path):
        process = start(tmp_path, max_steps=1)
        process.join()
    assert process.exitcode == 1
    assert f"Another run (process {os.getpid()} on " in (tmp_path / "log.txt").read_text()


def test_a_run_holds_its_folder_until_it_ends(run, tmp_path):
    refusals = []

    class SecondRun(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            with pytest.raises(BlockingIOError) as refused:
                second.train()
            refusals.append(str(refused.value))
            AutoUnifiedModel.from_pretrained(last_complete_checkpoint(tmp_path) or CHECKPOINT)  # reading is free

    first, second = run(max_steps=2, save_steps=1), run(max_steps=3)
    first.add_callback(SecondRun())
    first.train()
    assert len(refusals) == 2 and "Another run" in refusals[0]
    assert second.train(resume_from_checkpoint=True).global_step == 3


def hold_and_leave_a_child(folder, pipe):
    child = multiprocessing.get_context("fork").Process(target=signal.pause)
    with sole_run(folder):
        child.start()
        pipe.send(child.pid)
        signal.pause()


def test_a_killed_run_leaves_its_folder_though_its_workers_live_on(tmp_path):
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = fork(hold_and_leave_a_child, tmp_path, sender)
    child = receiver.recv()
    with pytest.raises(BlockingIOError, match=f"process {process.pid} on"), sole_run(tmp_path):
        pass
    process.kill()
    process.join()
    try:
        with sole_run(tmp_path):
            os.kill(child, 0)  # it lives
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_where_nothing_can_be_locked_there_is_a_warning(tmp_path, monkeypatch, warnings):
    monkeypatch.setattr(run_checkpoints, "fcntl", None)
    with sole_run(tmp_path):
        assert "cannot be locked" in warnings.text


class StopsBeforeItsFirstStep(TrainerCallback):
    def __init__(self, run):
        self.run = run

    def on_train_begin(self, *args, **kwargs):
        self.run.interruption.signal = signal.SIGTERM


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_resumed_run_that_is_stopped_before_its_first_step_leaves_its_checkpoint_alone(
    tmp_path, images, processor, warnings, elsewhere
):
    stream, lora = images.to_iterable_dataset(num_shards=2), LoraConfig(r=4, lora_dropout=0.5)
    make(tmp_path / "first", stream, processor, peft_config=lora).train()
    checkpoint = tmp_path / "first" / "checkpoint-2"
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    folder = tmp_path / ("second" if elsewhere else "first")
    run = make(folder, stream, processor, peft_config=lora)
    run.add_callback(StopsBeforeItsFirstStep(run))
    with pytest.raises(SystemExit) as stopped:
        run.train(resume_from_checkpoint=str(checkpoint))
    assert stopped.value.code == 143
    assert f"The run ended after step 2 of {STEPS}" in warnings.text
    assert f"with resume_from_checkpoint={str(checkpoint)!r} (on the command line" in warnings.text
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert not list(tmp_path.glob("second/checkpoint-*"))


def test_a_full_disk_has_room_for_the_lock(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        with sole_run(tmp_path), pytest.raises(BlockingIOError, match="Another run"), sole_run(tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
