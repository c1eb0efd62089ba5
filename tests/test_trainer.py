"""RecATrainer on a tiny BAGEL: the exact equalities that its promises come down to."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback

from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor, RecAConfig, RecATrainer
from reca_trainer.adapters import check_trainable
from reca_trainer.callbacks import UnderstandingAccuracy, fixed_rows
from reca_trainer.data import Row
from reca_trainer.saving.run_checkpoints import last_complete_checkpoint

CHECKPOINT = Path(__file__).parent / "golden" / "bagel" / "checkpoint"
SIZES = [(64, 48), (48, 64), (64, 64), (60, 44)]


@pytest.fixture
def model():
    return AutoUnifiedModel.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def processor():
    return AutoUnifiedProcessor.from_pretrained(
        CHECKPOINT, generation_size=(64, 32, 16), condition_size=(42, 42, 14), understanding_size=(70, 28, 14)
    )


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        for width, height in SIZES
        for _ in range(6)
    ]
    captions = [" ".join(["boat", "kite", "harbour", "stone"][: 1 + index % 4]) for index in range(len(images))]
    features = Features({"image": ImageFeature(), "caption": Value("string")})
    return Dataset.from_dict({"image": images, "caption": captions}, features=features)


def config(folder, **options):
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return RecAConfig(output_dir=str(folder), **{**defaults, **options})


def trainer(model, folder, dataset, processor, lora=True, **options):
    peft_config = LoraConfig(r=4, init_lora_weights="gaussian") if lora is True else lora or None
    return RecATrainer(
        model, config(folder, **options), train_dataset=dataset, processing_class=processor, peft_config=peft_config
    )


def losses(run, name="loss"):
    return [entry[name] for entry in run.state.log_history if name in entry]


def trained(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}


def test_short_form_trains(tmp_path, dataset, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(4):
        dataset[index]["image"].save(folder / f"{index}.png")
    tiny = AutoUnifiedProcessor.from_pretrained(CHECKPOINT, generation_size=(64, 32, 16), condition_size=(42, 42, 14))
    model = AutoUnifiedModel.from_pretrained(CHECKPOINT)
    model.save_pretrained(tmp_path / "model")
    tiny.save_pretrained(tmp_path / "model")
    run = RecATrainer(
        str(tmp_path / "model"), config(tmp_path / "out", dataset_name=str(folder), max_steps=2, save_strategy="steps")
    )
    run.train()
    assert run.state.global_step == 2
    assert (tmp_path / "out" / "checkpoint-2" / "model.safetensors").is_file()


@pytest.mark.parametrize(("task", "timesteps"), [("reconstruct", 1), ("reconstruct", 3), ("caption", 1)])
def test_accumulation_equals_one_large_batch(tmp_path, model, dataset, processor, task, timesteps):
    run = trainer(model, tmp_path, dataset, processor, lora=False, timesteps_per_image=timesteps)
    if task == "caption":  # BAGEL's image-to-text loss only reaches weights that RecA freezes
        run.model.requires_grad_(True)
        run.loss_weights["caption"] = 1.0
    sampler = run.get_train_dataloader().batch_sampler
    draw = next(iter(sampler))[0]._replace(task=task, size=(48, 64), instruction="describe")
    rows = [
        Row(
            draw._replace(seed=100 + index),
            str(index),
            dataset[index]["image"].resize((64, 48)),
            dataset[index]["caption"],
        )
        for index in range(4)
    ]

    def gradients(*micro_batches):
        run.model.zero_grad()
        batches = iter([run.data_collator(rows[start:end]) for start, end in micro_batches])
        batches, count = run.get_batch_samples(batches, len(micro_batches), torch.device("cpu"))
        if task == "reconstruct":
            drawn = [(len(batch["corruption"]["timesteps"]), batch["supervised"]) for batch in batches]
            elements = 12 * model.config.latent_token_dim
            assert drawn == [
                ((end - start) * timesteps, (end - start) * timesteps * elements) for start, end in micro_batches
            ]
        total = sum(run.training_step(run.model, batch, count) for batch in batches)
        return total, {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}

    whole_loss, whole = gradients((0, 4))
    parts_loss, parts = gradients((0, 3), (3, 4))
    torch.testing.assert_close(parts_loss, whole_loss, rtol=1e-6, atol=0)
    assert whole.keys() == parts.keys() and whole
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_bit_exact(tmp_path, dataset, processor, workers):
    options = {
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 9,
        "dataloader_num_workers": workers,
        "text_to_image_weight": 0.5,
    }
    whole = trainer(AutoUnifiedModel.from_pretrained(CHECKPOINT), tmp_path / "whole", dataset, processor, **options)
    whole.train()
    first = trainer(AutoUnifiedModel.from_pretrained(CHECKPOINT), tmp_path / "parts", dataset, processor, **options)
    first.add_callback(StopAt(4))
    first.train()
    second = trainer(AutoUnifiedModel.from_pretrained(CHECKPOINT), tmp_path / "parts", dataset, processor, **options)
    second.train(resume_from_checkpoint=True)
    assert losses(second) == losses(whole)
    for name, weight in trained(whole).items():
        assert torch.equal(weight, trained(second)[name]), name


def test_the_average_of_weights_is_what_is_evaluated_and_left_in_the_end(tmp_path, dataset, processor):
    def train(folder, steps):
        run = trainer(
            AutoUnifiedModel.from_pretrained(CHECKPOINT),
            folder,
            dataset,
            processor,
            max_steps=steps,
            ema_decay=0.4,
            eval_size=2,
            eval_strategy="steps",
            eval_steps=4,
            save_strategy="steps",
            save_steps=2,
        )
        weights, start = Weights(), trained(run)
        run.add_callback(weights)
        run.train(resume_from_checkpoint=True)
        return run, start, weights.at

    whole, average, steps = train(tmp_path / "whole", 4)
    for weights in steps:
        average = {name: 0.4 * mean + 0.6 * weights[name] for name, mean in average.items()}
    for name, weight in trained(whole).items():
        torch.testing.assert_close(weight, average[name], msg=name)
    assert losses(whole, "eval_loss") == [whole.evaluate()["eval_loss"]]
    for name, weight in load_file(tmp_path / "whole" / "checkpoint-4" / "adapter_model.safetensors").items():
        if "lora_" in name:
            assert torch.equal(weight, steps[-1][name.replace(".weight", ".default.weight")])

    train(tmp_path / "parts", 2)
    resumed, _, _ = train(tmp_path / "parts", 4)
    assert all(torch.equal(weight, trained(resumed)[name]) for name, weight in trained(whole).items())


class Weights(TrainerCallback):
    """The trained weights after every step."""

    def __init__(self):
        self.at = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.at.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses_and_soon_compile_nothing(tmp_path, dataset, processor):
    """Without code generation: traced, with gradients by the compiler's autograd, and run operation by operation."""

    graphs = []

    class Count(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    options = {"text_to_image_weight": 0.5, "max_steps": 24, "learning_rate": 1e-4}
    plain = trainer(AutoUnifiedModel.from_pretrained(CHECKPOINT), tmp_path, dataset, processor, **options)
    plain.train()
    options |= {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    compiled = trainer(AutoUnifiedModel.from_pretrained(CHECKPOINT), tmp_path, dataset, processor, **options)
    compiled.add_callback(Count())
    compiled.train()
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
    assert graphs[0] > 0 and graphs[11] == graphs[23]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step
        control.should_save = False


def test_truncated_checkpoint_is_passed_over(tmp_path, model, dataset, processor, caplog):
    run = trainer(model, tmp_path, dataset, processor, save_strategy="steps", save_steps=2)
    run.train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    weights = tmp_path / "checkpoint-6" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    with caplog.at_level(logging.WARNING, logger="transformers"):
        logging.getLogger("transformers").propagate = True
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert "adapter_model.safetensors should have" in caplog.text and "optimizer.pt" in caplog.text
    with pytest.raises(ValueError, match=r"checkpoint-6 is not complete: adapter_model.safetensors"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_checkpoints_hold_the_adapter_and_not_the_base(tmp_path, model, dataset, processor):
    run = trainer(model, tmp_path, dataset, processor, save_strategy="steps", save_steps=3, save_total_limit=1)
    run.train()
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["checkpoint-6"]
    saved = load_file(tmp_path / "checkpoint-6" / "adapter_model.safetensors")
    assert all("lora_" in name or "vae2llm" in name or "llm2vae" in name or "time_embedder" in name for name in saved)
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    listed = json.loads((tmp_path / "checkpoint-6" / "checkpoint_files.json").read_text())["bytes"]
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= listed.keys()


def test_evaluation_repeats_itself_at_any_batch_size(tmp_path, model, dataset, processor):
    results = []
    for batch_size in (1, 4, 4):
        run = RecATrainer(
            AutoUnifiedModel.from_pretrained(CHECKPOINT),
            config(tmp_path, per_device_eval_batch_size=batch_size, text_to_image_weight=1.0),
            train_dataset=dataset,
            eval_dataset=dataset.select(range(10)),
            processing_class=processor,
        )
        results.append({name: value for name, value in run.evaluate().items() if name.endswith("loss")})
    assert results[1] == results[2]
    assert results[0].keys() == {"eval_loss", "eval_reconstruction_loss", "eval_text_to_image_loss"}
    for name, value in results[0].items():
        assert value == pytest.approx(results[1][name], rel=1e-5)


def test_terms_are_logged_and_add_up(tmp_path, model, dataset, processor):
    run = trainer(model, tmp_path, dataset, processor, text_to_image_weight=0.25, gradient_accumulation_steps=2)
    run.train()
    total, parts = losses(run), zip(losses(run, "reconstruction_loss"), losses(run, "text_to_image_loss"), strict=True)
    assert total == pytest.approx([(image + 0.25 * text) / 2 for image, text in parts], rel=1e-4)


def test_lora_touches_only_the_generator(tmp_path, model, dataset, processor):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = trainer(model, tmp_path, dataset, processor)
    assert all(p.dtype == torch.float32 for p in trained(run).values())
    run.train()
    base = run.model.get_base_model()
    for name in base.understanding_modules:
        assert not base.get_submodule(name).training or not list(base.get_submodule(name).parameters())
    merged = run.model.merge_and_unload().state_dict()
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, before[name])}
    assert changed and all("_moe_gen" in n or n.startswith(("vae2llm", "llm2vae", "time_embedder")) for n in changed)
    assert sum("_proj_moe_gen" in name or "mlp_moe_gen" in name for name in changed) == 14


def test_full_training_leaves_understanding_bit_identical(tmp_path, model, dataset, processor):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer(model, tmp_path, dataset, processor, lora=False, weight_decay=0.1).train()
    generation = tuple(f"{name}." for name in model.generation_modules)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith(generation), name


def test_adapter_on_the_understanding_expert_is_refused(tmp_path, model, dataset, processor):
    with pytest.raises(ValueError, match=r"weights outside of it would be trained too: .*\.mlp\.gate_proj\."):
        trainer(model, tmp_path, dataset, processor, lora=LoraConfig(target_modules=["q_proj", "gate_proj"]))


def test_nothing_to_train_is_refused(model):
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="Nothing would be trained"):
        check_trainable(model)


