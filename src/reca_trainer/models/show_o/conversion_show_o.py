"""Show-o's published layout, which is spread over four repositories: file names and key names, read and written.

| repository | content | used for |
|---|---|---|
| `showlab/show-o*`, or a RecA checkpoint | language model, output layer, projector; hardly any dimensions | all |
| `showlab/magvitv2` | the image tokenizer | all |
| `openai/clip-vit-large-patch14-336` | the CLIP encoder | the CLIP variant |
| `microsoft/phi-1_5` | dimensions of the language model and the text tokenizer; no weights are read | all |

A folder with the last part of a repository's name, inside or beside that of Show-o, is used if there is one; else the
repository is downloaded.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoTokenizer, CLIPVisionConfig, PhiConfig

from reca_trainer.models.show_o.configuration_show_o import MAGVIT_V2, ShowOConfig
from reca_trainer.models.show_o.modeling_show_o import ShowOModel
from reca_trainer.models.show_o.processing_show_o import ShowOProcessor
from reca_trainer.models.weights import (
    CheckpointError,
    LazyTensor,
    autoencoder_from_ldm,
    autoencoder_to_ldm,
    load_strict,
    open_weights,
    weights_of,
    write_sharded,
    write_tokenizer,
)

VQ_MODEL, VISION_TOWER, LLM = "showlab/magvitv2", "openai/clip-vit-large-patch14-336", "microsoft/phi-1_5"
SHOW_O_WEIGHTS = ("pytorch_model.safetensors", "pytorch_model.bin", "model.safetensors")
WEIGHTS = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin")

# Where a MAGVIT-v2 is not the published one, its config.json holds a block `tiny` with these names.
VQ_SIZES = {
    "ch": "base_channels",
    "z_channels": "latent_channels",
    "encoder_ch_mult": "encoder_channel_multipliers",
    "encoder_num_res_blocks": "encoder_layers_per_block",
    "decoder_ch_mult": "decoder_channel_multipliers",
    "decoder_num_res_blocks": "decoder_layers_per_block",
}


def is_published(file_names: set[str], config: dict) -> bool:
    """Whether a checkpoint's files are Show-o's published ones: those of its repository, or of a folder that holds it and
    the image tokenizer."""
    if config:
        return config.get("_class_name") == "Showo"
    parts = {name.split("/")[0] for name in file_names if name.count("/") == 1 and name.endswith("/config.json")}
    return part_name(VQ_MODEL) in parts and any(name.startswith("show-o") for name in parts)


def read_published(
    folder: Path,
    *,
    vq_model: str | Path | None = None,
    vision_tower: str | Path | None = None,
    llm: str | Path | None = None,
    **kwargs: Any,
) -> ShowOModel:
    """Load Show-o as published.

    Args:
        folder: where Show-o's files are, or where a single sub-folder has them.
        vq_model, vision_tower, llm: folders or Hub ids of the other repositories, where they are not the published ones.
        kwargs: as for `PreTrainedModel.from_pretrained`.

    Raises:
        CheckpointError: a part is missing, or its keys are missing, unexpected or wrongly shaped.
    """
    folder = show_o_folder(folder)
    vq_folder, clip_folder, llm_folder = find_parts(folder, vq_model, vision_tower, llm)
    config = read_config(folder, vq_folder, clip_folder, llm_folder)

    state_dict = {}
    for key, tensor in open_weights(folder, *SHOW_O_WEIGHTS).items():
        state_dict[re.sub(r"^showo\.", "language_model.", key)] = tensor
    for key, tensor in read_vq_weights(vq_folder, config).items():
        state_dict[f"vq_model.{key}"] = tensor
    if clip_folder is not None:
        for key, tensor in open_weights(clip_folder, *WEIGHTS).items():
            if key.startswith("vision_model.") and not key.endswith(".position_ids"):
                state_dict["vision_tower." + key.removeprefix("vision_model.")] = tensor
    return load_strict(ShowOModel, config, state_dict, folder, **kwargs)


def read_published_processor(
    folder: Path,
    *,
    vq_model: str | Path | None = None,
    vision_tower: str | Path | None = None,
    llm: str | Path | None = None,
    **kwargs: Any,
) -> ShowOProcessor:
    """The processor of a published Show-o; arguments as for `read_published`, `kwargs` as for `ShowOProcessor`."""
    folder = show_o_folder(folder)
    vq_folder, clip_folder, llm_folder = find_parts(folder, vq_model, vision_tower, llm)
    config = read_config(folder, vq_folder, clip_folder, llm_folder)
    try:
        return ShowOProcessor.from_config(AutoTokenizer.from_pretrained(llm_folder), config, **kwargs)
    except ValueError as error:
        raise CheckpointError(f"The tokenizer in {llm_folder} does not fit {folder}: {error}") from error


def write_published(
    model: ShowOModel, processor: ShowOProcessor, folder: str | Path, max_shard_size: int | str | None = None
) -> None:
    """Write `model` in the layout that the original code reads: Show-o's part in `folder`, the others in sub-folders.

    With its own parts it loads offline, and where its parts differ from the published ones.
    """
    folder, config = Path(folder), model.config
    main, vq, clip = {}, {}, {}
    for name, tensor in weights_of(model).items():
        if name.startswith("vq_model."):
            vq[name.removeprefix("vq_model.")] = tensor
        elif name.startswith("vision_tower."):
            clip["vision_model." + name.removeprefix("vision_tower.")] = tensor
        else:
            main[re.sub(r"^language_model\.", "showo.", name)] = tensor
    vq = autoencoder_to_ldm(vq)
    bits = config.vq_config["latent_channels"]
    fixed = fixed_codes(bits)
    fixed["quantize.embedding"] = fixed["quantize.embedding"].to(vq["decoder.conv_in.weight"].dtype)
    vq |= {key: LazyTensor(tensor) for key, tensor in fixed.items()}

    text_config = config.text_config.to_dict() | {
        "architectures": ["PhiForCausalLM"],
        "rope_theta": config.text_config.rope_parameters["rope_theta"],
        "partial_rotary_factor": config.text_config.rope_parameters["partial_rotary_factor"],
        "qk_layernorm": False,  # as in Phi's own; Show-o's code overrides it
    }
    for name in ("rope_parameters", "dtype", "layer_types"):
        text_config.pop(name, None)
    vq_sizes = {key: config.vq_config[argument] for key, argument in VQ_SIZES.items()} | {"codebook_dim": bits}
    files = {
        "": {
            "_class_name": "Showo",
            "_diffusers_version": "0.30.1",
            "codebook_size": config.codebook_size,
            "llm_model_path": LLM,
            "llm_vocab_size": config.llm_vocab_size,
            "load_from_showo": True,
            "mask_token_id": config.mask_token_id,
            "num_vq_tokens": config.num_vq_tokens,
            "vocab_size": config.text_config.vocab_size,
            "w_clip_vit": config.w_clip_vit,
        },
        part_name(VQ_MODEL): {"_class_name": "MAGVITv2", "_diffusers_version": "0.30.1"}
        | ({} if config.vq_config == MAGVIT_V2 else {"tiny": vq_sizes}),
        part_name(LLM): text_config,
    }
    weights = {"": main, part_name(VQ_MODEL): vq}
    if config.w_clip_vit:
        vision_config = config.vision_config.to_dict()
        vision_config.pop("dtype", None)
        files[part_name(VISION_TOWER)], weights[part_name(VISION_TOWER)] = vision_config, clip
    for name, content in files.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    for name, tensors in weights.items():
        file = "model.safetensors" if name == part_name(VISION_TOWER) else "pytorch_model.safetensors"
        write_sharded(tensors, folder / name, file, max_shard_size, {"format": "pt"})
    write_tokenizer(processor.tokenizer, folder / part_name(LLM))


def part_name(repository: str) -> str:
    """The last part of a repository's name, which is that of its folder."""
    return repository.rstrip("/").rpartition("/")[2]


