"""LoRA on a generator: which layers, in which precision, the check that it is those and no others, and merging."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import BitsAndBytesConfig

from reca_trainer.models.auto import AutoUnifiedProcessor, adapter_base, open_lazily, resolve
from reca_trainer.models.checkpoint import (
    CheckpointError,
    LazyTensor,
    load_strict,
    write_weights,
    written_whole,
)
from reca_trainer.models.unified import UnifiedModel, UnifiedProcessor

QUANTIZATION_FILE = "quantization_config.json"  # beside an adapter: how the base it was trained on was quantised


def attach(model: UnifiedModel, peft_config: PeftConfig) -> PeftModel:
    """Put a new adapter on `model`'s generator.

    Where `peft_config` leaves `target_modules` open, they become `model.lora_target_modules`; `layers_to_transform` then
    picks layers among those. Trainable weights are float32 whatever the base is in: bfloat16 masters lose updates of
    about 1e-4.

    `modules_to_save` is left as it is, so that by default nothing but the adapter is trained. Training BAGEL's `vae2llm`,
    `llm2vae` and `time_embedder` in full beside it brought nothing on the embedded default: after 200 steps the held-out
    reconstruction loss was 0.344 with and 0.337 without them at a learning rate of 1e-3, and 0.398 and 0.399 at 1e-4
    (`benchmarks/adapters.py modules`); and PEFT does not combine adapters that have such modules.

    Raises:
        ValueError: no module matches; the message names what could have.
    """
    peft_config = copy.deepcopy(peft_config)
    peft_config.task_type = None  # PEFT's task classes expect a language model's forward
    if getattr(peft_config, "target_modules", None) is None:
        peft_config.target_modules = model.lora_target_modules
        if getattr(peft_config, "layers_to_transform", None) is not None:  # PEFT takes it for lists of names only
            peft_config.target_modules = _targets_in_layers(model, peft_config)
            peft_config.layers_to_transform = peft_config.layers_pattern = None
    if getattr(peft_config, "revision", None) is None:
        peft_config.revision = getattr(model.config, "_commit_hash", None)
    try:
        peft_model = get_peft_model(model, peft_config)
    except ValueError as error:
        raise ValueError(
            f"target_modules={peft_config.target_modules!r}: {error} The generator's linear layers are "
            f"{_some(_generator_linears(model))}."
        ) from error
    return _prepare_to_train(peft_model)


def load_adapter(model: UnifiedModel, folder: str | os.PathLike, is_trainable: bool = False) -> PeftModel:
    """Put the adapter saved in `folder` on `model`. Further ones are loaded, weighted and switched with PEFT's own
    `load_adapter`, `add_weighted_adapter` and `set_adapter`.

    Raises:
        CheckpointError: `folder` has no safetensors, or was trained on another model or another revision of it.
    """
    folder = Path(folder)
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        raise CheckpointError(
            f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}"
            + (
                f"; {', '.join(others)} is a pickle, which can run code when it is read, and is refused."
                if others
                else "."
            )
        )
    config = PeftConfig.from_pretrained(folder)
    commit = getattr(model.config, "_commit_hash", None)
    if (
        config.revision
        and commit
        and config.revision != commit
        and config.base_model_name_or_path == model.name_or_path
    ):
        raise CheckpointError(
            f"The adapter in {folder} was trained on revision {config.revision} of {model.name_or_path}, and the model "
            f"given is revision {commit}. Load the former: AutoUnifiedModel.from_pretrained({str(folder)!r})."
        )
    misfit = f"The adapter in {folder} does not fit {model.name_or_path or type(model).__name__}: "
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
            stored = set(file.keys())
        peft_model = PeftModel.from_pretrained(model, folder, is_trainable=is_trainable)
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(misfit + str(error)) from error
    expected = set(get_peft_model_state_dict(peft_model, save_embedding_layers=False))
    if stored != expected:
        raise CheckpointError(
            misfit + f"it lacks {_some(expected - stored)}, and has {_some(stored - expected)} besides."
        )
    if is_trainable:
        peft_model = _prepare_to_train(peft_model)
        set_peft_model_state_dict(peft_model, load_file(folder / SAFETENSORS_WEIGHTS_NAME))  # again, now unrounded
    return peft_model


def _prepare_to_train(model: PeftModel) -> PeftModel:
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    # Embeddings are never resized here; left to decide that itself, PEFT asks the Hub for the base's config.
    save = functools.partial(model.save_pretrained, save_embedding_layers=False)

    def save_pretrained(save_directory: str | os.PathLike, **kwargs: Any) -> None:
        save(save_directory, **kwargs)
        base = unwrap(model)
        quantization = getattr(base.config, "quantization_config", None)
        if quantization is not None and kwargs.get("is_main_process", True):
            settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
            settings = {**settings, "dtype": str(base.config.dtype or base.dtype).removeprefix("torch.")}
            (Path(save_directory) / QUANTIZATION_FILE).write_text(json.dumps(settings, indent=2) + "\n")

    model.save_pretrained = save_pretrained
    model.create_or_update_model_card = lambda output_dir: (
        None
    )  # PEFT's shows the base's path; `hub.model_card` is ours
    return model


def _generator_linears(model: UnifiedModel) -> list[str]:
    return [name for name, _ in model.named_modules() if re.fullmatch(model.lora_target_modules, name)]


def _targets_in_layers(model: UnifiedModel, peft_config: PeftConfig) -> list[str]:
    layers = peft_config.layers_to_transform
    layers = {layers} if isinstance(layers, int) else set(layers)
    pattern = rf"(?:^|\.){peft_config.layers_pattern or r'[^.]*'}\.(\d+)\."
    indices = {name: re.search(pattern, name) for name in _generator_linears(model)}
    found = [name for name, match in indices.items() if match and int(match[1]) in layers]
    if not found:
        known = sorted({int(match[1]) for match in indices.values() if match})
        raise ValueError(f"layers_to_transform={sorted(layers)} names no layer of the generator; it has {known}.")
    return found


def _some(names: Any, count: int = 5) -> str:
    names = sorted(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if names[count:] else "") or "nothing"


def unwrap(model: nn.Module) -> UnifiedModel:
    """The family's model behind a `PeftModel`, or `model` itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def check_trainable(model: nn.Module) -> tuple[int, int]:
    """Make sure that a run trains the generator and only it.

    Returns:
        Number of trainable parameters and of all parameters.

    Raises:
        ValueError: nothing is trainable, or something outside the generator is; the message names it.
    """
    base = unwrap(model)
    trainable = [
        (name.removeprefix("base_model.model."), p) for name, p in model.named_parameters() if p.requires_grad
    ]
    if not trainable:
        raise ValueError(
            "Nothing would be trained: no parameter requires a gradient. Give a peft_config whose target_modules match "
            f"the generator ({base.lora_target_modules!r} does), or no peft_config to train all of it."
        )
    generator = tuple(f"{name}." for name in base.generation_modules)
    if wrong := {name for name, _ in trainable if not f"{name}.".startswith(generator)}:
        raise ValueError(
            f"RecA trains the generator, but {len(wrong)} weights outside of it would be trained too: {_some(wrong)}. "
            f"Use target_modules={base.lora_target_modules!r}."
        )
    return sum(p.numel() for _, p in trainable), sum(p.numel() for p in model.parameters())


