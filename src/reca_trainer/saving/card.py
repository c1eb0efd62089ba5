"""The model card of a RecA run."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

PAPER = "https://arxiv.org/abs/2509.07295"


def public_name(model: str | None) -> str | None:
    """A Hub id as it is, the path of a folder without what lies above it."""
    if not model:
        return None
    try:
        if not Path(model).exists():
            validate_repo_id(model)
            return model
    except HFValidationError:
        pass
    return Path(model).name


def base_license(model: str | None, token: str | None = None) -> str | None:
    """The licence in a base model's card, from its folder or the Hub; `None` if it does not say."""
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
    except (HfHubHTTPError, OSError, ValueError):  # a card can do without it
        return None
    return card.get("license") if card else None


SNIPPET = """
from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor

model = AutoUnifiedModel.from_pretrained("{repo_id}"{base})
processor = AutoUnifiedProcessor.from_pretrained("{repo_id}"{base})
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
    steps: int,
    license: str | None = None,
    preview: str | None = None,
    notes: list[str] | None = None,
) -> ModelCard:
    """The card of a RecA run: what it started from, how it was trained, what came out, how to use it.

    Args:
        base_model: as it was loaded; only a folder's name is shown.
        hyperparameters: name and value of what was set, for a table.
        losses: name and last value of what was logged.
        preview: path of a picture in the repository.
        notes: further sentences about the weights.
    """
    base = public_name(base_model)
    on_hub = base is not None and base == base_model
    where = f', base_model="path/to/{base}"' if is_adapter and not on_hub else ""
    tags = ["reca-trainer", "reconstruction-alignment", "unified-multimodal-model", *(["lora"] if is_adapter else [])]
    data = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation=("adapter" if is_adapter else "finetune") if on_hub else None,
        datasets=[name for name in datasets if "/" in name and not Path(name).exists()] or None,
        library_name="peft" if is_adapter else "reca-trainer",
        license=license,
        pipeline_tag="text-to-image",
        tags=tags,
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    packages = ("reca-trainer", "torch", "transformers", "peft", "diffusers", "bitsandbytes")
    rows = "\n".join(f"| {name} | {value} |" for name, value in hyperparameters.items())
    results = "\n".join(f"| {name} | {value:.4g} |" for name, value in losses.items())
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repo_id.rpartition('/')[2]}",
        f"{'A LoRA adapter for' if is_adapter else 'A fine-tuned version of'} {base or 'a unified multimodal model'}, "
        f"post-trained with [Reconstruction Alignment (RecA)]({PAPER}): the model reconstructs images from its own "
        "understanding embeddings of them, which teaches its generator to draw what it can see.",
        *(notes or []),
        f"![Input, reconstruction and text-to-image, before and after training]({preview})" if preview else "",
        "## Usage",
        f"```python{SNIPPET.format(repo_id=repo_id, base=where)}```",
        "## Training",
        f"Data: {', '.join(map(str, datasets)) or 'not recorded'}. {steps:,} steps on {device}.",
        f"| hyper-parameter | value |\n|---|---|\n{rows}",
        f"| last logged | value |\n|---|---|\n{results}" if results else "",
        "Versions: " + ", ".join(f"{name} {version(name)}" for name in packages) + ".",
        "## Licence",
        f"Inherited from the base model: {license}." if license else "That of the base model.",
    ]
    return ModelCard("\n\n".join(line for line in lines if line) + "\n")
