"""Options of `transformers.TrainingArguments`, and arguments of `Trainer`, that mean nothing in a RecA run: refused."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from transformers import TrainingArguments

NO_PREDICTIONS = "an evaluation keeps the losses of every sample and no predictions"
SAMPLER = "rows are drawn by task and size (see reca_trainer.data.sampling)"
LIGER = "its kernels replace modules of language models that it knows, and it knows none of these"
PRECISION = "losses are evaluated in the precision of training, so that they compare"

# Option: why any other value than the default changes nothing here, or what to do instead.
MEANINGLESS = {
    "label_smoothing_factor": "the losses are those that the families were trained with",
    "neftune_noise_alpha": "the dense prompt is made of an image's embeddings, which get no noise",
    "use_liger_kernel": LIGER,
    "liger_kernel_config": LIGER,
    "use_cache": "training reads every sequence once",
    "train_sampling_strategy": SAMPLER,
    "length_column_name": SAMPLER,
    "average_tokens_across_devices": "targets are always counted over all processes; see token_weighting",
    "include_num_input_tokens_seen": "a batch's tensors are pixels; images_per_second is logged",
    "label_names": "the losses know their targets",
    "remove_unused_columns": "a row holds what the collator needs and no other column",
    "bf16_full_eval": PRECISION,
    "fp16_full_eval": PRECISION,
    "prediction_loss_only": NO_PREDICTIONS,
    "include_for_metrics": NO_PREDICTIONS,
    "batch_eval_metrics": NO_PREDICTIONS,
    "eval_accumulation_steps": NO_PREDICTIONS,
    "eval_use_gather_object": NO_PREDICTIONS,
    "eval_do_concat_batches": NO_PREDICTIONS,
    "enable_jit_checkpoint": "SIGTERM ends every run after the current step, with a checkpoint",
    "do_train": "a run trains; to measure a model call RecATrainer.evaluate",
    "do_predict": "call RecATrainer.predict",
}

# Entries of `accelerator_config` about data loaders, which accelerate does not see here.
MEANINGLESS_FOR_ACCELERATOR = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler")

# Parts of the names of optimizers that read these options.
USE_OPTIM_ARGS = ("anyprecision", "sgd", "adagrad", "rmsprop", "galore", "apollo", "ademamix", "grok", "stable")
USE_OPTIM_ARGS += ("schedule_free", "adamw_torch_4bit", "adamw_torch_8bit")
USE_OPTIM_TARGET_MODULES = ("galore", "apollo")
PARALLELISM = ("tp_size", "cp_size", "sp_size")  # entries of `parallelism_config` that split a sample over GPUs


# Arguments of `Trainer` that `RecATrainer` does not have, and why.
NO_ARGUMENTS = {
    "model_init": "it would be called again by every train(). Pass the model, or where to load it from",
    "compute_loss_func": "a loss is what the model's forward returns, weighted. Override RecATrainer.compute_loss",
    "preprocess_logits_for_metrics": "an evaluation keeps losses, and no logits",
}


def refuse_arguments(others: dict[str, Any]) -> None:
    """Raises `TypeError` for arguments that `RecATrainer` does not have."""
    for name in others:
        reason = f": {NO_ARGUMENTS[name]}" if name in NO_ARGUMENTS else ""
        raise TypeError(f"{name} is no argument of RecATrainer{reason}.")


def refuse_meaningless(args: TrainingArguments) -> None:
    """Raises `ValueError` for an option that would be ignored."""
    defaults = {field.name: _default(field) for field in dataclasses.fields(args)}
    reasons = {name: reason for name, reason in MEANINGLESS.items() if getattr(args, name, None) is not None}
    reasons = {name: reason for name, reason in reasons.items() if getattr(args, name) != defaults.get(name)}
    if args.optim_args and not any(part in args.optim for part in USE_OPTIM_ARGS):
        reasons["optim_args"] = f"optim={args.optim.value!r} takes none"
    if args.optim_target_modules and not any(part in args.optim for part in USE_OPTIM_TARGET_MODULES):
        reasons["optim_target_modules"] = f"optim={args.optim.value!r} acts on all trained weights"
    if args.do_eval and args.eval_strategy == "no":
        reasons["do_eval"] = "set eval_strategy to evaluate while training, or call RecATrainer.evaluate"
    if args.fsdp_config and not args.fsdp:
        reasons["fsdp_config"] = "fsdp is not set"
    if args.local_rank not in (-1, int(os.environ.get("LOCAL_RANK", -1))):
        reasons["local_rank"] = "a launcher says it in the environment variable LOCAL_RANK"
    for name, reason in reasons.items():
        raise ValueError(f"{name}={getattr(args, name)!r} would change nothing: {reason}. Leave it out.")
    accelerator = args.accelerator_config
    standard = type(accelerator)()
    for name in MEANINGLESS_FOR_ACCELERATOR:
        value = getattr(accelerator, name, None)
        if value != getattr(standard, name, None):
            raise ValueError(f"accelerator_config {name}={value!r} would change nothing: {SAMPLER}. Leave it out.")
    for name in PARALLELISM:
        if (size := getattr(getattr(args, "parallelism_config", None), name, 1)) > 1:
            raise ValueError(
                f"parallelism_config {name}={size} is not supported: no family splits a sample over GPUs. Use DDP, FSDP2 or "
                "DeepSpeed ZeRO."
            )
    if args.save_on_each_node:
        raise ValueError(
            "save_on_each_node=True is not supported: one process writes checkpoints, and all machines share output_dir."
        )
    if "tpu_metrics_debug" in args.debug:
        raise ValueError("debug='tpu_metrics_debug' needs a TPU, which no family has been tried on. Leave it out.")
    if args.fsdp and args.device.type == "cpu":
        raise ValueError(f"fsdp={args.fsdp!r} needs GPUs: on CPUs nothing would be sharded. Leave it out.")
    if args.fp16 and args.use_cpu:
        raise ValueError("fp16=True needs a GPU; on a CPU train in float32, or with bf16=True.")
    if args.max_steps == 0:
        raise ValueError("max_steps=0 trains nothing; to measure a model call RecATrainer.evaluate.")


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
