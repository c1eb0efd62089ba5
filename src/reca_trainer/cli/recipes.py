"""`reca-trainer recipes` and `reca-trainer init`: the settings that come with the package."""

from __future__ import annotations

import argparse
from pathlib import Path

from reca_trainer.files import replacing
from reca_trainer.recipes import EXPERIMENTS, FOLDER, RECIPES, recipe_file

# The smallest of 24, 48 and 80 GB that `reca-trainer plan` finds large enough for a recipe, or for each of eight processes with
# FSDP2. Only where a recipe is for the checkpoint that `plan` knows by the family's name.
GPUS = {
    "bagel_full": "8 × 24 GB",
    "bagel_lora": "48 GB",
    "bagel_paper": "8 × 24 GB",
    "bagel_qlora_24gb": "24 GB",
    "harmon_0_5b": "48 GB",
    "janus_lora_7b": "24 GB",
    "lance_full": "80 GB",
    "lance_lora": "24 GB",
    "openuni_1_6b": "48 GB",
    "qwen_image_edit_qlora": "24 GB",
    "show_o_clip_512": "48 GB",
}


def list_recipes(argv: list[str] | None = None) -> None:
    """`reca-trainer recipes`: the packaged recipes, the GPU that each needs and what it is for."""
    parser = argparse.ArgumentParser(
        "reca-trainer recipes", description="List the settings that come with the package."
    )
    parser.parse_args(argv)
    for name, path in RECIPES.items():
        print(f"{name:<20} {GPUS.get(name, ''):<10} {summary(path)}")
    print("\nControls and ablations of the paper, each of which changes one of these:")
    for name, path in EXPERIMENTS.items():
        print(f"{name:<31} {summary(path)}")
    launch_files = ", ".join(sorted(path.stem for path in (FOLDER / "accelerate").glob("*.yaml")))
    print(
        "\nThe memory is that of the smallest GPU that a recipe fits; for your model, GPU and batch ask `reca-trainer plan "
        f"--config NAME`.\nLaunch files for several GPUs: {launch_files}\n"
        "Use a recipe with `reca-trainer train --config NAME`; `reca-trainer init NAME` writes one, or a launch file, to edit."
    )


def init(argv: list[str] | None = None) -> None:
    """`reca-trainer init`: write a packaged recipe or launch file to edit.

    Raises:
        FileNotFoundError: there is none of that name.
        FileExistsError: the file is there already.
    """
    parser = argparse.ArgumentParser(
        "reca-trainer init", description="Write a packaged recipe or launch file to edit."
    )
    parser.add_argument("name", help="as `reca-trainer recipes` lists it")
    parser.add_argument("file", nargs="?", type=Path, help="where to (default: NAME.yaml)")
    args = parser.parse_args(argv)
    launch_file = FOLDER / "accelerate" / f"{args.name}.yaml"
    source = launch_file if launch_file.is_file() else recipe_file(args.name)
    target = args.file or Path(source.name)
    if target.exists():
        raise FileExistsError(f"{target} is there already; name another file.")
    with replacing(target) as file:
        file.write_text(source.read_text())
    command = f"reca-trainer train --config {target}"
    if source == launch_file:
        command = f"accelerate launch --config_file {target} -m reca_trainer train"
    print(f"Wrote {target}. Train with: {command}")


def summary(path: Path) -> str:
    """The first sentence of a recipe's comment."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines).partition(". ")[0].rstrip(".") + "."
