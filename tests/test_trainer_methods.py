"""Public methods that `RecATrainer` inherits from `Trainer`: each does what its name says, or is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from reca_trainer import RecAConfig, RecATrainer
from tests.test_option_effects import _quick_garbage_collection, dataset, make  # noqa: F401 a fixture


@pytest.fixture
def trainer(tmp_path):
    return make(tmp_path, eval_dataset=dataset(5))


@pytest.fixture
def trained(trainer):
    trainer.train()
    return trainer


class Note(TrainerCallback):
    ended = False

    def on_train_end(self, *args, **kwargs):
        self.ended = True


def test_callbacks_are_added_and_taken_away(trainer):
    note, other = Note(), PrinterCallback()
    trainer.add_callback(note)
    trainer.add_callback(other)
    assert trainer.pop_callback(other) is other
    trainer.remove_callback(PrinterCallback)  # the default one
    trainer.train()
    assert note.ended and trainer.pop_callback(PrinterCallback) is None


def test_precision_is_left_to_the_forward_that_accelerate_wraps(tmp_path):
    trainer, weight = make(tmp_path, bf16=True), torch.ones(4, 4)
    for context in (trainer.compute_loss_context_manager(), trainer.autocast_smart_context_manager()):
        with context:
            assert (weight @ weight).dtype == torch.float32
    model, dtypes = trainer.accelerator.prepare(trainer.model), []
    trainer.model.generator[0].register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    trainer.compute_loss(model, dict(batches[0]))
    assert dtypes == [torch.bfloat16]


def test_a_step_is_its_batches_losses_and_gradients(trainer):
    loader = trainer.get_train_dataloader()
    assert trainer.num_examples(loader) == 8
    batches, count = trainer.get_batch_samples(iter(loader), 2, torch.device("cpu"))
    assert len(batches) == 2 and sum(batch["share"] for batch in batches) == 1
    loss, output = trainer.compute_loss(trainer.model.train(), dict(batches[0]), return_outputs=True)
    assert float(loss) == pytest.approx(float(output.loss) * batches[0]["share"])
    assert float(trainer.training_step(trainer.model, dict(batches[0]), count)) == pytest.approx(float(loss))
    assert all(p.grad is not None for p in trainer.model.generator.parameters())
    assert trainer.floating_point_ops(batches[0]) == 0


def test_optimizer_and_schedule_are_made(trainer):
    trainer.create_optimizer_and_scheduler(num_training_steps=10)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert trainer.get_learning_rates() == [0.01] * len(trainer.optimizer.param_groups)
    assert trainer.get_num_trainable_parameters() == sum(p.numel() for p in trained)
    assert trainer.get_optimizer_group(trained[0])["lr"] == 0.01
    assert len(trainer.get_optimizer_group()) == len(trainer.optimizer.param_groups)
    kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args)
    assert kind is torch.optim.AdamW and options["eps"] == 1e-6
    assert trainer.get_decay_parameter_names(trainer.model) and trainer.lr_scheduler.get_last_lr()[0] == 0.01
    other = torch.optim.SGD(trained, lr=1.0)
    trainer.optimizer, trainer.lr_scheduler = None, None
    assert trainer.create_optimizer() is trainer.optimizer
    assert trainer.create_scheduler(10, other).optimizer is other


def test_layout_is_that_of_the_launch(trainer):
    assert trainer.get_total_train_batch_size(trainer.args) == 2
    assert (trainer.get_cp_size(), trainer.get_sp_size(), trainer.get_tp_size()) == (1, 1, 1)
    assert trainer.is_world_process_zero() and trainer.is_local_process_zero()
    _, updates, examples, samples, batch_size, _, steps = trainer.set_initial_training_values(
        trainer.args, trainer.get_train_dataloader()
    )
    assert (updates, examples, samples, batch_size, steps) == (4, 8, 6, 2, 3)
    before = trainer.accelerator
    trainer.create_accelerator_and_postprocess()
    assert trainer.accelerator is not before and trainer.accelerator.num_processes == 1


def test_evaluations_and_predictions_are_losses(trained):
    loader = trained.get_eval_dataloader()
    assert len(loader.dataset) == len(trained.get_test_dataloader(dataset(5)).dataset) == 5
    output = trained.evaluation_loop(loader, "Evaluation")
    assert isinstance(output, EvalLoopOutput) and output.num_samples == 5
    metrics, prediction = trained.evaluate(), trained.predict(dataset(5))
    assert isinstance(prediction, PredictionOutput)
    mean = float(prediction.predictions["reconstruction_loss"].mean())
    assert metrics["eval_loss"] == pytest.approx(mean) == pytest.approx(output.metrics["eval_loss"])
    assert prediction.metrics["test_loss"] == pytest.approx(mean)
    losses = []
    for batch in loader:
        loss, predictions, labels = trained.prediction_step(trained.model.eval(), batch, prediction_loss_only=False)
        assert labels is None and float(loss) == pytest.approx(float(predictions.mean()))
        losses += predictions.tolist()
    assert float(np.mean(losses)) == pytest.approx(mean)
    loss, predictions, _ = trained.prediction_step(trained.model, next(iter(loader)), prediction_loss_only=True)
    assert loss.isfinite() and predictions is None


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_the_model_of_the_best_reconstructions_is_loaded_at_the_end(tmp_path, ema_decay):
    """Of steps that are far too long, the first do least harm."""
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "ema_decay": ema_decay,
    }
    options |= {"score_images": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_reconstruction_psnr"}
    trainer = make(tmp_path, eval_dataset=dataset(5), learning_rate=0.5, max_steps=4, **options)
    trainer.train()
    scores = {
        entry["step"]: entry["eval_reconstruction_psnr"]
        for entry in trainer.state.log_history
        if "eval_reconstruction_psnr" in entry
    }
    best = max(scores, key=scores.__getitem__)
    assert len(scores) == 4 and best < 4
    assert trainer.state.best_metric == scores[best] and trainer.state.best_global_step == best
    folder = tmp_path / "run" / f"checkpoint-{best}"
    weights = load_file(folder / ("weight_average.safetensors" if ema_decay else "model.safetensors"))
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad:
            assert torch.equal(weight, weights[name]), name
    assert trainer.evaluate()["eval_reconstruction_psnr"] == pytest.approx(scores[best], abs=1e-4)


def test_a_score_that_is_not_computed_cannot_choose_the_best_model(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_reconstruction_psnr"}
    with pytest.raises(ValueError, match="metric_for_best_model='eval_reconstruction_psnr' needs score_images"):
        make(tmp_path, eval_dataset=dataset(5), **options)


def test_the_model_that_follows_most_prompts_is_loaded_at_the_end(tmp_path):
    """The judge tells only from the second picture of the third evaluation that it is right."""

    def judge(prompts, images):
        seen.append((list(prompts), [image.size for image in images]))
        return [None, len(seen) == 3, False]

    seen, images = [], dataset(5)
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "score_images": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_prompts_followed"}
    trainer = make(tmp_path, eval_dataset=images, judge=judge, max_steps=4, **options, **best)
    trainer.train()
    assert [prompts for prompts, _ in seen] == [images["caption"][:3]] * 4
    followed = [
        entry["eval_prompts_followed"] for entry in trainer.state.log_history if "eval_prompts_followed" in entry
    ]
    assert followed == [0, 0, 0.5, 0] and trainer.state.best_global_step == 3
    weights = load_file(tmp_path / "run" / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(w, weights[name]) for name, w in trainer.model.named_parameters() if w.requires_grad)
    with pytest.raises(ValueError, match="metric_for_best_model='eval_prompts_followed' needs a judge"):
        make(tmp_path / "other", eval_dataset=images, **options, **best)


def test_sets_by_name_are_evaluated_each_with_its_scores(tmp_path):
    sets = {"faces": dataset(5), "rooms": {"reconstruct": dataset(8).select(range(5, 8))}}
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "score_images": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_rooms_reconstruction_psnr"}
    trainer = make(tmp_path, eval_dataset=sets, **options, **best)
    trainer.train()
    scores = [entry[name] for entry in trainer.state.log_history if (name := best["metric_for_best_model"]) in entry]
    assert len(scores) == 3 and trainer.state.best_metric == max(scores)
    metrics = trainer.evaluate()
    for name, images in sets.items():
        alone = trainer.evaluate(images)
        for score in ("loss", "reconstruction_loss", "reconstruction_psnr", "reconstruction_ssim"):
            assert metrics[f"eval_{name}_{score}"] == alone[f"eval_{score}"]
    assert len(trainer.get_eval_dataloader("rooms").dataset) == 3
    assert trainer.evaluate({"mine": dataset(2)}, metric_key_prefix="test")["test_mine_loss"] > 0
    with pytest.raises(ValueError, match="not for rooms"):
        trainer.evaluate({"reconstruct": dataset(2), "rooms": dataset(2)})


def test_metrics_are_logged_shown_and_saved(trained, capsys):
    trained.log({"mine": 1.5})
    assert trained.state.log_history[-1]["mine"] == 1.5
    metrics = {"train_loss": 0.5, "train_runtime": 61.0}
    assert type(trained).metrics_format(metrics)["train_runtime"] == "0:01:01.00"
    capsys.readouterr()
    trained.log_metrics("train", metrics)
    assert "***** train metrics *****" in capsys.readouterr().out
    trained.save_metrics("train", metrics)
    trained.save_state()
    folder = Path(trained.args.output_dir)
    assert json.loads((folder / "train_results.json").read_text()) == metrics
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 3
    trained.store_flos()
    assert trained.state.total_flos == 0


@pytest.mark.skipif(not hasattr(RecATrainer, "end"), reason="this release of transformers has no Trainer.end")
def test_a_trainer_ends(trained):
    trained.end()
    assert not torch.distributed.is_initialized()


def test_what_would_start_from_another_model_is_refused(trainer):
    with pytest.raises(NotImplementedError, match="Start one run per setting"):
        trainer.hyperparameter_search()
    with pytest.raises(NotImplementedError, match="there is no model_init"):
        trainer.call_model_init()


REFUSED = {"model_init": "called", "compute_loss_func": "weighted", "preprocess_logits_for_metrics": "logits"}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_mean_nothing_are_refused(tmp_path, name):
    with pytest.raises(TypeError, match=rf"{name} is no argument of RecATrainer: .*{REFUSED[name]}"):
        RecATrainer("a/model", RecAConfig(output_dir=str(tmp_path), use_cpu=True), **{name: lambda: None})
