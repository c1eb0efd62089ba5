"""Encoding that is killed: no half-written file is read, and what the killed process left is gone after the next start."""

import json
import os
import signal
import socket
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from reca_trainer.data import encoded_shards
from reca_trainer.files import replacing
from tests.reliability.run import _die_at, fork
from tests.test_precompute import colours, stream, write


def encode(folder, number, process_index=0, num_processes=1):
    """Write shards, and die at the so-manyth file operation below the folder; notes how many there were."""
    encoded_shards.ROWS_PER_SHARD = 4
    operations = _die_at(number, folder)
    images = stream(range(10), range(10, 13))
    write(Path(folder) / "shards", images, process_index=process_index, num_processes=num_processes)
    (Path(folder) / "operations.json").write_text(json.dumps(operations[0]))


def run(folder, number=0, **layout):
    folder.mkdir(exist_ok=True)
    process = fork(encode, str(folder), number, *layout.values())
    process.join()
    return process.exitcode


def test_a_kill_at_any_file_operation_is_survived(tmp_path):
    assert run(tmp_path / "whole") == 0
    expected = colours(tmp_path / "whole" / "shards")
    assert sorted(expected) == list(range(13))
    operations = json.loads((tmp_path / "whole" / "operations.json").read_text())
    for number in range(2, operations, max(operations // 6, 1)):
        folder = tmp_path / str(number)
        assert run(folder, number) == -signal.SIGKILL
        for file in (folder / "shards").glob("*.parquet"):
            assert pq.read_metadata(file).num_rows  # whole
        assert run(folder, process_index=0, num_processes=2) == run(folder, process_index=1, num_processes=2) == 0
        assert colours(folder / "shards") == expected
        assert not list((folder / "shards").glob(".*"))


def test_only_what_dead_processes_of_this_machine_left_is_removed(tmp_path):
    dead = fork(print)
    dead.join()
    names = {
        f".file.{socket.gethostname()}-{dead.pid}.part": False,
        f".file.{socket.gethostname()}-{os.getppid()}.part": True,  # at work
        f".file.another-machine-{dead.pid}.part": True,
        f".file.{socket.gethostname()}-backup.part": True,
        f".other.{socket.gethostname()}-{dead.pid}.part": True,  # of another file
    }
    for name in names:
        (tmp_path / name).touch()
    with replacing(tmp_path / "file") as temporary:
        temporary.touch()
    assert {name: (tmp_path / name).exists() for name in names} == names
    with pytest.raises(KeyError), replacing(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise KeyError
    assert (tmp_path / "file").read_text() == "" and not temporary.exists()
