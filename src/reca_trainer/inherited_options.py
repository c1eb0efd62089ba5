"""Options of `transformers.TrainingArguments` that mean nothing in a RecA run: refused, so that none is taken in vain."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import TrainingArguments

_NO_PREDICTIONS = "an evaluation keeps the losses of every sample and no predictions"
_OWN_SAMPLER = "rows are drawn by task and size (see reca_trainer.data.sampling)"

# Option: why any other value than the default changes nothing here, or what to do instead.
MEANINGLESS = {
    "label_smoothing_factor": "the losses are those that the families were trained with",
    "neftune_noise_alpha": "the dense prompt is made of an image's embeddings, which get no noise",
    "use_liger_kernel": "its kernels replace modules of language models that it knows, and it knows none of these",
    "liger_kernel_config": "its kernels replace modules of language models that it knows, and it knows none of these",
    "use_cache": "training reads every sequence once",
    "train_sampling_strategy": _OWN_SAMPLER,
    "length_column_name": _OWN_SAMPLER,
    "average_tokens_across_devices": "targets are always counted over all processes; see token_weighting",
    "include_num_input_tokens_seen": "a batch's tensors are pixels; images_per_second is logged",
    "label_names": "the losses know their targets",
    "bf16_full_eval": "losses are evaluated in the precision of training, so that they compare",
    "fp16_full_eval": "losses are evaluated in the precision of training, so that they compare",
    "prediction_loss_only": _NO_PREDICTIONS,
    "include_for_metrics": _NO_PREDICTIONS,
    "batch_eval_metrics": _NO_PREDICTIONS,
    "eval_accumulation_steps": _NO_PREDICTIONS,
    "eval_use_gather_object": _NO_PREDICTIONS,
    "eval_do_concat_batches": _NO_PREDICTIONS,
    "do_predict": "call RecATrainer.predict",
}

# Of `accelerator_config`, what concerns data loaders that accelerate does not see here.
MEANINGLESS_FOR_ACCELERATOR = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler")


def refuse_meaningless(args: TrainingArguments) -> None:
    """Raises `ValueError` for an option that would be ignored."""
    defaults = {field.name: _default(field) for field in dataclasses.fields(TrainingArguments)}
    for name, reason in MEANINGLESS.items():
        value = getattr(args, name, None)
        if name in defaults and value not in (defaults[name], None):
            raise ValueError(f"{name}={value!r} would change nothing: {reason}. Leave it out.")
    accelerator = args.accelerator_config
    standard = type(accelerator)()
    for name in MEANINGLESS_FOR_ACCELERATOR:
        value = getattr(accelerator, name, None)
        if value != getattr(standard, name, None):
            raise ValueError(
                f"accelerator_config {name}={value!r} would change nothing: {_OWN_SAMPLER}. Leave it out."
            )
    if args.fp16 and args.use_cpu:
        raise ValueError("fp16=True needs a GPU; on a CPU train in float32, or with bf16=True.")
    if args.max_steps == 0:
        raise ValueError("max_steps=0 trains nothing; to measure a model call RecATrainer.evaluate.")


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
