"""Checkpoints, read lazily and strictly, written shard by shard and atomically.

A family's `conversion_<family>.py` translates file and key names; what all of them need is here: files are opened, not
read, and each tensor is materialised only when transformers' own loader places (casts, quantises) it in the model. Host
memory therefore never holds a second copy of the weights.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from reca_trainer.models.contract import UnifiedModel
from reca_trainer.models.tensor_files import CheckpointError as CheckpointError
from reca_trainer.models.tensor_files import StoredTensor, open_tensors, size_of, write_safetensors

logger = logging.get_logger(__name__)


class LazyTensor:
    """A tensor still on disk, with what has to be done to it after reading (reshape, split, …).

    transformers' loader reads it with `tensor[...]`, as it reads safetensors slices.

    Args:
        source: has a `shape` and a `dtype`, and is read with `source[...]`.
        transform: done to what is read. It is also tried on a meta tensor, to know shape and dtype of the result.
    """

    def __init__(self, source: Any, transform: Callable[[torch.Tensor], torch.Tensor] | None = None):
        self.source, self.transform = source, transform

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self.source[...]
        return (self.transform(tensor) if self.transform else tensor)[index]

    @functools.cached_property
    def meta(self) -> torch.Tensor:
        """What `self[...]` will be, without its values."""
        empty = torch.empty(tuple(self.source.shape), dtype=self.source.dtype, device="meta")
        return self.transform(empty) if self.transform else empty

    @property
    def shape(self) -> torch.Size:
        return self.meta.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.meta.dtype

    def map(self, transform: Callable[[torch.Tensor], torch.Tensor]) -> LazyTensor:
        """The same tensor with one more step after reading."""
        before = self.transform
        return LazyTensor(self.source, (lambda t: transform(before(t))) if before else transform)

    def to(self, dtype: torch.dtype) -> LazyTensor:
        """The same tensor in another dtype."""
        return self if dtype == self.dtype else self.map(lambda tensor: tensor.to(dtype))


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
        try:
            shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is no index of weights ({error!r}). Download it again.") from error
        for shard in shards:
            if Path(shard).name != shard:
                raise CheckpointError(f"{path}: shard {shard!r} points outside the checkpoint folder.")
            if not (path.parent / shard).is_file():
                raise CheckpointError(f"{path} lists the shard {shard}, which is not there.")
        return {key: tensor for shard in shards for key, tensor in _open(path.parent / shard).items()}
    tensors = open_tensors(path)
    return {key: LazyTensor(value) for key, value in tensors.items() if isinstance(value, StoredTensor | torch.Tensor)}


def choose_variant(names: Iterable[str], variant: str | None, source: str | Path) -> str:
    """The checkpoint (a `.pth` file or a folder) that `variant` means among several: `variant` is its name, with or without
    `.pth` and the family's name in front (`1.5b` is `harmon_1.5b.pth`). A single checkpoint needs no choice.

    Raises:
        CheckpointError: it means none of them, or there are several and no `variant`.
    """
    choices = sorted(names)
    if variant is None and len(choices) == 1:
        return choices[0]
    exact = [name for name in choices if variant in (name, name.removesuffix(".pth"))]
    shortened = [name for name in choices if variant == name.removesuffix(".pth").partition("_")[2]]
    if variant is not None and (meant := exact or shortened):
        return meant[0]
    asked = "none was chosen" if variant is None else f"none is {variant!r}"
    kind = ".pth file" if all(name.endswith(".pth") for name in choices) else "folder"
    raise CheckpointError(
        f"One {kind} of {source} is the checkpoint, and {asked}. These are there: {', '.join(choices) or 'none'}. Pass "
        "variant=<name>, or add its name to the model's: owner/name/file.pth, owner/name/folder."
    )


def read_optional_config(folder: Path) -> dict[str, Any]:
    """A `config.json` that a layout can do without: empty where there is none, or none that is JSON, which is logged."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        logger.warning(f"{path} is not read: it is no JSON ({error}).")
        return {}
    return config if isinstance(config, dict) else {}