def show_o_folder(folder: Path) -> Path:
    """`folder` if it has a config.json, else its only sub-folder with Show-o's.

    Raises:
        CheckpointError: there is no such sub-folder, or there are several.
    """
    if (folder / "config.json").is_file():
        return folder
    folders = [
        path.parent for path in sorted(folder.glob("*/config.json")) if read_json(path).get("_class_name") == "Showo"
    ]
    if len(folders) != 1:
        names = ", ".join(path.name for path in folders) or "none"
        raise CheckpointError(f"{folder} must hold exactly one Show-o checkpoint, or be one; it holds {names}.")
    return folders[0]


def find_parts(
    folder: Path, vq_model: str | Path | None, vision_tower: str | Path | None, llm: str | Path | None
) -> tuple[Path, Path | None, Path]:
    """The folders of the image tokenizer, of CLIP (`None` in the plain variant) and of Phi."""
    published = read_json(folder / "config.json")
    return (
        find_part(folder, "vq_model", vq_model, VQ_MODEL),
        find_part(folder, "vision_tower", vision_tower, VISION_TOWER) if published.get("w_clip_vit") else None,
        find_part(folder, "llm", llm, published.get("llm_model_path") or LLM, ["*.json", "*.txt"]),
    )


def find_part(
    folder: Path,
    argument: str,
    given: str | Path | None,
    published: str,
    patterns: tuple[str, ...] | list[str] = ("*.json", "*.safetensors", "*.bin", "*.txt"),
) -> Path:
    """The folder of a part: `given`, or one named like `published` in or beside `folder`, or a Hub snapshot.

    Raises:
        CheckpointError: there is no such folder, and the part cannot be downloaded.
    """
    name = str(given or published)
    candidates = [Path(name).expanduser()]
    if given is None:
        candidates = [folder / part_name(name), folder.parent / part_name(name), *candidates]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{folder} needs {name}, which is neither at {' nor at '.join(map(str, candidates))}, nor can it be downloaded "
            f"({type(error).__name__}). Pass its folder or Hub id as `{argument}`."
        ) from error


