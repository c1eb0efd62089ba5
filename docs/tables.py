"""Writes the tables of these pages that come from the code: `python docs/tables.py`, or with the names of some of them.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`. The tests compare what is there with what would
be written.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path

import yaml

DOCS = Path(__file__).parent
PLACE = r"(<!-- table: {name} -->\n)(.*?)(<!-- end of table -->)"
CARDS = (12, 16, 24, 32, 40, 48, 80)  # GB
IMAGES, RATE = 16_000, 300e12  # of the hours: 1,000 steps of 16 images, FLOP/s that are reached
MODES = {
    "QLoRA": ["--mode", "qlora"],
    "LoRA": ["--mode", "lora"],
    "whole generator": ["--mode", "full"],
}
SHARDED = "whole generator, FSDP2 on 8 GPUs"  # told where no card holds all of it


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def commands() -> str:
    from reca_trainer.cli import COMMANDS

    return table(["command", "what it does"], [[f"`{name}`", summary] for name, (_, summary) in COMMANDS.items()])


def options() -> str:
    """The arguments of `RecAConfig` that are its own or have another default than those of `TrainingArguments`."""
    from transformers import TrainingArguments

    from reca_trainer import RecAConfig

    inherited = {option.name: option.default for option in fields(TrainingArguments)}
    added = [option for option in fields(RecAConfig) if option.name not in inherited]
    changed = [o for o in fields(RecAConfig) if o.name in inherited and o.default != inherited[o.name]]
    rows = [
        [
            f"`{option.name}`",
            "" if option.default is None else f"`{option.default}`",
            " ".join(option.metadata["help"].split()),
        ]
        for option in [*added, *changed]
    ]
    return table(["option", "default", "meaning"], rows)


def recipes() -> str:
    from reca_trainer.cli.recipes import GPUS, summary
    from reca_trainer.recipes import RECIPES, read_recipe

    rows = []
    for path in RECIPES.values():
        values = read_recipe(path.stem)
        images = values["per_device_train_batch_size"] * values.get("gradient_accumulation_steps", 1)
        trained = f"LoRA, rank {values['lora_r']}" if values.get("use_peft") else "the whole generator"
        rate = f"{values['learning_rate']:.1e}".replace(".0e-0", "e-").replace("e-0", "e-")
        numbers = [GPUS.get(path.stem, ""), str(images), f"{values['max_steps']:,}", rate]
        rows.append([f"`{path.stem}`", summary(path), trained, *numbers])
    header = ["recipe", "what it is", "trains", "smallest GPU", "samples a step and process", "steps", "learning rate"]
    return table(header, rows)


def experiments() -> str:
    """The controls and ablations, and what they set."""
    from reca_trainer.recipes import EXPERIMENTS

    rows = []
    for name, path in EXPERIMENTS.items():
        values = yaml.safe_load(path.read_text())
        changed = [f"`{option}: {value}`" for option, value in values.items() if option not in ("base", "output_dir")]
        rows.append([f"`{name}`", f"`{values['base']}`", ", ".join(changed)])
    return table(["recipe", "base", "what it changes"], rows)


@cache
def planned(family: str, side: int | None, mode: str) -> tuple[float, float, float]:
    """GB of a GPU for a batch of one, GB for each further image, TFLOP an image, as `reca-trainer plan` counts them."""
    from reca_trainer.cli.plan import make_parser, plan_costs, read_arguments

    argv = ["--model", family, "--gpu", "80GB", *(["--max_image_size", str(side)] if side else [])]
    argv += MODES.get(mode, [*MODES["whole generator"], "--launch", "fsdp2", "--num_processes", "8"])
    args = read_arguments(make_parser(), argv)
    first, eighth = plan_costs(args, (1, 8))
    needed, of_eight = (cost.process(launch=args.launch, processes=args.num_processes) for cost in (first, eighth))
    return needed / 1e9, (of_eight - needed) / 7e9, first.flops / 1e12


def families() -> list[str]:
    """Those of the package."""
    from reca_trainer.models import registry

    packages = {name: registry.family(name).__name__ for name in registry.families()}
    return sorted(name for name, package in packages.items() if package.startswith("reca_trainer.models."))


def sides(family: str) -> list[int | None]:
    """512 and 1,024 pixels where the family makes targets of both, else its only size."""
    from reca_trainer.plan import open_model

    model = open_model(family)
    possible: list[int | None] = []
    for side in (512, 1024):
        try:
            model.example_batch(1, side, None)
        except ValueError:
            continue
        possible.append(side)
    return possible if len(possible) > 1 else [None]


def memory(family: str) -> list[list[str]]:
    """The rows of a family."""
    from reca_trainer.plan import open_model

    rows = []
    for side in sides(family):
        pixels = side or open_model(family).example_batch(1)["pixel_values"].shape[-1]
        modes = list(MODES)
        if planned(family, side, modes[-1])[0] > max(CARDS):
            modes.append(SHARDED)
        for mode in modes:
            needed, further, flops = planned(family, side, mode)
            card = next((f"{size} GB" for size in CARDS if size >= needed), "none")
            hours = flops * 1e12 * IMAGES / RATE / 3600
            numbers = [f"{needed:.1f} GB", f"{further:.2f} GB", card, f"{flops:.1f}", f"{hours:.1f}"]
            rows.append([f"`{family}`", f"{pixels:,}", mode, *numbers])
    return rows


HEADER = [
    "family",
    "pixels",
    "trains",
    "batch of 1",
    "each further image",
    "smallest card",
    "TFLOP an image",
    "GPU-hours",
]


def all_memory() -> str:
    return table(HEADER, [row for family in families() for row in memory(family)])


def protocols() -> str:
    """What `--protocol paper` sets, and the script of RecA's authors that says so."""
    from reca_trainer.evaluation.protocols import PAPER

    rows = []
    for benchmark, by_family in PAPER.items():
        for family, protocol in by_family.items():
            count = protocol.images_per_prompt if benchmark in ("geneval", "dpg") else 1
            values = [f"`{name}={value}`" for name, value in protocol.sampling.items()]
            values += [f"prompts begin with `{protocol.prompt_prefix}`"] if protocol.prompt_prefix else []
            values += [f"asked for `{protocol.instruction}`"] if protocol.instruction else []
            rows.append([benchmark, family, str(count), ", ".join(values), f"`{protocol.source}`"])
    return table(["benchmark", "family", "images a prompt", "settings", "script"], rows)