def weights_of(model: UnifiedModel) -> dict[str, LazyTensor]:
    """A model's weights: those on disk of a model that was opened lazily, else its `state_dict`."""
    if hasattr(model, "lazy_weights"):
        return dict(model.lazy_weights)
    return {name: LazyTensor(tensor) for name, tensor in model.state_dict().items()}


def cast(model: UnifiedModel, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """`weights_of(model)` in `dtype`, by default each in its own. Modules that the family keeps in float32 stay so."""
    weights = weights_of(model)
    if dtype is None:
        return weights
    return {
        name: tensor.to(torch.float32 if _is_kept(model, name) else dtype)
        if tensor.dtype.is_floating_point
        else tensor
        for name, tensor in weights.items()
    }


def _is_kept(model: UnifiedModel, name: str) -> bool:
    """Whether a weight is float32 whatever the model is in."""
    modules = model._keep_in_fp32_modules_strict or ()
    return any(re.search(rf"(?:^|\.){re.escape(module)}\.", name) for module in modules)


def main_dtype(model: UnifiedModel, weights: dict[str, LazyTensor]) -> torch.dtype:
    """The dtype of most of a generator's values; what is frozen may have fewer bits."""
    generator = tuple(f"{name}." for name in model.generation_modules)
    counts: dict[torch.dtype, int] = {}
    for name, tensor in weights.items():
        if f"{name}.".startswith(generator):
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.shape.numel()
    return max(counts, key=lambda dtype: counts[dtype])


def _are_equal(weights: dict[str, LazyTensor], name: str, twin: str) -> bool:
    return twin in weights and torch.equal(weights[name][...], weights[twin][...])


def load_strict(
    model_class: type[UnifiedModel],
    config: PreTrainedConfig,
    state_dict: dict[str, LazyTensor],
    source: str | Path,
    ignore_missing: Iterable[str] = (),
    lazy: bool = False,
    **kwargs: Any,
) -> UnifiedModel:
    """Build `model_class` on the meta device and stream `state_dict` into it through transformers' loader.

    Args:
        source: where the weights come from, for messages.
        ignore_missing: keys that may be absent because the model ties or recomputes them.
        lazy: leave the model on the meta device, read nothing, and give it its weights as `model.lazy_weights`.
        kwargs: as for `from_pretrained`: `dtype`, `device_map`, `quantization_config`, …

    Raises:
        CheckpointError: keys are missing, unexpected or wrongly shaped; the message lists them.
    """
    ignore_missing = set(ignore_missing)
    if lazy:
        with torch.device("meta"):
            model = model_class(config)
        model.lazy_weights = dequantized(state_dict)
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        shapes = {name: tensor.shape for name, tensor in model.lazy_weights.items()}
        ignore_missing |= set(model.all_tied_weights_keys)
        missing, unexpected = expected.keys() - shapes.keys(), shapes.keys() - expected.keys()
        mismatched = [(name, shapes[name], expected[name]) for name in shapes.keys() & expected.keys()
                      if shapes[name] != expected[name]]  # fmt: skip
    else:
        if kwargs.get("dtype") is None:
            kwargs["dtype"] = torch.float32
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=state_dict,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, together with the other problems
            **kwargs,
        )
        missing, unexpected, mismatched = info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"]
    check_fit(model_class, source, set(missing) - ignore_missing, unexpected, mismatched)
    return model


def check_fit(
    model_class: type[UnifiedModel],
    source: str | Path,
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Iterable[tuple[str, torch.Size, torch.Size]],
) -> None:
    """Raises `CheckpointError` that lists the keys, if there are any."""
    problems = {
        "missing": sorted(missing),
        "unexpected": sorted(unexpected),
        "wrongly shaped": sorted(f"{key}: {tuple(shape)} in the file, {tuple(expected)} in the model"
                                 for key, shape, expected in mismatched),
    }  # fmt: skip
    if any(problems.values()):
        lines = [f"  {kind} ({len(keys)}): {', '.join(keys[:20])}{' …' if len(keys) > 20 else ''}"
                 for kind, keys in problems.items() if keys]  # fmt: skip
        raise CheckpointError(f"The weights in {source} do not fit {model_class.__name__}:\n" + "\n".join(lines))


