"""Does RecA need a model that understands? Its effect at equal generators, against understanding.

    python benchmarks/understanding.py --pretraining runs/shapes --output_dir runs/understanding --workers 2

The bases share all weights of one pretraining run (`recipes/pretrain_shapes.py`) but those of the image encoder and its
connector, which are trained for fewer or more steps. So all bases make the same pictures from the same prompts, and differ
in what they answer about pictures and in the embeddings that RecA trains on. Writes what `recipes/paper_experiments.py` does,
and `understanding.png`: text-to-image after RecA less that before, over the share of questions answered right.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import paper_experiments
import pretrain_shapes


@dataclass
class Arguments:
    pretraining: str = field(metadata={"help": "output_dir of recipes/pretrain_shapes.py, all stages done"})
    output_dir: str = field(metadata={"help": "where bases, runs and reports are written"})
    vision_steps: list[int] = field(default_factory=lambda: [20, 40, 60, 100, 200, 1500])
    seeds: int = field(default=1, metadata={"help": "training seeds a base"})
    steps: int = 300
    size: int = field(default=200, metadata={"help": "prompts a category; dense prompts are twice as many"})
    workers: int = 1


def make_base(pretraining: Path, folder: Path, steps: int) -> str:
    """A base whose image encoder was trained for `steps`, all else as in `pretraining`."""
    record = json.loads((pretraining / "checkpoint" / "pretraining.json").read_text())["arguments"]
    folder.mkdir(parents=True, exist_ok=True)
    for stage in pretrain_shapes.STAGES:
        path = folder / f"{stage}.safetensors"
        if stage != "vision" and not path.exists():
            shutil.copy(pretraining / path.name, path)
    arguments = pretrain_shapes.Arguments(**{**record, "output_dir": str(folder), "vision_steps": steps})
    return str(pretrain_shapes.main(arguments))


def draw(results: list[dict], path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for axis, metric in zip(axes, paper_experiments.DECISIVE, strict=True):
        for base in dict.fromkeys(result["base"] for result in results):
            before, *after = [result["curve"][-1] for result in results if result["base"] == base]
            effects = [scores[metric]["mean"] - before[metric]["mean"] for scores in after]
            error = np.hypot(before[metric]["stderr"], after[0][metric]["stderr"])
            understood = before["question_accuracy"]["mean"]
            axis.errorbar(understood, np.mean(effects), error / len(after) ** 0.5, fmt="o", color="C0", capsize=3)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xlabel="questions answered right before RecA", title=metric)
    axes[0].set_ylabel("after RecA less before")
    figure.savefig(path, dpi=100)


def main(arguments: Arguments) -> str:
    output = Path(arguments.output_dir)
    bases = [
        make_base(Path(arguments.pretraining), output / f"vision_{steps}", steps) for steps in arguments.vision_steps
    ]
    options = {name: getattr(arguments, name) for name in ("seeds", "steps", "size", "workers")}
    text = paper_experiments.main(
        paper_experiments.Arguments(
            str(output), bases=bases, runs=["base", "reca"], trained=["whole"], scores=1, **options
        )
    )
    draw(json.loads((output / "results.json").read_text()), output / "understanding.png")
    return text


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    print(main(parsed))
