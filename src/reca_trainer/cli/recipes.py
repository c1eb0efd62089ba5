"""`reca-trainer recipes` and `reca-trainer init`: the settings that come with the package."""

from __future__ import annotations

import argparse
from pathlib import Path

from reca_trainer.files import replacing
from reca_trainer.recipes import FOLDER, recipe_file


def list_recipes(argv: list[str] | None = None) -> None:
    """`reca-trainer recipes`: the packaged recipes and what each is for."""
    parser = argparse.ArgumentParser(
        "reca-trainer recipes", description="List the settings that come with the package."
    )
    parser.parse_args(argv)
    for path in sorted(FOLDER.glob("*.yaml")):
        print(f"{path.stem:<20} {summary(path)}")
    print(
        f"\nLaunch files for several GPUs: {', '.join(sorted(p.stem for p in (FOLDER / 'accelerate').glob('*.yaml')))}"
    )
    print(
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
