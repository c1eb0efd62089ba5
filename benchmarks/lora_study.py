"""Does LoRA give RecA's gain? Adapters against the whole generator, on the embedded default.

    python benchmarks/lora_study.py --output_dir runs/lora-study --workers 2

Every setting of `SETTINGS` differs in one thing from `reference` and gets the same number of trials: three learning rates, on the
first two bases. At its best rate each of the best settings, and the whole generator, is then run on all bases and with more
seeds. Interrupted, the same command goes on. Writes `table.md`, `results.json` and `study.png` (which needs matplotlib).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import paper_experiments as experiments

ATTENTION, MLP = r"self_attn\.[qkvo]_proj_moe_gen", r"mlp_moe_gen\.(gate|up|down)_proj"
NORMS = ["q_norm_moe_gen", "k_norm_moe_gen", "input_layernorm_moe_gen", "post_attention_layernorm_moe_gen", "norm_moe_gen"]
PROJECTIONS = ["vae2llm", "llm2vae", "time_embedder"]
# What costs short prompts least without captions: benchmarks/results/strong_base/
RECA = {"instruction_dropout": 1.0, "condition_token_dropout": 0.25}


def where(layers: str, parts: str) -> str:
    """The linear layers that these regular expressions name, of the generation expert."""
    return rf"language_model\.model\.layers\.{layers}\.{parts}"


def in_turns(share: float) -> dict[str, Any]:
    """RecA, and text-to-image in a share of the steps."""
    mix = f"reconstruct={round(20 * (1 - share))},generate={round(20 * share)}"
    return {**RECA, "text_to_image_weight": 1.0, "task_mix": mix}


@dataclass(frozen=True)
class Setting:
    """What is trained: an adapter's arguments beside rank 64 and alpha 128, `None` for the whole generator."""

    adapter: dict[str, Any] | None = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=lambda: RECA)
    rates: tuple[float, float, float] = (1e-4, 3e-4, 1e-3)

    def lora(self) -> LoraConfig | None:
        return None if self.adapter is None else LoraConfig(**{"r": 64, "lora_alpha": 128, **self.adapter})


WHOLE, REFERENCE = "whole", "reference"
SETTINGS = {
    WHOLE: Setting(None, rates=(3e-5, 1e-4, 3e-4)),
    "whole, text-to-image 0.5": Setting(None, in_turns(0.5), rates=(3e-5, 1e-4, 3e-4)),
    REFERENCE: Setting(),
    **{f"rank {rank}": Setting({"r": rank, "lora_alpha": 2 * rank}) for rank in (4, 16, 128)},
    "attention": Setting({"target_modules": where(r"\d+", ATTENTION)}),
    "MLP": Setting({"target_modules": where(r"\d+", MLP)}),
    "early layers": Setting({"target_modules": where("[01]", f"({ATTENTION}|{MLP})")}),
    "late layers": Setting({"target_modules": where("[34]", f"({ATTENTION}|{MLP})")}),
    "norms too": Setting({"modules_to_save": NORMS}),
    "norms and projections too": Setting({"modules_to_save": [*NORMS, *PROJECTIONS]}),
    **{f"text-to-image {share}": Setting(stage=in_turns(share)) for share in (0.1, 0.25, 0.5)},
    "alpha 16": Setting({"lora_alpha": 16}),
    "rsLoRA": Setting({"use_rslora": True}),
    "DoRA": Setting({"use_dora": True}),
    "Gaussian A": Setting({"init_lora_weights": "gaussian"}),  # the trainer refuses those that change the base's weights
}


@dataclass
class Arguments(experiments.Experiment):
    settings: list[str] = field(default_factory=lambda: list(SETTINGS), metadata={"choices": list(SETTINGS)})
    winners: int = field(default=3, metadata={"help": "settings that are run on all bases, beside the whole generator"})
    steps: int = 300
    size: int = field(default=100, metadata={"help": "prompts a category; dense prompts are twice as many"})
    scores: int = field(default=1, metadata={"help": "times a run is scored, all but the last on a quarter"})


