"""Files of tensors: larger than memory, hostile, and written as safetensors itself writes them."""

import json
import os
import resource
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from reca_trainer.models import tensor_files
from reca_trainer.models.tensor_files import DTYPES, open_tensors, write_safetensors
from reca_trainer.models.weights import CheckpointError, LazyTensor, open_weights


def sparse_safetensors(path, size):
    """A file that takes up next to nothing: four ones, then zeros up to `size` bytes."""
    header = {
        "small": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "large": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [16, 16 + size]},
    }
    encoded = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded + torch.ones(4).numpy().tobytes())
        file.truncate(8 + len(encoded) + 16 + size)


def memory_and_swap():
    with open("/proc/meminfo") as file:
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
    return sizes["MemTotal"] + sizes["SwapTotal"]


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="a system that does not say how much memory it has")
def test_a_file_larger_than_memory_and_swap_opens(tmp_path):
    path = tmp_path / "model.safetensors"
    sparse_safetensors(path, memory_and_swap() + (1 << 30))
    weights = open_weights(tmp_path, "model.safetensors")
    assert weights["large"].shape.numel() > memory_and_swap() // 2 and weights["large"].dtype == torch.bfloat16
    assert torch.equal(weights["small"][...], torch.ones(4))
    assert path.stat().st_blocks * 512 < 1 << 20


READ_WITHIN = """
import resource, sys
from pathlib import Path
from reca_trainer.models import tensor_files
folder, limit, tensor_files.WINDOW = Path(sys.argv[1]), int(sys.argv[2]), 1 << 25
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + limit,) * 2)
tensors = tensor_files.open_tensors(folder / "model.pth")
values = [tensors[f"layer.{place}"][...][-1].item() for place in range(24)]
assert values == list(range(24)), values
for refused in (lambda: tensors["whole"][...], lambda: tensor_files.open_tensors(folder / "model.safetensors")):
    try:
        refused()
    except tensor_files.CheckpointError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits on address space are Linux'")
def test_what_does_not_fit_into_memory_is_not_called_damaged(tmp_path):
    """384 MB of layers are read in 256 MB of address space, window by window; what has more in one piece is not."""
    tensors = {f"layer.{place}": torch.full((1 << 22,), float(place)) for place in range(24)}
    torch.save({**tensors, "whole": torch.zeros(80 << 20)}, tmp_path / "model.pth")
    sparse_safetensors(tmp_path / "model.safetensors", 1 << 29)
    words = [sys.executable, "-c", READ_WITHIN, str(tmp_path), str(256 << 20)]
    process = subprocess.run(words, capture_output=True, text=True, timeout=120)
    (tmp_path / "model.pth").unlink()
    assert process.returncode == 0, process.stderr
    messages = [
        f"There is not enough memory to read {tmp_path}/model.{kind} GB" for kind in ("pth: 0.34", "safetensors: 0.54")
    ]
    assert [line.partition(" of it")[0] for line in process.stdout.splitlines()] == messages


@pytest.mark.parametrize("new_format", [True, False])
def test_pickles_of_views_parameters_and_scalars(tmp_path, new_format):
    table = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "table": table,
        "transposed": table.t(),
        "row": table[1],
        "parameter": torch.nn.Parameter(table.bfloat16()),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
    }
    torch.save({"model": tensors, "epoch": 3}, tmp_path / "x.pth", _use_new_zipfile_serialization=new_format)
    weights = open_weights(tmp_path, "x.pth")
    assert weights.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (weights[name].shape, weights[name].dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(weights[name][...], tensor)


def test_writing_to_a_tensor_leaves_the_file_as_it_is(tmp_path):
    save_file({"a": torch.ones(1000), "b": torch.ones(1000)}, tmp_path / "model.safetensors")
    tensors = open_tensors(tmp_path / "model.safetensors")
    tensors["a"][...].zero_()
    assert all(torch.equal(tensor, torch.ones(1000)) for tensor in load_file(tmp_path / "model.safetensors").values())
    assert torch.equal(tensors["b"][...], torch.ones(1000))


def test_a_truncated_file_and_one_that_is_no_dictionary_are_refused(tmp_path):
    save_file({"a": torch.ones(1000)}, tmp_path / "model.safetensors")
    torch.save({"a": torch.ones(1000)}, tmp_path / "model.pth")
    for name in ("model.safetensors", "model.pth"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-500])
        with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
            open_weights(tmp_path, name)
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list and not a dictionary of tensors"):
        open_weights(tmp_path, "list.pth")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is no index of weights"):
        open_weights(tmp_path, "model.safetensors")


def test_a_pickle_whose_tensor_ends_behind_the_file_is_refused(tmp_path):
    """As somebody could make it by hand: a header of more values than the entry has."""
    torch.save({"a": torch.ones(8)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as file:
        parts = {name: file.read(name) for name in file.namelist()}
    pickled = next(name for name in parts if name.endswith("data.pkl"))
    parts[pickled] = parts[pickled].replace(b"K\x08", b"J\xff\xff\xff\x7f")
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as file:
        for name, content in parts.items():
            file.writestr(name, content)
    with pytest.raises(CheckpointError, match=r"x\.pth"):
        open_weights(tmp_path, "x.pth")["a"][...]


def test_what_is_written_is_byte_for_byte_what_safetensors_writes(tmp_path):
    torch.manual_seed(0)
    tensors = {}
    for place, (name, dtype) in enumerate(DTYPES.items()):
        if not name.startswith(("F8_E8M0", "C64")):  # which save_file of this torch does not know, or cannot draw
            tensors[f"layer.{place}.{name}"] = torch.randint(0, 2, (3, place + 1)).to(dtype)
            tensors[f"a.{name}"] = torch.zeros((), dtype=dtype)
    tensors["größe"] = torch.randn(0, 4)
    tensors["transposed"] = torch.randn(4, 5).t()
    lazy = {name: LazyTensor(tensor) for name, tensor in tensors.items()}
    for metadata in (None, {"format": "pt"}):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", metadata)
        write_safetensors(tmp_path / "ours", lazy, metadata)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    class Drawn:
        shape, dtype = torch.Size([4 << 20]), torch.float32

        def __getitem__(self, index):
            return torch.ones(self.shape)[index]

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_safetensors(tmp_path / "model.safetensors", {str(place): Drawn() for place in range(24)})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # kB, of 400 MB
    assert tensor_files.open_tensors(tmp_path / "model.safetensors")["23"][...].sum() == 4 << 20