def default_dtype(bf16: bool, has_adapter: bool) -> torch.dtype:
    """Of a model given by name: what is trained needs float32 masters, a frozen base does not."""
    return torch.bfloat16 if bf16 and has_adapter else torch.float32


# --- merging ---


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


def write_model(
    model: UnifiedModel,
    processor: UnifiedProcessor,
    output_dir: str | os.PathLike,
    dtype: torch.dtype | None = None,
    layout: str = "transformers",
    quantization_config: BitsAndBytesConfig | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a model that `open_lazily` opened; arguments as for `merge_adapter`."""
    if layout not in ("transformers", "published"):
        raise ValueError(f'layout is "transformers" or "published", not {layout!r}.')
    if layout == "published" and quantization_config is not None:
        raise ValueError('Quantised weights have no published layout: use layout="transformers".')
    with written_whole(output_dir) as folder:
        if quantization_config is not None:
            config = type(model.config).from_dict(model.config.to_dict())
            config.__dict__.pop("quantization_config", None)
            options = {"dtype": dtype or torch.bfloat16, "quantization_config": quantization_config}
            loaded = load_strict(type(model), config, model.lazy_weights, model.name_or_path, **options)
            loaded.save_pretrained(folder, max_shard_size=max_shard_size)
            processor.save_pretrained(folder)
        elif layout == "transformers":
            write_weights(model, folder, dtype, max_shard_size)
            processor.save_pretrained(folder)
        else:
            (folder / "copy").mkdir()
            write_weights(model, folder / "copy", dtype, max_shard_size)
            # Its tensors are memory-mapped, so that writing them again takes no memory, and put in as they are stored:
            # loading has changed the dtype of some.
            loaded = type(model).from_pretrained(folder / "copy", dtype="auto")
            for shard in (folder / "copy").glob("*.safetensors"):
                loaded.load_state_dict(load_file(shard), strict=False, assign=True)
            family = importlib.import_module(type(model).__module__.rpartition(".")[0])
            family.write_published(loaded, processor, folder)
            del loaded
            shutil.rmtree(folder / "copy")
    return Path(output_dir)


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
            own = dict(module.get_base_layer().named_parameters(recurse=False))
            stored = {key: weights[f"{name}.{key}"] for key in own}
            if trains_bias and "bias" in own:
                stored["bias"] = LazyTensor(own["bias"].detach())
            for key in own:
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


def read_quantization(adapter: Path) -> tuple[BitsAndBytesConfig | None, torch.dtype | None]:
    """How the base of an adapter was quantised in training, and what dtype it had before; `None` if it was not."""
    path = adapter / QUANTIZATION_FILE
    if not path.is_file():
        return None, None
    settings = json.loads(path.read_text())
    dtype = getattr(torch, settings.pop("dtype", "float32"))
    return BitsAndBytesConfig.from_dict(settings), dtype
