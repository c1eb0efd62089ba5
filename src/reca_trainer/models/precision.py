"""Frozen weights in the precision that autocast computes with, beside trained ones in float32.

`torch.autocast` casts the weights of linear layers and convolutions to bfloat16 at every use. Those that are not trained may
as well be loaded in bfloat16: they take half the memory, and every loss and gradient is the same bit for bit. All else stays
in float32: what is trained, and what autocast leaves as it is, so that embeddings, norms and single parameters still give
float32 states to add to. So do autoencoders, which some families run outside of autocast.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

_requested: ContextVar[torch.dtype | None] = ContextVar("frozen_dtype", default=None)


def default_precision(bf16: bool, has_adapter: bool) -> dict[str, torch.dtype]:
    """Arguments of `from_pretrained` for a model given by name: what is trained needs float32 masters, what is frozen
    does not."""
    if not bf16:
        return {"dtype": torch.float32}
    return {"dtype": torch.bfloat16} if has_adapter else {"dtype": torch.float32, "frozen_dtype": torch.bfloat16}


@contextlib.contextmanager
def loading_frozen_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Models that are made within have their `weights_cast_by_autocast` in `dtype`, into which the loader then casts."""
    token = _requested.set(dtype)
    try:
        yield
    finally:
        _requested.reset(token)


def apply_frozen_dtype(model: PreTrainedModel) -> None:
    """Do what `loading_frozen_in` asks for to a model that has no values yet."""
    model.frozen_dtype = None if is_deepspeed_zero3_enabled() else _requested.get()  # DeepSpeed casts all
    if model.frozen_dtype is not None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in weights_cast_by_autocast(model):
            parameters[name].data = parameters[name].data.to(model.frozen_dtype)


def autocast_frozen(model: PreTrainedModel) -> contextlib.AbstractContextManager:
    """The context in which a model computes outside of a trainer, where its frozen weights have a dtype of their own."""
    if model.frozen_dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, model.frozen_dtype)


def weights_cast_by_autocast(model: PreTrainedModel) -> list[str]:
    """Names of the weights that a full run does not train and that only linear layers and convolutions use, under
    autocast."""
    fixed = tuple(f"{name}." for name in [*model.generation_modules, *model.frozen_modules])
    kept = [f".{name}." for name in model._keep_in_fp32_modules_strict or ()]
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    names = [
        f"{prefix}.{key}"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.Linear | _ConvNd)
        for key, _ in module.named_parameters(recurse=False)
    ]
    return [
        name
        for name in names
        if not (f"{name}.".startswith(fixed) or name in tied or any(part in f".{name}." for part in kept))
    ]