def test_data_is_checked_before_the_model_is_loaded(tmp_path, dataset, processor):
    bare = dataset.remove_columns("caption")
    bad = Dataset.from_dict({"image": [b"x", b"y"], "caption": ["a", " "]})
    mixed = Dataset.from_dict({"image": [*dataset.with_format(None)[:2]["image"], None]}, features=bare.features)
    (tmp_path / "file").write_text("")
    cases = [
        ("needs a caption column", bare, {"text_to_image_weight": 1.0}),
        ("No dataset has a column 'words'", bare, {"caption_column": "words"}),
        ("'image' does not hold text", dataset, {"caption_column": "image"}),
        (r"1 of 2 rows have no caption, .*'generate'.*:\n  row 1$", bad, {"text_to_image_weight": 1.0}),
        ("no column 'photo'", dataset, {"image_column": "photo"}),
        ("nothing to train on", None, {}),
        ("no rows", dataset.select([]), {}),
        ("not as list", [{"image": 0}], {}),
        ("1 of 3 images cannot be used:\n  row 2: there is no image", mixed, {}),
        ("2 of 2 images cannot be used:\n  row 0: not an image of a known format", bad, {"on_bad_image": "skip"}),
        (
            "do not fill a micro-batch of 25 rows",
            dataset,
            {"dataloader_drop_last": True, "per_device_train_batch_size": 25},
        ),
        ("set max_steps", dataset.to_iterable_dataset(), {"max_steps": -1}),
        ("eval_strategy='steps' needs images", dataset, {"eval_strategy": "steps"}),
        ("--eval_size 0 --eval_strategy no", dataset.to_iterable_dataset(), {"eval_size": 2}),
        ("Nothing can be saved in output_dir=", dataset, {"output_dir": str(tmp_path / "file" / "out")}),
    ]
    for message, images, options in cases:
        args = config(options.pop("output_dir", tmp_path), **options)
        with pytest.raises((ValueError, OSError), match=message):
            RecATrainer("no/such/model", args, train_dataset=images, processing_class=processor)


