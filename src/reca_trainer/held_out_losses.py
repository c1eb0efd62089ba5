"""What `RecATrainer` evaluates: the losses of held-out images, of one set or of several by name."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from reca_trainer.config import RecAConfig
from reca_trainer.data.task_datasets import TaskDatasets
from reca_trainer.tasks import TASKS


def open_eval_sets(source: Any, args: RecAConfig) -> TaskDatasets | dict[str, TaskDatasets]:
    """One set, of which a mapping may say the dataset of each task; or several, by names that are no task's."""
    if isinstance(source, Mapping) and source and not source.keys() & TASKS.keys():
        return {name: TaskDatasets.open(images, args, training=False) for name, images in source.items()}
    return TaskDatasets.open(source, args, training=False)


def sets_of(held_out: TaskDatasets | dict[str, TaskDatasets] | None) -> list[TaskDatasets]:
    """What `open_eval_sets` gave, one set or several, as a list; none of `None`."""
    if isinstance(held_out, dict):
        return list(held_out.values())
    return [] if held_out is None else [held_out]


def check_metric(args: RecAConfig, has_judge: bool) -> None:
    """Raises `ValueError` if the best model is to be chosen by a score that is not computed."""
    metric = args.metric_for_best_model or ""
    scores = ("reconstruction_psnr", "reconstruction_ssim", "prompts_followed")
    if metric.endswith(scores) and not args.score_images:
        raise ValueError(f"metric_for_best_model={metric!r} needs score_images: how many held-out images to score.")
    if metric.endswith("prompts_followed") and not has_judge:
        raise ValueError(
            f"metric_for_best_model={metric!r} needs a judge, which tells pictures that follow their prompts."
        )


class HeldOutLosses(Trainer if TYPE_CHECKING else object):
    """The part of `RecATrainer` that evaluates."""

    def averaged_weights(self):
        """A context in which the model holds the average of its weights, if there is one."""
        return contextlib.nullcontext() if self.weight_average is None else self.weight_average.applied()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As `Trainer.evaluate`, of the averaged weights where there are any."""
        images = self.eval_dataset if eval_dataset is None else open_eval_sets(eval_dataset, self.args)
        self.evaluated = metric_key_prefix, images
        with self.averaged_weights():
            return super().evaluate(images, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Mean loss of every task with fixed corruptions: comparable between checkpoints and runs."""
        model = self._wrap_model(self.model, training=False)
        if len(self.accelerator._models) == 0 and model is self.model:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        self._optimizer_to_eval()
        losses: dict[str, list[float]] = {}
        self._terms["eval"].zero_()
        for inputs in dataloader:
            _, sample_losses, _ = self.prediction_step(model, inputs, prediction_loss_only=False)
            if not inputs["repeated"]:
                losses.setdefault(TASKS[inputs["task"]].loss_name, []).extend(sample_losses.tolist())
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        terms = self._mean_terms("eval")
        weights = {TASKS[task].loss_name: weight for task, weight in self.loss_weights.items()}
        metrics = {"loss": sum(weights[name] * value for name, value in terms.items()), **terms}
        predictions = self._gather_losses(losses)
        if self.compute_metrics is not None:
            metrics |= self.compute_metrics(EvalPrediction(predictions=predictions, label_ids=None))
        prefix = f"{metric_key_prefix}_"
        metrics = {f"{prefix}{name.removeprefix(prefix)}": value for name, value in metrics.items()}
        samples = sum(map(len, predictions.values()))
        return EvalLoopOutput(predictions=predictions, label_ids=None, metrics=metrics, num_samples=samples)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The weighted loss of a batch, and float32 `[B]` that of every sample, with fixed corruptions; no labels."""
        self._note_skipped(inputs)
        self._draw_corruption(inputs)
        inputs["share"] = 1.0
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, output = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        return loss, None if prediction_loss_only else output.per_sample_loss.float(), None

    def _gather_losses(self, losses: dict[str, list[float]]) -> dict[str, np.ndarray]:
        """The losses of all processes' samples, one process after the other."""
        parts = gather_object([losses])
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: np.array([x for part in parts for x in part.get(name, [])], dtype=np.float32) for name in names}

    def _optimizer_to_eval(self) -> None:
        """Schedule-free optimizers keep another point for training than the one that is evaluated and saved."""
        if callable(evaluate := getattr(self.optimizer, "eval", None)):
            evaluate()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._optimizer_to_eval()
        super().save_model(output_dir, _internal_call)
