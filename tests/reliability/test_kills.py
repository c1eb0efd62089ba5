"""A run that is killed again and again ends bit for bit where an undisturbed one ends."""

import contextlib
import json
import random
import signal

import psutil
import pytest

from reca_trainer.saving.run_checkpoints import check_complete
from tests.reliability.run import start

COMMON = {"max_steps": 14, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
SCENARIOS = {
    "plain": {},
    "workers, accumulation and a task mix": {
        "dataloader_num_workers": 2,
        "gradient_accumulation_steps": 2,
        "text_to_image_weight": 0.5,
        "task_mix": "reconstruct=2,generate=1",
    },
    "one checkpoint of the whole generator": {"full": True, "save_total_limit": 1, "save_steps": 1},
    "cached latents": {"cache_latents": True, "dataloader_num_workers": 1},
    "a stream with workers": {"streaming": True, "dataloader_num_workers": 2, "max_steps": 20},
    "QLoRA": {"quantized": True},
    "Harmon, the whole generator": {"family": "harmon", "full": True, "per_device_train_batch_size": 1},
    "Harmon, LoRA": {"family": "harmon", "per_device_train_batch_size": 1},
    "OpenUni, LoRA": {"family": "openuni", "image_to_text_weight": 0.0},
    "OpenUni, QLoRA": {"family": "openuni", "quantized": True, "image_to_text_weight": 0.0},
}


def result(folder):
    [weights] = folder.glob("*model.safetensors")
    return json.loads((folder / "losses.json").read_text()), weights.read_bytes()


def undisturbed(folder, options):
    process = start(folder, **options)
    process.join()
    assert process.exitcode == 0, (folder / "log.txt").read_text()


def killed(process, cpu_seconds, workers):
    """Whether the process was still running, and so was killed, when it had worked for so long; its children are added
    to `workers`."""
    while process.exitcode is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            running = psutil.Process(process.pid)
            used = running.cpu_times()
            if used.user + used.system >= cpu_seconds:
                workers += running.children(recursive=True)
                process.kill()
        process.join(0.005)
    return process.exitcode == -signal.SIGKILL


def finish_and_compare(folder, expected, options):
    process = start(folder, resume=True, **options)
    process.join()
    assert process.exitcode == 0, (folder / "log.txt").read_text()
    losses, weights = result(folder)
    assert losses == expected[0]
    assert weights == expected[1]
    # An older one may be half deleted, where the kill fell into `save_total_limit` at work.
    check_complete(folder / f"checkpoint-{options['max_steps']}")
    assert not list(folder.glob(".*.partial"))


def survive(tmp_path, options, kills, seed):
    """Kill at `kills` random moments of a run's length, resuming after each; returns where the kills fell."""
    options = {**COMMON, **options}
    undisturbed(tmp_path / "whole", options)
    seconds = json.loads((tmp_path / "whole" / "usage.json").read_text())["cpu_seconds"]
    expected = result(tmp_path / "whole")
    rng, killed_at, workers, chain = random.Random(seed), [], [], 0
    while len(killed_at) < kills:
        folder, chain = tmp_path / f"chain-{chain}", chain + 1
        while len(killed_at) < kills:
            process = start(folder, resume=True, **options)
            if not killed(process, rng.uniform(0.3, 1) * seconds, workers):  # the chain got through
                assert process.exitcode == 0, (folder / "log.txt").read_text()
                break
            saved = [int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*")]
            killed_at.append((max(saved, default=0), len(list(folder.glob(".*.partial")))))
        finish_and_compare(folder, expected, options)
    assert not psutil.wait_procs(workers, timeout=60)[1], "loading workers outlive a killed run"
    return killed_at


def test_a_few_random_kills_are_survived(tmp_path):
    survive(tmp_path, {"save_total_limit": 1, "save_steps": 1, "max_steps": 6}, kills=2, seed=0)


@pytest.mark.parametrize("moment", [0.4, 0.9])
def test_a_kill_while_saving_is_survived(tmp_path, moment, saving_run):
    _, expected, operations = saving_run
    kill_at_operation(tmp_path, round(1 + moment * (operations - 1)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_many_random_kills_are_survived(tmp_path, name, record_property):
    killed_at = survive(tmp_path, SCENARIOS[name], kills=12, seed=len(name))
    record_property("kills", killed_at)
    assert any(step for step, _ in killed_at), "no kill fell behind the first checkpoint"


@pytest.mark.slow
def test_a_kill_at_any_file_operation_is_survived(tmp_path, saving_run):
    _, expected, operations = saving_run
    for number in random.Random(0).sample(range(1, operations + 1), 24):
        kill_at_operation(tmp_path / str(number), number, expected)


SAVING = {**COMMON, "max_steps": 4, "save_steps": 1, "save_total_limit": 1}


@pytest.fixture(scope="module")
def saving_run(tmp_path_factory):
    """An undisturbed run and the number of its file operations."""
    folder = tmp_path_factory.mktemp("saving")
    undisturbed(folder, {**SAVING, "die_at": 0})
    return folder, result(folder), json.loads((folder / "usage.json").read_text())["file_operations"]


def kill_at_operation(folder, number, expected):
    process = start(folder, die_at=number, **SAVING)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    finish_and_compare(folder, expected, SAVING)
