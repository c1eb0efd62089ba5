"""LoRA on a generator: which layers, in which precision, and the check that it is those and no others."""

from __future__ import annotations

import copy
import functools

import torch
from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn

from reca_trainer.models.unified import UnifiedModel


def attach(model: UnifiedModel, peft_config: PeftConfig) -> PeftModel:
    """Put an adapter on `model`'s generator.

    Where `peft_config` leaves them open, `target_modules` becomes `model.lora_target_modules` and `modules_to_save`
    becomes `model.lora_modules_to_save`. Trainable weights are float32 whatever the base is in: bfloat16 masters lose
    updates of about 1e-4.
    """
    peft_config = copy.deepcopy(peft_config)
    peft_config.task_type = None  # PEFT's task classes expect a language model's forward
    if getattr(peft_config, "target_modules", None) is None:
        peft_config.target_modules = model.lora_target_modules
    if getattr(peft_config, "modules_to_save", None) is None and model.lora_modules_to_save:
        peft_config.modules_to_save = list(model.lora_modules_to_save)
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        for name, parameter in model.named_parameters():  # it casts all that is not quantised to float32
            if parameter.dtype != dtypes[name]:
                parameter.data = parameter.data.to(dtypes[name])
    model = get_peft_model(model, peft_config)
    # Embeddings are never resized here; left to decide that itself, PEFT asks the Hub for the base's config.
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model


def unwrap(model: nn.Module) -> UnifiedModel:
    """The family's model behind a `PeftModel`, or `model` itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def check_trainable(model: nn.Module) -> tuple[int, int]:
    """Make sure that a run trains the generator and only it.

    Returns:
        Number of trainable parameters and of all parameters.

    Raises:
        ValueError: nothing is trainable, or parts of a disjoint understanding half are; the message names them.
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
    if not base.shares_weights:
        frozen = tuple(f"{name}." for name in base.understanding_modules)
        wrong = sorted({name for name, _ in trainable if name.startswith(frozen)})
        if wrong:
            raise ValueError(
                f"RecA trains the generator, but {len(wrong)} weights of the understanding half would be trained too, "
                f"such as {', '.join(wrong[:5])}. Use target_modules={base.lora_target_modules!r}."
            )
    return sum(p.numel() for _, p in trainable), sum(p.numel() for p in model.parameters())


def default_dtype(bf16: bool, has_adapter: bool) -> torch.dtype:
    """Of a model given by name: what is trained needs float32 masters, a frozen base does not."""
    return torch.bfloat16 if bf16 and has_adapter else torch.float32
