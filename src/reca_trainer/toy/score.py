"""How well a model knows the world: six categories of short prompts, dense prompts, reconstruction, understanding.

The categories are those of GenEval (Ghosh et al., 2023), judged by the rule-based `Detector`; its relation between two
objects becomes the place of each. The dense score is the fraction of the facts stated by a full description that hold,
after DPG-Bench (Hu et al., 2024). Scenes come from a held-out split, noise from one generator per image, so two
models are scored on the same prompts with the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from reca_trainer.models.contract import UnifiedModel, UnifiedProcessor
from reca_trainer.toy.detector import Detector
from reca_trainer.toy.world import (
    COLOURS,
    QUESTION_KINDS,
    SHAPES,
    Fact,
    Scene,
    World,
    count_phrase,
    normalise_answer,
)

CATEGORIES = ("single_object", "two_objects", "counting", "colours", "position", "colour_attribution")
INSTRUCTION = "describe the image in detail"

Score = dict[str, float]  # "mean", "stderr" (of the mean), "n"


def short_prompt(world: World, category: str, rng: np.random.Generator) -> tuple[str, list[Fact]]:
    """A short prompt of one category and what must hold in an image for it to count as followed."""
    shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:2]]
    colours = [tuple(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:2]]
    cells = [int(cell) for cell in rng.permutation(world.grid**2)[:2]]
    first, second = (("shape", shape) for shape in shapes)
    if category == "single_object":
        return count_phrase(1, [], shapes[0]), [Fact((first,))]
    if category == "two_objects":
        text = f"{count_phrase(1, [], shapes[0])} and {count_phrase(1, [], shapes[1])}"
        return text, [Fact((first,)), Fact((second,))]
    if category == "counting":
        count = int(rng.integers(2, world.max_objects + 1))
        return count_phrase(count, [], shapes[0]), [Fact((first,), count, count)]
    if category == "colours":
        return count_phrase(1, [colours[0]], shapes[0]), [Fact((first, ("colour", colours[0])))]
    if category == "position":
        places = [
            f"{count_phrase(1, [], shape)} at the {world.places[cell]}"
            for shape, cell in zip(shapes, cells, strict=True)
        ]
        return " and ".join(places), [Fact((first, ("cell", cells[0]))), Fact((second, ("cell", cells[1])))]
    if category == "colour_attribution":
        text = " and ".join(count_phrase(1, [colour], shape) for shape, colour in zip(shapes, colours, strict=True))
        return text, [Fact((first, ("colour", colours[0]))), Fact((second, ("colour", colours[1])))]
    raise ValueError(f"Unknown category {category!r}; there are {', '.join(CATEGORIES)}.")


def short_prompts(world: World, size: int, seed: int = 0) -> dict[str, list[tuple[str, list[Fact]]]]:
    """`size` prompts of each category; prompt `i` does not depend on `size`."""
    return {
        category: [short_prompt(world, category, np.random.default_rng([seed, index, i])) for i in range(size)]
        for index, category in enumerate(CATEGORIES)
    }


def held_out_scenes(world: World, size: int, seed: int = 0, split: str = "test") -> list[Scene]:
    """Scenes of a split, the same ones as in `world.dataset(split, size, seed)`."""
    return [world.sample(world.rng(split, seed, index), split) for index in range(size)]


def questions(world: World, kind: str, size: int, seed: int = 0, split: str = "test") -> list[tuple]:
    """`size` triples (scene, question, answer) of one kind of question about scenes of a split."""
    triples = []
    for index in range(10**9):
        rng = np.random.default_rng([seed, QUESTION_KINDS.index(kind), index])
        scene = world.sample(rng, split)
        question = world.question(scene, rng, kind)
        if question.kind == kind:
            triples.append((scene, question.text, question.answer))
        if len(triples) == size:
            return triples


def mean(values: Sequence[float]) -> Score:
    """The mean of independent measurements with its standard error."""
    array = np.asarray(values, dtype=np.float64)
    stderr = array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else float("nan")
    return {"mean": float(array.mean()), "stderr": float(stderr), "n": len(array)}


def mean_of_means(scores: Sequence[Score]) -> Score:
    """The unweighted mean of several scores, whose errors are independent."""
    stderr = math.sqrt(sum(score["stderr"] ** 2 for score in scores)) / len(scores)
    return {"mean": sum(s["mean"] for s in scores) / len(scores), "stderr": stderr, "n": sum(s["n"] for s in scores)}


def judge_short(scenes: Sequence[Scene], facts: Sequence[list[Fact]]) -> Score:
    """How often all facts of a prompt hold in what was detected in its image."""
    return mean([all(fact.holds(scene) for fact in stated) for scene, stated in zip(scenes, facts, strict=True)])


def judge_dense(scenes: Sequence[Scene], facts: Sequence[list[Fact]]) -> dict[str, Score]:
    """`strict`: all stated facts hold; `soft`: the fraction of a description's facts that hold."""
    fractions = [np.mean([fact.holds(scene) for fact in stated]) for scene, stated in zip(scenes, facts, strict=True)]
    return {"strict": mean([fraction == 1 for fraction in fractions]), "soft": mean(fractions)}


