"""Which family is this checkpoint? The list of families; none is imported before it is asked for."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from reca_trainer.models.contract import UnifiedModel
from reca_trainer.models.weights import CheckpointError, open_weights

_FAMILIES: dict[str, str] = {}


def register_family(name: str, package: str) -> None:
    """Make a family known to everything that takes a model by name or folder.

    Args:
        name: what it is called, for instance by `reca-trainer plan --model`.
        package: the importable name of its package or module. It offers `Config`, `Model` and `Processor`; a family
            with a published layout of its own also `is_published(file_names, config)`, `read_published(folder,
            **kwargs)`, `read_published_processor(folder, **kwargs)` and `write_published(model, processor, folder)`; one
            whose training code writes `.pth` files of any name also `TRAINING_KEYS`, which all of them hold; one whose
            layout has several checkpoints side by side, each in a folder, also `variants(file_names)`; one whose other tools
            load adapters, `write_published_adapter(adapter, folder)`.

    Raises:
        ValueError: another package has that name.
    """
    if _FAMILIES.setdefault(name, package) != package:
        raise ValueError(f"The family {name!r} is {_FAMILIES[name]} already; register {package} under another name.")


for _name in ("bagel", "janus", "openuni", "harmon", "show_o", "lance"):
    register_family(_name, f"reca_trainer.models.{_name}")
register_family("qwen-image-edit", "reca_trainer.models.qwen_image")


def families() -> tuple[str, ...]:
    """The names of all registered families."""
    return tuple(_FAMILIES)


def family(name: str) -> ModuleType:
    """The package of one family."""
    return importlib.import_module(_FAMILIES[name])


def family_of(model: UnifiedModel) -> ModuleType:
    """The package of the family that a model belongs to, also where its class is derived from the family's.

    Raises:
        CheckpointError: the model is of no registered family, or of one without a published layout.
    """
    for name in _FAMILIES:
        package = family(name)
        if isinstance(model, package.Model):
            if not hasattr(package, "write_published"):
                raise CheckpointError(f'The family {name!r} has no published layout: use layout="transformers".')
            return package
    raise CheckpointError(
        f"{type(model).__name__} is of no registered family ({', '.join(_FAMILIES)}): call register_family first, or "
        'use layout="transformers".'
    )


def detect(folder: Path) -> tuple[ModuleType, bool]:
    """The family a checkpoint folder belongs to, and whether it is in that family's published layout (rather than in
    `save_pretrained` form)."""
    names = {str(path.relative_to(folder)) for path in folder.glob("**/*") if path.is_file()}
    config, damage = _read_config(folder)
    for name in _FAMILIES:
        package = family(name)
        if hasattr(package, "is_published") and package.is_published(names, config):
            return package, True
        if config.get("model_type") == package.Config.model_type:
            return package, False
    for path in sorted(folder.glob("*.pth")):  # the originals name a run's files after its steps: iter_5000.pth
        keys = open_weights(folder, path.name).keys()
        for name in _FAMILIES:
            package = family(name)
            if getattr(package, "TRAINING_KEYS", None) and keys >= package.TRAINING_KEYS:
                return package, True
    if damage:
        raise CheckpointError(damage)
    raise CheckpointError(
        f"{folder} is no checkpoint of a known family ({', '.join(_FAMILIES)}): "
        f"model_type is {config.get('model_type')!r}, files are {sorted(names)[:12]}."
    )


def variants(file_names: set[str]) -> tuple[list[str], str | None]:
    """The checkpoints that `variant` chooses among, by the names of a repository's files: folders where the layout of a
    family has them side by side, else `.pth` files. And the one that is read without a choice; `None` where one is needed.
    """
    pickles = [name for name in file_names if name.endswith(".pth") and "/" not in name]
    for name in _FAMILIES if pickles else ():
        package = family(name)
        if hasattr(package, "variants") and package.is_published(file_names, {}):
            return package.variants(file_names)
    return pickles, None


def _read_config(folder: Path) -> tuple[dict[str, Any], str]:
    """The `config.json` of a folder, and what is wrong with it: some families are known by their files alone."""
    path = folder / "config.json"
    if not path.is_file():
        return {}, ""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return {}, f"{path} is no JSON ({error}), and the other files do not say which family this is."
    if not isinstance(config, dict):
        return {}, f"{path} holds a {type(config).__name__} and not a configuration."
    return config, ""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter and not a model."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
