"""Every recipe on the tiny model of its family, from its YAML file to its end; with `-s` this prints the losses."""

import functools
import json
import statistics

import pytest

from reca_trainer import toy
from reca_trainer.cli.train import run
from reca_trainer.recipes import EXPERIMENTS, RECIPES, read_recipe
from tests.models.test_contract import TASKS, build

pytestmark = pytest.mark.slow

# What a tiny model, four pictures and a CPU need otherwise than the recipes say.
OPTIONS = {
    "max_steps": 30,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "use_cpu": "true",
    "bf16": "false",
    "dtype": "float32",
    "dataloader_num_workers": 0,
    "eval_size": 0,
    "eval_strategy": "no",
    "eval_on_start": "false",
    "save_strategy": "no",
    "preview_steps": 0,
    "logging_steps": 1,
    "report_to": "none",
    "dataset_name": "pictures.parquet",
    "caption_dataset_name": "conversations.parquet",
    "image_root": ".",
}
BAGEL = {"max_image_size": 32, "min_image_size": 32}
BY_RECIPE = {
    "bagel_condition_518": {"processor_kwargs": json.dumps({"condition_size": [70, 70, 14]})},
    "bagel_condition_980": {"processor_kwargs": json.dumps({"condition_size": [140, 140, 14]})},
    "show_o_vq_512_blur": {"processor_kwargs": json.dumps({"down_scale": 4, "resize_back": True})},
}
LORA = {"learning_rate": 1e-2}


def family_of(recipe: str) -> str:
    """The name of its tiny model in `build`."""
    if recipe.startswith("show_o_vq"):
        return "show_o_plain"
    return next(family for family in TASKS if recipe.startswith(family))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where runs have their data."""
    folder = tmp_path_factory.mktemp("recipes")
    rows = toy.dataset("train", 4)
    dense = toy.World().dataset("train", 4, density=1.0)["text"]
    pictures = rows.select_columns(["image", "text"]).rename_column("text", "prompt").add_column("llava", list(dense))
    pictures.to_parquet(folder / "pictures.parquet")
    rows.select_columns(["image", "conversations"]).to_parquet(folder / "conversations.parquet")
    for name in ("instruction.txt", "instructions.txt"):
        (folder / name).write_text("describe the image in detail\n")
    return folder


@pytest.fixture(scope="module")
def tiny(folder):
    @functools.cache
    def save(family: str) -> str:
        """The name of a folder with the tiny model of a family."""
        for part in build(family):
            part.save_pretrained(folder / family)
        return family

    return save


@pytest.fixture(scope="module")
def train(folder, tiny):
    @functools.cache
    def losses(recipe: str) -> list[float]:
        """Of every step of a recipe, whose first stage has been run if it is the second."""
        values = read_recipe(recipe)
        before = [name for name in RECIPES if read_recipe(name)["output_dir"] == values.get("model_name_or_path")]
        options = {**OPTIONS, **BY_RECIPE.get(recipe, {}), "model_name_or_path": tiny(family_of(recipe))}
        options |= BAGEL if recipe.startswith("bagel") else {}
        options |= LORA if values.get("use_peft") else {}
        if not values.get("image_to_text_weight") and "caption" not in values.get("task_mix", "caption"):
            del options["caption_dataset_name"], options["image_root"]
        if values.get("task_mix"):
            options["gradient_accumulation_steps"] = 2
        for name in before:
            losses(name)
            del options["model_name_or_path"]  # the recipe names what the first stage has written
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        trainer = run(lambda: pytest.fail("a model is named"), "", ["--config", recipe, *words])
        assert trainer.state.global_step == OPTIONS["max_steps"]
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    return losses


@pytest.mark.parametrize("recipe", RECIPES | EXPERIMENTS)
def test_a_recipe_runs_to_its_end_and_its_loss_falls(recipe, folder, train, monkeypatch):
    monkeypatch.chdir(folder)
    losses = train(recipe)
    first, last = statistics.mean(losses[:5]), statistics.mean(losses[-5:])
    print(f"\n| `{recipe}` | {first:.3f} | {last:.3f} |")
    assert last < first
    assert any((folder / read_recipe(recipe)["output_dir"]).glob("*model.safetensors"))
