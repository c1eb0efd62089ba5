"""Does RecA improve text-to-image? The embedded default as a small experiment, with controls.

    python recipes/shapes_experiment.py --output_dir runs/shapes-experiment --workers 2

From each base model every run of `RUNS` is trained for the same number of steps, seed by seed, and scored on the same
prompts with the same noise. Controls see the same scenes for as many steps, but learn plain text-to-image from their
captions. Interrupted, the same command goes on with the runs that have no `result.json` yet. At the end, `table.md`,
`results.json`, `scores.png` and `pictures.png` say what came out; the figure needs matplotlib.

The two metrics that decide were fixed before any run: `dense_soft`, the share of a full description's facts that hold,
and `short_mean`, the mean of the six categories of short prompts.
"""

from __future__ import annotations

import contextlib
import copy
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from PIL import Image, ImageDraw
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm
from transformers import HfArgumentParser, TrainerCallback

from reca_trainer import RecAConfig, RecATrainer, toy
from reca_trainer.callbacks import contact_sheet
from reca_trainer.tasks import parse_task_mix
from reca_trainer.toy.score import CATEGORIES, score

PRIMARY = ("dense_soft", "short_mean")
REPORTED = (*PRIMARY, *CATEGORIES, "dense_strict", "psnr", "ssim", "facts_kept", "question_where_is",
            "question_what_is_at", "question_accuracy")  # fmt: skip
PROMPTS = ("a red circle", "two green triangles", "a blue square and a yellow cross",
           "a cross at the top left and a circle at the bottom right",
           "a large purple square at the top left and a small cyan circle at the bottom right on a white background",
           "a small yellow triangle at the top left, a large red cross at the top right and a large green circle at the "
           "bottom left on a black background")  # fmt: skip

PROJECTIONS = ("vae2llm", "llm2vae", "time_embedder")  # trained in full beside an adapter


@dataclass(frozen=True)
class Run:
    """What a run trains on and how.

    Args:
        task_mix: micro-batches of each task per turn; a micro-batch is a step here.
        captions: of the generate task, `"sparse"` as in pretraining, or `"dense"`: everything named.
        lora_r: rank of the adapter on the generator; 0 trains the whole generator.
    """

    task_mix: str
    learning_rate: float
    captions: str = "sparse"
    lora_r: int = 64


RUNS = {
    "control": Run("generate=1", 1e-3),
    "control, dense captions": Run("generate=1", 1e-3, captions="dense"),
    "RecA": Run("reconstruct=1", 1e-3),
    "RecA + text-to-image .1": Run("reconstruct=9,generate=1", 1e-3),
    "RecA + text-to-image .3": Run("reconstruct=7,generate=3", 1e-3),
    "RecA + text-to-image .5": Run("reconstruct=1,generate=1", 1e-3),
    "control, whole generator": Run("generate=1", 3e-4, lora_r=0),
    "RecA, whole generator": Run("reconstruct=1", 3e-4, lora_r=0),
    "RecA + text-to-image .1, whole generator": Run("reconstruct=9,generate=1", 3e-4, lora_r=0),
}


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "where runs and reports are written"})
    bases: list[str] = field(
        default_factory=lambda: [str(toy.CHECKPOINT)],
        metadata={"help": "checkpoints of recipes/pretrain_shapes.py, of different pretraining seeds"},
    )
    runs: list[str] = field(default_factory=lambda: list(RUNS), metadata={"help": "names in RUNS"})
    seeds: int = field(default=3, metadata={"help": "training seeds a run"})
    steps: int = field(default=600, metadata={"help": "optimizer steps a run"})
    batch_size: int = 32
    scenes: int = field(default=4000, metadata={"help": "training scenes"})
    size: int = field(default=200, metadata={"help": "prompts a category; dense prompts are twice as many"})
    scores: int = field(default=3, metadata={"help": "times a run is scored, evenly spread"})
    workers: int = field(default=1, metadata={"help": "runs at a time, one thread each"})