def tables() -> dict[str, Callable[[], str]]:
    """Every table by its name."""
    by_family = {
        f"memory of {family}": lambda family=family: table(HEADER[1:], [row[1:] for row in memory(family)])
        for family in families()
    }
    by_name = {"commands": commands, "options": options, "recipes": recipes, "protocols": protocols}
    return {**by_name, "experiments": experiments, "memory": all_memory, **by_family}


def written(name: str) -> dict[Path, str]:
    """The table as it stands, by the pages that have it."""
    pattern = re.compile(PLACE.format(name=re.escape(name)), re.DOTALL)
    places = {page: pattern.search(page.read_text(encoding="utf-8")) for page in sorted(DOCS.rglob("*.md"))}
    return {page: match[2] for page, match in places.items() if match}


def write(name: str, content: str) -> None:
    pattern = re.compile(PLACE.format(name=re.escape(name)), re.DOTALL)
    for page in written(name):
        text = page.read_text(encoding="utf-8")
        page.write_text(pattern.sub(lambda match: match[1] + content + match[3], text), encoding="utf-8")


if __name__ == "__main__":
    for name, make in tables().items():
        if written(name) and (len(sys.argv) == 1 or name in sys.argv[1:]):
            write(name, make())
            print(f"Wrote {name}.", file=sys.stderr)
