"""An adapter merged into its base, one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import BitsAndBytesConfig

from reca_trainer.adapters import QUANTIZATION_FILE, load_adapter, read_quantization
from reca_trainer.models.auto import AutoUnifiedProcessor, adapter_base, open_lazily, resolve
from reca_trainer.models.contract import UnifiedModel, UnifiedProcessor
from reca_trainer.models.weights import LazyTensor
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
    max_shard_size: int | str = "5GB",
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
            `"quantized"`: as either default, and the sum is quantised again: small, and loads as it is.
        dtype: of the weights written; by default as stored, and bfloat16 for what is left unquantised beside `into=
            "quantized"`.
        layout: `"transformers"`, our own `save_pretrained` form, or `"published"`, the family's, for its other tools. The
            latter is written through a temporary copy on disk.
        quantization_config: for `into="quantized"`; by default the one of the training, or NF4.
        processor: to write beside the weights; by default the adapter's, or else the base's.
        token: for adapter and base on the Hub; by default the one that `hf auth login` stored.

    Returns:
        `output_dir`.

    Raises:
        ValueError: the choices contradict each other, or the adapter or the base.
        CheckpointError: the adapter does not fit the base.
        FileExistsError: `output_dir` is not empty.
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
    model.lazy_weights = _merged(model, folder, lambda name: dtype or stored[name][...].dtype)
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
    """`model.lazy_weights` with the adapter merged in, by PEFT's own layers, when each tensor is read."""
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = _placeholder(parameter)
    weights = dict(model.lazy_weights)
    peft_model = load_adapter(model, adapter)
    trains_bias = getattr(peft_model.active_peft_config, "bias", "none") != "none"
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save[module.active_adapters[0]].state_dict()
            for key, tensor in trained.items():
                full_name = f"{name}.{key}"
                weights[full_name] = LazyTensor(tensor).map(lambda t, name=full_name: t.to(dtype_of(name)))
        elif isinstance(module, BaseTunerLayer):
            parameters = dict(module.get_base_layer().named_parameters(recurse=False))
            stored = {key: weights[f"{name}.{key}"] for key in parameters}
            if trains_bias and "bias" in parameters:
                stored["bias"] = LazyTensor(parameters["bias"].detach())
            for key in parameters:
                merged = LazyTensor(_MergedParameter(module, key, stored))
                weights[f"{name}.{key}"] = merged.map(lambda t, name=f"{name}.{key}": t.to(dtype_of(name)))
    return weights


def _placeholder(tensor: torch.Tensor) -> nn.Parameter:
    """Of the shape of `tensor`, on the CPU, where PEFT puts an adapter beside it; a matrix takes up one element."""
    shape = tensor.shape
    return nn.Parameter(torch.zeros(()).expand(shape) if len(shape) > 1 else torch.zeros(shape), requires_grad=False)


class _MergedParameter:
    """A parameter of one layer with its adapter merged in, in float32, as a `LazyTensor`'s source."""

    def __init__(self, layer: BaseTunerLayer, key: str, stored: dict[str, LazyTensor]):
        self.layer, self.key, self.stored = layer, key, stored

    def __getitem__(self, index: Any) -> torch.Tensor:
        base = self.layer.get_base_layer()
        before = {key: tensor[...] for key, tensor in self.stored.items()}
        for key, tensor in before.items():
            setattr(base, key, nn.Parameter(tensor.float(), requires_grad=False))
        with torch.no_grad():
            self.layer.merge(safe_merge=True)
        merged = getattr(base, self.key).detach()
        self.layer.merged_adapters.clear()
        self.layer._caches.clear()
        for key, tensor in before.items():
            setattr(base, key, _placeholder(tensor))
        return merged[index]


def _as_quantized(model: UnifiedModel, config: BitsAndBytesConfig, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """`model.lazy_weights`, each weight that `config` quantises quantised and dequantised when it is read."""
    from bitsandbytes.functional import int8_vectorwise_dequant
    from bitsandbytes.nn import Int8Params, Params4bit  # takes seconds to import
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    def round_trip(weight: torch.Tensor) -> torch.Tensor:
        weight = weight.to(dtype or weight.dtype)
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