class Scores(TrainerCallback):
    """Scores the model `times` times, always on the same prompts with the same noise, all but the last time on a quarter
    of them."""

    def __init__(self, times: int, size: int):
        self.times, self.size, self.curve = times, size, []

    def on_step_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        if state.global_step % (state.max_steps // self.times) == 0:
            size = self.size if state.global_step == state.max_steps else self.size // 4
            results = score(merged(model), processing_class, size=size, sampling=toy.SAMPLING, progress=False)
            self.curve.append({"step": state.global_step, **results})


def merged(model: Any) -> Any:
    """A copy for inference, its adapter merged."""
    model = copy.deepcopy(model)
    return (model.merge_and_unload() if isinstance(model, PeftModel) else model).eval()


def pretraining_seed(base: str) -> int:
    return json.loads((Path(base) / "pretraining.json").read_text())["arguments"]["seed"]


def draw(model: Any, processor: Any) -> list[Image.Image]:
    """The images of `PROMPTS`, always from the same noise."""
    noise = [torch.Generator().manual_seed(index) for index in range(len(PROMPTS))]
    return model.generate_images(processor, text=list(PROMPTS), generator=noise, **toy.SAMPLING)


def train(base: str, name: str, seed: int, arguments: Arguments, folder: Path) -> None:
    """One run; its scores and settings are written to `folder/result.json` when it is done."""
    torch.set_num_threads(1)
    run, started = RUNS[name], time.time()
    model, processor = toy.load(base)
    dataset = toy.World().dataset(
        "train", arguments.scenes, seed=1, density=1.0 if run.captions == "dense" else toy.SPARSE
    )
    shares = parse_task_mix(run.task_mix)
    adapter = LoraConfig(r=run.lora_r, lora_alpha=2 * run.lora_r, modules_to_save=list(PROJECTIONS))
    callback = Scores(arguments.scores, arguments.size)
    trainer = RecATrainer(
        model,
        RecAConfig(
            output_dir=str(folder),
            seed=seed,
            learning_rate=run.learning_rate,
            lr_scheduler_type="cosine",
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            task_mix=run.task_mix,
            reca_weight=float("reconstruct" in shares),
            image_to_text_weight=float("caption" in shares),
            text_to_image_weight=float("generate" in shares),
            caption_column="text",
            cache_latents="reconstruct" in shares,
            bf16=True,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        processing_class=processor,
        callbacks=[callback],
        peft_config=adapter if run.lora_r else None,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w") as log, contextlib.redirect_stdout(log), sdpa_kernel(SDPBackend.MATH):
        trainer.train()
    for index, image in enumerate(draw(merged(trainer.model), processor)):
        image.save(folder / f"{index}.png")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {"base": pretraining_seed(base), "run": name, "seed": seed, **asdict(run), "steps": arguments.steps,
              "batch_size": arguments.batch_size, "scenes": arguments.scenes, "losses": losses,
              "seconds": round(time.time() - started), "curve": callback.curve}  # fmt: skip
    (folder / "result.json.partial").write_text(json.dumps(result))
    (folder / "result.json.partial").rename(folder / "result.json")


def score_base(base: str, arguments: Arguments, folder: Path) -> None:
    """The base model itself, as a run of no steps."""
    torch.set_num_threads(1)
    model, processor = toy.load(base)
    with sdpa_kernel(SDPBackend.MATH):
        results = score(model, processor, size=arguments.size, sampling=toy.SAMPLING, progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(draw(model, processor)):
        image.save(folder / f"{index}.png")
    (folder / "result.json").write_text(
        json.dumps({"base": pretraining_seed(base), "run": "base", "seed": None, "curve": [{"step": 0, **results}]})
    )


def summarise(results: list[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """For every run and score the mean over training seeds and its standard error; one run alone has that of its prompts."""
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for name in dict.fromkeys(result["run"] for result in results):
        last = [result["curve"][-1] for result in results if result["run"] == name]
        summary[name] = {}
        for metric in REPORTED:
            values = np.array([scores[metric]["mean"] for scores in last])
            spread = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else last[0][metric]["stderr"]
            summary[name][metric] = {"mean": float(values.mean()), "stderr": float(spread), "n": len(values)}
    return summary


def differences(results: list[dict], control: str) -> dict[str, dict[str, dict[str, float]]]:
    """For every run and primary metric its difference from the control of the same seed, which saw the same prompts with
    the same noise: mean and standard error over the seeds."""
    last = {(r["seed"], r["run"]): r["curve"][-1] for r in results}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in dict.fromkeys(result["run"] for result in results):
        pairs = [(scores, last[seed, control]) for (seed, run), scores in last.items()
                 if run == name != control and (seed, control) in last]  # fmt: skip
        if len(pairs) > 1:
            found[name] = {}
            for metric in PRIMARY:
                values = np.array([a[metric]["mean"] - b[metric]["mean"] for a, b in pairs])
                stderr = float(values.std(ddof=1) / len(values) ** 0.5)
                found[name][metric] = {"mean": float(values.mean()), "stderr": stderr, "n": len(values)}
    return found


def of_base(results: list[dict]) -> dict[int, list[dict]]:
    """Results by pretraining seed."""
    return {base: [result for result in results if result["base"] == base] for base in {r["base"] for r in results}}


def report(results: list[dict], output: Path) -> str:
    """Write `table.md` and `results.json`; returns the Markdown."""
    lines: list[str] = []
    for base, of_it in sorted(of_base(results).items()):
        lines += [f"## Pretraining seed {base}", ""]
        lines += [f"| run | n | {' | '.join(REPORTED)} |", "|---" * (len(REPORTED) + 2) + "|"]
        for name, scores in summarise(of_it).items():
            cells = [f"{s['mean']:.{1 if metric == 'psnr' else 3}f} ± {s['stderr']:.{1 if metric == 'psnr' else 3}f}"
                     for metric, s in scores.items()]  # fmt: skip
            lines.append(f"| {name} | {scores[PRIMARY[0]]['n']} | {' | '.join(cells)} |")
        for control in (name for name in RUNS if name.startswith("control")):
            rows = differences(of_it, control)
            if not rows:
                continue
            lines += ["", f"Difference from *{control}*, same seed, prompts and noise:", ""]
            lines += [f"| run | n | {' | '.join(PRIMARY)} |", "|---" * (len(PRIMARY) + 2) + "|"]
            for name, row in rows.items():
                cells = [f"{row[m]['mean']:+.3f} ± {row[m]['stderr']:.3f}" for m in PRIMARY]
                lines.append(f"| {name} | {row[PRIMARY[0]]['n']} | {' | '.join(cells)} |")
        lines.append("")
    text = "\n".join(lines)
    output.mkdir(parents=True, exist_ok=True)
    (output / "table.md").write_text(text)
    (output / "results.json").write_text(json.dumps(results) + "\n")
    return text


def draw_scores(results: list[dict], path: Path) -> None:
    """For each base both primary metrics over steps, with error bars, and reconstruction against the dense score."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bases = sorted(of_base(results).items())
    figure, rows = plt.subplots(len(bases), 3, figsize=(17, 4.5 * len(bases)), layout="constrained", squeeze=False)
    for axes, (base, of_it) in zip(rows, bases, strict=True):
        start = next(result["curve"][-1] for result in of_it if result["run"] == "base")
        axes[2].plot(start["facts_kept"]["mean"], start["dense_soft"]["mean"], "k*", markersize=12, label="base")
        for name in dict.fromkeys(result["run"] for result in of_it if result["run"] != "base"):
            curves = [result["curve"] for result in of_it if result["run"] == name]
            control = name.startswith("control")
            style = {"label": name, "linestyle": "--" if control else "-", "marker": "o", "capsize": 3}
            for axis, metric in zip(axes, PRIMARY, strict=False):
                values = np.array([[scores[metric]["mean"] for scores in curve] for curve in curves])
                prompts = np.array([scores[metric]["stderr"] for scores in curves[0]])
                spread = values.std(axis=0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else prompts
                steps = [0] + [scores["step"] for scores in curves[0]]
                axis.errorbar(steps, [start[metric]["mean"], *values.mean(axis=0)], [0, *spread], **style)
            ends = [curve[-1] for curve in curves]
            kept, dense = ([scores[metric]["mean"] for scores in ends] for metric in ("facts_kept", "dense_soft"))
            axes[2].scatter(kept, dense, label=name, marker="x" if control else "o")
        for axis, metric in zip(axes, PRIMARY, strict=False):
            axis.set(xlabel="step", ylabel=metric, title=f"pretraining seed {base}")
        axes[2].set(xlabel="facts kept in reconstructions", ylabel="dense_soft")
        axes[2].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=100)


def draw_pictures(folders: dict[str, Path], path: Path) -> None:
    """One row of pictures a run, one column a prompt."""
    names = []
    for name in folders:
        label = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(label).text((4, 50), name.replace(", ", "\n").replace(" + ", "\n+ "), fill="black")
        names.append(label)
    columns = [("", names)]
    for index, prompt in enumerate(PROMPTS):
        columns.append((prompt, [Image.open(folder / f"{index}.png") for folder in folders.values()]))
    contact_sheet(columns, cell=128).save(path)


def main(arguments: Arguments) -> str:
    output = Path(arguments.output_dir)
    jobs: list[tuple] = []
    for index, base in enumerate(arguments.bases):
        jobs.append((score_base, (base, arguments, output / f"base-{index}" / "base")))
    for seed in range(arguments.seeds):
        for index, base in enumerate(arguments.bases):
            for name in arguments.runs:
                slug = "-".join(name.replace(",", "").replace("+ ", "").split())
                folder = output / f"base-{index}" / f"{slug}-{seed}"
                jobs.append((train, (base, name, seed, arguments, folder)))
    folders = [job[1][-1] for job in jobs]
    todo = [job for job in jobs if not (job[1][-1] / "result.json").is_file()]
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(function, *words) for function, words in todo]
        bar = tqdm(as_completed(running), total=len(jobs), initial=len(jobs) - len(todo), desc="runs", unit="run")
        for done in bar:
            done.result()
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    text = report(results, output)
    first: dict[str, Path] = {}
    for result, folder in zip(results, folders, strict=True):
        first.setdefault(result["run"], folder)
    draw_pictures(first, output / "pictures.png")
    if find_spec("matplotlib"):
        draw_scores(results, output / "scores.png")
    else:
        print("No scores.png: it needs `pip install matplotlib`, and this command again.")
    return text


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    print(main(parsed))
