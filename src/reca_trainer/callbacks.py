"""What goes along with a run: trackers that never end it, the average of its weights, preview pictures, scores, alarms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import logging

from reca_trainer import adapters
from reca_trainer.config import PREVIEW_PROMPTS
from reca_trainer.contact_sheets import contact_sheet, sheet_row
from reca_trainer.data import Row, RowDataset, SamplingPlan, StreamingBatches, TaskBatchSampler
from reca_trainer.data.collator import NOTES
from reca_trainer.data.task_datasets import TaskDatasets, target_rule
from reca_trainer.files import replacing
from reca_trainer.held_out_losses import sets_of
from reca_trainer.images import ImageError, decode_image

logger = logging.get_logger(__name__)


TRACKERS = tuple(INTEGRATION_TO_CALLBACK.values())
EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]


def shield_run(tracker: TrainerCallback) -> None:
    """Make errors of a tracker a warning, once. They are raised only at the start of a new run, which has nothing to lose.
    Other callbacks are left alone."""
    if not isinstance(tracker, TRACKERS) or "on_log" in vars(tracker):
        return
    failures: list[Exception] = []

    def attempt(event: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(type(tracker), event)(tracker, *args, **kwargs)
        except Exception as error:  # each tracker has its own, and most are the network's
            state = args[1]
            if event in ("on_init_end", "on_train_begin") and state.global_step == 0:
                raise
            if not failures:
                logger.warning(
                    f"{type(tracker).__name__} failed at step {state.global_step}; the run goes on: {error!r}"
                )
            failures.append(error)

    vars(tracker).update({event: partial(attempt, event) for event in EVENTS})


class WeightAverage(TrainerCallback):
    """An exponential moving average of the trained weights, `m ← decay · m + (1 - decay) · w` after every step, in
    float32 and from the weights that training starts with.

    The average is what is evaluated and drawn, and what the model holds when training ends. A checkpoint's weights are
    those that training goes on from; the average lies beside them in `weight_average.safetensors`.

    Args:
        trainer: a `RecATrainer`.
        decay: after N steps, `decay ** N` of the average still is what training started with.
    """

    file = "weight_average.safetensors"
    tolerated_start = 0.05

    def __init__(self, trainer: Any, decay: float):
        self.trainer, self.decay = trainer, decay
        self.average: dict[str, torch.Tensor] = {}  # empty before and after training

    def on_train_begin(self, args, state, control, **kwargs):
        start = self.decay**state.max_steps
        if start > self.tolerated_start:
            logger.warning(
                f"ema_decay={self.decay:g} does not fit a run of {state.max_steps} steps: at its end {start:.1%} of the "
                f"average are the weights it started from. Use at most "
                f"{self.tolerated_start ** (1 / state.max_steps):.4g}, or 0 for no average."
            )
        self.average = {name: weight.detach().float().clone() for name, weight in self._weights().items()}
        if self.trainer.resumed_from is not None:
            self._load(Path(self.trainer.resumed_from))

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        for name, weight in self._weights().items():
            self.average[name].mul_(self.decay).add_(weight.float(), alpha=1 - self.decay)

    def on_train_end(self, args, state, control, **kwargs):
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load(Path(state.best_model_checkpoint))
        self._put(self.average)
        self.average = {}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the average meanwhile."""
        weights = {name: weight.detach().clone() for name, weight in self._weights().items() if self.average}
        self._put(self.average)
        try:
            yield
        finally:
            self._put(weights)

    def save(self, folder: Path) -> None:
        """Called by all processes, as each may hold a part; the first writes."""
        whole = {name: m.full_tensor() if isinstance(m, DTensor) else m for name, m in self.average.items()}
        if self.trainer.is_world_process_zero():
            save_file({name: tensor.cpu() for name, tensor in whole.items()}, folder / self.file)

    def _load(self, checkpoint: Path) -> None:
        if not (checkpoint / self.file).is_file():
            logger.warning(f"{checkpoint} holds no average of weights; it starts from the checkpoint's weights.")
            return
        for name, tensor in load_file(checkpoint / self.file).items():
            average = self.average[name]
            if isinstance(average, DTensor):
                tensor = distribute_tensor(tensor.to(average.device), average.device_mesh, average.placements)
            average.copy_(tensor)

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: weight for name, weight in self.trainer.model.named_parameters() if weight.requires_grad}

    @torch.no_grad()
    def _put(self, tensors: dict[str, torch.Tensor]) -> None:
        for module in self.trainer.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # or it would go on with what it gathered before
        weights = self._weights() if tensors else {}
        for name, tensor in tensors.items():
            weights[name].copy_(tensor)


