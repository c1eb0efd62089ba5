"""Which family is this checkpoint? The one place that knows the list of families."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.utils import validate_repo_id

from reca_trainer.models.checkpoint import CheckpointError
from reca_trainer.models.unified import UnifiedModel, UnifiedProcessor

FAMILIES = ("bagel", "janus", "openuni", "harmon", "show_o")


def family(name: str) -> ModuleType:
    """The package of one family. Each offers `Config`, `Model`, `Processor`, and for its published layout
    `is_published(file_names)`, `read_published(folder, **kwargs)`, `read_published_processor(folder)` and
    `write_published(model, processor, folder)`."""
    return importlib.import_module(f"reca_trainer.models.{name}")


def resolve(pretrained_model_name_or_path: str | Path, **hub: Any) -> Path:
    """The local folder of a checkpoint: itself if it is one, else its Hub snapshot (`revision`, `token`, `cache_dir`, …)."""
    folder = Path(pretrained_model_name_or_path).expanduser()
    if folder.is_dir():
        return folder
    name = str(pretrained_model_name_or_path)
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise CheckpointError(f"{name} is neither a folder on this machine nor a Hub repository id.") from error
    patterns = ["*.json", "*.safetensors", "*.bin", "*.pth", "*.ckpt", "*.txt", "*.model", "*.jinja", "*/*.json"]
    patterns += ["*/*.safetensors", "*/*.txt"]
    return Path(snapshot_download(name, allow_patterns=patterns, **hub))


def detect(folder: Path) -> tuple[ModuleType, bool]:
    """The family a checkpoint folder belongs to, and whether it is in that family's published layout (rather than in
    `save_pretrained` form)."""
    names = {str(path.relative_to(folder)) for path in folder.glob("**/*") if path.is_file()}
    config = json.loads((folder / "config.json").read_text()) if "config.json" in names else {}
    for name in FAMILIES:
        package = family(name)
        if package.is_published(names, config):
            return package, True
        if config.get("model_type") == package.Config.model_type:
            return package, False
    raise CheckpointError(
        f"{folder} is no checkpoint of a known family ({', '.join(FAMILIES)}): "
        f"model_type is {config.get('model_type')!r}, files are {sorted(names)[:12]}."
    )


HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


class AutoUnifiedModel:
    """Loads a unified model of any family from a folder or a Hub id, in the family's published layout or in
    `save_pretrained` form."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **kwargs: Any) -> UnifiedModel:
        """Load a model.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            kwargs: `revision`, `token`, `cache_dir`, `local_files_only` for the Hub; `dtype` (default float32),
                `device_map`, `quantization_config`, … as for `PreTrainedModel.from_pretrained`.

        Raises:
            CheckpointError: the family is unknown, or keys are missing, unexpected or wrongly shaped.
        """
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        folder = resolve(pretrained_model_name_or_path, **hub)
        package, published = detect(folder)
        load = package.read_published if published else package.Model.from_pretrained
        model = load(folder, **kwargs)
        model.name_or_path = model.config._name_or_path = str(pretrained_model_name_or_path)
        return model


class AutoUnifiedProcessor:
    """Loads the processor that belongs to a checkpoint."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **kwargs: Any) -> UnifiedProcessor:
        """Load a processor; arguments as for `AutoUnifiedModel.from_pretrained`."""
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        folder = resolve(pretrained_model_name_or_path, **hub)
        package, published = detect(folder)
        if published:
            return package.read_published_processor(folder, **kwargs)
        return package.Processor.from_pretrained(folder, **kwargs)
