"""A full disk stops a run with its reason and leaves the last checkpoint whole."""

import os
import subprocess
from pathlib import Path

import pytest

from reca_trainer.saving.run_checkpoints import last_complete_checkpoint
from tests.reliability.run import start

SAVING = {"max_steps": 4, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture
def small_disk(tmp_path):
    """640 kB, room for three checkpoints of the adapter."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def assert_stopped_clearly(folder, process):
    process.join()
    log = (folder / "log.txt").read_text()
    assert process.exitcode == 1, log
    last = last_complete_checkpoint(folder)
    step = int(Path(last).name.rpartition("-")[2]) + 1 if last else 1
    assert f"OSError: The checkpoint of step {step} could not be written to {folder}: " in log
    assert "MB are free there. Make room or choose another output_dir" in log
    assert not list(folder.glob(".*.partial"))
    return step


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(small_disk):
    log = small_disk.parent / "log.txt"  # or there would be no room to say it
    os.symlink(log, small_disk / "log.txt")
    step = assert_stopped_clearly(small_disk, start(small_disk, **SAVING))
    assert 1 < step <= 4
    for older in range(1, step - 1):
        subprocess.run(["rm", "-r", str(small_disk / f"checkpoint-{older}")], check=True)
    process = start(small_disk, resume=True, save_total_limit=1, **SAVING)
    process.join()
    assert process.exitcode == 0, log.read_text()


def test_a_file_that_cannot_be_written_whole_stops_the_run(tmp_path):
    assert assert_stopped_clearly(tmp_path, start(tmp_path, file_limit=50_000, **SAVING)) == 1
