"""Every recipe from its command line to saved weights, with next to no steps."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from trl import ModelConfig

from reca_trainer import RecAConfig, toy
from reca_trainer.cli.train import RecipeParser, run
from reca_trainer.recipes import EXPERIMENTS, RECIPES, read_recipe, recipe_file
from reca_trainer.tasks import TASKS

SCRIPTS = Path(__file__).parents[1] / "recipes"
PROGRAM = """
import runpy, sys
from pathlib import Path
recipe = Path(sys.argv.pop(1))
tiny = runpy.run_path(str(recipe))["tiny"]
from reca_trainer.cli.train import run
steps = {"autoencoder_steps": 1, "understanding_steps": 1, "generator_steps": 1}
run(lambda: tiny(**steps), recipe.stem + "_tiny")
"""
FAST = "--max_steps 2 --per_device_train_batch_size 2 --eval_strategy no --eval_on_start false --logging_steps 1 "
FAST += "--preview_steps 2 --preview_images 1 --use_cpu true"


@pytest.mark.parametrize(
    ("name", "saved", "terms"),
    [
        ("harmon", "model.safetensors", {"reconstruction_loss", "image_to_text_loss"}),
        ("show_o", "model.safetensors", {"reconstruction_loss", "image_to_text_loss"}),
        ("openuni", "model.safetensors", {"reconstruction_loss"}),
        ("lance", "model.safetensors", {"reconstruction_loss"}),
        ("qwen_image", "model.safetensors", {"reconstruction_loss"}),
        ("janus_lora", "adapter_model.safetensors", {"reconstruction_loss", "image_to_text_loss"}),
    ],
)
def test_recipe_runs_without_a_model_or_data(name, saved, terms, tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(SCRIPTS / f"{name}.py"), *FAST.split(), "--output_dir", "out"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    assert (out / saved).is_file() and (out / "previews" / "before_after.png").is_file()
    logged = set().union(*json.loads((out / "trainer_state.json").read_text())["log_history"])
    assert logged & set({task.loss_name for task in TASKS.values()}) == terms


def test_pretraining_is_kept_for_the_next_run(tmp_path):
    tiny = runpy.run_path(str(SCRIPTS / "show_o.py"))["tiny"]
    steps = {"autoencoder_steps": 1, "understanding_steps": 1, "generator_steps": 1, "cache_dir": tmp_path}
    first, _ = tiny(**steps)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    second, _ = tiny(**steps)
    assert len(kept) == 3 and kept == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    tiny(**{**steps, "understanding_steps": 2})
    assert len(list(tmp_path.iterdir())) == 5  # the autoencoder before another understanding is the same


def test_the_image_to_text_term_learns_from_the_questions_of_the_shapes():
    row = toy.dataset("train", 1)[0]
    question, answer = row["conversations"]
    assert (question["value"], answer["value"]) == (row["question"], row["answer"])


@pytest.mark.slow
def test_the_experiment_goes_on_with_the_runs_that_are_missing(tmp_path):
    options = "--output_dir out --runs base sft sft_reca --trained lora --seeds 1 --steps 2 --batch_size 2 --scenes 4 "
    options += "--size 1 --scores 1"
    command = [sys.executable, str(SCRIPTS / "paper_experiments.py"), *options.split()]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def experiment():
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    first = experiment()
    results = {path.parent.name: path for path in (tmp_path / "out").glob("*/*/result.json")}
    assert results.keys() == {"base", "sft-lora-0", "sft_reca-lora-0"}
    assert all(f"| {name} | 1 |" in first for name in ("base", "sft", "sft_reca"))
    two_stages = json.loads(results["sft_reca-lora-0"].read_text())
    assert [scores["step"] for scores in two_stages["curve"]] == [2] and len(two_stages["losses"]) == 2
    second = json.loads((results["sft_reca-lora-0"].parent / "stage_1" / "adapter_config.json").read_text())
    assert second["base_model_name_or_path"] == str(toy.CHECKPOINT)
    kept = results["sft-lora-0"].stat().st_mtime_ns
    results["sft_reca-lora-0"].unlink()
    assert experiment() == first
    assert results["sft-lora-0"].stat().st_mtime_ns == kept


SECOND_STAGES = {
    "bagel_plus": "bagel_sft",
    "harmon_1_5b_plus": "harmon_1_5b_sft",
    "openuni_3_6b_plus": "openuni_3_6b_sft",
    "harmon_1_5b_reca_sft": "harmon_1_5b",
}


@pytest.fixture(autouse=True)
def instruction_files(tmp_path_factory, monkeypatch):
    """Two recipes name a file of instructions, which their comments say how to make."""
    folder = tmp_path_factory.mktemp("instructions")
    monkeypatch.chdir(folder)
    for name in ("instruction.txt", "instructions.txt"):
        (folder / name).write_text("Describe the image in detail.\n")


def parse(name):
    """The arguments of a recipe, on this machine's CPU."""
    parser = RecipeParser((RecAConfig, ModelConfig))
    return parser.parse_args_and_config(["--config", str(recipe_file(name)), "--use_cpu", "true", "--bf16", "false"])


