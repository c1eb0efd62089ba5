"""A run that goes wrong says so."""

import logging
import shutil

import numpy as np
import pytest
import torch
from transformers import TrainerCallback, TrainerState

from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor, RecAConfig, RecATrainer
from reca_trainer.callbacks import CollapseAlarm, UnderstandingProbe
from reca_trainer.saving.run_checkpoints import last_complete_checkpoint
from tests.reliability.run import CHECKPOINT, dataset, poison, trainer

SHARED = CHECKPOINT.parents[1] / "harmon" / "checkpoint"  # a model whose understanding and generation share weights


def start(folder, **options):
    return trainer(str(folder), False, False, 23, **{"max_steps": 3, "per_device_train_batch_size": 2, **options})


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING)
    logging.getLogger("transformers").propagate = True
    return caplog


def poison_gradient(run, *steps):
    weight = next(p for p in run.model.parameters() if p.requires_grad)
    weight.register_hook(lambda gradient: gradient * (torch.nan if run.state.global_step + 1 in steps else 1))


class Weights(TrainerCallback):
    def __init__(self):
        self.at = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.at.append([p.detach().clone() for p in model.parameters() if p.requires_grad])


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_applied(tmp_path):
    run = start(tmp_path)
    poison_gradient(run, 2)
    with pytest.raises(FloatingPointError, match=r"gradient's norm is nan at step 2 on row \d+ \(\d+.png\), row \d+"):
        run.train()
    assert all(p.isfinite().all() for p in run.model.parameters())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_steps_that_are_not_finite_are_left_out_and_counted(tmp_path, where, warnings):
    run, weights = start(tmp_path, max_nonfinite_steps=1), Weights()
    run.add_callback(weights)
    poison(run, 0, 2) if where == "loss" else poison_gradient(run, 2)
    run.train()
    first, second, third = weights.at
    assert all(torch.equal(before, after) for before, after in zip(first, second, strict=True))
    assert not all(torch.equal(before, after) for before, after in zip(second, third, strict=True))
    assert run.state.log_history[-2]["nonfinite_steps"] == 1 and "The step is left out." in warnings.text
    assert all(np.isfinite(entry["loss"]) for entry in run.state.log_history if "loss" in entry)


def test_too_many_steps_that_are_not_finite_stop_the_run(tmp_path):
    run = start(tmp_path, max_nonfinite_steps=1)
    poison_gradient(run, 1, 2)
    with pytest.raises(FloatingPointError, match=r"(?s)at step 2 .*1 such steps were left out"):
        run.train()


@pytest.mark.parametrize(("warmup_steps", "warns"), [(3, True), (2, False)])
def test_a_warm_up_as_long_as_the_run_is_warned_of(tmp_path, warnings, warmup_steps, warns):
    start(tmp_path, warmup_steps=warmup_steps).train()
    assert ("warms up for 3 of 3 steps and so never reaches 0.001" in warnings.text) == warns


@pytest.mark.parametrize(("decay", "warns"), [(0.9, True), (0.3, False)])
def test_an_average_that_does_not_fit_the_run_is_warned_of(tmp_path, warnings, decay, warns):
    start(tmp_path, ema_decay=decay).train()
    warning = (
        "ema_decay=0.9 does not fit a run of 3 steps: at its end 72.9% of the average are the weights it started from"
    )
    assert (warning in warnings.text) == warns


def test_a_resumed_run_compares_with_its_true_beginning(warnings):
    state = TrainerState(log_history=[{"reconstruction_loss": 2.0}, {"reconstruction_loss": 0.1}])
    alarm = CollapseAlarm(threshold=0.02)  # as a process that has seen nothing of this run
    for loss in (0.05, 0.03, 0.02):
        state.log_history.append({"reconstruction_loss": loss})
        alarm.on_log(None, state, None, logs=state.log_history[-1])
    assert warnings.text.count("the reconstruction loss fell from 2 to 0.03") == warnings.text.count("Collapse") == 1


@pytest.mark.slow
def test_understanding_is_measured_before_and_after(tmp_path):
    run = RecATrainer(
        AutoUnifiedModel.from_pretrained(SHARED),
        RecAConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            image_to_text_weight=0.0,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=dataset(),
        processing_class=AutoUnifiedProcessor.from_pretrained(SHARED, image_size=64),
    )
    run.train()
    losses = [entry["understanding_loss"] for entry in run.state.log_history if "understanding_loss" in entry]
    assert len(losses) == 2 and losses[0] != losses[1]


@pytest.mark.parametrize(("after", "warns"), [(2.1, False), (2.3, True)])
def test_understanding_that_drifts_is_warned_of(monkeypatch, warnings, after, warns):
    state = TrainerState(log_history=[{"understanding_loss": 2.0}, {"loss": 1.0}])
    probe = UnderstandingProbe(None)
    monkeypatch.setattr(probe, "measure", lambda: state.log_history.append({"understanding_loss": after}))
    probe.on_train_end(None, state, None)
    assert ("the image-to-text loss on fixed captions rose from 2 to 2.3" in warnings.text) == warns


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path):
    run = start(
        tmp_path,
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        eval_size=3,
        save_total_limit=1,
        load_best_model_at_end=True,
        greater_is_better=True,  # the first, so that the limit would have it deleted
        metric_for_best_model="eval_loss",
    )
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    best = 1 + losses.index(max(losses))
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert (tmp_path / f"checkpoint-{best}").is_dir() and last_complete_checkpoint(tmp_path)


def test_the_limit_deletes_what_is_damaged_then_what_is_oldest(tmp_path):
    start(tmp_path, save_strategy="steps", save_steps=3).train()
    for number in (7, 9):  # left over from a run that went further
        shutil.copytree(tmp_path / "checkpoint-3", tmp_path / f"checkpoint-{number}")
    (tmp_path / "checkpoint-9" / "optimizer.pt").write_bytes(b"")
    go_on = {"save_strategy": "steps", "save_steps": 1}
    start(tmp_path, max_steps=4, save_total_limit=3, **go_on).train(str(tmp_path / "checkpoint-3"))
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4", "checkpoint-7"}
    start(tmp_path, max_steps=5, save_total_limit=1, **go_on).train(resume_from_checkpoint=True)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]


def test_the_newest_checkpoint_may_have_a_lower_number(tmp_path):
    start(tmp_path, save_strategy="steps", save_steps=3).train()
    (tmp_path / "checkpoint-3").rename(tmp_path / "checkpoint-9")
    start(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
