"""Files of tensors: opened without reading them, read tensor by tensor, written tensor by tensor.

A checkpoint may be larger than memory and swap together. Systems refuse to map such a file as a whole where its pages
could be written to, which is how safetensors and `torch.load(mmap=True)` map it. Here a file is mapped in windows, each
while one of its tensors is in use. Pages are shared with every process that reads the file, until they are written to.
"""

from __future__ import annotations

import errno
import json
import mmap
import pickle
import weakref
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.utils import logging

WINDOW = 1 << 30  # bytes; a tensor that has more is a window of its own
# By their names in safetensors, in the order in which its writer puts them: the widest first.
DTYPES = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
    "F32": torch.float32, "U32": torch.uint32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
DTYPE_ORDER = {dtype: place for place, dtype in enumerate(DTYPES.values())}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which file or key, and what was expected."""


class Place(NamedTuple):
    """Where in a file a tensor lies: bytes from its start, and how they are to be read."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    @property
    def count(self) -> int:
        """Values from the tensor's first to its last, those between them that are not its own included."""
        return 1 + sum((side - 1) * step for side, step in zip(self.shape, self.stride, strict=True))

    @property
    def end(self) -> int:
        return self.offset + self.count * self.dtype.itemsize if self.shape.numel() else self.offset


class _Window:
    """Consecutive bytes of a file."""

    def __init__(self, file: IO[bytes], offset: int):
        self.file, self.end = file, offset
        self.start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        self._mapped: weakref.ref[mmap.mmap] | None = None

    def map(self) -> mmap.mmap:
        """These bytes, copied where they are written to; unmapped with the last tensor that is made of them."""
        mapped = self._mapped and self._mapped()
        if mapped is None:
            size = self.end - self.start
            try:
                mapped = mmap.mmap(self.file.fileno(), size, access=mmap.ACCESS_COPY, offset=self.start)
            except (OSError, ValueError) as error:
                if getattr(error, "errno", None) != errno.ENOMEM:
                    raise CheckpointError(f"{self.file.name} cannot be read ({error}); download it again.") from error
                raise CheckpointError(_no_memory(self.file.name, size)) from error
            self._mapped = weakref.ref(mapped)
        return mapped


class StoredTensor:
    """A tensor in a file; `tensor[...]` reads it. It may be written to, which does not change the file."""

    def __init__(self, place: Place, window: _Window):
        self.place, self.window, self.shape, self.dtype = place, window, place.shape, place.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        place = self.place
        if not place.shape.numel():
            return torch.empty(place.shape, dtype=place.dtype)[index]
        offset = place.offset - self.window.start
        values = torch.frombuffer(self.window.map(), dtype=place.dtype, count=place.count, offset=offset)
        return values.as_strided(place.shape, place.stride)[index]


def open_tensors(path: Path) -> dict[str, Any]:
    """What a `.safetensors` file holds, or the dictionary in a torch pickle (`.bin`, `.pth`, `.ckpt`), which is read
    with `weights_only=True`: tensors as `StoredTensor`, the rest as it is.

    Raises:
        CheckpointError: the file is truncated or not what its name says, or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return _in_windows(path, _safetensors_places(path))
        if not zipfile.is_zipfile(path):  # torch's format before 1.6
            return _dictionary(path, torch.load(path, map_location="cpu", weights_only=True))
        with FakeTensorMode():  # which reads no values
            content = _dictionary(path, torch.load(path, map_location="cpu", weights_only=True))
    except MemoryError as error:
        raise CheckpointError(_no_memory(path, path.stat().st_size)) from error
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} holds more than tensors, which could run code: it is not read. {reason}"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); it may be truncated. Download it again.") from error
    places = {key: _torch_place(value) for key, value in content.items() if isinstance(value, torch.Tensor)}
    return content | _in_windows(path, places)


def _no_memory(path: Path | str, size: int) -> str:
    return (
        f"There is not enough memory to read {path}: {size / 1e9:.2f} GB of it could not be mapped. The file is not at "
        "fault. Free some memory, add swap, or raise the limit (ulimit -v)."
    )


def _dictionary(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__} and not a dictionary of tensors.")
    for wrapper in ("state_dict", "model"):
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    return content


def _safetensors_places(path: Path) -> dict[str, Place]:
    safe_open(path, framework="np")  # checks the header against the file, and maps it for reading alone
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    places = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{path}: {key} has the dtype {entry['dtype']}, which is not supported.")
        shape = torch.Size(entry["shape"])
        stride = torch.empty(shape, device="meta").stride()
        places[key] = Place(8 + length + entry["data_offsets"][0], DTYPES[entry["dtype"]], shape, stride)
    return places


def _torch_place(tensor: torch.Tensor) -> Place:
    offset = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.dtype.itemsize
    return Place(offset, tensor.dtype, tensor.shape, tensor.stride())


def _in_windows(path: Path, places: Mapping[str, Place]) -> dict[str, StoredTensor]:
    file, size, window = open(path, "rb"), path.stat().st_size, None  # noqa: SIM115 (open while a tensor refers to it)
    tensors = {}
    for key, place in sorted(places.items(), key=lambda entry: entry[1].offset):
        if place.end > size:
            raise CheckpointError(
                f"{path} is truncated: {key} ends at byte {place.end:,} of {size:,}. Download it again."
            )
        if window is None or place.end - window.start > WINDOW:
            window = _Window(file, place.offset)
        window.end = max(window.end, place.end)
        tensors[key] = StoredTensor(place, window)
    return {key: tensors[key] for key in places}


class Unread(Protocol):
    """A tensor that says what it will be before it is read."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, index: Any) -> torch.Tensor: ...


def size_of(tensor: Unread) -> int:
    """Bytes of a tensor's values."""
    return tensor.shape.numel() * tensor.dtype.itemsize


def write_safetensors(path: Path, tensors: Mapping[str, Unread], metadata: Mapping[str, str] | None = None) -> None:
    """Write what `safetensors.torch.save_file` would, byte for byte, with one tensor in memory at a time.

    Raises:
        OSError: there is no room.
    """
    names = sorted(tensors, key=lambda name: (DTYPE_ORDER[tensors[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    total = 0
    for name in names:
        tensor, start = tensors[name], total
        total += size_of(tensor)
        entry = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, total]}
        header[name] = entry
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    bar = logging.tqdm(total=total, desc=f"Writing {path.name}", unit="B", unit_scale=True, delay=2)
    with open(path, "wb") as file, bar:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for place, name in enumerate(names, 1):
            tensor = tensors[name][...].detach().cpu().contiguous()
            if (tensor.shape, tensor.dtype) != (tensors[name].shape, tensors[name].dtype):
                raise RuntimeError(f"{name} is not the tensor it was said to be: {tensor.shape}, {tensor.dtype}.")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            bar.set_postfix_str(f"tensor {place} of {len(names)}", refresh=False)
            bar.update(tensor.nbytes)
