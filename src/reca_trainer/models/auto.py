"""The public door: models and processors by folder or Hub id, adapters included."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from accelerate import DistributedType, PartialState
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from transformers.integrations import is_fsdp_enabled

from reca_trainer.adapters import base_state_dict, load_adapter, read_quantization
from reca_trainer.models.contract import UnifiedModel, UnifiedProcessor
from reca_trainer.models.registry import detect, is_adapter, variants
from reca_trainer.models.weights import (
    CheckpointError,
    LazyTensor,
    check_fit,
    choose_variant,
    load_strict,
    open_weights,
    read_optional_config,
)

FILES = ["*.json", "*.safetensors", "*.bin", "*.ckpt", "*.txt", "*.model", "*.jinja"]
FILES += ["*/*.json", "*/*.safetensors", "*/*.txt"]


def resolve(pretrained_model_name_or_path: str | Path, variant: str | None = None, **hub: Any) -> Path:
    """The local folder of a checkpoint: itself if it is one, else its Hub snapshot (`revision`, `token`, `cache_dir`, …)."""
    return locate(pretrained_model_name_or_path, variant, **hub)[0]


def locate(name_or_path: str | Path, variant: str | None = None, **hub: Any) -> tuple[Path, str | None]:
    """A checkpoint's local folder, and which of several checkpoints in it is meant, see `variants`.

    A Hub repository with several is looked through first, and only the one is downloaded.

    Args:
        name_or_path: folder, Hub id, or either with the name of a checkpoint in it behind it.
        variant: that name, see `choose_variant`; `None` where the first argument says it, or there is no choice.

    Raises:
        CheckpointError: there is no such folder or repository, or the choice is open.
    """
    name, named = _split(str(name_or_path))
    if named and variant not in (None, named):
        raise CheckpointError(
            f"{name_or_path} names the checkpoint {named}, and variant={variant!r} another: leave one out."
        )
    variant = named or variant
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder, None if variant is None else choose_variant(_variants_in(folder)[0], variant, folder)
    try:
        validate_repo_id(name)
        owner, _ = name.split("/")
    except ValueError as error:
        message = f"{name} is neither a folder on this machine nor a Hub repository id (owner/name)."
        raise CheckpointError(message) from error
    choices, default = variants(_file_names(name, **hub))
    if choices and (variant is not None or (default is None and len(choices) > 1)):
        variant = choose_variant(choices, variant, name)
    try:
        pickles = variant if choices and variant and variant.endswith(".pth") else "*.pth"
        skipped = [f"{other}/*" for other in choices if other != (variant or default)]
        snapshot = Path(snapshot_download(name, allow_patterns=[*FILES, pickles], ignore_patterns=skipped, **hub))
    except LocalEntryNotFoundError as error:
        # Where only one of several checkpoints is in the cache, that is no complete snapshot, but may be all that is asked for.
        snapshot = _cached(name, **hub)
        if snapshot is None or (variant or _variants_in(snapshot)[1]) is None:
            raise CheckpointError(
                f"There is no folder {name} on this machine, and the Hub, where {owner} might have it, cannot be reached."
            ) from error
    return snapshot, None if variant is None else choose_variant(_variants_in(snapshot)[0], variant, name)


def _cached(name: str, **hub: Any) -> Path | None:
    """What the cache holds of a repository, complete or not."""
    try:
        return Path(snapshot_download(name, allow_patterns=[], **{**hub, "local_files_only": True}))
    except LocalEntryNotFoundError:
        return None


def _split(name: str) -> tuple[str, str | None]:
    """A name without the checkpoint that it chooses among several, and what stands behind its last slash if that is one."""
    source, _, last = name.rpartition("/")
    folder = Path(name).expanduser()
    if folder.is_dir():
        is_variant = last in _variants_in(folder.parent)[0]
    else:
        repository = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source)
        is_variant = last.endswith(".pth") or (repository and last and not Path(source).is_dir())
    return (source, last) if is_variant else (name, None)


def _variants_in(folder: Path) -> tuple[list[str], str | None]:
    """The checkpoints in a folder that `variant` chooses among, and the one that is read without a choice."""
    files = {path.name for path in folder.glob("*.pth") if path.is_file()}
    nested = {path.relative_to(folder).as_posix() for path in folder.glob("*/*")} if files else set()
    return variants(files | nested)


def _file_names(name: str, **hub: Any) -> set[str]:
    """The files of a repository that may have several checkpoints; none where it cannot be looked into, and what is in the
    cache has to do."""
    if hub.get("local_files_only"):
        return set()
    try:
        files = set(HfApi(token=hub.get("token")).list_repo_files(name, revision=hub.get("revision")))
    except (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, OSError):
        return set()  # the download says what is wrong
    return set() if any(file.endswith(".safetensors") and "/" not in file for file in files) else files


def _named(name_or_path: str | Path, variant: str | None) -> str:
    """A checkpoint's name with the one that was chosen in it, so that it can be found again."""
    name = str(name_or_path)
    return name if variant is None else f"{_split(name)[0]}/{variant}"


