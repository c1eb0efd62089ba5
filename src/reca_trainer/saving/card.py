"""The model card of a RecA run."""

from __future__ import annotations

import html
import json
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from reca_trainer.files import replacing
from reca_trainer.models.registry import detect
from reca_trainer.models.registry import is_adapter as holds_adapter
from reca_trainer.saving.describe import describe

logger = logging.get_logger(__name__)

PAPER = "https://arxiv.org/abs/2509.07295"
PREVIEW = "previews/before_after.png"
PACKAGES = ("reca-trainer", "torch", "transformers", "peft", "diffusers", "bitsandbytes")


def public_name(model: str | os.PathLike | None) -> str | None:
    """A Hub id as it is, the path of a folder without what lies above it, an address without its user and query."""
    if not model:
        return None
    name = str(model)
    try:
        if not os.path.exists(name):
            validate_repo_id(re.sub(r"^([^/]+/[^/]+)/[\w.-]+$", r"\1", name))  # or one of a repository's checkpoints
            return name
    except HFValidationError:
        pass
    return Path(urlsplit(name).path if "://" in name else name).name


def escaped(value: Any) -> str:
    """`value` as one line of Markdown that shows it as it is: no markup, no HTML, no further cell of a table. What
    looks like a Hub token is left out."""
    return re.sub(r"([\\`*\[\]{}|~#!$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", html.escape(_line(value), quote=False))


def _line(value: Any) -> str:
    text = "".join(character if character.isprintable() else " " for character in str(value))
    return re.sub(r"\bhf_\w{8,}", "hf_…", " ".join(text.split()))


def base_license(model: str | None, token: str | None = None) -> str | None:
    """The licence in a base model's card, from its folder or the Hub; `None` if it does not say or cannot be read."""
    if not model:
        return None
    folder = Path(model)
    try:
        if not folder.is_dir():
            card = HfApi(token=token).model_info(model, timeout=10).card_data
        elif (folder / "README.md").is_file():
            card = ModelCard.load(folder / "README.md").data
        else:
            return None
        name = card.get("license") if card else None
    except Exception:  # whatever stands there or the network answers, a card can do without it
        return None
    return name if isinstance(name, str) else None


SNIPPET = """
from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor

model = AutoUnifiedModel.from_pretrained({repo_id}{base})
processor = AutoUnifiedProcessor.from_pretrained({repo_id}{base})
image = model.generate_images(processor, text=["a red circle above a blue square"])[0]
image.save("image.png")
"""