@pytest.mark.parametrize("name", RECIPES | EXPERIMENTS)
def test_a_recipe_holds_known_options_and_names_its_data(name):
    args, model_args = parse(name)
    if not name.endswith("_tiny"):  # those make their data
        assert args.dataset_name is not None
    if args.image_to_text_weight and not name.endswith("_tiny"):
        assert args.caption_dataset_name is not None and args.image_root is not None
    before = SECOND_STAGES.get(name)
    assert model_args.model_name_or_path == (before and read_recipe(before)["output_dir"])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_has_its_bases_options_but_for_what_it_changes(name):
    changes = yaml.safe_load(EXPERIMENTS[name].read_text())
    base = read_recipe(changes.pop("base"))
    assert {"output_dir"} < changes.keys() and read_recipe(name) == base | changes
    assert all(base.get(option) != value for option, value in changes.items())
    assert base["max_steps"] == read_recipe(name)["max_steps"]


def test_recipes_write_to_places_of_their_own():
    places = [read_recipe(name)["output_dir"] for name in RECIPES | EXPERIMENTS]
    assert len(set(places)) == len(places)


def test_a_base_is_a_packaged_recipe(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: harmon_1_5b\nlearning_rate: 2.0e-5\n")
    args, _ = parse(str(mine))
    assert (args.learning_rate, args.weight_decay) == (2e-5, 0.02)
    mine.write_text("base: mine\nlearning_rate: 2.0e-5\n")
    with pytest.raises(ValueError, match="base: mine is no packaged recipe"):
        parse(str(mine))


# What the official scripts and configurations say: learning rate, warm-up (updates), betas, epsilon, decay, clipping,
# images a micro-batch, micro-batches an update, dropout of instructions, weighting, schedule.
BAGEL = (4e-5, 1000, (0.9, 0.95), 1e-15, 0.0, 1.0, 1, 8, 0.1, "target", "constant_with_warmup")
HARMON = (1e-5, 125, (0.9, 0.95), 1e-8, 0.02, 1.0, 48, 4, 0.1, "micro_batch", "constant_with_warmup")
OPENUNI = (1e-5, 0.01, (0.9, 0.95), 1e-8, 0.05, 1.0, 42, 4, 0.0, "micro_batch", "cosine")
SHOW_O = (5e-7, 1000, (0.9, 0.999), 1e-8, 0.01, 0.0, 2, 10, 0.0, "micro_batch", "constant_with_warmup")


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("bagel_paper", BAGEL),
        ("bagel_full", (BAGEL[0], 50, *BAGEL[2:])),
        ("harmon_1_5b", HARMON),
        ("harmon_1_5b_plus", HARMON),
        ("harmon_0_5b", (*HARMON[:6], 96, *HARMON[7:])),
        ("openuni_1_6b", OPENUNI),
        ("openuni_3_6b", (*OPENUNI[:7], 16, *OPENUNI[8:])),
        ("show_o_clip_512", SHOW_O),
        ("show_o_clip_256", (*SHOW_O[:6], 4, *SHOW_O[7:])),
        ("show_o_vq_512", (*SHOW_O[:7], 40, *SHOW_O[8:])),
    ],
)
def test_the_recipes_of_the_paper_have_the_official_values(name, official):
    args, _ = parse(name)
    assert official == (
        args.learning_rate,
        args.warmup_steps,
        (args.adam_beta1, args.adam_beta2),
        args.adam_epsilon,
        args.weight_decay,
        args.max_grad_norm,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.instruction_dropout,
        args.token_weighting,
        args.lr_scheduler_type,
    )
    assert args.caption_dropout == 0.1
    if name.startswith("bagel"):
        assert (args.max_image_size, args.min_image_size) == (1024, 512)
    if name.startswith("harmon"):
        assert args.task_mix == "reconstruct=2,caption=2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model_name_or_path m --lora_r 4", "--lora_r is about an adapter: add --use_peft"),
        ("--model_name_or_path m --use_dora", "--use_dora is about an adapter"),
        ("--model_name_or_path m --trust_remote_code", "--trust_remote_code"),  # which newer releases of TRL do not have
        ("--model_name_or_path m --use_peft --use_bnb_nested_quant", "--use_bnb_nested_quant is about a 4-bit base"),
        ("--dtype bfloat16", "--dtype is about loading a model: add --model_name_or_path"),
        ("--attn_implementation eager", "--attn_implementation is about loading a model"),
        ('--model_init_kwargs {"revision":"main"}', "--model_init_kwargs is about loading a model"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, message, tmp_path):
    argv = ["--config", str(tmp_path / "empty.yaml"), "--output_dir", str(tmp_path), "--use_cpu", *options.split()]
    (tmp_path / "empty.yaml").write_text("{}\n")
    with pytest.raises(ValueError, match=message):
        run(lambda: pytest.fail("nothing is made before the options are read"), "bagel_lora_tiny", argv)


def test_options_of_loading_reach_the_model(tmp_path):
    bagel = str(toy.CHECKPOINT)
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    argv = f"--model_name_or_path {bagel} --dataset_name {tmp_path} --output_dir {tmp_path / 'out'} --use_cpu --max_steps 1"
    argv += (
        " --per_device_train_batch_size 1 --max_image_size 32 --attn_implementation eager --use_peft --lora_r 2 --bf16"
    )
    argv += " --report_to none --config empty.yaml"
    (tmp_path / "empty.yaml").write_text("{}\n")
    trainer = run(None, "bagel_lora_tiny", argv.replace("empty.yaml", str(tmp_path / "empty.yaml")).split())
    base = trainer.model.get_base_model()
    assert base.config._attn_implementation == "eager"
    assert {weight.dtype for weight in base.vit_model.parameters()} == {torch.bfloat16}  # frozen, and --bf16 was given
    with pytest.raises(ValueError, match="garbage"):
        run(None, "", argv.replace("eager", "garbage").replace("empty.yaml", str(tmp_path / "empty.yaml")).split())
