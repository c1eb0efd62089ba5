"""The paper's experiments in small, on the embedded default: two stages, controls and ablations.

    python recipes/paper_experiments.py --output_dir runs/paper-experiments --workers 2

From each base model every run of `RUNS` is trained for as many steps as the others, seed by seed, as a whole generator and as
LoRA, and scored on the same prompts with the same noise. Interrupted, the same command goes on with the runs that have no
`result.json` yet. At the end `table.md`, `results.json` and `scores.png` (which needs matplotlib) say what came out.
"""

from __future__ import annotations

import contextlib
import copy
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm
from transformers import HfArgumentParser, TrainerCallback

from reca_trainer import RecAConfig, RecATrainer, toy
from reca_trainer.files import replacing
from reca_trainer.toy.score import INSTRUCTION, score

METRICS = ("dense_soft", "short_mean", "facts_kept", "question_accuracy")
DECISIVE = METRICS[:2]
TRAINED = {"whole": (1e-4, None), "lora": (3e-4, LoraConfig(r=64, lora_alpha=128))}  # learning rate, adapter


# The stages of each run: arguments of `RecAConfig`, and what `stage_options` reads beside them.
SFT = {"reca_weight": 0.0, "text_to_image_weight": 1.0}  # on captions as sparse as those of pretraining
RECA = {"cache_latents": True}
CONTROL = "sft"
RUNS: dict[str, list[dict[str, Any]]] = {
    "base": [],
    CONTROL: [SFT],
    "sft_dense": [{**SFT, "density": 1.0}],
    "reca": [RECA],
    "sft_reca": [SFT, RECA],
    "reca_sft": [RECA, SFT],
    "reca_condition_half": [{**RECA, "condition_scale": 0.5}],
    "reca_condition_vae": [{"processor_kwargs": {"condition_encoder": "vae"}}],
    "reca_condition_dropout": [{**RECA, "condition_token_dropout": 0.5}],
    "reca_no_instruction": [{**RECA, "instruction_dropout": 1.0}],
    "reca_one_instruction": [{**RECA, "instruction": INSTRUCTION}],
    "reca_frozen_layer": [{**RECA, "freeze_modules": ["language_model.model.layers.0"]}],
    "reca_sparse_condition": [{**RECA, "instruction_dropout": 1.0, "condition_token_dropout": 0.25}],
    "reca_and_sft": [{"text_to_image_weight": 1.0, "task_mix": "reconstruct=1,generate=1"}],
}


@dataclass
class Experiment:
    output_dir: str = field(metadata={"help": "where runs and reports are written"})
    bases: list[str] = field(
        default_factory=lambda: [str(toy.CHECKPOINT)],
        metadata={"help": "checkpoints of recipes/pretrain_shapes.py, of different pretraining seeds"},
    )
    seeds: int = field(default=3, metadata={"help": "training seeds a run"})
    steps: int = field(default=400, metadata={"help": "optimizer steps a run, shared evenly by its stages"})
    batch_size: int = 32
    scenes: int = field(default=4000, metadata={"help": "training scenes"})
    size: int = field(default=200, metadata={"help": "prompts a category; dense prompts are twice as many"})
    scores: int = field(default=4, metadata={"help": "times a run is scored, all but the last on a quarter"})
    workers: int = field(default=1, metadata={"help": "runs at a time, one thread each"})


@dataclass
class Arguments(Experiment):
    runs: list[str] = field(default_factory=lambda: list(RUNS), metadata={"choices": list(RUNS)})
    trained: list[str] = field(default_factory=lambda: list(TRAINED), metadata={"choices": list(TRAINED)})


@dataclass(frozen=True)
class Job:
    """A run from a base: its stages, none where the base itself is scored, and what they train at which learning rate."""

    base: str
    run: str
    stages: list[dict[str, Any]]
    trained: str | None = None
    learning_rate: float | None = None
    adapter: LoraConfig | None = None
    seed: int | None = None


