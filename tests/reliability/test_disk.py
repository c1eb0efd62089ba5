"""A full disk stops a run with its reason and leaves the last checkpoint whole; what is written needs its own room
once, and others may read it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from reca_trainer.adapters import attach
from reca_trainer.files import written_whole
from reca_trainer.models import bagel
from reca_trainer.saving.export import export
from reca_trainer.saving.merge import merge_adapter
from reca_trainer.saving.run_checkpoints import last_complete_checkpoint
from tests.conftest import GOLDEN
from tests.reliability.run import start

CHECKPOINT = GOLDEN / "bagel" / "checkpoint"

SAVING = {"max_steps": 4, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture
def small_disk(tmp_path, request):
    """640 kB, room for three checkpoints of the adapter; or what the test asks for."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = f"size={getattr(request, 'param', 640)}k"
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True, text=True)
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


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


PUBLISHED_KB = size_of(CHECKPOINT) // 1000


@pytest.fixture
def adapter(tmp_path):
    attach(bagel.read_published(CHECKPOINT), LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("small_disk", [PUBLISHED_KB * 5 // 4], indirect=True)
def test_a_published_model_takes_its_own_room_on_disk_and_no_more(small_disk, adapter):
    merge_adapter(CHECKPOINT, adapter, small_disk / "merged", layout="published")
    assert size_of(small_disk) > 1000 * PUBLISHED_KB * 9 // 10


@pytest.mark.parametrize("small_disk", [PUBLISHED_KB // 2], indirect=True)
@pytest.mark.parametrize("layout", ["published", "transformers"])
def test_what_does_not_fit_is_refused_before_anything_is_written(small_disk, adapter, layout):
    with pytest.raises(OSError, match=r"merged will take 0\.\d+ GB, and 0\.\d+ GB are free there\. Make room"):
        merge_adapter(CHECKPOINT, adapter, small_disk / "merged", layout=layout)
    assert not list(small_disk.iterdir())


def test_room_is_checked_in_the_folder_that_is_written_to(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(OSError, match="will take"), written_whole(tmp_path / "folder", 2 * free):
        raise AssertionError("began to write")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("umask", "rights"), [(0o022, 0o644), (0o027, 0o640)])
@pytest.mark.parametrize(
    "form",
    [
        {"layout": "published"},
        {"layout": "transformers"},
        {"layout": "transformers", "quantization_config": BitsAndBytesConfig(load_in_4bit=True)},
    ],
    ids=["published", "transformers", "quantised"],
)
def test_the_umask_says_who_may_read_what_is_written(tmp_path, form, umask, rights):
    before = os.umask(umask)
    try:
        export(CHECKPOINT, tmp_path / "exported", **form)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "exported").rglob("*") if path.is_file()]
    assert files and {path.stat().st_mode & 0o777 for path in files} == {rights}


def test_a_published_model_in_shards_is_the_same_model(tmp_path):
    for name, size in (("whole", None), ("sharded", "100KB")):
        export(CHECKPOINT, tmp_path / name, layout="published", max_shard_size=size)
    shards = sorted((tmp_path / "sharded").glob("ema-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "sharded" / "ema.safetensors").exists()
    whole = load_file(tmp_path / "whole" / "ema.safetensors")
    parts = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert whole.keys() == parts.keys() and all((whole[name] == parts[name]).all() for name in whole)
    models = [bagel.read_published(tmp_path / name).state_dict() for name in ("whole", "sharded")]
    assert all((tensor == models[1][name]).all() for name, tensor in models[0].items())
