"""Published checkpoint layouts, read lazily and strictly.

A family's `checkpoint_<family>.py` translates file and key names; what all of them need is here: files are opened, not
read, and each tensor is materialised only when transformers' own loader places (casts, quantises) it in the model. Host
memory therefore never holds a second copy of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from reca_trainer.models.unified import UnifiedModel


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which file or key, and what was expected."""


class LazyTensor:
    """A tensor still on disk, with what has to be done to it after reading (reshape, split, …).

    transformers' loader reads it with `tensor[...]`, as it reads safetensors slices.
    """

    def __init__(self, source: Any, transform: Callable[[torch.Tensor], torch.Tensor] | None = None):
        self.source, self.transform = source, transform

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self.source[...]
        return (self.transform(tensor) if self.transform else tensor)[index]

    def map(self, transform: Callable[[torch.Tensor], torch.Tensor]) -> LazyTensor:
        """The same tensor with one more step after reading."""
        before = self.transform
        return LazyTensor(self.source, (lambda t: transform(before(t))) if before else transform)


def open_weights(folder: Path, *names: str) -> dict[str, LazyTensor]:
    """Open the first of `names` that `folder` holds: `x.safetensors`, its sharded `x.safetensors.index.json`, or a
    torch pickle (`.bin`, `.pth`, `.ckpt`), which is read with `weights_only=True`.

    Raises:
        CheckpointError: no such file, a shard is missing, or a file is truncated or not what its name says.
    """
    for name in names:
        for path in (folder / name, folder / f"{name}.index.json"):
            if path.is_file():
                return _open(path)
    raise CheckpointError(f"{folder} holds none of: {', '.join(names)} (nor an .index.json of one of them).")


def _open(path: Path) -> dict[str, LazyTensor]:
    if path.name.endswith(".index.json"):
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        for shard in shards:
            if Path(shard).name != shard:
                raise CheckpointError(f"{path}: shard {shard!r} points outside the checkpoint folder.")
            if not (path.parent / shard).is_file():
                raise CheckpointError(f"{path} lists the shard {shard}, which is not there.")
        return {key: tensor for shard in shards for key, tensor in _open(path.parent / shard).items()}
    try:
        if path.suffix == ".safetensors":
            file = safe_open(path, framework="pt")
            return {key: LazyTensor(file.get_slice(key)) for key in file.keys()}  # noqa: SIM118 (not a dict)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); it may be truncated. Download it again.") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(tensors.get(wrapper), dict):
            tensors = tensors[wrapper]
    return {key: LazyTensor(tensor) for key, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


def load_strict(
    model_class: type[UnifiedModel],
    config: PreTrainedConfig,
    state_dict: dict[str, LazyTensor],
    source: str | Path,
    ignore_missing: Iterable[str] = (),
    **kwargs: Any,
) -> UnifiedModel:
    """Build `model_class` on the meta device and stream `state_dict` into it through transformers' loader.

    Args:
        source: where the weights come from, for messages.
        ignore_missing: keys that may be absent because the model ties or recomputes them.
        kwargs: as for `from_pretrained`: `dtype`, `device_map`, `quantization_config`, …

    Raises:
        CheckpointError: keys are missing, unexpected or wrongly shaped; the message lists them.
    """
    kwargs.setdefault("dtype", torch.float32)
    model, info = model_class.from_pretrained(
        None,
        config=config,
        state_dict=state_dict,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, together with the other problems
        **kwargs,
    )
    mismatched = sorted(f"{key}: {tuple(got)} in the file, {tuple(want)} in the model"
                        for key, got, want in info["mismatched_keys"])  # fmt: skip
    problems = {
        "missing": sorted(set(info["missing_keys"]) - set(ignore_missing)),
        "unexpected": sorted(info["unexpected_keys"]),
        "wrongly shaped": mismatched,
    }
    if any(problems.values()):
        lines = [f"  {kind} ({len(keys)}): {', '.join(keys[:20])}{' …' if len(keys) > 20 else ''}"
                 for kind, keys in problems.items() if keys]  # fmt: skip
        raise CheckpointError(f"The weights in {source} do not fit {model_class.__name__}:\n" + "\n".join(lines))
    return model