def read_config(folder: Path, vq_folder: Path, clip_folder: Path | None, llm_folder: Path) -> ShowOConfig:
    """The `ShowOConfig` of a published checkpoint and its parts."""
    published = read_json(folder / "config.json")
    sizes = read_json(vq_folder / "config.json").get("tiny", {})
    vq_config = dict(MAGVIT_V2, **{VQ_SIZES[name]: sizes[name] for name in sizes if name in VQ_SIZES})
    text_config = PhiConfig.from_pretrained(llm_folder)
    text_config.vocab_size = published["vocab_size"]
    text_config.qk_layernorm = True
    eos_token_id = AutoTokenizer.from_pretrained(llm_folder).eos_token_id
    try:
        config = ShowOConfig(
            text_config=text_config,
            vision_config=None if clip_folder is None else CLIPVisionConfig.from_pretrained(clip_folder),
            vq_config=vq_config,
            w_clip_vit=clip_folder is not None,
            llm_vocab_size=published["llm_vocab_size"],
            num_vq_tokens=published["num_vq_tokens"],
            bos_token_id=eos_token_id,
            eos_token_id=eos_token_id,
        )
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    if published.get("codebook_size", config.codebook_size) != config.codebook_size:
        raise CheckpointError(
            f"{folder} has {published['codebook_size']} image tokens, {vq_folder} has {config.codebook_size}."
        )
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's content, or a `CheckpointError` that names the file."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def fixed_codes(bits: int) -> dict[str, torch.Tensor]:
    """MAGVIT-v2's binary code, as its file holds it: powers of two `[bits]` int64, and codes `[2^bits, bits]` float32."""
    powers = 2 ** torch.arange(bits - 1, -1, -1)
    codes = ((torch.arange(2**bits)[:, None] & powers) != 0).float() * 2 - 1
    return {"quantize.power_vals": powers, "quantize.embedding": codes}


def read_vq_weights(folder: Path, config: ShowOConfig) -> dict[str, LazyTensor]:
    """MAGVIT-v2's weights under the module names of `MagvitV2`, without the codebook, which is fixed.

    Raises:
        CheckpointError: the file's codebook is another.
    """
    fixed = fixed_codes(config.vq_config["latent_channels"])
    weights = open_weights(folder, *WEIGHTS)
    for key in fixed.keys() & weights.keys():
        if not torch.equal(weights.pop(key)[...].to(fixed[key].dtype), fixed[key]):
            raise CheckpointError(
                f"{folder}: {key} is not the binary code that MAGVIT-v2 uses; bits would be mixed up."
            )
    return autoencoder_from_ldm(weights)
