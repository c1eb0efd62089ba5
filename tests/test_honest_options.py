"""What is accepted changes something; what would be ignored is refused with a sentence."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import TrainingArguments

from reca_trainer import RecAConfig, RecATrainer
from tests.test_trainer import config, dataset, losses, model, processor, trainer  # noqa: F401 fixtures


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": None}, TypeError, "a UnifiedModel or a PeftModel around one, not NoneType"),
        ({"model": torch.nn.Linear(1, 1)}, TypeError, "not Linear"),
        ({"args": TrainingArguments(output_dir="unused", use_cpu=True)}, TypeError, "not TrainingArguments"),
    ],
)
def test_things_of_another_kind_are_refused(model, dataset, processor, arguments, error, message, tmp_path):  # noqa: F811
    given = {"model": model, "args": config(tmp_path), "train_dataset": dataset, "processing_class": processor}
    with pytest.raises(error, match=message):
        RecATrainer(**{**given, **arguments})


def test_a_term_that_trains_nothing_is_refused(tmp_path, model, dataset, processor):  # noqa: F811
    with pytest.raises(
        ValueError, match=r"image_to_text_weight=1 would train nothing: the understanding of BagelModel"
    ):
        trainer(model, tmp_path, dataset, processor, image_to_text_weight=1.0)


def test_a_transform_that_would_not_be_called_is_refused(tmp_path, model, dataset, processor):  # noqa: F811
    with pytest.raises(ValueError, match="has a transform"):
        trainer(model, tmp_path, dataset.with_transform(lambda rows: rows), processor)


def test_an_optimizer_of_other_weights_is_refused(tmp_path, model, dataset, processor):  # noqa: F811
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with pytest.raises(ValueError, match="None of the optimizer's parameters is trained"):
        RecATrainer(
            model,
            config(tmp_path),
            train_dataset=dataset,
            processing_class=processor,
            peft_config=LoraConfig(r=2),
            optimizers=(optimizer, None),
        )


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_steps_that_cannot_be_taken_back_are_refused(tmp_path, model, dataset, processor, optim):  # noqa: F811
    options = {"optim_target_modules": ["mlp"]} if optim.startswith("galore") else {}
    with pytest.raises(ValueError, match="cannot take a step back"):
        trainer(model, tmp_path, dataset, processor, max_nonfinite_steps=1, optim=optim, **options)


def test_an_optimizer_class_is_used(tmp_path, model, dataset, processor):  # noqa: F811
    run = RecATrainer(
        model,
        config(tmp_path, max_steps=1),
        train_dataset=dataset,
        processing_class=processor,
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5, "momentum": 0.25}),
    )
    run.train()
    assert isinstance(run.optimizer.optimizer, torch.optim.SGD)
    assert run.optimizer.param_groups[0]["momentum"] == 0.25


class TwoPoints(torch.optim.SGD):
    """Trains at one point, and is evaluated and saved at another, as schedule-free optimizers are."""

    training, shift = True, 1.0

    @torch.no_grad()
    def move(self, training):
        for group in self.param_groups if training != self.training else ():
            for parameter in group["params"]:
                parameter.add_(self.shift if not training else -self.shift)
        self.training = training

    def train(self):
        self.move(True)

    def eval(self):
        self.move(False)


def test_an_optimizer_with_two_points_is_evaluated_and_saved_at_the_other(tmp_path, model, dataset, processor):  # noqa: F811
    run = RecATrainer(
        model,
        config(tmp_path, max_steps=1, learning_rate=0.0),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(4)),
        processing_class=processor,
        optimizer_cls_and_kwargs=(TwoPoints, {"lr": 0.0}),
    )
    _, weight = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    before = weight.detach().clone()
    run.train()
    run.optimizer.train()
    torch.testing.assert_close(weight.detach(), before)
    run.evaluate()
    torch.testing.assert_close(weight.detach(), before + 1)
    run.optimizer.train()
    run.save_model(str(tmp_path / "saved"))
    torch.testing.assert_close(weight.detach(), before + 1)


def test_metrics_are_computed_from_the_losses_of_all_samples(tmp_path, model, dataset, processor):  # noqa: F811
    run = RecATrainer(
        model,
        config(tmp_path),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(5)),
        processing_class=processor,
        compute_metrics=lambda p: {"worst": float(p.predictions["reconstruction_loss"].max())},
    )
    metrics = run.evaluate()
    prediction = run.predict(dataset.select(range(5)))
    values = prediction.predictions["reconstruction_loss"]
    assert values.dtype == np.float32 and values.shape == (5,)
    assert metrics["eval_worst"] == pytest.approx(float(values.max()))
    assert prediction.metrics["test_worst"] == metrics["eval_worst"]
    assert prediction.metrics["test_reconstruction_loss"] == pytest.approx(metrics["eval_reconstruction_loss"])


def test_a_batch_that_does_not_fit_is_halved(tmp_path, model, dataset, processor, monkeypatch):  # noqa: F811
    squares = Dataset.from_dict({"image": [Image.new("RGB", (64, 64), (index, 0, 0)) for index in range(8)]})
    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "max_steps": 2}
    run = trainer(model, tmp_path, squares, processor, **options)
    step, sizes = run.training_step, []

    def training_step(model, inputs, *args, **kwargs):
        sizes.append(len(inputs["seeds"]))
        if sizes[-1] > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        return step(model, inputs, *args, **kwargs)

    monkeypatch.setattr(run, "training_step", training_step)
    run.train()
    assert max(sizes[1:]) <= 3 and sizes[-2:] == [2, 2]


def test_tokens_are_shown_and_kept_nowhere(tmp_path):
    args = RecAConfig(output_dir=str(tmp_path), use_cpu=True, hub_token="hf_do_not_tell")
    assert not any("do_not_tell" in text for text in (repr(args), str(args), args.to_json_string()))
    for given in ({"token": "hf_do_not_tell"}, '{"token": "hf_do_not_tell"}'):
        with pytest.raises(ValueError, match="hf auth login") as error:
            RecAConfig(output_dir=str(tmp_path), use_cpu=True, model_init_kwargs=given)
        assert "do_not_tell" not in str(error.value)


def test_a_launchers_backend_compiles_nothing_and_says_so(tmp_path, model, dataset, processor, monkeypatch, caplog):  # noqa: F811
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    run = trainer(model, tmp_path, dataset, processor, max_steps=1)
    run.train()
    assert not isinstance(run.model_wrapped, torch._dynamo.eval_frame.OptimizedModule)
    assert "ACCELERATE_DYNAMO_BACKEND=eager is not used" in caplog.text


def test_weights_too_coarse_for_their_steps_are_named(tmp_path, model, dataset, processor, caplog):  # noqa: F811
    trainer(model, tmp_path, dataset, processor)
    assert "Trained weights are" not in caplog.text
    arguments = {"args": config(tmp_path), "train_dataset": dataset, "processing_class": processor}
    RecATrainer(copy.deepcopy(model).to(torch.bfloat16), **arguments)
    assert "Trained weights are torch.bfloat16: most steps are smaller than they can tell apart" in caplog.text