def model_card(
    repo_id: str,
    *,
    base_model: str | None,
    is_adapter: bool,
    datasets: list[str],
    hyperparameters: dict[str, Any],
    losses: dict[str, float],
    steps: int | None,
    license: str | None = None,
    license_note: str = "",
    preview: str | None = None,
    notes: list[str] | None = None,
    weights: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
) -> ModelCard:
    """The card of a RecA run: what it started from, how it was trained, what came out, how to use it.

    Names and values are shown as they are, whatever markup is in them.

    Args:
        base_model: as it was loaded; only a folder's name is shown.
        hyperparameters: name and value of what was set, for a table.
        losses: name and last value of what was logged.
        steps: how many were trained; `None` if that is not known.
        license_note: a further sentence about the licence, in Markdown.
        preview: path of a picture in the repository.
        notes: further sentences about the weights, in Markdown.
        weights: name and value of what the weights are, for a table.
        environment: `device`, and the version of each package, of the training.
    """
    base = public_name(base_model)
    on_hub = base is not None and base == base_model
    repository = json.dumps(_line(repo_id), ensure_ascii=False)
    where = json.dumps(_line(f"path/to/{base}"), ensure_ascii=False)
    where = f", base_model={where}" if is_adapter and not on_hub else ""
    tags = ["reca-trainer", "reconstruction-alignment", "unified-multimodal-model", *(["lora"] if is_adapter else [])]
    data = ModelCardData(
        base_model="/".join(base.split("/")[:2]) if on_hub else None,
        base_model_relation=("adapter" if is_adapter else "finetune") if on_hub else None,
        datasets=[name for name in datasets if "/" in name and public_name(name) == name] or None,
        library_name="peft" if is_adapter else "reca-trainer",
        license=license and _line(license),
        pipeline_tag="text-to-image",
        tags=tags,
    )
    is_trained = is_adapter or steps is not None
    kind = "A LoRA adapter for" if is_adapter else "A fine-tuned version of"
    packages = dict(environment or {})
    device = packages.pop("device", None)
    data_names = [escaped(public_name(name)) for name in datasets]
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# {escaped(repo_id.rpartition('/')[2])}",
        f"{kind} {escaped(base or 'a unified multimodal model')}, "
        f"post-trained with [Reconstruction Alignment (RecA)]({PAPER}): the model reconstructs images from its own "
        "understanding embeddings of them, which teaches its generator to draw what it can see."
        if is_trained
        else "A unified multimodal model. How it was trained is not recorded beside it.",
        *(notes or []),
        f"![Input, reconstruction and text-to-image, before and after training]({quote(preview)})" if preview else "",
        _table("weights", "", weights),
        "## Usage",
        f"```python{SNIPPET.format(repo_id=repository, base=where)}```",
        "## Training" if is_trained else "",
        f"Data: {', '.join(data_names) or 'not recorded'}." if is_trained else "",
        f"{steps:,} steps{f' on {escaped(device)}' if device else ''}." if steps is not None else "",
        _table("hyper-parameter", "value", hyperparameters),
        _table("last logged", "value", {name: f"{value:.4g}" for name, value in losses.items()}),
        "Versions: " + ", ".join(f"{name} {number}" for name, number in packages.items()) + "." if packages else "",
        "## Licence",
        f"Inherited from the base model: {escaped(license)}." if license else "That of the base model.",
        license_note,
    ]
    return ModelCard("\n\n".join(line for line in lines if line) + "\n")


def folder_card(folder: Path, repo_id: str, token: str | None = None) -> ModelCard:
    """The card of an adapter or a model by what lies in its folder, `trainer_state.json` included."""
    weights: dict[str, Any] = {}
    state: dict[str, Any] = {}
    try:
        weights = describe(folder)
        state = json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError, KeyError):  # another tool's folder, or no trainer's: the card says what is known
        pass
    base = weights.pop("base model", None)
    return model_card(
        repo_id,
        base_model=base,
        is_adapter=holds_adapter(folder),
        datasets=[],
        hyperparameters={},
        losses=last_losses(state.get("log_history", [])),
        steps=state.get("global_step"),
        license=base_license(base, token),
        license_note=detect(folder)[0].Model.license_note if "family" in weights else "",
        preview=PREVIEW if (folder / PREVIEW).is_file() else None,
        weights=weights,
    )


def save_card(card: ModelCard, path: Path) -> None:
    """Write a card. Where that fails a warning says so, since the weights do not depend on it."""
    try:
        with replacing(path) as temporary:
            temporary.write_text(str(card), encoding="utf-8")
    except OSError as error:
        logger.warning(f"The model card was not written to {path}: {error}.")


def last_losses(log_history: list[dict[str, Any]]) -> dict[str, float]:
    """The last value of each loss that a `Trainer` logged."""
    last: dict[str, float] = {}
    for entry in log_history:
        last |= {name: value for name, value in entry.items() if name.endswith("loss")}
    if "train_loss" in last:
        last["mean train_loss"] = last.pop("train_loss")
    return last


def this_environment() -> dict[str, str]:
    """The `device` of this process, and the versions of the packages that decide how it computes."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    versions = {"device": device}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # run from its source, or not needed
            continue
    return versions


def _table(name: str, value: str, rows: dict[str, Any] | None) -> str:
    lines = [f"| {name} | {value} |", "|---|---|"]
    lines += [f"| {escaped(name)} | {escaped(value)} |" for name, value in (rows or {}).items()]
    return "\n".join(lines) if rows else ""
