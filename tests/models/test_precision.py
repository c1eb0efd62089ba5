"""Frozen weights in bfloat16 beside trained ones in float32: half the memory, the same numbers."""

import pytest
import torch
from datasets import Dataset

from reca_trainer import AutoUnifiedModel, RecAConfig, RecATrainer
from reca_trainer.models.auto import open_lazily
from reca_trainer.saving.export import export
from tests.models.test_contract import PICTURES, TASKS, fresh, make_batch, run

FAMILIES = [family for family in TASKS if family not in ("embedded", "sketch")]


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    """A family's processor, and the same checkpoint in float32 and with what is frozen in bfloat16."""
    model, processor = fresh(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    loaded = [
        AutoUnifiedModel.from_pretrained(folder, dtype=torch.float32, **options)
        for options in ({}, {"frozen_dtype": torch.bfloat16})
    ]
    for model in loaded:
        model.freeze_understanding()
        model.train()
    return request.param, processor, *loaded


def test_what_is_trained_is_float32_and_most_that_is_frozen_is_not(both):
    family, _, whole, mixed = both
    names = {name for name, weight in mixed.named_parameters() if weight.dtype == torch.bfloat16}
    assert bool(names) == (family not in ("harmon", "show_o_plain"))  # which freeze an autoencoder alone
    assert not names & {name for name, weight in mixed.named_parameters() if weight.requires_grad}
    assert (mixed.dtype, mixed.frozen_dtype, whole.frozen_dtype) == (torch.float32, torch.bfloat16, None)
    for name, weight in whole.state_dict().items():
        assert torch.equal(mixed.state_dict()[name], weight.bfloat16() if name in names else weight), name


def test_losses_and_gradients_are_the_same_bits(both):
    family, processor, *models = both
    for task in TASKS[family]:
        results = []
        for model in models:
            with torch.autocast("cpu", torch.bfloat16):
                output = run(model, make_batch(processor, task))
            if output.loss.requires_grad:
                output.loss.backward()
            gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
            results.append((output.loss.detach(), gradients))
            model.zero_grad()
        (loss, gradients), (mixed_loss, mixed_gradients) = results
        assert torch.equal(loss, mixed_loss), task
        assert gradients.keys() == mixed_gradients.keys()
        for name, gradient in gradients.items():
            assert torch.equal(gradient, mixed_gradients[name]), (task, name)


def test_pictures_and_answers_are_those_of_the_whole_model_under_an_autocast(both):
    family, processor, whole, mixed = both
    sampling = {} if family in ("janus", "show_o", "show_o_plain") else {"num_inference_steps": 2}

    def make(model):
        generator = torch.Generator().manual_seed(0)
        drawn = model.generate_images(
            processor, images=PICTURES[:1], task="reconstruct", generator=generator, **sampling
        )
        answers = model.generate_text(processor, ["What is this?"], PICTURES[:1], max_new_tokens=4)
        return drawn[0].tobytes(), answers

    with torch.autocast("cpu", torch.bfloat16):
        expected = make(whole)
    assert make(mixed) == expected


def test_saved_and_loaded_again_it_is_float32(both, tmp_path):
    _, _, _, mixed = both
    mixed.save_pretrained(tmp_path)
    loaded = AutoUnifiedModel.from_pretrained(tmp_path)
    for name, weight in mixed.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.float() if weight.is_floating_point() else weight), name
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}


def test_a_run_from_a_name_trains_as_with_all_in_float32_and_resumes(tmp_path):
    images = Dataset.from_dict({"image": PICTURES * 2})
    model, processor = fresh("bagel")
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")

    def make(name, **options):
        defaults = {
            "max_steps": 2,
            "per_device_train_batch_size": 1,
            "learning_rate": 1e-3,
            "bf16": True,
            "use_cpu": True,
        }
        defaults |= {"save_steps": 1, "save_strategy": "steps", "report_to": "none", "disable_tqdm": True}
        defaults |= {"preview_steps": 1, "preview_generation_kwargs": {"num_inference_steps": 2}}
        args = RecAConfig(output_dir=str(tmp_path / name), **{**defaults, **options})
        return RecATrainer(str(tmp_path / "base"), args, train_dataset=images)

    whole = make("whole", model_init_kwargs={"dtype": "float32"})
    mixed = make("mixed")
    for trainer in (whole, mixed):
        trainer.train()
    trained = {name: weight for name, weight in mixed.model.named_parameters() if weight.requires_grad}
    for name, weight in whole.model.named_parameters():
        assert name not in trained or torch.equal(weight, trained[name]), name
    again = make("mixed")
    assert again.model.frozen_dtype == torch.bfloat16
    again.train(resume_from_checkpoint=str(tmp_path / "mixed" / "checkpoint-1"))
    for name, weight in again.model.state_dict().items():
        assert torch.equal(weight, mixed.model.state_dict()[name]), name
    mixed.save_model()
    export(tmp_path / "mixed", tmp_path / "published", layout="published")
    exported = open_lazily(tmp_path / "published").lazy_weights
    for name, weight in mixed.model.state_dict().items():
        assert torch.equal(exported[name][...].to(weight.dtype), weight), name
