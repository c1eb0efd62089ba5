"""What RecA does to the tiny model of a recipe: held-out reconstruction and understanding before and after, with the
image-to-text term and without it.

    python benchmarks/families.py harmon [--max_steps 200 …]

Further words are passed to the recipe. Prints one line of JSON and writes it to `results/families/`, with a picture of
held-out scenes, what the autoencoder alone makes of them (no reconstruction can be better), their reconstructions before
RecA, and after.
"""

from __future__ import annotations

import argparse
import datetime
import json
import runpy
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from PIL import Image

from reca_trainer import adapters
from reca_trainer.cli.train import run
from reca_trainer.contact_sheets import contact_sheet, sheet_row
from reca_trainer.models.contract import UnifiedModel, UnifiedProcessor
from reca_trainer.toy import World
from reca_trainer.toy.detector import Detector
from reca_trainer.toy.score import INSTRUCTION, compare_images, held_out_scenes, judge_dense, mean, questions
from reca_trainer.toy.world import QUESTION_KINDS, normalise_answer

ROOT = Path(__file__).parent
SAMPLING = {
    "harmon": {"num_inference_steps": 8, "guidance_scale": 1.0},
    "show_o": {"num_inference_steps": 12, "guidance_scale": 0.0},
    "openuni": {"num_inference_steps": 12, "guidance_scale": 1.0},
    "janus_lora": {"guidance_scale": 1.0},
    "lance": {"num_inference_steps": 12, "guidance_scale": 1.0, "timestep_shift": 1.0},
    "qwen_image": {"num_inference_steps": 12, "guidance_scale": 1.0},
}


def scores_of(images: list[Image.Image]) -> dict:
    """How near images are to the held-out scenes they should show."""
    world = World()
    scenes = held_out_scenes(world, len(images))
    scores = compare_images(images, [world.render(scene) for scene in scenes])
    scores["facts_kept"] = judge_dense(Detector(world)(images), [world.facts(scene) for scene in scenes])["soft"]
    return scores


def rounded(scores: dict) -> dict:
    return {name: {key: round(value, 4) for key, value in score.items()} for name, score in scores.items()}


@torch.no_grad()
def autoencoder_alone(recipe: dict, model: UnifiedModel, processor: UnifiedProcessor, size: int) -> tuple[dict, list]:
    """Scores of `size` held-out scenes that went through the autoencoder, and the pictures."""
    world = World()
    originals = [world.render(scene) for scene in held_out_scenes(world, size)]
    pixels = processor(images=originals, instruction=INSTRUCTION, task="reconstruct")["pixel_values"]
    decoded = recipe["decode"](model, recipe["encode"](model, pixels))
    levels = (127.5 * decoded + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    images = [Image.fromarray(array) for array in levels]
    return rounded(scores_of(images)), images


def measure(model: UnifiedModel, processor: UnifiedProcessor, sampling: dict, size: int) -> tuple[dict, list]:
    """Scores on `size` held-out scenes and as many questions of each kind, and the reconstructions."""
    world = World()
    originals = [world.render(scene) for scene in held_out_scenes(world, size)]
    noise = [torch.Generator().manual_seed(index) for index in range(size)]
    images = model.generate_images(
        processor, text=[INSTRUCTION] * size, images=originals, task="reconstruct", generator=noise, **sampling
    )
    scores, right = scores_of(images), []
    for kind in QUESTION_KINDS:
        triples = questions(world, kind, size)
        shown = [world.render(scene) for scene, _, _ in triples]
        answers = model.generate_text(processor, [text for _, text, _ in triples], images=shown, max_new_tokens=8)
        right += [normalise_answer(answer) == truth for answer, (_, _, truth) in zip(answers, triples, strict=True)]
    scores["question_accuracy"] = mean(right)
    return rounded(scores), images


def train_and_measure(name: str, weight: float | None, argv: list[str], size: int) -> tuple[dict, list]:
    """One run of a recipe with another weight of the image-to-text term (`None`: the recipe's), and its scores."""
    torch.set_num_threads(1)
    recipe = ROOT.parent / "recipes" / f"{name}.py"
    tiny = runpy.run_path(str(recipe))["tiny"]
    if weight == 0:
        argv = [*argv, "--image_to_text_weight", "0", "--task_mix", "reconstruct=1", "--gradient_accumulation_steps", "1"]
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        argv = [*argv, "--output_dir", folder, "--preview_steps", "0", "--save_strategy", "no"]
        trainer = run(tiny, f"{name}_tiny", argv)
    seconds = round(time.time() - started)
    held_out = [row for row in trainer.state.log_history if "eval_reconstruction_loss" in row]
    names = ("step", "eval_reconstruction_loss", "eval_image_to_text_loss")
    losses = [{key: round(row[key], 4) for key in names if key in row} for row in (held_out[0], held_out[-1])]
    scores, images = measure(adapters.unwrap(trainer.model), trainer.processing_class, SAMPLING[name], size)
    return {"seconds": seconds, "held_out_losses": losses, **scores}, images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=SAMPLING)
    parser.add_argument("--size", type=int, default=32, help="held-out scenes, and questions of each kind")
    arguments, passed_on = parser.parse_known_args()
    name, size = arguments.recipe, arguments.size
    torch.set_num_threads(1)

    started = time.time()
    recipe = runpy.run_path(str(ROOT.parent / "recipes" / f"{name}.py"))
    model, processor = recipe["tiny"]()
    result = {"recipe": name, "date": datetime.date.today().isoformat()}
    result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    result["preparation_seconds"] = round(time.time() - started)
    result["autoencoder_alone"], ceiling = autoencoder_alone(recipe, model, processor, size)
    runs = {"reca_and_image_to_text": None, "reca_alone": 0.0} if model.shares_weights else {"reca": None}
    with ProcessPoolExecutor(len(runs), mp_context=get_context("spawn")) as pool:
        jobs = {label: pool.submit(train_and_measure, name, w, passed_on, size) for label, w in runs.items()}
        result["before"], before = measure(model, processor, SAMPLING[name], size)
        finished = {label: job.result() for label, job in jobs.items()}
    result |= {label: scores for label, (scores, _) in finished.items()}

    world, shown = World(), 8
    originals = [world.render(scene) for scene in held_out_scenes(world, shown)]
    after = next(iter(finished.values()))[1]
    rows = {"held out": originals, "autoencoder": ceiling, "before": before, "after": after}
    folder = ROOT / "results" / "families"
    folder.mkdir(parents=True, exist_ok=True)
    sheet = contact_sheet([sheet_row(title, pictures[:shown], cell=96) for title, pictures in rows.items()])
    sheet.save(folder / f"{name}-{result['date']}.png")
    (folder / f"{name}-{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