class PreviewCallback(TrainerCallback):
    """Draws what the model makes of a few fixed images and prompts, with fixed noise, as training goes on.

    Each picture (`output_dir/previews/step-NNNNNN.png`, and the tracker) has rows of prompts, of their text-to-image, of
    input images and of their reconstructions from the model's own understanding embeddings. After training
    `before_after.png` shows the pictures from before above those from after. Trackio, which closes its run before that, has
    all but the last.

    A picture that does not fit into the device's memory, or cannot be written or tracked, is warned of, and the run
    goes on. So it does after any other error, unless a new run begins, which has nothing to lose, or processes that hold
    parts of the model wait for one another.

    Args:
        trainer: a `RecATrainer`; images come from its first evaluation set that has some to reconstruct, else from the
            training set. Without any there, only prompts are drawn. Its `judge`, if it has one, marks text-to-image.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.prompts = list(trainer.args.preview_prompts or PREVIEW_PROMPTS)
        self.rows: list[Row] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        # Sharded weights are gathered for `forward` alone, unless told of other methods that need them.
        register_fsdp_forward_method(self.trainer.model, "generate_images")
        self.draw()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.preview_steps == 0 and state.global_step < state.max_steps:
            self.draw()

    def on_train_end(self, args, state, control, **kwargs):
        after = self.draw()
        if after is None:
            return
        folder = Path(args.output_dir) / "previews"
        try:
            before = decode_image(folder / "step-000000.png")
        except (ImageError, FileNotFoundError) as error:
            logger.warning(f"There is no before_after.png: {error}")
            return
        if before.size != contact_sheet(after).size:
            logger.warning("There is no before_after.png: step-000000.png was drawn of other prompts or images.")
            return
        rows, top = [], 0
        for index, row in enumerate(after):
            if index % 2:  # made, and not given
                rows.append(before.crop((0, top, row.width, top + row.height)))
            rows.append(row)
            top += row.height
        self._save(contact_sheet(rows), folder / "before_after.png")

    def draw(self) -> list[Image.Image] | None:
        """Generate, save and track the picture of the current step, and return its rows; `None` if it was not saved.
        All processes generate, since all may hold a part of the model; the first saves."""
        trainer, step = self.trainer, self.trainer.state.global_step
        try:
            with trainer.averaged_weights():
                rows = self._rows()
        except Exception as error:
            is_new = step == 0 and not isinstance(error, torch.OutOfMemoryError)
            if is_new or any(isinstance(module, FSDPModule) for module in trainer.model.modules()):
                raise
            logger.warning(f"There is no preview of step {step}: {error!r}")
            return None
        if rows is None:
            return None
        picture = contact_sheet(rows)
        self._track(picture)
        path = Path(trainer.args.output_dir) / "previews" / f"step-{step:06d}.png"
        return rows if self._save(picture, path) else None

    def _rows(self) -> list[Image.Image] | None:
        """Rows of inputs, each followed by the row made from it; `None` in all processes but the first."""
        trainer = self.trainer
        if self.rows is None:
            self.rows = fixed_rows(trainer, "reconstruct", trainer.args.preview_images)
        inputs = [row.image for row in self.rows]
        made: list[Image.Image] = []
        if inputs:
            texts = [row.draw.instruction for row in self.rows]
            made = paint(trainer, "reconstruct", texts, [row.draw.size for row in self.rows], inputs)
        square = trainer.processing_class.fixed_size or target_rule(trainer.processing_class, trainer.args)(4096, 4096)
        drawn = paint(trainer, "generate", self.prompts, [square] * len(self.prompts))
        if not trainer.is_world_process_zero():
            return None
        step, last = trainer.state.global_step, trainer.state.max_steps
        title = {0: "before", last: "after"}.get(step, f"step {step}")
        marks = trainer.judge(self.prompts, drawn) if trainer.judge else None
        rows = [sheet_row("prompt", self.prompts), sheet_row(title, drawn, marks=marks)]
        if inputs:
            rows += [sheet_row("input", inputs), sheet_row(title, made)]
        return rows

    def _save(self, picture: Image.Image, path: Path) -> bool:
        """Whether the picture was written."""
        try:
            with replacing(path) as temporary:
                picture.save(temporary, format="PNG")
        except OSError as error:
            logger.warning(f"The preview {path} was not written: {error}.")
            return False
        return True

    def _track(self, picture: Image.Image) -> None:
        step = self.trainer.state.global_step
        for callback in self.trainer.callback_handler.callbacks:
            writer = getattr(callback, "tb_writer", None)
            tracker = getattr(callback, "_wandb", None) or getattr(callback, "_trackio", None)
            is_open = getattr(callback, "_initialized", True)  # Trackio's run is over when training ends
            try:
                if writer is not None:
                    writer.add_image("preview", np.asarray(picture), step, dataformats="HWC")
                elif tracker is not None and is_open:
                    tracker.log({"preview": tracker.Image(picture), "train/global_step": step})
            except Exception as error:  # each tracker has its own, and most are the network's
                logger.warning(f"{type(callback).__name__} did not take the preview of step {step}: {error!r}")


class ReconstructionScores(TrainerCallback):
    """Scores reconstructions of fixed held-out images at every evaluation: PSNR in dB, SSIM, and the colour cast against
    the images in CIE Lab (`lab_shift_b` above 0: yellower). They become metrics of it,
    `eval_reconstruction_<score>`, or of one named set `eval_<name>_reconstruction_<score>`, so that
    `metric_for_best_model` may name one.

    With a `judge`, the captions of the same set are painted too: `eval_prompts_followed` is the share of the pictures that
    follow theirs, of those that the judge can tell.

    Args:
        trainer: a `RecATrainer`; the first `args.score_images` images of the set that is evaluated are scored.
        models: further scores' models, `clip=` and `lpips=` of `evaluation.reconstruction.score_reconstructions`.
    """

    def __init__(self, trainer: Any, **models: Any):
        from reca_trainer.evaluation.image_scores import import_torchmetrics

        import_torchmetrics()  # named now if it is missing, and not at the first evaluation
        self.trainer, self.models = trainer, models

    def on_train_begin(self, args, state, control, **kwargs):
        register_fsdp_forward_method(self.trainer.model, "generate_images")

    def on_evaluate(self, args, state, control, metrics: dict[str, float], **kwargs):
        from reca_trainer.evaluation.reconstruction import evaluate_reconstruction

        trainer, (prefix, images) = self.trainer, self.trainer.evaluated
        if not images.serves("reconstruct"):
            logger.warning_once(f"score_images={args.score_images}: the held-out images have none to reconstruct.")
            return
        pictures = [row.image for row in first_rows(trainer, images, "reconstruct", args.score_images)]
        sampling = dict(args.preview_generation_kwargs or {})
        scores = evaluate_reconstruction(
            adapters.unwrap(trainer.model), trainer.processing_class, pictures, **self.models, **sampling
        )
        del scores["reconstruction_loss"]  # the evaluation has that of all images
        scores = {f"{prefix}_reconstruction_{name}": value for name, value in scores.items()}
        if trainer.judge is not None and images.serves("generate"):
            rows = first_rows(trainer, images, "generate", args.score_images)
            prompts = [row.text for row in rows]
            drawn = paint(trainer, "generate", prompts, [row.draw.size for row in rows])
            verdicts = [verdict for verdict in trainer.judge(prompts, drawn) if verdict is not None]
            if verdicts:
                scores[f"{prefix}_prompts_followed"] = sum(verdicts) / len(verdicts)
        metrics.update(scores)
        trainer.log(scores)


class CollapseAlarm(TrainerCallback):
    """Warns when a model has learned to copy its condition instead of aligning with it.

    The sign is a reconstruction loss that falls towards zero (the authors' reproduction guide): without an information
    bottleneck between condition and target, reconstruction becomes trivial and text-to-image is forgotten.

    Args:
        threshold: share of the first logged reconstruction loss below which the alarm goes off.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.raised = False

    def on_log(self, args, state, control, logs: dict | None = None, **kwargs):
        loss = (logs or {}).get("reconstruction_loss")
        if loss is None or self.raised:
            return
        # The history and not this object remembers, so that a resumed run compares with its real beginning.
        first = next(entry["reconstruction_loss"] for entry in state.log_history if "reconstruction_loss" in entry)
        if loss < self.threshold * first:
            self.raised = True
            name = "eval_text_to_image_loss"
            generation_losses = [entry[name] for entry in state.log_history if name in entry]
            rising = len(generation_losses) > 1 and generation_losses[-1] > generation_losses[0]
            logger.warning(
                f"Collapse alarm at step {state.global_step}: the reconstruction loss fell from {first:.4g} to "
                f"{loss:.4g}, below {self.threshold:.0%} of where it began"
                + (f", while held-out text-to-image loss rose to {generation_losses[-1]:.4g}" if rising else "")
                + ". The model may be copying its condition. Use the understanding encoder's smallest resolution for "
                "the condition, a lower learning rate, or fewer steps."
            )


class UnderstandingProbe(TrainerCallback):
    """Measures how well the model still understands where it shares weights with generation: the image-to-text loss on
    a few fixed captions before and after training, logged as `understanding_loss`; a rise is warned of.

    Args:
        trainer: a `RecATrainer` whose images have captions; they come from its first evaluation set that has some, else
            from the training set.
    """

    rows = 8
    tolerated_rise = 1.1

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if not any("understanding_loss" in entry for entry in state.log_history):
            self.measure()

    def on_train_end(self, args, state, control, **kwargs):
        self.measure()
        losses = [entry["understanding_loss"] for entry in state.log_history if "understanding_loss" in entry]
        if len(losses) > 1 and losses[-1] > self.tolerated_rise * losses[0]:
            logger.warning(
                f"Understanding drifted: the image-to-text loss on fixed captions rose from {losses[0]:.4g} to "
                f"{losses[-1]:.4g}. Raise image_to_text_weight, or lower the learning rate."
            )

    @torch.no_grad()
    def measure(self) -> None:
        trainer = self.trainer
        rows = [row for row in fixed_rows(trainer, "caption", self.rows) if row.text]
        if not rows:
            return
        batch = trainer._prepare_inputs(trainer.data_collator(rows))
        batch = {name: value for name, value in batch.items() if name not in NOTES}
        training = trainer.model.training
        trainer.model.eval()
        with trainer.compute_loss_context_manager():
            loss = trainer.model(**batch).loss
        trainer.model.train(training)
        trainer.log({"understanding_loss": loss.item()})


class UnderstandingAccuracy(TrainerCallback):
    """Asks the model before and after training; the share answered right is logged as `understanding_accuracy`.

    Args:
        trainer: a `RecATrainer`.
        questions: rows with `image`, `question` and `answer`, see `evaluation.understanding.answer_questions`.
        sampling: passed to `generate_text`: `max_new_tokens`, …
    """

    def __init__(self, trainer: Any, questions: Sequence[dict[str, Any]], **sampling: Any):
        self.trainer, self.questions, self.sampling = trainer, questions, sampling

    def on_train_begin(self, args, state, control, **kwargs):
        register_fsdp_forward_method(self.trainer.model, "generate_text")
        if not any("understanding_accuracy" in entry for entry in state.log_history):
            self.ask()

    def on_train_end(self, args, state, control, **kwargs):
        self.ask()

    def ask(self) -> None:
        from reca_trainer.evaluation.understanding import understanding_accuracy

        model = adapters.unwrap(self.trainer.model)
        training = model.training
        accuracy = understanding_accuracy(model.eval(), self.trainer.processing_class, self.questions, **self.sampling)
        model.train(training)
        self.trainer.log({"understanding_accuracy": accuracy})


def paint(
    trainer: Any, task: str, texts: Sequence[str | None], sizes: Sequence[tuple[int, int]], images: Sequence[Any] = ()
) -> list[Image.Image]:
    """What the model makes of texts, or of images, each at its size (height, width) and with its own fixed noise."""
    options = dict(trainer.args.preview_generation_kwargs or {})
    pictures: dict[int, Image.Image] = {}
    for height, width in dict.fromkeys(sizes):
        members = [index for index, size in enumerate(sizes) if size == (height, width)]
        made = trainer.model.generate_images(
            trainer.processing_class,
            text=[texts[index] for index in members],
            images=[images[index] for index in members] if images else None,
            task=task,
            generator=[torch.Generator().manual_seed(index) for index in members],
            **{"height": height, "width": width, **options},
        )
        pictures.update(zip(members, made, strict=True))
    return [pictures[index] for index in range(len(sizes))]


def fixed_rows(trainer: Any, task: str, count: int) -> list[Row]:
    """The first rows for a task of the first evaluation set that has some, else of the training set, decoded."""
    sets = (*sets_of(trainer.eval_dataset), trainer.images)
    images = next((images for images in sets if images.serves(task)), None)
    return [] if images is None else first_rows(trainer, images, task, count)


def first_rows(trainer: Any, images: TaskDatasets, task: str, count: int) -> list[Row]:
    """The first rows of `images`, decoded."""
    args, processor = trainer.args, trainer.processing_class
    sources = {task: images.datasets[task]}, {task: images.columns[task]}
    reading = {"on_bad_image": args.on_bad_image, "conversation_problem": processor.conversation_problem}
    plan = SamplingPlan({task: 1}, shuffle=False)
    if images.is_streaming:
        batches = StreamingBatches(*sources, target_rule(processor, args), plan, **reading)
        return list(islice((row for batch in batches for row in batch), count))
    sampler = TaskBatchSampler({task: images.targets(task, processor, args)}, plan)
    rows = RowDataset(*sources, **reading)
    return [rows[draw] for [draw] in islice(sampler, count)]
