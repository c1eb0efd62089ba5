"""A run that is told to stop, or whose launcher is gone, ends after the current step and says how to go on."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from reca_trainer.saving.run_checkpoints import last_complete_checkpoint, read_seal
from tests.reliability.run import fork, run_logged, start, start_together

ROOT = Path(__file__).parents[2]
ENDLESS = {"max_steps": 100_000, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
ENDLESS |= {"lr_scheduler_type": "constant", "text_to_image_weight": 0.5}
HOW = "To go on, start it again with resume_from_checkpoint=True (on the command line: --resume_from_checkpoint true)."


def wait_for(path, *processes):
    """Until `path` is there, while the processes that should make it are running."""
    while not path.exists():
        for process in processes:
            assert not ended(process, 0.01), "".join(log.read_text() for log in path.parent.glob("log*.txt"))


def ended(process, timeout):
    """Whether a process has ended after so many seconds; as one that is no child of this one, it may stay a zombie."""
    process = psutil.Process(process.pid) if psutil.pid_exists(process.pid) else None
    return process is None or process.status() == psutil.STATUS_ZOMBIE or not psutil.wait_procs([process], timeout)[1]


def last_step(folder):
    return read_seal(Path(last_complete_checkpoint(folder)))["step"]


def assert_goes_on_exactly(folder, tmp_path):
    """Two steps more give what an undisturbed run of as many gives."""
    steps = last_step(folder) + 2
    for name, options in ((folder, {"resume": True}), (tmp_path / "undisturbed", {})):
        process = start(name, **{**ENDLESS, "max_steps": steps, **options})
        process.join()
        assert process.exitcode == 0, (name / "log.txt").read_text()
    first, second = (load_file(name / "adapter_model.safetensors") for name in (folder, tmp_path / "undisturbed"))
    assert all((first[name] == weight).all() for name, weight in second.items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step(tmp_path, number):
    folder = tmp_path / "run"
    process = start(folder, dataloader_num_workers=1, **ENDLESS)
    wait_for(folder / "checkpoint-2", process)
    workers = psutil.Process(process.pid).children()
    for running in (*workers, process):  # as a terminal and `torchrun`, which signal all of a group, and schedulers do
        os.kill(running.pid, number)
    process.join()
    log, step = (folder / "log.txt").read_text(), last_step(folder)
    assert process.exitcode == (143 if number == signal.SIGTERM else 1)
    reason = f"because the run was told to stop ({number.name})"
    assert f"The run ended after step {step} of 100000, {reason}. {HOW}" in log
    assert ("KeyboardInterrupt: The run ended" in log) == (number == signal.SIGINT)
    assert_goes_on_exactly(folder, tmp_path)


def test_a_second_interrupt_ends_the_run_at_once(tmp_path):
    process = start(tmp_path, **{**ENDLESS, "save_steps": 1, "hold_at": 3})  # its third step does not end
    wait_for(tmp_path / "held", process)
    os.kill(process.pid, signal.SIGINT)
    log = tmp_path / "log.txt"
    while "Press Ctrl-C again to end it at once" not in log.read_text():
        process.join(0.005)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 1 and last_step(tmp_path) == 2


def test_without_checkpoints_nothing_is_promised(tmp_path):
    process = start(tmp_path, **{**ENDLESS, "save_strategy": "no", "preview_steps": 2, "preview_images": 1})
    wait_for(tmp_path / "previews" / "step-000002.png", process)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143 and not list(tmp_path.glob("checkpoint-*"))
    assert "(SIGTERM). There is no checkpoint of it." in (tmp_path / "log.txt").read_text()


def test_a_signal_to_one_process_ends_all_after_the_same_step(tmp_path):
    processes = start_together(tmp_path, 2, **ENDLESS)
    wait_for(tmp_path / "checkpoint-2", *processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [143, 143]
    step = last_step(tmp_path)
    first, second = ((tmp_path / f"log-{rank}.txt").read_text() for rank in (0, 1))
    assert f"The run ended after step {step} of 100000, because another of its processes was told to stop." in first
    assert f"The run ended after step {step} of 100000, because the run was told to stop (SIGTERM)." in second


def launch(folder, environment):
    """Start a run as a child, and wait for it, as a launcher does."""
    os.environ.update(environment)
    run = multiprocessing.get_context("fork").Process(target=run_logged, args=(folder, dict(ENDLESS)))
    run.start()
    (Path(folder) / "pid").write_text(str(run.pid))
    run.join()


@pytest.mark.parametrize("environment", [{"ACCELERATE_MIXED_PRECISION": "no"}, {}], ids=["launcher", "shell"])
def test_the_death_of_a_launcher_ends_the_run_and_that_of_a_shell_does_not(tmp_path, environment):
    folder = tmp_path / "run"
    folder.mkdir()
    parent = fork(launch, str(folder), environment)
    wait_for(folder / "checkpoint-2", parent)
    run = psutil.Process(int((folder / "pid").read_text()))
    parent.kill()
    parent.join()
    if not environment:
        wait_for(folder / f"checkpoint-{last_step(folder) + 4}", run)
        return run.kill()
    while not ended(run, 0.1):
        pass
    assert f"because its launcher (process {parent.pid}) is gone. {HOW}" in (folder / "log.txt").read_text()
    assert_goes_on_exactly(folder, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_death_of_accelerate_launch_ends_the_run(tmp_path, number, processes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", processes]
    command += ["--main_process_port", port, "-m", "tests.reliability.run", tmp_path, json.dumps(ENDLESS)]
    with (tmp_path / "log.txt").open("w") as log:
        launcher = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=log, stderr=log)
    while not (tmp_path / "checkpoint-2").exists():
        assert launcher.poll() is None, (tmp_path / "log.txt").read_text()
    runs = psutil.Process(launcher.pid).children()
    launcher.send_signal(number)
    launcher.wait()
    for run in runs:
        while not ended(run, 0.1):
            pass
    log = (tmp_path / "log.txt").read_text()
    assert f"The run ended after step {last_step(tmp_path)} of 100000, because " in log and HOW in log
