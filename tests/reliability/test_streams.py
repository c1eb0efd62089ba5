"""Runs on streams: processes and workers share the rows; a run goes on exactly in its layout and is refused in another."""

import io
import json
import os
import signal
import tarfile
from collections import Counter
from itertools import chain

import datasets
from safetensors.torch import load_file

from tests.hostile_images import encoded
from tests.reliability.run import dataset, start, start_together
from tests.reliability.test_interruptions import last_step, wait_for


def run(folder, processes=1, expect=0, **options):
    """The rows of every step, of all processes, and what was logged."""
    options = {"per_device_train_batch_size": 1, "max_steps": 8, **options}
    started = [start(folder, **options)] if processes == 1 else start_together(folder, processes, **options)
    for process in started:
        process.join()
    log = "".join(path.read_text() for path in sorted(folder.glob("log*.txt")))
    assert [bool(process.exitcode) for process in started] == [bool(expect)] * processes, log
    parts = [json.loads(path.read_text()) for path in sorted(folder.glob("rows-*.json"))]
    return [list(chain(*chain(*step))) for step in zip(*parts, strict=True)], log


def write_shards(folder, rows=24, shards=4):
    """Tar archives of the first rows."""
    folder.mkdir()
    images = dataset(rows).with_format(None).cast_column("image", datasets.Image(decode=False))["image"]
    for shard in range(shards):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for row in range(shard, rows, shards):
                member = tarfile.TarInfo(f"{row:03d}.png")
                member.size = len(images[row]["bytes"])
                archive.addfile(member, io.BytesIO(images[row]["bytes"]))
    return folder


def test_two_processes_read_every_row_once_in_a_pass(tmp_path):
    folder = write_shards(tmp_path / "shards")
    options = {"dataset_name": str(folder), "dataset_streaming": True, "dataloader_num_workers": 1, "max_steps": 12}
    steps, _ = run(tmp_path / "two", processes=2, **options)
    names = [name.partition("member ")[2].partition(".png")[0] for name in chain(*steps)]
    assert Counter(names) == {f"{row:03d}": 1 for row in range(24)}


def test_where_a_process_has_more_rows_the_other_waits(tmp_path):
    """23 rows in 3 shards: while the reader of two shards goes on, the other repeats a row that does not count."""
    steps, log = run(tmp_path, processes=2, streaming=True, max_steps=16)
    rows = Counter(chain(*steps[:15]))
    assert len(rows) == 23 and [name for name, count in rows.items() if count > 1] == ["shard 0, row 0 (0.png)"]
    assert "shards for" not in log


def test_resume_in_the_same_layout_is_bit_exact_and_in_another_refused(tmp_path):
    options = {"streaming": True, "save_strategy": "steps", "save_steps": 4, "dataloader_num_workers": 1}
    run(tmp_path / "whole", processes=2, **options)
    run(tmp_path / "parts", processes=2, **{**options, "max_steps": 4})
    for other in ({"processes": 1, "gradient_accumulation_steps": 2}, {"processes": 2, "dataloader_num_workers": 2}):
        _, log = run(tmp_path / "parts", resume=True, expect=1, **{**options, **other})
        assert "readers of the stream (processes x dataloader_num_workers), who divide its shards" in log
    run(tmp_path / "parts", processes=2, resume=True, **options)
    files = ["adapter_model.safetensors", "losses.json"]
    whole, parts = ([(tmp_path / name / file).read_bytes() for file in files] for name in ("whole", "parts"))
    assert parts == whole


def test_more_lost_rows_than_allowed_end_the_run(tmp_path):
    """A damaged shard counts with about as many rows as the others have."""
    folder = tmp_path / "shards"
    folder.mkdir()
    data = encoded(dataset(1)[0]["image"])
    for shard in range(8):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for row in range(30):
                member = tarfile.TarInfo(f"{row:03d}.png")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        if shard % 3 == 0:
            path = folder / f"{shard}.tar"
            path.write_bytes(path.read_bytes()[: len(data) + 1400])
    options = {"dataset_name": str(folder), "dataset_streaming": True, "on_bad_image": "skip", "max_steps": 20,
               "per_device_train_batch_size": 16}  # fmt: skip
    _, log = run(tmp_path / "out", expect=1, **options)
    assert "rows had to be left out, more than max_bad_share=0.1" in log and "Left out: shard" in log


def test_a_signal_ends_a_run_on_a_stream_behind_its_last_step(tmp_path):
    """The batches that were fetched for the next step are not lost."""
    options = {
        "streaming": True,
        "dataloader_num_workers": 2,
        "per_device_train_batch_size": 1,
        "save_strategy": "steps",
    }
    options |= {"save_steps": 2, "lr_scheduler_type": "constant", "gradient_accumulation_steps": 2}
    process = start(tmp_path / "parts", max_steps=100_000, **options)
    wait_for(tmp_path / "parts" / "checkpoint-2", process)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143, (tmp_path / "parts" / "log.txt").read_text()
    steps = last_step(tmp_path / "parts") + 2
    run(tmp_path / "parts", resume=True, **{**options, "max_steps": steps})
    run(tmp_path / "whole", **{**options, "max_steps": steps})
    parts, whole = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("parts", "whole"))
    assert all((parts[name] == weight).all() for name, weight in whole.items())