def test_a_run_without_held_out_images_evaluates_nothing_at_its_start(tmp_path, model, dataset, processor):
    run = trainer(model, tmp_path, dataset, processor, LoraConfig(r=4), max_steps=1, eval_on_start=True)
    run.train()
    assert run.state.global_step == 1 and not any("eval_loss" in entry for entry in run.state.log_history)


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path, dataset, processor):
    def run(lora, steps):
        model = AutoUnifiedModel.from_pretrained(CHECKPOINT)
        options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2}
        return trainer(model, tmp_path, dataset, processor, lora, **options).train(resume_from_checkpoint=True)

    run(LoraConfig(r=4), 2)
    with pytest.raises(ValueError, match="r: 4, now 8; lora_alpha: 8, now 16"):
        run(LoraConfig(r=8, lora_alpha=16), 4)
    with pytest.raises(ValueError, match="holds an adapter, and this run trains a whole model"):
        run(None, 4)
    assert run(LoraConfig(r=4), 4).global_step == 4


def test_non_finite_loss_stops_the_run_and_names_the_rows(tmp_path, model, dataset, processor):
    with torch.no_grad():
        model.llm2vae.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"reconstruction loss is nan at step 1 on row \d+"):
        trainer(model, tmp_path, dataset, processor).train()


def test_preview_pictures_are_drawn(tmp_path, model, dataset, processor):
    run = trainer(
        model,
        tmp_path,
        dataset,
        processor,
        max_steps=2,
        preview_steps=1,
        preview_images=2,
        preview_prompts=["boat"],
        preview_generation_kwargs={"num_inference_steps": 2},
    )
    run.train()
    pictures = sorted(path.name for path in (tmp_path / "previews").iterdir())
    assert pictures == ["before_after.png", "step-000000.png", "step-000001.png", "step-000002.png"]
    first, last = (Image.open(tmp_path / "previews" / f"step-00000{step}.png") for step in (0, 2))
    assert first.size == last.size and first.tobytes() != last.tobytes()