def compare_images(images: Sequence[Image.Image], references: Sequence[Image.Image]) -> dict[str, Score]:
    """PSNR (dB) and SSIM of each image against its reference, which it is resized to, both on the range [0, 1].

    Raises:
        ImportError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
    except ImportError as error:
        raise ImportError("PSNR and SSIM need torchmetrics: pip install 'reca-trainer[evaluation]'.") from error

    psnr, ssim = [], []
    for image, reference in zip(images, references, strict=True):
        a, b = (
            torch.from_numpy(np.asarray(picture.convert("RGB").resize(reference.size), dtype=np.float32) / 255)
            .permute(2, 0, 1)
            .unsqueeze(0)
            for picture in (image, reference)
        )
        psnr.append(float(peak_signal_noise_ratio(a, b, data_range=(0.0, 1.0))))
        ssim.append(float(structural_similarity_index_measure(a, b, data_range=(0.0, 1.0))))
    return {"psnr": mean(np.minimum(psnr, 100.0)), "ssim": mean(ssim)}


def score(
    model: UnifiedModel,
    processor: UnifiedProcessor,
    world: World | None = None,
    *,
    quick: bool = False,
    size: int | None = None,
    seed: int = 0,
    split: str = "test",
    batch_size: int = 100,
    sampling: dict[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Score]:
    """Score a model.

    Args:
        quick: 48 prompts, scenes and questions of each kind (under a minute for the embedded default on two cores)
            instead of 200.
        size: how many of each instead; dense prompts are twice as many.
        seed: decides prompts, scenes and noise.
        sampling: further arguments of `generate_images`, such as `num_inference_steps` and `guidance_scale`.
        progress: show a progress bar.

    Returns:
        For each name a mean, its standard error and the number of measurements: the `CATEGORIES` and their
        `short_mean`; `dense_soft`, `dense_strict`; `facts_kept` of reconstructions and, unless `quick`, their `psnr` (dB)
        and `ssim`, which need torchmetrics;
        `question_accuracy` and, for each of `QUESTION_KINDS`, its own accuracy, as `question_where_is`.
    """
    world = world or World()
    size = size or (48 if quick else 200)
    sampling = dict(sampling or {})
    short = short_prompts(world, size, seed)
    dense = held_out_scenes(world, 2 * size, seed, split)
    asked = {kind: questions(world, kind, size, seed, split) for kind in QUESTION_KINDS}
    detect = Detector(world)
    total = len(CATEGORIES) * size + 2 * size + size + len(QUESTION_KINDS) * size
    bar = tqdm(total=total, desc="score", unit="sample", disable=not progress)

    def generate(offset: int, **inputs: list) -> list[Image.Image]:
        """Images for `inputs`, sample `i` with the noise of `seed`, `offset` and `i`, in batches."""
        count, images = len(next(iter(inputs.values()))), []
        for start in range(0, count, batch_size):
            part = {name: values[start : start + batch_size] for name, values in inputs.items()}
            indices = range(start, min(start + batch_size, count))
            noise = [torch.Generator().manual_seed((seed * 64 + offset) * 2**20 + index) for index in indices]
            task = "reconstruct" if "images" in inputs else "generate"
            images += model.generate_images(processor, task=task, generator=noise, **part, **sampling)
            bar.update(len(indices))
        return images

    results: dict[str, Score] = {}
    for index, (category, prompts) in enumerate(short.items()):
        images = generate(index, text=[text for text, _ in prompts])
        results[category] = judge_short(detect(images), [facts for _, facts in prompts])
    results["short_mean"] = mean_of_means([results[category] for category in CATEGORIES])

    images = generate(len(CATEGORIES), text=[world.describe(scene) for scene in dense])
    judged = judge_dense(detect(images), [world.facts(scene) for scene in dense])
    results |= {f"dense_{name}": value for name, value in judged.items()}

    kept = dense[:size]
    originals = [world.render(scene) for scene in kept]
    images = generate(len(CATEGORIES) + 1, text=[INSTRUCTION] * size, images=originals)
    if not quick:
        results |= compare_images(images, originals)
    results["facts_kept"] = judge_dense(detect(images), [world.facts(scene) for scene in kept])["soft"]

    for kind, triples in asked.items():
        answers = []
        for start in range(0, size, batch_size):
            part = triples[start : start + batch_size]
            shown = [world.render(scene) for scene, _, _ in part]
            answers += model.generate_text(processor, [text for _, text, _ in part], images=shown)
            bar.update(len(part))
        right = [normalise_answer(answer) == truth for answer, (_, _, truth) in zip(answers, triples, strict=True)]
        results[f"question_{kind.replace('-', '_')}"] = mean(right)
    results["question_accuracy"] = mean_of_means([results[f"question_{k.replace('-', '_')}"] for k in QUESTION_KINDS])
    bar.close()
    return results


def table(**runs: dict[str, Score]) -> str:
    """A Markdown table of several results of `score`, one column a run: `table(before=…, after=…)`."""
    names = list(next(iter(runs.values())))
    lines = [f"| | {' | '.join(runs)} |", "|---" * (len(runs) + 1) + "|"]
    for name in names:
        digits = 1 if name == "psnr" else 3
        cells = [f"{run[name]['mean']:.{digits}f} ± {run[name]['stderr']:.{digits}f}" for run in runs.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
