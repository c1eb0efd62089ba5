"""Distributed checkpoints, looked through before torch reads them: it unpickles their index, and each value in them that is
no tensor, without any restriction."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

# What an index is made of, by module.
INDEX = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}  # fmt: skip


def check_shards(checkpoint: Path) -> None:
    """Raises `ValueError` if reading a checkpoint's shards would make anything but tensors and plain values."""
    for path in checkpoint.glob("*/.metadata"):
        try:
            with open(path, "rb") as file:
                index: Metadata = _Index(file).load()
            for place, stored in index.storage_data.items():
                if isinstance(index.state_dict_metadata[place.fqn], BytesStorageMetadata):
                    with open(path.parent / stored.relative_path, "rb") as file:
                        file.seek(stored.offset)
                        torch.load(io.BytesIO(file.read(stored.length)), weights_only=True)
        except Exception as error:  # whatever an index makes of it that was made to harm
            name = path.parent.name
            raise ValueError(f"{checkpoint} is refused: {name} holds more than tensors, and may run code. {error}") from error


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in INDEX.get(module, ()):
            raise pickle.UnpicklingError(f"It asks for {module}.{name}.")
        return super().find_class(module, name)