def open_lazily(model_or_path: UnifiedModel | str | Path, **hub: Any) -> UnifiedModel:
    """A checkpoint's model on the meta device, with its weights, unread, as `lazy_weights`. A loaded model gives
    its weights without those of an adapter."""
    if isinstance(model_or_path, UnifiedModel):
        weights = {name: LazyTensor(tensor) for name, tensor in base_state_dict(model_or_path).items()}
        model = load_strict(type(model_or_path), model_or_path.config, weights, "the loaded model", lazy=True)
    else:
        folder, variant = locate(model_or_path, **hub)
        package, published = detect(folder)
        if published:
            model = package.read_published(folder, lazy=True, **_choice(variant))
        else:
            config = package.Config.from_pretrained(folder)
            model = load_strict(package.Model, config, open_weights(folder, "model.safetensors"), folder, lazy=True)
        model.config._commit_hash = commit_of(folder)
    model.name_or_path = getattr(model_or_path, "name_or_path", str(model_or_path))
    return model


def _choice(variant: str | None) -> dict[str, str]:
    return {} if variant is None else {"variant": variant}


def gets_weights_from_first_process() -> bool:
    """Whether FSDP's efficient loading is on and this is not the first process of its machine: accelerate sends it its
    shards, so that a machine holds one copy of a model and not one a process."""
    state = PartialState()  # on CPUs accelerate shards nothing
    return (
        is_fsdp_enabled() and state.distributed_type != DistributedType.MULTI_CPU and not state.is_local_main_process
    )


HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only", "variant")


def commit_of(folder: Path) -> str | None:
    """The commit of a Hub snapshot's folder; `None` of any other."""
    return folder.name if folder.parent.name == "snapshots" else None


def adapter_base(folder: Path, base_model: str | None, hub: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The base model an adapter names, or `base_model`, and the arguments to get it with: those in `hub`, and the
    revision that the adapter pins.

    Raises:
        CheckpointError: the adapter names no base, or one that only existed where it was trained.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    named, pinned = config.get("base_model_name_or_path"), {**hub, "revision": None, "variant": None}
    base = base_model or named
    if not base:
        raise CheckpointError(f"{folder}/adapter_config.json names no base model; pass base_model.")
    if not base_model and commit_of(folder) and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w.-]+)?", base):
        raise CheckpointError(
            f"The adapter in {folder} was trained on {base!r}, which is a path and not a Hub repository; pass "
            "base_model to say where that model is."
        )
    if base == named:
        pinned["revision"] = config.get("revision")
    return base, pinned


def _is_quantized(folder: Path) -> bool:
    return "quantization_config" in read_optional_config(folder)


class AutoUnifiedModel:
    """Loads a unified model of any family from a folder or a Hub id, in the family's published layout or in
    `save_pretrained` form."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **kwargs: Any) -> UnifiedModel:
        """Load a model.

        Args:
            pretrained_model_name_or_path: folder or Hub id, either with the name of a checkpoint behind it where there are
                several: `owner/name/file.pth`, `owner/name/folder`.
            kwargs: `revision`, `token`, `cache_dir`, `local_files_only` for the Hub; `variant`, which of several checkpoints
                a folder or repository has (of a repository no other is downloaded); `dtype` (default: float32 for a
                published layout, as stored for our own), `device_map`, `quantization_config`, … as for
                `PreTrainedModel.from_pretrained`; `frozen_dtype`, see `models.precision`. For an adapter also
                `base_model`, to use in place of the base it names, and `is_trainable`.

        Returns:
            The model; for an adapter, the `PeftModel` around its base, at the revision the adapter was trained on, and
            quantised as it was in training unless `quantization_config` says otherwise (`None`: not at all).

        Raises:
            CheckpointError: the family is unknown, or keys are missing, unexpected or wrongly shaped.
        """
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        base_model, is_trainable = kwargs.pop("base_model", None), kwargs.pop("is_trainable", False)
        folder, variant = locate(pretrained_model_name_or_path, **hub)
        if is_adapter(folder):
            base, pinned = adapter_base(folder, base_model, hub)
            trained_on, _ = read_quantization(folder)
            # Only a quantised base is looked up twice: a Hub id costs a request each time.
            if trained_on and "quantization_config" not in kwargs and not _is_quantized(resolve(base, **pinned)):
                kwargs["quantization_config"] = trained_on
            model = AutoUnifiedModel.from_pretrained(base, **pinned, **kwargs)
            return load_adapter(model, folder, is_trainable=is_trainable)
        package, published = detect(folder)
        if published:
            model = package.read_published(folder, **_choice(variant), **kwargs)
        else:
            strict = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
            model, info = package.Model.from_pretrained(folder, **strict, **kwargs)
            problems = (info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
            check_fit(package.Model, pretrained_model_name_or_path, *problems)
        model.name_or_path = model.config._name_or_path = _named(pretrained_model_name_or_path, variant)
        model.config._commit_hash = commit_of(folder)
        return model


class AutoUnifiedProcessor:
    """Loads the processor that belongs to a checkpoint."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **kwargs: Any) -> UnifiedProcessor:
        """Load a processor; arguments as for `AutoUnifiedModel.from_pretrained`."""
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        base_model = kwargs.pop("base_model", None)
        folder, variant = locate(pretrained_model_name_or_path, **hub)
        if is_adapter(folder):
            base, pinned = adapter_base(folder, base_model, hub)
            if not (folder / "processor_config.json").is_file():
                return AutoUnifiedProcessor.from_pretrained(base, **pinned, **kwargs)
            package, _ = detect(resolve(base, **pinned))
            return package.Processor.from_pretrained(folder, **kwargs)
        package, published = detect(folder)
        if published:
            return package.read_published_processor(folder, **_choice(variant), **kwargs)
        # Without a config the tokenizer reads the folder's, whose type it does not know, and warns.
        kwargs.setdefault("config", package.Config.from_pretrained(folder))
        return package.Processor.from_pretrained(folder, **kwargs)