class Scores(TrainerCallback):
    """Scores a model along its run, whose stages it counts through."""

    def __init__(self, world: toy.World, arguments: Experiment):
        self.world, self.arguments, self.steps_before = world, arguments, 0
        self.curve: list[dict[str, Any]] = []

    def add(self, model: Any, processor: Any, step: int, last: bool) -> None:
        model = copy.deepcopy(model)
        model = (model.merge_and_unload() if isinstance(model, PeftModel) else model).eval()
        options = {"quick": True, "sampling": toy.SAMPLING, "progress": False}
        size = self.arguments.size if last else max(self.arguments.size // 4, 1)
        self.curve.append({"step": step, **score(model, processor, self.world, size=size, **options)})

    def on_step_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        step, last = self.steps_before + state.global_step, self.arguments.steps
        if step == last or step % max(last // self.arguments.scores, 1) == 0:
            self.add(model, processing_class, step, step == last)

    def on_train_end(self, args, state, control, **kwargs):
        self.steps_before += state.global_step


def stage_options(stage: dict[str, Any], processor: Any, folder: Path) -> tuple[dict[str, Any], Any]:
    """A stage's arguments of `RecAConfig`, and the share of the facts that its captions name."""
    options = dict(stage)
    if scale := options.pop("condition_scale", None):  # of the side at which the understanding encoder sees a picture
        *sides, patch = processor.condition_size
        options["processor_kwargs"] = {"condition_size": [*(round(s * scale / patch) * patch for s in sides), patch]}
    if instruction := options.pop("instruction", None):  # the only one
        (folder / "instruction.txt").write_text(f"{instruction}\n")
        options["instructions_file"] = str(folder / "instruction.txt")
    return options, options.pop("density", toy.SPARSE)


def perform(job: Job, arguments: Experiment, folder: Path) -> None:
    """Train a run stage by stage, each from what the one before has saved, and write `folder/result.json`."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    base, start, losses, flos = Path(job.base), time.time(), [], 0.0
    pretraining = json.loads((base / "pretraining.json").read_text())
    world = toy.World(**pretraining["world"])
    model, processor = toy.load(base)
    scores, name = Scores(world, arguments), str(base)
    with (folder / "log.txt").open("w") as log, contextlib.redirect_stdout(log), sdpa_kernel(SDPBackend.MATH):
        if not job.stages:
            scores.add(model, processor, 0, True)
        for index, stage in enumerate(job.stages):
            options, density = stage_options(stage, processor, folder)
            steps = arguments.steps * (index + 1) // len(job.stages) - scores.steps_before
            config = RecAConfig(output_dir=str(folder / f"stage_{index}"), seed=job.seed, max_steps=steps,
                                per_device_train_batch_size=arguments.batch_size, learning_rate=job.learning_rate,
                                lr_scheduler_type="cosine", model_init_kwargs={"dtype": "float32"}, bf16=True,
                                caption_column="text", use_cpu=True, save_strategy="no", report_to="none",
                                disable_tqdm=True, **options)  # fmt: skip
            dataset = world.dataset("train", arguments.scenes, seed=1, density=density)
            adapter = None if index else job.adapter  # a later stage goes on with the one it opens
            trainer = RecATrainer(name, config, train_dataset=dataset, callbacks=[scores], peft_config=adapter)
            trainer.train()
            trainer.save_model()
            losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
            flos += trainer.state.total_flos
            name = config.output_dir
    title = f"{folder.parent.name}, pretraining seed {pretraining['arguments']['seed']}"
    names = {"base": title, "run": job.run, "trained": job.trained, "learning_rate": job.learning_rate, "seed": job.seed}
    result = {**names, "curve": scores.curve, "losses": losses, "flos": flos}
    with replacing(folder / "result.json") as file:
        file.write_text(json.dumps({**result, "seconds": round(time.time() - start)}))


def by_run(results: list[dict[str, Any]]) -> dict[tuple[str | None, str], list[dict[str, Any]]]:
    """The results of all seeds and bases, by what is trained and run."""
    groups: dict[tuple[str | None, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["trained"], result["run"]), []).append(result)
    return groups


def standard_error(values: np.ndarray) -> np.ndarray:
    """Of the mean over the first axis, which has more than one entry."""
    return values.std(axis=0, ddof=1) / len(values) ** 0.5


def average(values: list[float]) -> str:
    if len(values) < 2:
        return "".join(f"{value:.3f}" for value in values)
    return f"{np.mean(values):.3f} ± {standard_error(np.array(values)):.3f}"


def report(results: list[dict[str, Any]]) -> str:
    """Tables in Markdown, of each base and of all: means with standard errors over seeds (and bases), and the differences
    from the control of the same base and seed."""
    header = ["trained", "run", "n", *METRICS, *(f"{metric} - {CONTROL}" for metric in DECISIVE)]
    bases = list(dict.fromkeys(result["base"] for result in results))
    lines = []
    for title, chosen in [*((base, [base]) for base in bases), *([("All bases", bases)] if len(bases) > 1 else [])]:
        lines += [f"## {title}", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        groups = by_run([result for result in results if result["base"] in chosen])
        for (trained, name), runs in groups.items():
            controls = {(r["base"], r["seed"]): r for r in groups.get((trained, CONTROL), []) if name != CONTROL}
            pairs = [(r, controls[r["base"], r["seed"]]) for r in runs if (r["base"], r["seed"]) in controls]
            columns = [[r["curve"][-1][metric]["mean"] for r in runs] for metric in METRICS]
            for metric in DECISIVE:
                columns.append([a["curve"][-1][metric]["mean"] - b["curve"][-1][metric]["mean"] for a, b in pairs])
            lines.append(f"| {' | '.join([trained or '', name, str(len(runs)), *map(average, columns)])} |")
        lines.append("")
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """The decisive metrics over steps: means over seeds and bases, with standard errors."""
    from matplotlib import pyplot as plt

    figure, rows = plt.subplots(len(TRAINED), 2, figsize=(15, 9), layout="constrained", squeeze=False)
    for axes, kind in zip(rows, TRAINED, strict=True):
        for axis, metric in zip(axes, DECISIVE, strict=True):
            for (trained, name), runs in by_run(results).items():
                values = np.array([[scores[metric]["mean"] for scores in run["curve"]] for run in runs])
                if trained is None:
                    axis.axhline(values.mean(), color="black", label=name)
                elif trained == kind:
                    steps, style = [scores["step"] for scores in runs[0]["curve"]], "-" if "reca" in name else "--"
                    errors = standard_error(values) if len(values) > 1 else None
                    axis.errorbar(steps, values.mean(axis=0), errors, label=name, linestyle=style, capsize=3)
            axis.set(xlabel="step", ylabel=metric, title=kind)
        axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=100)


def perform_all(jobs: dict[Path, Job], arguments: Experiment) -> list[dict[str, Any]]:
    """The results of all jobs, by folder; those that are there already are not run again."""
    todo = {folder: job for folder, job in jobs.items() if not (folder / "result.json").is_file()}
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(perform, job, arguments, folder) for folder, job in todo.items()]
        for done in tqdm(as_completed(running), total=len(jobs), initial=len(jobs) - len(todo), unit="run"):
            done.result()
    return [json.loads((folder / "result.json").read_text()) for folder in jobs]


def main(arguments: Arguments) -> str:
    output, jobs = Path(arguments.output_dir), {}
    for seed in range(arguments.seeds):
        for index, base in enumerate(arguments.bases):
            for name in arguments.runs:
                folder, stages = output / f"base-{index}", RUNS[name]
                if not stages:
                    jobs[folder / name] = Job(base, name, stages)
                    continue
                for trained in arguments.trained:
                    job = Job(base, name, stages, trained, *TRAINED[trained], seed)
                    jobs[folder / f"{name}-{trained}-{seed}"] = job
    results = perform_all(jobs, arguments)
    (output / "results.json").write_text(json.dumps(results) + "\n")
    (output / "table.md").write_text(report(results))
    if find_spec("matplotlib"):
        draw(results, output / "scores.png")
    return report(results)


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    print(main(parsed))
