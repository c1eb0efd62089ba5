"""To and from the Hub: adapters and merged models with their cards, and exports to a family's published layout."""

from __future__ import annotations

import fnmatch
import json
import os
import platform
import re
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from transformers import BitsAndBytesConfig
from transformers.utils import logging

from reca_trainer.adapters import read_quantization, write_model
from reca_trainer.models.auto import AutoUnifiedProcessor, detect, is_adapter, open_lazily, resolve
from reca_trainer.models.checkpoint import CheckpointError, open_weights
from reca_trainer.models.unified import UnifiedModel, UnifiedProcessor

logger = logging.get_logger(__name__)

# Of a training's output, what is for going on with it on this machine, or may hold a token or a path.
LEFT_OUT = (
    "checkpoint-*",
    ".*",
    "runs/*",
    "logs/*",
    "wandb/*",
    "training_args.bin",
    "*.pt",
    "rng_state*",
    "trainer_state.json",
    "checkpoint_files.json",
    "data_order.json",
    "weight_average.safetensors",
)
RETRIED, WAITS = {429, 500, 502, 503, 504}, (1, 2, 4, 8, 16)  # status codes; seconds before each further try
PAPER = "https://arxiv.org/abs/2509.07295"


def export(
    model_or_path: UnifiedModel | str | os.PathLike,
    output_dir: str | os.PathLike,
    layout: str = "published",
    dtype: torch.dtype | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    processor: UnifiedProcessor | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a model in another form, one tensor at a time; arguments as for `merge_adapter`. Nothing that is not cast
    or quantised changes by a bit.

    Args:
        processor: of a model that was not loaded from anywhere.
    """
    model = open_lazily(model_or_path)
    processor = processor or AutoUnifiedProcessor.from_pretrained(model.name_or_path)
    return write_model(model, processor, output_dir, dtype, layout, quantization_config, max_shard_size)


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload with reca_trainer",
) -> CommitInfo:
    """Upload an adapter or a model in one commit, which either is there or is not.

    What of an interrupted upload has arrived is not sent again. Busy or failing servers (429, 5xx) are tried again, at
    most five times. Of a training's output neither its checkpoints nor its arguments are uploaded.

    Args:
        folder: an adapter, a model or a trainer's `output_dir`.
        repo_id: `owner/name`; created if it is not there.
        private: visibility of a repository that is created here; by default as the owner has set it.
        revision: branch to commit to; created from `main` if it is not there.
        token: by default the one that `hf auth login` stored.
        create_pr: open a pull request instead of committing.

    Raises:
        CheckpointError: the folder has no weights as safetensors.
        PermissionError: not logged in, or no right to write there.
        ConnectionError: the Hub cannot be reached, or stopped answering.
        HfHubHTTPError: what else the Hub answers.
    """
    folder = Path(folder)
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: path for name, path in files.items() if not any(fnmatch.fnmatch(name, left) for left in LEFT_OUT)}
    if not any(name.endswith(".safetensors") for name in files):
        raise CheckpointError(f"{folder} holds no .safetensors file, so there is nothing to push.")
    contents: dict[str, Any] = dict(files)
    if "adapter_config.json" in files:
        contents["adapter_config.json"] = _without_local_base(files["adapter_config.json"])
    api = HfApi(token=token)

    def commit() -> CommitInfo:
        # Made anew for every try: a commit empties its operations.
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        return api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )

    try:
        repo_id = _retried(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        if revision is not None:
            _retried(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        return _retried(commit)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise PermissionError(
                f"The Hub does not let you write to {repo_id} ({status}). Log in with `hf auth login`, or pass a token "
                "with write access to it."
            ) from error
        if status in (409, 412):
            error.append_to_message(f"\n{repo_id} was changed by someone else during the upload; push again.")
        raise
    except (HTTPError, RuntimeError) as error:
        if not isinstance(error, HTTPError) and not isinstance(error.__cause__, HTTPError):
            raise  # uploads in threads wrap what went wrong
        raise ConnectionError(
            f"The connection to {api.endpoint} failed ({error!r}). Push again: what has arrived is not sent again."
        ) from error


def _retried(request: Any) -> Any:
    for wait in (*WAITS, None):
        try:
            return request()
        except HfHubHTTPError as error:
            if wait is None or error.response.status_code not in RETRIED:
                raise
            logger.warning(f"The Hub answered {error.response.status_code}; trying again in {wait} s.")
            time.sleep(wait)


def _without_local_base(path: Path) -> bytes:
    """An adapter's config with the folder of its base cut to its name: others do not have that folder, and its path
    is nobody's business."""
    config = json.loads(path.read_text())
    base = config.get("base_model_name_or_path")
    config["base_model_name_or_path"] = public_name(base)
    if config["base_model_name_or_path"] != base:
        logger.warning(
            f"The adapter's base model is the folder {base}, which others do not have; they must pass base_model to "
            "AutoUnifiedModel.from_pretrained."
        )
    return (json.dumps(config, indent=2) + "\n").encode()


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


def describe(model_or_path: str | os.PathLike) -> dict[str, Any]:
    """What a checkpoint or adapter is, by name: kind, family or base, modules, number of parameters. No weights are
    read.

    Raises:
        CheckpointError: it is neither.
    """
    folder = resolve(model_or_path)
    if is_adapter(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        weights = open_weights(folder, "adapter_model.safetensors")
        targets = sorted({match[1] for key in weights if (match := re.search(r"([^.]+\.[^.]+)\.lora_A\.", key))})
        trained, _ = read_quantization(folder)
        found = {
            "kind": f"{config['peft_type']} adapter",
            "base model": config.get("base_model_name_or_path"),
            "base revision": config.get("revision") or "not pinned",
            "base in training": "not quantised" if trained is None else f"{4 if trained.load_in_4bit else 8} bits",
            "rank, alpha": f"{config.get('r')}, {config.get('lora_alpha')}",
            "layers": f"{sum('.lora_A.' in key for key in weights)}: {', '.join(targets)}",
            "trained in full": ", ".join(config.get("modules_to_save") or ()) or "none",
            "parameters": f"{sum(tensor.shape.numel() for tensor in weights.values()):,}",
        }
        return {name: value for name, value in found.items() if value is not None}
    package, published = detect(folder)
    model = open_lazily(folder)
    names = tuple(f"{name}." for name in model.generation_modules)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    generator = sum(size for name, size in sizes.items() if name.startswith(names) or name + "." in names)
    quantization = getattr(model.config, "quantization_config", None)
    return {
        "kind": "model",
        "family": package.Config.model_type,
        "layout": "published" if published else "transformers",
        "quantised": "no" if quantization is None else "4 bits" if quantization.get("load_in_4bit") else "8 bits",
        "parameters": f"{sum(sizes.values()):,}",
        "of its generator": f"{generator:,} ({', '.join(sorted({name.split('.')[0] for name in names}))})",
        "experts": "shared weights" if model.shares_weights else "separate weights",
    }
