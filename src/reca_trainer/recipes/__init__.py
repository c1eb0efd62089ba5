"""The YAML files of all recipes, by name: whole runs here, `experiments/` with what changes one of them, and `accelerate/` with
launch files for several processes."""

from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
RECIPES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
EXPERIMENTS = {path.stem: path for path in sorted((FOLDER / "experiments").glob("*.yaml"))}


def recipe_file(name_or_path: str) -> Path:
    """The YAML file called so, or the packaged recipe of that name, with or without `.yaml`, with underscores or dashes.

    Raises:
        FileNotFoundError: neither is there; the message lists the packaged recipes.
    """
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    name = name_or_path.removesuffix(".yaml").replace("-", "_")
    packaged = RECIPES | EXPERIMENTS
    if name not in packaged:
        raise FileNotFoundError(
            f"There is no file {name_or_path}, and no recipe of that name. Recipes: {', '.join(packaged)}."
        )
    return packaged[name]


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """All options of a recipe, those of its base included."""
    return over_base(yaml.safe_load(recipe_file(name_or_path).read_text()))


def over_base(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a YAML file over those of the packaged recipe that its key `base` names.

    Raises:
        ValueError: no packaged recipe has that name.
    """
    options = dict(options)
    base = options.pop("base", None)
    if base is None:
        return options
    if base not in RECIPES:
        raise ValueError(f"base: {base} is no packaged recipe. Recipes: {', '.join(RECIPES)}.")
    return read_recipe(str(RECIPES[base])) | options
