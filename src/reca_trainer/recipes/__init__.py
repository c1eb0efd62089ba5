"""The YAML files of all recipes, by name; `accelerate/` has launch files for several processes."""

from pathlib import Path

FOLDER = Path(__file__).parent


def recipe_file(name_or_path: str) -> Path:
    """The YAML file called so, or the packaged recipe of that name, with or without `.yaml`, with underscores or dashes.

    Raises:
        FileNotFoundError: neither is there; the message lists the packaged recipes.
    """
    packaged = FOLDER / f"{name_or_path.removesuffix('.yaml').replace('-', '_')}.yaml"
    for path in (Path(name_or_path), packaged):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))
    raise FileNotFoundError(f"There is no file {name_or_path}, and no recipe of that name. Recipes: {names}.")