def test_reconstructions_are_scored_at_every_evaluation(tmp_path, model, dataset, processor):
    run = trainer(
        model,
        tmp_path,
        dataset,
        processor,
        max_steps=2,
        eval_size=4,
        eval_strategy="steps",
        eval_steps=1,
        score_images=2,
        preview_generation_kwargs={"num_inference_steps": 2},
    )
    questions = [{"image": Image.new("RGB", (32, 32), "red"), "question": "which colour", "answer": "red"}]
    run.add_callback(UnderstandingAccuracy(run, questions, max_new_tokens=2))
    run.train()
    for score in ("psnr", "ssim", "lab_shift_l", "lab_shift_a", "lab_shift_b"):
        assert len(losses(run, f"eval_reconstruction_{score}")) == 2
    assert len(losses(run, "understanding_accuracy")) == 2  # before and after


def test_what_held_out_images_lack_is_drawn_from_the_training_set(tmp_path, model, dataset, processor):
    options = {"preview_steps": 2, "preview_images": 1, "preview_prompts": ["boat"], "score_images": 1}
    options |= {"text_to_image_weight": 1.0, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    options["preview_generation_kwargs"] = {"num_inference_steps": 1}
    held_out = {"generate": dataset.select(range(4))}
    run = RecATrainer(
        model,
        config(tmp_path, **options),
        train_dataset=dataset,
        eval_dataset=held_out,
        processing_class=processor,
        peft_config=LoraConfig(r=4),
    )
    run.train()
    assert len(losses(run, "eval_text_to_image_loss")) == 1 and not losses(run, "eval_reconstruction_psnr")
    assert (tmp_path / "previews" / "step-000002.png").is_file()
    assert [row.draw.task for row in fixed_rows(run, "reconstruct", 2)] == ["reconstruct"] * 2
    assert [row.text for row in fixed_rows(run, "generate", 4)] == held_out["generate"]["caption"]