class _Packed:
    """A tensor that bitsandbytes stored in 4 or 8 bits, as a `LazyTensor`'s source: reading it dequantises it."""

    def __init__(self, weight: LazyTensor, parts: dict[str, LazyTensor]):
        self.weight, self.parts = weight, parts
        state = None if "SCB" in parts else self.read_state()
        self.shape = weight.shape if state is None else state.shape
        self.dtype = torch.float32 if state is None else state.dtype

    def read_state(self) -> Any:
        from bitsandbytes.functional import QuantState  # takes seconds to import, and few checkpoints need it

        return QuantState.from_dict({name: tensor[...] for name, tensor in self.parts.items()}, device="cpu")

    def __getitem__(self, index: Any) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

        if "SCB" in self.parts:
            return int8_vectorwise_dequant(self.weight[...], self.parts["SCB"][...])[index]
        return dequantize_4bit(self.weight[...], self.read_state())[index]


def dequantized(state_dict: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """`state_dict` with every weight that bitsandbytes packed put in place of its parts."""
    weights: dict[str, LazyTensor] = {}
    packed: dict[str, dict[str, LazyTensor]] = {}
    for key, tensor in state_dict.items():
        name, is_part, part = key.rpartition(".weight.")
        if not is_part and key.endswith((".SCB", ".weight_format")):
            name, is_part, part = key.rpartition(".")
        if is_part:
            packed.setdefault(f"{name}.weight", {})[part] = tensor
        else:
            weights[key] = tensor
    for name, parts in packed.items():
        parts.pop("weight_format", None)
        if name not in weights:
            raise CheckpointError(f"{name}.{next(iter(parts), 'weight_format')} is there without {name}.")
        try:
            weights[name] = LazyTensor(_Packed(weights[name], parts))
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{name} is packed in parts that bitsandbytes does not write: {sorted(parts)}."
            ) from error
    return weights


