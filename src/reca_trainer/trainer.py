"""`RecATrainer`: the loss, term by term; what is logged and evaluated."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin, broadcast_object_list
from datasets import Dataset
from peft import PeftConfig, PeftModel
from PIL import Image
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import BitsAndBytesConfig, Trainer, trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalPrediction, set_seed
from transformers.utils import logging

from reca_trainer import adapters
from reca_trainer.callbacks import (
    CollapseAlarm,
    PreviewCallback,
    ReconstructionScores,
    UnderstandingProbe,
    WeightAverage,
    shield_run,
)
from reca_trainer.config import RecAConfig
from reca_trainer.data import collator, encoded_shards, latent_cache
from reca_trainer.data.collator import UnifiedCollator
from reca_trainer.data.rows import RowDataset
from reca_trainer.data.sampling import SamplingPlan, TaskBatchSampler
from reca_trainer.data.streaming import StreamingBatches
from reca_trainer.data.task_datasets import Images, TaskDatasets, target_rule
from reca_trainer.held_out_losses import HeldOutLosses, check_metric, open_eval_sets, sets_of
from reca_trainer.images import ImageError, list_problems
from reca_trainer.inherited_options import refuse_arguments
from reca_trainer.interruption import Interrupted, ignore_interrupts
from reca_trainer.models.auto import AutoUnifiedModel, AutoUnifiedProcessor, gets_weights_from_first_process
from reca_trainer.models.common.condition_dropout import draw_condition_dropout
from reca_trainer.models.contract import UnifiedModel, UnifiedProcessor
from reca_trainer.models.precision import default_precision
from reca_trainer.saving.hub_uploads import HubUploads
from reca_trainer.saving.run_checkpoints import RunCheckpoints, make_output_dir
from reca_trainer.tasks import TASKS

logger = logging.get_logger(__name__)

NOTES = (*collator.NOTES, "timesteps_per_image", "supervised", "share")  # of a batch, for the trainer and not the model


class RecATrainer(RunCheckpoints, HeldOutLosses, HubUploads, Trainer):
    """Trains a unified multimodal model by Reconstruction Alignment (arXiv 2509.07295).

    Args:
        model: a `UnifiedModel`, a `PeftModel` around one, or a folder or Hub id to load.
        args: a `RecAConfig`; by default one named after the model.
        data_collator: rows to batch; by default `UnifiedCollator(processing_class)`.
        train_dataset: any `datasets` dataset with an image column; or one per task, `{"reconstruct": …, "caption": …,
            "generate": …, "edit": …}`. By default `args.dataset_name`.
        eval_dataset: likewise, or several by names of your own, `{"faces": …, "rooms": …}`, whose metrics are called
            `eval_faces_loss` and so on; by default `args.eval_size` rows held out of the training set.
        processing_class: the family's processor; by default loaded from where the model is from.
        peft_config: adapter to train instead of the whole generator. Its `target_modules` default to the generator's
            linear layers.
        quantization_config: for a model given by name; quantises it while loading, and needs a `peft_config`.
        compute_metrics: called after every evaluation with an `EvalPrediction` whose `predictions` are the losses of all
            samples, float32 arrays by the name of their term; what it returns is logged.
        judge: called with prompts and the images made from them, says which follow: `True`, `False`, or `None` where it
            cannot tell. Previews show it, and with `score_images` evaluations log `eval_prompts_followed`.

    Raises:
        ValueError: the data does not fit the loss weights, or the wrong weights would be trained.
    """

    _tag_names = ("reca-trainer", "reconstruction-alignment")

    def __init__(
        self,
        model: str | os.PathLike | UnifiedModel | PeftModel,
        args: RecAConfig | None = None,
        data_collator: Any = None,
        train_dataset: Images | Mapping[str, Images] | None = None,
        eval_dataset: Images | Mapping[str, Any] | None = None,
        processing_class: UnifiedProcessor | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        judge: Callable[[Sequence[str], Sequence[Image.Image]], list[bool | None]] | None = None,
        **others: Any,
    ):
        refuse_arguments(others)
        if not isinstance(model, str | os.PathLike | UnifiedModel | PeftModel):
            raise TypeError(
                f"model is a folder, a Hub id, a UnifiedModel or a PeftModel around one, not {type(model).__name__}."
            )
        if args is not None and not isinstance(args, RecAConfig):
            raise TypeError(f"args is a RecAConfig, not {type(args).__name__}: it takes the same arguments and more.")
        if args is None:
            name = str(model) if isinstance(model, str | os.PathLike) else unwrap_name(model)
            args = RecAConfig(output_dir=f"{Path(name).name}-reca")
        make_output_dir(args)
        if args.push_to_hub:  # what is wrong with the Hub need not wait for the model
            self.args = args
            self.init_hf_repo()
        self.images = TaskDatasets.open(train_dataset, args)
        eval_images = None if eval_dataset is None else open_eval_sets(eval_dataset, args)
        if eval_images is None and args.eval_size:
            self.images, eval_images = self.images.split(args.eval_size, args.seed)
        if eval_images is None:
            if args.eval_strategy != "no":
                raise ValueError(
                    f"eval_strategy={args.eval_strategy.value!r} needs images: pass an eval_dataset, or set eval_size to hold "
                    "some out."
                )
            args.eval_on_start = False  # recipes set it, and a user who turns evaluation off means all of it
        check_metric(args, judge is not None)
        if judge is not None and not (args.preview_steps or args.score_images):
            raise ValueError("A judge has nothing to look at: set preview_steps or score_images, or leave it out.")
        self.judge = judge
        if self.images.is_streaming and args.max_steps <= 0:
            raise ValueError("A stream does not say how long it is: set max_steps.")

        if processing_class is None:
            name = str(model) if isinstance(model, str | os.PathLike) else adapters.unwrap(model).name_or_path
            if not name:
                raise ValueError("This model was not loaded from anywhere; pass its processing_class.")
            processing_class = AutoUnifiedProcessor.from_pretrained(name)
        if args.processor_kwargs:
            processing_class = processing_class.with_arguments(**args.processor_kwargs)
        if isinstance(model, str | os.PathLike):
            if quantization_config is not None and peft_config is None:
                raise ValueError("A quantised model cannot be trained itself; pass a peft_config for its adapter.")
            # What is wrong with the images need not wait for the model.
            self.images.check_batches(processing_class, args)
            for images in sets_of(eval_images):
                images.check_sizes(processing_class, args)
            init = dict(args.model_init_kwargs or {})
            if "dtype" not in init:
                init |= default_precision(args.bf16, peft_config is not None)
            if quantization_config is None and not args.cache_latents and gets_weights_from_first_process():
                init.setdefault("device_map", "meta")
            model = AutoUnifiedModel.from_pretrained(
                model, quantization_config=quantization_config, is_trainable=True, **init
            )
        elif quantization_config is not None:
            raise ValueError("quantization_config acts while a model is loaded; pass the model by name or path.")
        base = adapters.unwrap(model)
        i2t = float(base.shares_weights) if args.image_to_text_weight is None else args.image_to_text_weight
        self.loss_weights = {name: getattr(args, task.weight_option) for name, task in TASKS.items()} | {
            "caption": i2t
        }
        if self.loss_weights["caption"] and not base.shares_weights:
            raise ValueError(
                f"image_to_text_weight={self.loss_weights['caption']:g} would train nothing: the understanding of "
                f"{type(base).__name__} is frozen, and its answers go through no trained weight. Leave it 0."
            )
        self.task_pattern = args.task_pattern(self.loss_weights)
        for task in self.task_pattern:
            if task not in base.tasks:
                raise ValueError(
                    f"{type(base).__name__} cannot do the task {task!r}; it can do {', '.join(base.tasks)}. Leave "
                    f"{TASKS[task].weight_option} 0."
                )
        self.images.check(self.task_pattern)
        if args.ddp_find_unused_parameters is None:  # one of several tasks may not reach every trained weight
            args.ddp_find_unused_parameters = len(self.task_pattern) > 1

        if isinstance(model, PeftModel):
            if peft_config is not None:
                raise ValueError("The model already has an adapter; pass it without peft_config to go on training it.")
            model = adapters.prepare(model)
        elif peft_config is not None:
            set_seed(args.seed)  # an adapter starts from random weights
            model = adapters.attach(model, peft_config)
        else:
            model.freeze_understanding()
        adapters.freeze(model, args.freeze_modules or ())
        trained, total = adapters.check_trainable(model)
        logger.info(f"Training {trained:,} of {total:,} parameters ({trained / total:.2%}).")
        halves = {str(p.dtype) for p in model.parameters() if p.requires_grad and p.dtype.itemsize < 4}
        if halves:
            logger.warning(
                f"Trained weights are {', '.join(sorted(halves))}: most steps are smaller than they can tell apart, and are "
                "lost. Load the model in float32 and train with bf16=True."
            )

        if args.cache_latents:
            latent_cache.check_encoders(base)
            if data_collator is not None or is_deepspeed_zero3_enabled():
                cause = "a data_collator of your own may change images" if data_collator else "ZeRO-3 shards encoders"
                raise ValueError(f"cache_latents encodes every image once, before the first step, but {cause}.")
        if args.timesteps_per_image > 1 and not base.supports_timesteps_per_image:
            raise ValueError(
                f"timesteps_per_image={args.timesteps_per_image}: the loss of {type(base).__name__} draws one corruption "
                "an image. Leave it 1."
            )

        if args.condition_token_dropout is None:
            args.condition_token_dropout = base.condition_token_dropout if args.reca_weight else 0.0
        if args.condition_token_dropout and not base.supports_condition_token_dropout:
            raise ValueError(
                f"condition_token_dropout={args.condition_token_dropout:g}: {type(base).__name__} reads its whole condition. "
                "Leave it 0."
            )

        if args.torch_compile:
            compile_layers(base, backend=args.torch_compile_backend, mode=args.torch_compile_mode)

        self.weight_average: WeightAverage | None = None
        self.resumed_from: str | None = None
        self._encoded: Dataset | None = None
        self._terms = {mode: torch.zeros(len(TASKS), 2, dtype=torch.float64) for mode in ("train", "eval")}
        self.images_seen, self.skipped_images, self.nonfinite_steps = 0, 0, 0  # of all processes
        self.texts_cut = 0  # likewise
        self._sources, self._leave_out = [], False  # of the current step
        self._images_at_last_log, self._data_seconds, self._last_log = 0, 0.0, time.perf_counter()
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or UnifiedCollator(processing_class),
            train_dataset=self.images,
            eval_dataset=eval_images,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_metrics=compute_metrics,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self._check_optimizer()
        self.can_return_loss, self.label_names = True, []
        self.model_accepts_loss_kwargs = True  # see `training_step`
        if args.n_gpu > 1:
            raise ValueError("RecATrainer runs one process per GPU: start it with `accelerate launch`.")
        if args.ema_decay:
            if is_deepspeed_zero3_enabled():
                raise ValueError("ema_decay needs weights that ZeRO-3 takes apart; use FSDP2, or leave it 0.")
            self.weight_average = WeightAverage(self, args.ema_decay)
            self.add_callback(self.weight_average)  # the first, so that what others look at is the average
        self.add_callback(CollapseAlarm(args.collapse_threshold))
        if args.preview_steps and is_deepspeed_zero3_enabled():
            logger.warning(
                "No previews are drawn: ZeRO-3 gathers sharded weights for training steps alone. Use FSDP2."
            )
        elif args.preview_steps:
            self.add_callback(PreviewCallback(self))
        if args.score_images:
            self.add_callback(ReconstructionScores(self))
        if base.shares_weights and self.images.serves("caption"):
            self.add_callback(UnderstandingProbe(self))
        if args.max_nonfinite_steps and self.is_deepspeed_enabled:
            raise ValueError("max_nonfinite_steps cannot take a step back that DeepSpeed has taken; leave it 0.")
        if args.max_nonfinite_steps and ("lomo" in args.optim or args.optim.endswith("_layerwise")):
            raise ValueError(
                f"max_nonfinite_steps cannot take a step back that optim={args.optim.value!r} takes during the backward "
                "pass; leave it 0."
            )
        base.add_model_tags(list(self._tag_names))

    def _check_optimizer(self) -> None:
        """Raises `ValueError` for an optimizer that was made for other weights than those that are trained."""
        if self.optimizer is None:
            return
        trained = {id(parameter) for parameter in self.model.parameters() if parameter.requires_grad}
        given = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        if not trained & given:
            raise ValueError(
                "None of the optimizer's parameters is trained. With a peft_config the adapter's weights are new: make the "
                "optimizer from a PeftModel, or pass optimizer_cls_and_kwargs."
            )

    def add_callback(self, callback: Any) -> None:
        super().add_callback(callback)
        for callback in self.callback_handler.callbacks:
            shield_run(callback)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        arguments = super()._build_accelerator_args(**kwargs)
        # A backend from the arguments or the environment would compile the model as a whole; see `compile_layers`.
        backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
        if backend.lower() != "no":
            logger.warning(
                f"ACCELERATE_DYNAMO_BACKEND={backend} is not used: it would compile the model as a whole, and batches of "
                "every task and shape anew. Set torch_compile=True, which compiles layer by layer."
            )
        arguments["dynamo_plugin"] = TorchDynamoPlugin(backend="NO")
        return arguments

    def train(self, *args: Any, **kwargs: Any):
        """As `Trainer.train`, but for the ids of special tokens in the model's configuration, which stay as they are."""
        with special_tokens_kept():
            return super().train(*args, **kwargs)

    # --- the loss ---

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """L = λ_reca · L_reca + λ_i2t · L_image-to-text + λ_t2i · L_text-to-image + λ_edit · L_edit, one term a micro-batch.

        `L_reca = L_gen(G([E(x_und), instruction]), x_gen)` is the model's own generation loss, conditioned on its own
        understanding embeddings of the same image (paper, equation 2); it is computed in the model's `forward`.

        A micro-batch counts by its share of all the step's supervised targets of its task, over micro-batches and
        processes, so that accumulated and distributed batches give the loss of one large batch; with
        `token_weighting="micro_batch"` all of a step count alike.
        """
        task, notes = inputs["task"], {name: inputs[name] for name in NOTES if name in inputs}
        output = model(**{name: value for name, value in inputs.items() if name not in NOTES})
        mode = "train" if model.training else "eval"
        if torch.isfinite(output.loss):
            self._record(mode, task, output.loss, notes["supervised"])
        else:
            name = TASKS[task].loss_name.replace("_", " ")
            self._not_finite(f"The {name} is {output.loss.item()}", notes["sources"], may_skip=model.training)
        loss = self.loss_weights[task] * output.loss * notes["share"]
        return (loss, output) if return_outputs else loss

    def _not_finite(self, problem: str, sources: list[str], may_skip: bool = True) -> None:
        """Raises `FloatingPointError`, unless the step may be left out."""
        problem = f"{problem} at step {self.state.global_step + 1} on {', '.join(sources)}."
        if not may_skip or self.nonfinite_steps >= self.args.max_nonfinite_steps:
            raise FloatingPointError(
                f"{problem} Lower the learning rate, or train in bfloat16 rather than float16. "
                f"({self.nonfinite_steps} such steps were left out; max_nonfinite_steps allows some.)"
            )
        logger.warning(f"{problem} The step is left out.")
        self._leave_out = True

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As in `Trainer`. A number of items tells it that the loss is a share of the step's, as `compute_loss` makes it;
        without one it would divide the loss by the number of micro-batches."""
        return super().training_step(model, inputs, num_items_in_batch=1)

    def _get_grad_norm(self, model, grad_norm=None):
        """As in `Trainer`; comes before the optimizer, so a gradient that is not finite is dropped here."""
        norm = super()._get_grad_norm(model, grad_norm)
        scaled = self.accelerator.scaler is not None  # float16 expects overflows, and has its own way with them
        value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not (math.isfinite(value) or scaled or self._leave_out):
            self._not_finite(f"The gradient's norm is {value}", self._sources)
        if self.args.max_nonfinite_steps:  # the loss may be finite on other processes
            count = torch.tensor(float(self._leave_out), device=self.args.device)
            if self.accelerator.reduce(count, "sum") > 0:
                self.nonfinite_steps += 1
                if not scaled:
                    model.zero_grad()
            self._leave_out = False
        return norm

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Fetch one step's micro-batches, draw their corruptions and work out each one's share of the step."""
        started = time.perf_counter()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._data_seconds += time.perf_counter() - started
        targets, micro_batches = torch.zeros(2, len(TASKS), dtype=torch.float64)
        problems: list[str] = []
        lost_rows = sum(batch.pop("lost_rows", 0) for batch in batches)
        for batch in batches:
            problems += self._note_skipped(batch)
            if self.args.timesteps_per_image > 1:
                batch["timesteps_per_image"] = self.args.timesteps_per_image
            self._draw_corruption(batch, self.args.condition_token_dropout)
            index = TASKS[batch["task"]].index
            targets[index] += batch["supervised"]
            micro_batches[index] += not batch["repeated"]
        images = sum(len(batch["seeds"]) for batch in batches)
        stops = self.interruption.cause is not None
        cut = sum(batch.get("texts_cut", 0) for batch in batches)
        counts = torch.cat([targets, micro_batches, torch.tensor([images, len(problems) + lost_rows, cut, stops])])
        *counts, images, skipped, cut, stops = self.accelerator.reduce(counts.to(device, torch.float32), "sum").tolist()
        if stops:
            raise Interrupted
        self._check_bad_share(int(images), int(skipped), problems)
        if cut and not self.texts_cut:
            logger.warning("Some texts are longer than this model takes and lose their end; texts_cut counts them.")
        self.texts_cut += int(cut)
        targets, micro_batches = counts[: len(TASKS)], counts[len(TASKS) :]
        self._sources = [source for batch in batches for source in batch["sources"]]
        for batch in batches:
            index = TASKS[batch["task"]].index
            if self.args.token_weighting == "micro_batch":
                share = float(not batch["repeated"])
            else:
                share = batch["supervised"] / max(targets[index], 1) * micro_batches[index]
            # Gradients are averaged over processes, hence the factor.
            batch["share"] = share / sum(micro_batches) * self.accelerator.num_processes
        return batches, None

    def _draw_corruption(self, batch: dict[str, Any], condition_token_dropout: float = 0.0) -> None:
        """Every sample has its own seed, so its draws depend neither on its batch nor on the number of processes."""
        model = adapters.unwrap(self.model)
        generators = [torch.Generator().manual_seed(seed) for seed in batch["seeds"]]
        batch["corruption"] = model.sample_corruption(batch, generators)
        if condition_token_dropout and batch["task"] == "reconstruct":
            batch["corruption"] |= draw_condition_dropout(condition_token_dropout, len(generators), generators)
        # A sample that several processes work on, so that each has something to do, counts on the first of them.
        batch["supervised"] = 0 if batch.get("repeated") else model.count_supervised(batch, batch["corruption"])
        batch.setdefault("repeated", False)

    def _record(self, mode: str, task: str, loss: torch.Tensor, supervised: int) -> None:
        terms = self._terms[mode] = self._terms[mode].to(loss.device)
        terms[TASKS[task].index] += torch.stack([loss.detach().double() * supervised, loss.new_tensor(supervised)])

    def _mean_terms(self, mode: str) -> dict[str, float]:
        """The recorded mean of every term over all processes since the last call, unweighted."""
        sums = self.accelerator.reduce(self._terms[mode].float().to(self.args.device), "sum").tolist()
        self._terms[mode].zero_()
        return {
            TASKS[task].loss_name: total / count for task, (total, count) in zip(TASKS, sums, strict=True) if count
        }

    def _note_skipped(self, batch: dict[str, Any]) -> list[str]:
        problems = batch.pop("skipped", [])
        for problem in problems:
            logger.warning(f"Left out: {problem}")
        return problems

    def _check_bad_share(self, images: int, skipped: int, problems: list[str]) -> None:
        """Raises `ImageError` once so many rows of all processes had to be left out that they are no exceptions."""
        self.images_seen += images
        self.skipped_images += skipped
        seen = self.images_seen + self.skipped_images
        if skipped and seen >= 100 and self.skipped_images > self.args.max_bad_share * seen:
            headline = (
                f"{self.skipped_images} of {seen} rows had to be left out, more than max_bad_share="
                f"{self.args.max_bad_share:g} allows"
            )
            raise ImageError(list_problems(problems, headline))

    # --- data ---

    def get_train_dataloader(self) -> DataLoader:
        return self._dataloader(self.images, self._train_batch_size, training=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        images = self.eval_dataset if eval_dataset is None else eval_dataset
        if images is None:
            raise ValueError("Evaluation needs images: pass eval_dataset, or set eval_size to hold some out.")
        images = self.eval_dataset[images] if isinstance(images, str) else open_eval_sets(images, self.args)
        return self._dataloader(images, self.args.eval_batch_size, training=False)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return self.get_eval_dataloader(test_dataset)

    def _dataloader(self, images: TaskDatasets, batch_size: int, training: bool) -> DataLoader:
        args = self.args
        tasks = self.task_pattern
        if not training:
            tasks = {task: 1 for task in tasks if images.serves(task)}
            images.check(tasks)
            if missing := [TASKS[task].loss_name for task in self.task_pattern if task not in tasks]:
                logger.warning_once(f"The held-out images have nothing for {', '.join(missing)}: not evaluated.")
        instructions = args.read_instructions()
        plan = SamplingPlan(
            tasks,
            batch_size=batch_size,
            num_processes=args.world_size,
            process_index=args.process_index,
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffle=training,
            drop_last=training and args.dataloader_drop_last,
            instructions=None if instructions is None else {"reconstruct": instructions},
            instruction_dropout=args.instruction_dropout,
            caption_dropout=args.caption_dropout,
            edit_source_dropout=args.edit_source_dropout,
            size_tolerance=0.0 if args.cache_latents else SamplingPlan.size_tolerance,  # kept at their own sizes
        )
        loading = {
            "collate_fn": self.data_collator,
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory and torch.cuda.is_available(),
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "multiprocessing_context": getattr(args, "dataloader_multiprocessing_context", None),  # not in 5.14
            "in_order": getattr(args, "dataloader_in_order", True),  # likewise
            "generator": torch.Generator(),  # else the loader draws from the run's own random state
            "worker_init_fn": ignore_interrupts,
        }
        datasets = {task: images.datasets[task] for task in tasks}
        columns = {task: images.columns[task] for task in tasks}
        processor = self.processing_class
        reading = {"on_bad_image": args.on_bad_image, "conversation_problem": processor.conversation_problem}
        cached = training and args.cache_latents and "reconstruct" in tasks
        stored = encoded_shards.encoded_column(datasets["reconstruct"]) if cached else None
        if stored:
            encoded_shards.check_column(stored, self.encoded_column())
            columns["reconstruct"] = columns["reconstruct"]._replace(encoded=stored)
        if images.is_streaming:
            if cached and not stored:
                raise ValueError(
                    "cache_latents cannot keep the images of a stream, which has no length. Write them with `reca-trainer "
                    "precompute`, and train on what that writes; or leave cache_latents off."
                )
            rule = target_rule(processor, args)
            options = {**reading, **loading, "endless": training, "count_processes": self._count_processes}
            if stored:
                options["buffer_size"] = encoded_shards.WINDOW
            stream = StreamingBatches(datasets, columns, rule, plan, **options)
            if training:
                self.follow_stream(stream)
            return EpochDataLoader(stream, batch_size=None, collate_fn=as_it_is)
        rows = RowDataset(datasets, columns, **reading)
        targets = {task: images.targets(task, processor, args) for task in tasks}
        if cached and not stored:
            if self._encoded is None:
                self._encoded = self._encode_images(rows, targets["reconstruct"])
            rows = latent_cache.EncodedRows(rows, self._encoded)
        return EpochDataLoader(rows, batch_sampler=TaskBatchSampler(targets, plan), **loading)

    def _encode_images(self, rows: RowDataset, sizes: list[tuple[int, int]]) -> Dataset:
        """All processes write their share, then all read it."""
        args, model, processor = self.args, adapters.unwrap(self.model), self.processing_class
        precision = self.accelerator.mixed_precision
        folder = latent_cache.cache_folder(rows, sizes, model, processor, precision) if args.process_index == 0 else None
        folder = broadcast_object_list([folder])[0]
        layout = {"process_index": args.process_index, "num_processes": args.world_size}
        latent_cache.encode_images(rows, sizes, processor, self.encode_batch, folder, **layout)
        self.accelerator.wait_for_everyone()
        return latent_cache.encoded_images(folder, len(sizes))

    @torch.no_grad()
    def encode_batch(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What the model's frozen encoders make of a batch, in the run's precision (see `UnifiedModel.encode_batch`)."""
        with self.accelerator.autocast():
            return adapters.unwrap(self.model).encode_batch(self._prepare_inputs(batch))

    def encoded_column(self) -> str:
        """The column of what `encode_batch` makes of images (see `encoded_shards.column_name`)."""
        bounds = (self.args.max_image_size, self.args.min_image_size)
        model = adapters.unwrap(self.model)
        return encoded_shards.column_name(model, self.processing_class, *bounds, self.accelerator.mixed_precision)

    def _count_processes(self, present: bool) -> int:
        """On how many processes `present` is true."""
        return int(self.accelerator.reduce(torch.tensor(float(present), device=self.args.device), "sum"))

    def num_examples(self, dataloader: DataLoader) -> int:
        return len(dataloader.dataset) if not self.images.is_streaming else super().num_examples(dataloader)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """The parameters that weight decay acts on, as the family's original groups them."""
        decays = adapters.unwrap(model).decays
        return [
            name
            for name, parameter in model.named_parameters()
            if decays(name, getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 empties parameters
        ]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        warmup = self.args.get_warmup_steps(num_training_steps)
        if warmup >= num_training_steps:
            logger.warning(
                f"The learning rate warms up for {warmup} of {num_training_steps} steps and so never reaches "
                f"{self.args.learning_rate:g}; set warmup_steps to fewer, or to a share of the run such as 0.05."
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: a batch's tensors are pixels, not tokens."""
        return 0

    # --- what is refused, and logs ---

    def hyperparameter_search(self, *args: Any, **kwargs: Any):
        """Refused: every trial would train the weights that the one before has left."""
        raise NotImplementedError("A RecATrainer has one model, which every trial would go on with. Start one run per setting.")

    def call_model_init(self, trial: Any = None):
        """Refused: see `hyperparameter_search`."""
        raise NotImplementedError("A RecATrainer trains the model that it was given; there is no model_init.")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            elapsed = max(time.perf_counter() - self._last_log, 1e-9)
            logs = {
                **logs,
                **self._mean_terms("train"),
                "images_per_second": round((self.images_seen - self._images_at_last_log) / elapsed, 3),
                "data_wait": round(self._data_seconds / elapsed, 4),  # share of the time spent waiting for batches
            }
            self._images_at_last_log = self.images_seen
            self._data_seconds, self._last_log = 0.0, time.perf_counter()
            if self.skipped_images:
                logs["skipped_images"] = self.skipped_images
            if self.texts_cut:
                logs["texts_cut"] = self.texts_cut
            if self.nonfinite_steps:
                logs["nonfinite_steps"] = self.nonfinite_steps
        super().log(logs, start_time)


@contextlib.contextmanager
def special_tokens_kept():
    """A context in which the special tokens of the model's configuration stay as they are. `Trainer` would write the
    tokenizer's there, but the weights were trained with the former, and a tokenizer may lack some (BAGEL's start of text)."""
    align = trainer.align_special_tokens
    trainer.align_special_tokens = lambda model, processing_class: None
    try:
        yield
    finally:
        trainer.align_special_tokens = align


class EpochDataLoader(DataLoader):
    """Tells its sampler or stream which epoch it is, so that each is shuffled anew."""

    def set_epoch(self, epoch: int) -> None:
        source = self.dataset if self.batch_size is None and self.batch_sampler is None else self.batch_sampler
        source.set_epoch(epoch)


def as_it_is(batch: Any) -> Any:
    return batch


def compile_layers(model: UnifiedModel, **options: Any) -> None:
    """`torch.compile` every transformer layer for itself, in place: layers are alike, so they share what is compiled, and
    all a family does around them (which branches on the batch) stays as it is. A second size of a dimension makes it
    symbolic, so images of other shapes and longer instructions soon compile nothing any more."""
    # Layers of every kind, task and shape count as one function: the wrapper that transformers puts around `forward`.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            module.compile(**options)


def unwrap_name(model: Any) -> str:
    base = adapters.unwrap(model)
    return base.name_or_path or base.config.model_type
