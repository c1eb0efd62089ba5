"""An adapter merged into its base, one tensor at a time."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from torch import nn
from transformers import BitsAndBytesConfig

from reca_trainer.adapters import QUANTIZATION_FILE, check_kind, load_adapter, name_in_base, read_quantization
from reca_trainer.models.auto import AutoUnifiedProcessor, adapter_base, open_lazily, resolve
from reca_trainer.models.contract import UnifiedModel, UnifiedProcessor
from reca_trainer.models.weights import LazyTensor, open_weights
from reca_trainer.saving.export import write_model


def merge_adapter(
    model_or_path: UnifiedModel | str | os.PathLike | None,
    adapter: str | os.PathLike,
    output_dir: str | os.PathLike,
    into: str | None = None,
    dtype: torch.dtype | None = None,
    *,
    layout: str = "transformers",
    quantization_config: BitsAndBytesConfig | None = None,
    processor: UnifiedProcessor | None = None,
    max_shard_size: int | str | None = None,
    token: str | None = None,
) -> Path:
    """Write a model with an adapter merged into it, one tensor at a time, in float32, rounded once.

    What QLoRA learnt belongs to the *quantised* base, whose weights are off the original ones by several per cent: merged
    into the original, the adapter's output changes by that much. On a random 0.2B model, velocities differ from the
    adapter's own by 1e-6 (dequantised NF4, written in float32), 0.5 % (the same in bfloat16) and 29 % (original base);
    LoRA into its base, by 1e-6 and 0.4 % (`benchmarks/adapters.py`).

    Args:
        model_or_path: the base: folder, Hub id or loaded model. `None`: the one that the adapter names. That one is taken
            at the revision the adapter was trained on.
        adapter: folder or Hub id of a PEFT adapter.
        output_dir: where to write. It appears when it is complete; it must not exist before, or be empty.
        into: what to merge into.
            `"base"`: the base as stored. The default for an adapter trained on an unquantised base.
            `"dequantized"`: the base as it was in training, quantised and dequantised. The default for QLoRA.
            `"quantized"`: the default base; the merged weights are then quantised again, so that the model is small.
        dtype: of the weights written; by default as stored, and bfloat16 for what is left unquantised beside `into=
            "quantized"`.
        layout: `"transformers"`, our own `save_pretrained` form, or `"published"`, the family's, for its other tools.
        quantization_config: for `into="quantized"`; by default the one of the training, or NF4.
        processor: to write beside the weights; by default the adapter's, or else the base's.
        max_shard_size: of a file; by default 5 GB, and in a published layout what that has.
        token: for adapter and base on the Hub; by default the one that `hf auth login` stored.

    Returns:
        `output_dir`.

    Raises:
        ValueError: the choices contradict each other, or the adapter or the base.
        CheckpointError: the adapter does not fit the base.
        FileExistsError: `output_dir` is not empty.
        OSError: there is not enough room for it.
    """
    folder = resolve(adapter, token=token)
    trained_on, trained_dtype = read_quantization(folder)
    if into not in (None, "base", "dequantized", "quantized"):
        raise ValueError(f'into is "base", "dequantized" or "quantized", not {into!r}.')
    into = into or ("base" if trained_on is None else "dequantized")
    if into == "dequantized" and trained_on is None:
        raise ValueError(f'{adapter} was trained on an unquantised base (no {QUANTIZATION_FILE}): use into="base".')
    hub: dict[str, Any] = {"token": token}
    if not isinstance(model_or_path, UnifiedModel):
        model_or_path, hub = adapter_base(folder, model_or_path and str(model_or_path), hub)
    model = open_lazily(model_or_path, **hub)
    stored = model.lazy_weights
    was_quantized = getattr(model.config, "quantization_config", None) is not None
    if into == "base" and was_quantized:
        raise ValueError(f'{model.name_or_path} is itself stored quantised: use into="dequantized".')
    if into != "base" and trained_on is not None and not was_quantized:
        model.lazy_weights = _as_quantized(model, trained_on, trained_dtype)
    model.lazy_weights = _merged(model, folder, lambda name: dtype or stored[name].dtype)
    if processor is None:
        processor = AutoUnifiedProcessor.from_pretrained(folder, base_model=str(model.name_or_path), **hub)
    if into == "quantized":
        quantization_config = (
            quantization_config
            or trained_on
            or BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        )
    elif quantization_config is not None:
        raise ValueError('quantization_config is for into="quantized".')
    return write_model(model, processor, output_dir, dtype, layout, quantization_config, max_shard_size)


def _merged(model: UnifiedModel, adapter: Path, dtype_of: Callable[[str], torch.dtype]) -> dict[str, LazyTensor]:
    """`model.lazy_weights` with the adapter merged in, by PEFT's own layers, when each tensor is read.

    Raises:
        ValueError: an adapter of this kind cannot be merged into a base as it is stored.
    """
    check_kind(PeftConfig.from_pretrained(adapter))
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = _placeholder(parameter)
    weights = dict(model.lazy_weights)
    for name, tensor in open_weights(adapter, SAFETENSORS_WEIGHTS_NAME).items():
        name = name_in_base(name)
        if name in weights:  # a bias that was trained itself
            weights[name] = tensor
    load_adapter(model, adapter)
    layers: dict[str, BaseTunerLayer] = {}  # the outermost of each base layer: PEFT nests them
    merged = dict(weights)
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save[module.active_adapters[0]].state_dict()
            merged |= {f"{name}.{key}": LazyTensor(tensor) for key, tensor in trained.items()}
        elif isinstance(module, BaseTunerLayer):
            layers.setdefault(name_in_base(name), module)
    for name, layer in layers.items():
        stored = {key: weights[f"{name}.{key}"] for key, _ in layer.get_base_layer().named_parameters(recurse=False)}
        merged |= {f"{name}.{key}": LazyTensor(_MergedParameter(layer, key, stored)) for key in stored}
    return {
        name: tensor if tensor is model.lazy_weights[name] else tensor.to(dtype_of(name))
        for name, tensor in merged.items()
    }


def _placeholder(tensor: torch.Tensor) -> nn.Parameter:
    """A parameter of the shape of `tensor`, on the CPU, so that PEFT puts the adapter there too; a matrix takes up the
    memory of one element."""
    shape = tensor.shape
    return nn.Parameter(torch.zeros(()).expand(shape) if len(shape) > 1 else torch.zeros(shape), requires_grad=False)


class _MergedParameter:
    """A parameter of one layer with its adapter merged in, in float32, as a `LazyTensor`'s source."""

    def __init__(self, layer: BaseTunerLayer, key: str, stored: dict[str, LazyTensor]):
        self.layer, self.key, self.stored = layer, key, stored
        self.shape, self.dtype = stored[key].shape, torch.float32

    def __getitem__(self, index: Any) -> torch.Tensor:
        # Merging marks a layer, each kind in its own way: a copy is merged, which shares only the placeholders.
        placeholders = self.layer.get_base_layer()
        base = copy.deepcopy(placeholders, {id(parameter): parameter for parameter in placeholders.parameters()})
        layer = copy.deepcopy(self.layer, {id(placeholders): base})
        for key, tensor in self.stored.items():
            values = tensor[...].to(torch.float32, copy=True)  # some kinds add to the weights in place
            setattr(base, key, nn.Parameter(values, requires_grad=False))
        with torch.no_grad():
            for part in reversed(list(layer.modules())):
                if isinstance(part, BaseTunerLayer):
                    part.merge(safe_merge=True)
        return getattr(layer.get_base_layer(), self.key).detach()[index]


def _as_quantized(model: UnifiedModel, config: BitsAndBytesConfig, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """`model.lazy_weights`, each weight that `config` quantises quantised and dequantised when it is read."""
    from bitsandbytes.functional import int8_vectorwise_dequant
    from bitsandbytes.nn import Int8Params, Params4bit  # takes seconds to import
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    def round_trip(weight: torch.Tensor) -> torch.Tensor:
        weight = weight.to(dtype or weight.dtype)
        if weight.is_meta:
            return weight
        if config.load_in_8bit:
            packed = Int8Params(weight, requires_grad=False).to("cpu")
            return int8_vectorwise_dequant(packed.data, packed.SCB).to(weight.dtype)
        packed = Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            quant_storage=config.bnb_4bit_quant_storage,
        ).to("cpu")
        return dequantize_bnb_weight(packed)

    weights = dict(model.lazy_weights)
    spared = HfQuantizer.get_modules_to_not_convert(model, config.llm_int8_skip_modules, model._keep_in_fp32_modules)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and should_convert_module(name, spared):
            weights[f"{name}.weight"] = weights[f"{name}.weight"].map(round_trip)
    return weights