def text_to_image(results: Iterable[dict[str, Any]]) -> float:
    """The mean of dense and short prompts, over runs."""
    return float(np.mean([[r["curve"][-1][metric]["mean"] for metric in experiments.DECISIVE] for r in results]))


def report(title: str, base: list[dict[str, Any]], groups: dict[str, list[dict[str, Any]]]) -> str:
    """A table in Markdown: scores with standard errors, and the share of the whole generator's gain over `base`."""
    header = ["setting", "learning rate", "n", "TFLOP", *experiments.METRICS, f"gain / {WHOLE}"]
    lines = [f"## {title}", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    before = text_to_image(base)
    gain = text_to_image(groups[WHOLE]) - before if WHOLE in groups else float("nan")
    for name, runs in {"base": base, **groups}.items():
        columns = [[run["curve"][-1][metric]["mean"] for run in runs] for metric in experiments.METRICS]
        rate = runs[0]["learning_rate"]
        cells = [name, "" if rate is None else f"{rate:g}", str(len(runs)), f"{runs[0]['flos'] / 1e12:.1f}"]
        share = "" if name == "base" else f"{(text_to_image(runs) - before) / gain:.2f}"
        lines.append(f"| {' | '.join([*cells, *map(experiments.average, columns), share])} |")
    return "\n".join([*lines, ""])


def draw(base: list[dict[str, Any]], groups: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """What each setting gains, at each of its rates."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 0.35 * len(groups) + 1.5), layout="constrained", sharey=True)
    for axis, metric in zip(axes, experiments.METRICS, strict=False):
        before = np.mean([result["curve"][-1][metric]["mean"] for result in base])
        for row, runs in enumerate(groups.values()):
            for place, rate in enumerate(sorted({run["learning_rate"] for run in runs})):
                scores = [run["curve"][-1][metric]["mean"] for run in runs if run["learning_rate"] == rate]
                axis.scatter(np.mean(scores) - before, row, color=f"C{place}", alpha=0.7)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=f"{metric} - base", yticks=range(len(groups)), yticklabels=groups)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=100)


def main(arguments: Arguments) -> str:
    output = Path(arguments.output_dir)

    def jobs(settings: dict[str, Iterable[float]], bases: list[str], seeds: int) -> dict[Path, experiments.Job]:
        table = {}
        for index, base in enumerate(bases):
            table[output / f"base-{index}" / "base"] = experiments.Job(base, "base", [])
            for name, rates in settings.items():
                for rate in rates:
                    for seed in range(seeds):
                        setting, folder = SETTINGS[name], f"{name.replace(' ', '-')}-{rate:g}-{seed}"
                        job = experiments.Job(base, name, [setting.stage], name, rate, setting.lora(), seed)
                        table[output / f"base-{index}" / folder] = job
        return table

    def grouped(results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
        groups = {name: runs for (_, name), runs in experiments.by_run(results).items()}
        return groups.pop("base"), groups

    trials = {name: SETTINGS[name].rates for name in arguments.settings}
    results = experiments.perform_all(jobs(trials, arguments.bases[:2], 1), arguments)
    base, screened = grouped(results)
    best: dict[str, list[dict[str, Any]]] = {}
    for name, runs in screened.items():
        by_rate = [[run for run in runs if run["learning_rate"] == rate] for rate in SETTINGS[name].rates]
        best[name] = max(by_rate, key=text_to_image)
    tables = [report("Screening, each setting at its best rate", base, best)]
    adapters = sorted((name for name in best if SETTINGS[name].adapter is not None), key=lambda n: -text_to_image(best[n]))
    final = {name: [best[name][0]["learning_rate"]] for name in [*adapters[: arguments.winners], WHOLE] if name in best}
    finals = experiments.perform_all(jobs(final, arguments.bases, arguments.seeds), arguments)
    tables.append(report("The best, on all bases", *grouped(finals)))
    (output / "results.json").write_text(json.dumps({"screening": results, "final": finals}) + "\n")
    (output / "table.md").write_text("\n".join(tables))
    if find_spec("matplotlib"):
        draw(base, screened, output / "study.png")
    return "\n".join(tables)


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    print(main(parsed))
