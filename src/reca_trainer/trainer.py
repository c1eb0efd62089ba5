"""`RecATrainer`: the loss, term by term; what is logged and saved."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import BitsAndBytesConfig, Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, HubStrategy, set_seed
from transformers.utils import PushInProgress, logging

from reca_trainer import adapters, cache, hub
from reca_trainer.callbacks import (
    CollapseAlarm,
    PreviewCallback,
    ReconstructionScores,
    UnderstandingProbe,
    WeightAverage,
)
from reca_trainer.checkpoints import (
    check_complete,
    delete_surplus,
    last_complete_checkpoint,
    make_output_dir,
    seal,
)
from reca_trainer.collator import UnifiedCollator
from reca_trainer.config import RecAConfig
from reca_trainer.data import (
    RowDataset,
    StreamingRows,
    TaskBatchSampler,
)
from reca_trainer.models.auto import AutoUnifiedModel, AutoUnifiedProcessor
from reca_trainer.models.checkpoint import sync
from reca_trainer.models.unified import TASKS, UnifiedModel, UnifiedProcessor
from reca_trainer.task_images import Images, TaskImages

logger = logging.get_logger(__name__)

LOSS_NAMES = {"reconstruct": "reconstruction_loss", "caption": "image_to_text_loss", "generate": "text_to_image_loss"}
NOTES = ("seeds", "sources", "skipped", "supervised", "share")  # of a batch, for the trainer and not the model
# Of an adapter's configuration, what does not decide how it computes.
ADAPTER_NOTES = {
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "inference_mode",
    "init_lora_weights",
    "auto_mapping",
}
DATA_ORDER = "data_order.json"


class RecATrainer(Trainer):
    """Trains a unified multimodal model by Reconstruction Alignment (arXiv 2509.07295).

    Args:
        model: a `UnifiedModel`, a `PeftModel` around one, or a folder or Hub id to load.
        args: a `RecAConfig`; by default one named after the model.
        data_collator: rows to batch; by default `UnifiedCollator(processing_class)`.
        train_dataset: any `datasets` dataset with an image column; or one per task, `{"reconstruct": …, "caption": …,
            "generate": …}`. By default `args.dataset_name`.
        eval_dataset: likewise; by default `args.eval_size` rows held out of the training set.
        processing_class: the family's processor; by default loaded from where the model is from.
        peft_config: adapter to train instead of the whole generator. Its `target_modules` default to the generator's
            linear layers.
        quantization_config: for a model given by name; quantises it while loading, and needs a `peft_config`.

    Raises:
        ValueError: the data does not fit the loss weights, or the wrong weights would be trained.
    """

    _tag_names = ("reca-trainer", "reconstruction-alignment")
    loss_is_scaled_for_ga = True  # compute_loss weights each micro-batch by its share of the step

    def __init__(
        self,
        model: str | os.PathLike | UnifiedModel | PeftModel,
        args: RecAConfig | None = None,
        data_collator: Any = None,
        train_dataset: Images | Mapping[str, Images] | None = None,
        eval_dataset: Images | Mapping[str, Images] | None = None,
        processing_class: UnifiedProcessor | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ):
        if args is None:
            name = str(model) if isinstance(model, str | os.PathLike) else unwrap_name(model)
            args = RecAConfig(output_dir=f"{Path(name).name}-reca")
        make_output_dir(args.output_dir)
        self.images = TaskImages.open(train_dataset, args)
        eval_images = None if eval_dataset is None else TaskImages.open(eval_dataset, args)
        if eval_images is None and args.eval_size:
            self.images, eval_images = self.images.split(args.eval_size, args.seed)
        if eval_images is None and args.eval_strategy != "no":
            raise ValueError(
                f"eval_strategy={args.eval_strategy.value!r} needs images: pass an eval_dataset, or set eval_size to hold some out."
            )
        if self.images.is_streaming and args.max_steps <= 0:
            raise ValueError("A stream does not say how long it is: set max_steps.")

        if isinstance(model, str | os.PathLike):
            if quantization_config is not None and peft_config is None:
                raise ValueError("A quantised model cannot be trained itself; pass a peft_config for its adapter.")
            if processing_class is None:
                processing_class = AutoUnifiedProcessor.from_pretrained(model)
            # What is wrong with the images need not wait for the model.
            self.images.check_batches(processing_class.target_sizes(), args)
            if eval_images is not None:
                eval_images.check_sizes(processing_class.target_sizes(), args.on_bad_image)
            init = dict(args.model_init_kwargs or {})
            init.setdefault("dtype", adapters.default_dtype(args.bf16, peft_config is not None))
            model = AutoUnifiedModel.from_pretrained(
                model, quantization_config=quantization_config, is_trainable=True, **init
            )
        elif quantization_config is not None:
            raise ValueError("quantization_config acts while a model is loaded; pass the model by name or path.")
        base = adapters.unwrap(model)
        if processing_class is None:
            if not base.name_or_path:
                raise ValueError("This model was not loaded from anywhere; pass its processing_class.")
            processing_class = AutoUnifiedProcessor.from_pretrained(base.name_or_path)

        i2t = float(base.shares_weights) if args.image_to_text_weight is None else args.image_to_text_weight
        self.loss_weights = dict(zip(TASKS, (args.reca_weight, i2t, args.text_to_image_weight), strict=True))
        self.task_pattern = args.task_pattern(self.loss_weights)
        self.images.check(self.task_pattern)
        if args.ddp_find_unused_parameters is None:  # one of several tasks may not reach every trained weight
            args.ddp_find_unused_parameters = len(self.task_pattern) > 1

        if isinstance(model, PeftModel):
            if peft_config is not None:
                raise ValueError("The model already has an adapter; pass it without peft_config to go on training it.")
        elif peft_config is not None:
            set_seed(args.seed)  # an adapter starts from random weights
            model = adapters.attach(model, peft_config)
        else:
            model.freeze_understanding()
        trained, total = adapters.check_trainable(model)
        logger.info(f"Training {trained:,} of {total:,} parameters ({trained / total:.2%}).")

        if args.cache_latents:
            cache.check_encoders(base)
            if self.images.is_streaming:
                raise ValueError("cache_latents keeps every image of a dataset that has a length; a stream has none.")
            if data_collator is not None or is_deepspeed_zero3_enabled():
                cause = "a data_collator of your own may change images" if data_collator else "ZeRO-3 shards encoders"
                raise ValueError(f"cache_latents encodes every image once, before the first step, but {cause}.")
        if args.timesteps_per_image > 1 and not base.supports_timesteps_per_image:
            raise ValueError(
                f"timesteps_per_image={args.timesteps_per_image}: the loss of {type(base).__name__} draws one corruption "
                "an image. Leave it 1."
            )

        if args.torch_compile:
            compile_layers(base, backend=args.torch_compile_backend, mode=args.torch_compile_mode)

        self.weight_average: WeightAverage | None = None
        self.resumed_from: str | None = None
        self._encoded: Dataset | None = None
        self._terms = {mode: torch.zeros(len(TASKS), 2, dtype=torch.float64) for mode in ("train", "eval")}
        self.skipped_images, self.nonfinite_steps = 0, 0
        self._sources, self._leave_out = [], False  # of the current step
        self._images_seen, self._data_seconds, self._last_log = 0, 0.0, time.perf_counter()
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or UnifiedCollator(processing_class),
            train_dataset=self.images,
            eval_dataset=eval_images,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.can_return_loss, self.label_names = True, []
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
        base.add_model_tags(list(self._tag_names))

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        arguments = super()._build_accelerator_args(**kwargs)
        arguments.pop("dynamo_plugin", None)  # it compiles the model as a whole; see `compile_layers`
        return arguments

    # --- the loss ---

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """L = λ_reca · L_reca + λ_i2t · L_image-to-text + λ_t2i · L_text-to-image, one term a micro-batch.

        `L_reca = L_gen(G([E(x_und), instruction]), x_gen)` is the model's own generation loss, conditioned on its own
        understanding embeddings of the same image (paper, equation 2); it is computed in the model's `forward`.

        A micro-batch counts by its share of all the step's supervised targets of its task, over micro-batches and
        processes, so that accumulated and distributed batches give the loss of one large batch.
        """
        task, notes = inputs["task"], {name: inputs[name] for name in NOTES if name in inputs}
        output = model(**{name: value for name, value in inputs.items() if name not in NOTES})
        mode = "train" if model.training else "eval"
        if torch.isfinite(output.loss):
            self._record(mode, task, output.loss, notes["supervised"])
        else:
            name = LOSS_NAMES[task].replace("_", " ")
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

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        return torch.where(torch.isfinite(loss), loss, 0.0)  # of a step that is left out, in the logged mean

    def _get_grad_norm(self, model, grad_norm=None):
        """As in `Trainer`; comes before the optimizer, so a gradient that is not finite is dropped here."""
        norm = super()._get_grad_norm(model, grad_norm)
        scaled = self.accelerator.scaler is not None  # float16 expects overflows, and has its own way with them
        value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not (math.isfinite(value) or scaled or self._leave_out):
            self._not_finite(f"The gradient's norm is {value}", self._sources)
        if self.args.max_nonfinite_steps:  # the loss may be finite on other processes
            found = torch.tensor(float(self._leave_out), device=self.args.device)
            if self.accelerator.reduce(found, "sum") > 0:
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
        self._images_seen += sum(len(batch["seeds"]) for batch in batches)
        counts = torch.zeros(len(TASKS), dtype=torch.float64)
        for batch in batches:
            self._note_skipped(batch)
            if self.args.timesteps_per_image > 1:
                batch["timesteps_per_image"] = self.args.timesteps_per_image
            self._draw_corruption(batch)
            counts[TASKS.index(batch["task"])] += batch["supervised"]
        counts = self.accelerator.reduce(counts.to(device, torch.float32), "sum").tolist()
        tasks = [batch["task"] for batch in batches]
        self._sources = [source for batch in batches for source in batch["sources"]]
        for batch in batches:
            task = batch["task"]
            of_its_task = batch["supervised"] / counts[TASKS.index(task)]
            # Gradients are averaged over processes, hence the factor.
            batch["share"] = of_its_task * tasks.count(task) / len(tasks) * self.accelerator.num_processes
        return batches, None

    def _draw_corruption(self, batch: dict[str, Any]) -> None:
        """Every sample has its own seed, so its draws depend neither on its batch nor on the number of processes."""
        model = adapters.unwrap(self.model)
        generators = [torch.Generator().manual_seed(seed) for seed in batch["seeds"]]
        batch["corruption"] = model.sample_corruption(batch, generators)
        batch["supervised"] = model.count_supervised(batch, batch["corruption"])

    def _record(self, mode: str, task: str, loss: torch.Tensor, supervised: int) -> None:
        terms = self._terms[mode] = self._terms[mode].to(loss.device)
        terms[TASKS.index(task)] += torch.stack([loss.detach().double() * supervised, loss.new_tensor(supervised)])

    def _mean_terms(self, mode: str) -> dict[str, float]:
        """The recorded mean of every term over all processes since the last call, unweighted."""
        sums = self.accelerator.reduce(self._terms[mode].float().to(self.args.device), "sum").tolist()
        self._terms[mode].zero_()
        return {LOSS_NAMES[task]: total / count for task, (total, count) in zip(TASKS, sums, strict=True) if count}

    def _note_skipped(self, batch: dict[str, Any]) -> None:
        for problem in batch.pop("skipped", []):
            self.skipped_images += 1
            logger.warning(f"Skipped an image ({self.skipped_images} so far): {problem}")

    # --- data ---

    def get_train_dataloader(self) -> DataLoader:
        return self._dataloader(self.images, self.args.train_batch_size, training=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        images = self.eval_dataset if eval_dataset is None else eval_dataset
        if images is None:
            raise ValueError("Evaluation needs images: pass eval_dataset, or set eval_size to hold some out.")
        if not isinstance(images, TaskImages):
            images = TaskImages.open(images, self.args)
        return self._dataloader(images, self.args.eval_batch_size, training=False)

    def _dataloader(self, images: TaskImages, batch_size: int, training: bool) -> DataLoader:
        args = self.args
        tasks = {task: count for task, count in self.task_pattern.items() if training or images.serves(task)}
        if not training:
            tasks = dict.fromkeys(tasks, 1)
        plan = {
            "weights": tasks,
            "batch_size": batch_size,
            "num_processes": args.world_size,
            "process_index": args.process_index,
            "seed": args.seed if args.data_seed is None else args.data_seed,
            "shuffle": training,
            "drop_last": training and args.dataloader_drop_last,
            "instruction_dropout": args.instruction_dropout if training else 0.0,
        }
        loading = {
            "collate_fn": self.data_collator,
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory and torch.cuda.is_available(),
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "generator": torch.Generator(),  # else the loader draws from the run's own random state
        }
        datasets = {task: images.datasets[task] for task in tasks}
        columns = {task: images.columns[task] for task in tasks}
        sizes = self.processing_class.target_sizes()
        if images.is_streaming:
            rows = StreamingRows(datasets, columns, sizes, on_bad_image=args.on_bad_image, endless=training, **plan)
            return EpochDataLoader(rows, batch_size=None, **loading)
        rows = RowDataset(datasets, columns, on_bad_image=args.on_bad_image)
        buckets = {task: images.buckets(task, sizes, args.on_bad_image) for task in tasks}
        if training and args.cache_latents and "reconstruct" in tasks:
            if self._encoded is None:
                self._encoded = self._encode_images(rows, buckets["reconstruct"])
            rows = cache.EncodedRows(rows, self._encoded)
        return EpochDataLoader(rows, batch_sampler=TaskBatchSampler(buckets, **plan), **loading)

    def _encode_images(self, rows: RowDataset, sizes: list[tuple[int, int]]) -> Dataset:
        """The main process writes the file, all read it."""
        model, processor, main = adapters.unwrap(self.model), self.processing_class, self.is_world_process_zero()
        file = cache.cache_file(rows, sizes, model, processor, self.accelerator.mixed_precision) if main else None
        file = broadcast_object_list([file])[0]

        def encode(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
            with self.accelerator.autocast():
                return model.encode_batch(self._prepare_inputs(batch))

        with self.accelerator.main_process_first():
            if not (main or file.exists()):
                raise ValueError(
                    f"{file} is not there on every machine: set HF_DATASETS_CACHE to a folder they share."
                )
            return cache.encode_images(rows, sizes, processor, encode, file)

    def num_examples(self, dataloader: DataLoader) -> int:
        return len(dataloader.dataset) if not self.images.is_streaming else super().num_examples(dataloader)

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

    # --- evaluation and logs ---

    def averaged_weights(self):
        """A context in which the model holds the average of its weights, if there is one."""
        return contextlib.nullcontext() if self.weight_average is None else self.weight_average.applied()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`, of the averaged weights where there are any."""
        with self.averaged_weights():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Mean loss of every task with fixed corruptions: comparable between checkpoints and runs."""
        model = self._wrap_model(self.model, training=False)
        if len(self.accelerator._models) == 0 and model is self.model:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        samples = 0
        with torch.no_grad():
            for inputs in dataloader:
                self._note_skipped(inputs)
                self._draw_corruption(inputs)
                inputs["share"] = 1.0
                samples += len(inputs["seeds"])
                with self.compute_loss_context_manager():
                    self.compute_loss(model, self._prepare_inputs(inputs))
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        terms = self._mean_terms("eval")
        weights = {LOSS_NAMES[task]: weight for task, weight in self.loss_weights.items()}
        metrics = {"loss": sum(weights[name] * value for name, value in terms.items()), **terms}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=samples)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            elapsed = max(time.perf_counter() - self._last_log, 1e-9)
            logs = {
                **logs,
                **self._mean_terms("train"),
                "images_per_second": round(self._images_seen * self.accelerator.num_processes / elapsed, 3),
                "data_wait": round(self._data_seconds / elapsed, 4),  # share of the time spent waiting for batches
            }
            self._images_seen, self._data_seconds, self._last_log = 0, 0.0, time.perf_counter()
            if self.skipped_images:
                logs["skipped_images"] = self.skipped_images
            if self.nonfinite_steps:
                logs["nonfinite_steps"] = self.nonfinite_steps
        super().log(logs, start_time)

    # --- checkpoints ---

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """As `Trainer.train`. `resume_from_checkpoint=True` goes on from the newest complete checkpoint in
        `output_dir`, or starts from the beginning, with a warning, if there is none."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                logger.warning(f"There is no checkpoint in {self.args.output_dir} to resume from; starting anew.")
        elif isinstance(resume_from_checkpoint, str | os.PathLike):
            check_complete(Path(resume_from_checkpoint))
        if resume_from_checkpoint:
            self._check_data_order(Path(resume_from_checkpoint))
            self._check_adapter(Path(resume_from_checkpoint))
        if self.is_world_process_zero():
            for abandoned in Path(self.args.output_dir).glob(f".{PREFIX_CHECKPOINT_DIR}-*.partial"):
                shutil.rmtree(abandoned)
        self.resumed_from = resume_from_checkpoint or None
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if result.global_step == self._initial_global_step:
            logger.warning(
                f"Nothing was trained: {resume_from_checkpoint} is of step {result.global_step}, and the run has "
                f"{self.state.max_steps}. Raise max_steps or num_train_epochs to go on."
            )
        return result

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`, except that a run resumed behind its last step does not take another one."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _save_checkpoint(self, model, trial) -> None:
        """Write the checkpoint aside and rename it when all of it is on disk: a folder called `checkpoint-N` is whole.

        Raises:
            OSError: it could not be written; earlier checkpoints are untouched.
        """
        final = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = final.parent / f".{final.name}.partial"
        try:
            with self._aside(staging):
                super()._save_checkpoint(model, trial)
            if self.weight_average is not None:
                self.weight_average.save(staging / final.name)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                self._finish_checkpoint(staging / final.name, final)
        except Exception as error:  # each writer has its own error for a full disk
            shutil.rmtree(staging, ignore_errors=True)
            raise OSError(
                f"The checkpoint of step {self.state.global_step} could not be written to {final.parent}: {error}. "
                f"{shutil.disk_usage(final.parent).free / 1e6:,.1f} MB are free there. Make room or choose another "
                f"output_dir; earlier checkpoints are whole, and resume_from_checkpoint=True goes on from the last one."
            ) from error
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _finish_checkpoint(self, written: Path, final: Path) -> None:
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        (written / DATA_ORDER).write_text(json.dumps(self._data_order(), indent=1))
        seal(written)
        if final.exists():
            shutil.rmtree(final)
        written.rename(final)
        sync(final.parent)
        written.parent.rmdir()
        if self.args.save_total_limit:
            best = self.state.best_model_checkpoint
            delete_surplus(final.parent, self.args.save_total_limit, keep={final, *([Path(best)] if best else [])})

    def _data_order(self) -> dict[str, Any]:
        """What decides which images a step sees: a run can only be resumed where it is the same."""
        args = self.args
        return {
            "images per micro-batch (per_device_train_batch_size x processes)": args.train_batch_size
            * args.world_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "micro-batches of each task": self.task_pattern,
            "seed": args.seed if args.data_seed is None else args.data_seed,
            "rows": None if self.images.is_streaming else {t: len(self.images.datasets[t]) for t in self.task_pattern},
        }

    def _check_data_order(self, checkpoint: Path) -> None:
        """Raises `ValueError` if going on from `checkpoint` would show some images twice and others never."""
        if not (checkpoint / DATA_ORDER).is_file() or self.args.ignore_data_skip:
            return
        before, now = json.loads((checkpoint / DATA_ORDER).read_text()), self._data_order()
        changed = [f"{name}: {value}, now {now.get(name)}" for name, value in before.items() if value != now.get(name)]
        if changed:
            raise ValueError(
                f"{checkpoint} cannot be resumed exactly, because these differ: {'; '.join(changed)}. Another number of "
                "processes is fine if images per micro-batch stay the same. Restore them, or pass ignore_data_skip=True "
                "to go on from these weights at the beginning of an epoch."
            )

    def _check_adapter(self, checkpoint: Path) -> None:
        """Raises `ValueError` if the weights in `checkpoint` are not of the kind that this run trains."""
        has_adapter = (checkpoint / CONFIG_NAME).is_file()
        if has_adapter != isinstance(self.model, PeftModel):
            kinds = ("an adapter", "a whole model") if has_adapter else ("a whole model", "an adapter")
            raise ValueError(
                f"{checkpoint} holds {kinds[0]}, and this run trains {kinds[1]}: "
                f"{'pass the peft_config it was made with' if has_adapter else 'leave peft_config out'}."
            )
        if has_adapter:
            before, now = PeftConfig.from_pretrained(checkpoint).to_dict(), self.model.active_peft_config.to_dict()
            changed = [name for name in before if name not in ADAPTER_NOTES and before[name] != now.get(name)]
            if changed:
                differences = "; ".join(f"{name}: {before[name]}, now {now.get(name)}" for name in changed)
                raise ValueError(
                    f"The adapter in {checkpoint} is another than this run's: {differences}. Restore them."
                )

    @contextlib.contextmanager
    def _aside(self, folder: Path):
        """Save into `folder`, from which nothing is uploaded."""
        args = self.args
        before = args.output_dir, args.push_to_hub
        args.output_dir, args.push_to_hub = str(folder), False
        try:
            yield
        finally:
            args.output_dir, args.push_to_hub = before

    # --- the Hub ---

    def create_model_card(self, model_name: str | None = None, *, merged: bool = False, **card: Any) -> None:
        """Write `README.md` into the output folder; `card` replaces entries of `hub.model_card`."""
        if self.is_world_process_zero():
            self._model_card(model_name, merged, **card).save(Path(self.args.output_dir) / "README.md")

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        **card: Any,
    ):
        """Upload the adapter, or the fully trained model, with processor, card and previews, to `args.hub_model_id`; see
        `hub.push`. It always waits for the upload to end, whatever `blocking` says."""
        args, token = self.args, token or self.args.hub_token
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        repo_id = args.hub_model_id or Path(args.output_dir).absolute().name
        self.create_model_card(repo_id, **card)
        return hub.push(
            args.output_dir,
            repo_id,
            private=args.hub_private_repo if private is None else private,
            revision=revision or args.hub_revision,
            token=token,
            create_pr=create_pr,
            commit_message=commit_message,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload its weights in the background, unless the last upload is still under way. The run goes on where that
        fails: its checkpoints are here."""
        args = self.args
        busy = self.is_world_process_zero() and self.push_in_progress and not self.push_in_progress.is_done()
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END or busy:
            return
        job = HfApi().run_as_future(
            hub.push,
            checkpoint_folder,
            self.hub_model_id,
            private=args.hub_private_repo,
            revision=args.hub_revision,
            token=args.hub_token,
            commit_message=f"Training in progress, step {self.state.global_step}",
        )
        job.add_done_callback(
            lambda done: (
                done.exception() and logger.warning(f"{checkpoint_folder} was not uploaded: {done.exception()}")
            )
        )
        self.push_in_progress = PushInProgress([job])

    def push_merged_to_hub(
        self,
        repo_id: str,
        into: str | None = None,
        dtype: torch.dtype | None = None,
        *,
        layout: str = "transformers",
        token: str | None = None,
        private: bool | None = None,
        **upload: Any,
    ):
        """Merge the adapter (see `adapters.merge_adapter` for `into`, `dtype` and `layout`) and upload the whole model;
        `upload` as for `hub.push`. The merged copy lies in the output folder meanwhile."""
        folder = Path(self.args.output_dir) / ".merged"
        self.save_model(str(folder / "adapter"), _internal_call=True)
        if not self.is_world_process_zero():
            return None
        base = adapters.unwrap(self.model)
        options = {"dtype": dtype, "layout": layout, "processor": self.processing_class}
        token = token or self.args.hub_token
        try:
            if isinstance(self.model, PeftModel):
                source = base.name_or_path or base
                adapters.merge_adapter(source, folder / "adapter", folder / "model", into, token=token, **options)
            else:
                hub.export(base, folder / "model", **options)
            self._model_card(repo_id, merged=True).save(folder / "model" / "README.md")
            for picture in Path(self.args.output_dir).glob("previews/before_after.png"):
                (folder / "model" / "previews").mkdir()
                shutil.copy(picture, folder / "model" / "previews")
            private = self.args.hub_private_repo if private is None else private
            return hub.push(folder / "model", repo_id, token=token, private=private, **upload)
        finally:
            shutil.rmtree(folder)

    def _model_card(self, repo_id: str | None, merged: bool, **card: Any):
        args, base = self.args, adapters.unwrap(self.model)
        is_adapter = isinstance(self.model, PeftModel) and not merged
        names = ("learning_rate", "lr_scheduler_type", "warmup_steps", "per_device_train_batch_size",
                 "gradient_accumulation_steps", "optim", "adam_beta2", "weight_decay", "max_grad_norm", "bf16", "seed",
                 "instruction_dropout")  # fmt: skip
        settings = {name: getattr(args, name) for name in names} | {"processes": args.world_size}
        if args.ema_decay:
            settings["weights"] = f"exponential moving average, decay {args.ema_decay:g}"
        settings |= {f"weight of {LOSS_NAMES[task]}": weight for task, weight in self.loss_weights.items()}
        if isinstance(self.model, PeftModel):
            peft_config = self.model.active_peft_config
            settings |= {name: getattr(peft_config, name, None) for name in ("r", "lora_alpha", "lora_dropout")}
            settings["base loaded in"] = (
                "4 bits" if getattr(base, "is_loaded_in_4bit", False)
                else "8 bits" if getattr(base, "is_loaded_in_8bit", False) else str(base.dtype)
            )  # fmt: skip
        last: dict[str, float] = {}
        for entry in self.state.log_history:
            last |= {name: value for name, value in entry.items() if name.endswith("loss")}
        if "train_loss" in last:
            last["mean train_loss"] = last.pop("train_loss")
        source = base.name_or_path or None
        preview = Path("previews/before_after.png")
        defaults = {
            "base_model": source,
            "is_adapter": is_adapter,
            "datasets": [hub.public_name(name) for name in (args.dataset_name, args.caption_dataset_name) if name],
            "hyperparameters": settings,
            "losses": last,
            "steps": self.state.global_step,
            "license": hub.base_license(source, args.hub_token),
            "preview": str(preview) if (Path(args.output_dir) / preview).is_file() else None,
        }
        return hub.model_card(
            repo_id or args.hub_model_id or Path(args.output_dir).absolute().name, **(defaults | card)
        )


class EpochDataLoader(DataLoader):
    """Tells its sampler or stream which epoch it is, so that each is shuffled anew."""

    def set_epoch(self, epoch: int) -> None:
        source = self.dataset if self.batch_size is None and self.batch_sampler is None else self.batch_sampler
        source.set_epoch(epoch)


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