def write_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a tokenizer as published checkpoints have it, for code that stands on transformers 4 or on a tokenizer
    written in Python: with the files of its vocabulary, and every added token in `tokenizer_config.json`."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for name in ("backend", "is_local", "local_files_only", "processor_class"):
        config.pop(name, None)
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 takes a dictionary under this name
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    config["added_tokens_decoder"] = {
        str(index): {flag: getattr(token, flag) for flag in flags}
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


# Layers of an autoencoder as latent diffusion (LDM) names them, and FLUX, KL-16 and MAGVIT-v2 after it → as diffusers
# does, in order of application; i is a number that both have.
LDM_NAMES = (
    ("encoder.down.{i}.block.", "encoder.down_blocks.{i}.resnets."),
    ("encoder.down.{i}.attn.", "encoder.down_blocks.{i}.attentions."),
    ("encoder.down.{i}.downsample.", "encoder.down_blocks.{i}.downsamplers.0."),
    ("decoder.up.{i}.block.", "decoder.up_blocks.{i}.resnets."),
    ("decoder.up.{i}.upsample.", "decoder.up_blocks.{i}.upsamplers.0."),
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.", ".mid_block.attentions.0."),
    (".nin_shortcut.", ".conv_shortcut."),
    (".norm_out.", ".conv_norm_out."),
    (".attentions.{i}.norm.", ".attentions.{i}.group_norm."),
    (".attentions.{i}.q.", ".attentions.{i}.to_q."),
    (".attentions.{i}.k.", ".attentions.{i}.to_k."),
    (".attentions.{i}.v.", ".attentions.{i}.to_v."),
    (".attentions.{i}.proj_out.", ".attentions.{i}.to_out.0."),
)
# Linear layers in diffusers, 1 × 1 convolutions in LDM.
ATTENTION_WEIGHT = re.compile(r"\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight$")


def autoencoder_from_ldm(weights: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """An autoencoder's weights in latent diffusion's layout, in that of diffusers."""
    names = _rename_layers(weights, LDM_NAMES)
    return {
        names[key]: tensor.map(lambda weight: weight.flatten(1)) if ATTENTION_WEIGHT.search(names[key]) else tensor
        for key, tensor in weights.items()
    }


def autoencoder_to_ldm(weights: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Inverse of `autoencoder_from_ldm`."""
    names = _rename_layers(weights, [(ours, theirs) for theirs, ours in reversed(LDM_NAMES)])
    return {
        names[key]: tensor.map(lambda weight: weight[:, :, None, None]) if ATTENTION_WEIGHT.search(key) else tensor
        for key, tensor in weights.items()
    }


def _rename_layers(keys: Iterable[str], names: Iterable[tuple[str, str]]) -> dict[str, str]:
    """From key to renamed key. The decoder's levels count from the output in one layout, towards it in the other."""
    matches = (re.search(r"\.up(?:_blocks)?\.(\d+)\.", key) for key in keys)
    levels = 1 + max((int(match[1]) for match in matches if match), default=0)

    def rename(key: str, source: str, target: str) -> str:
        pattern = re.escape(source).replace(r"\{i\}", r"(\d+)")
        if not (match := re.search(pattern, key)):
            return key
        number = match[1] if match.groups() else ""
        if target.startswith("decoder.up"):
            number = str(levels - 1 - int(number))
        return key[: match.start()] + target.replace("{i}", number) + key[match.end() :]

    renamed = {}
    for key in keys:
        renamed[key] = key
        for source, target in names:
            renamed[key] = rename(renamed[key], source, target)
    return renamed


def write_sharded(
    tensors: dict[str, LazyTensor],
    folder: Path,
    name: str,
    max_shard_size: int | str | None = None,
    metadata: dict[str, str] | None = None,
) -> dict[str, str]:
    """Write tensors, one in memory at a time, as the file `name`, or above `max_shard_size` as shards of it and an index.

    Returns:
        The file of each tensor, as in the index.
    """
    limit = float("inf") if max_shard_size is None else convert_file_size_to_int(max_shard_size)
    shards: list[dict[str, LazyTensor]] = [{}]
    size = 0
    for key in sorted(tensors):
        if shards[-1] and size + size_of(tensors[key]) > limit:
            shards.append({})
            size = 0
        shards[-1][key] = tensors[key]
        size += size_of(tensors[key])
    stem = name.removesuffix(".safetensors")
    files = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    files = [name] if len(shards) == 1 else files
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(folder / file, shard, metadata)
    weight_map = {key: file for file, shard in zip(files, shards, strict=True) for key in shard}
    if len(shards) > 1:
        write_index(folder / f"{name}.index.json", tensors, weight_map)
    return weight_map


def write_index(path: Path, tensors: dict[str, LazyTensor], weight_map: dict[str, str]) -> None:
    """Write which file has which tensor, as transformers does."""
    sizes = {
        "total_parameters": sum(tensor.shape.numel() for tensor in tensors.values()),
        "total_size": sum(map(size_of, tensors.values())),
    }
    path.write_text(json.dumps({"metadata": sizes, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n")


def write_weights(
    model: UnifiedModel, folder: Path, dtype: torch.dtype | None = None, max_shard_size: int | str = "5GB"
) -> None:
    """Write `weights_of(model)` and the config in `save_pretrained` form, holding one tensor in memory at a time.

    Args:
        dtype: of what is written; by default each tensor's own. Modules that the family keeps in float32 stay so.
    """
    weights = cast(model, dtype)
    # A configuration may call weights tied that the file has apart; then it is the file that counts.
    twins = {name: twin for name, twin in model.all_tied_weights_keys.items() if name in weights}
    apart = {name for name, twin in twins.items() if not _are_equal(weights, name, twin)}
    weights = {name: tensor for name, tensor in weights.items() if name in apart or name not in twins}
    write_sharded(weights, folder, "model.safetensors", max_shard_size, {"format": "pt"})
    config = type(model.config).from_dict(model.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for part in (config, config.get_text_config()) if apart else ():
        part.tie_word_embeddings = False
    config.architectures = [type(model).__name__]
    config.dtype = main_dtype(model, weights)
    config.save_pretrained(folder)
