"""Lance's published layout: file names and key names, read and written.

| file | content |
|---|---|
| `Lance_3B/model.safetensors` (or `ema.safetensors`) | everything but the autoencoder and, in the image checkpoint, the vision transformer |
| `Lance_3B_Video/model.safetensors` | the same of the video checkpoint, with the vision transformer as `vit_model.*` and a position table of 31 frames |
| `Lance_3B/llm_config.json` | dimensions of the language model, as those of Qwen2.5-VL-3B; its `tie_word_embeddings` is wrong: the output layer has its own weights |
| `Lance_3B/vocab.json`, `merges.txt`, `tokenizer.json`, … | the tokenizer |
| `Qwen2.5-VL-ViT/vit.safetensors`, `config.json` | the vision transformer; weights bundled with the language model win over these |
| `Wan2.2_VAE.pth` | the autoencoder in Wan's own key names |
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2TokenizerFast
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig

from reca_trainer.models.lance.configuration_lance import WAN_AUTOENCODER, LanceConfig
from reca_trainer.models.lance.modeling_lance import LanceModel
from reca_trainer.models.lance.processing_lance import LanceProcessor
from reca_trainer.models.weights import (
    CheckpointError,
    LazyTensor,
    choose_variant,
    load_strict,
    main_dtype,
    open_weights,
    weights_of,
    write_sharded,
    write_tokenizer,
)

IMAGE, VIDEO = "Lance_3B", "Lance_3B_Video"
VISION, AUTOENCODER = "Qwen2.5-VL-ViT", "Wan2.2_VAE.pth"
POSITION_TABLE = "latent_pos_embed.pos_embed"
TEXT_SETTINGS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_dropout", "bos_token_id",
    "eos_token_id",
)  # fmt: skip
VISION_SETTINGS = (
    "depth", "hidden_size", "hidden_act", "intermediate_size", "num_heads", "patch_size", "spatial_merge_size",
    "temporal_patch_size", "tokens_per_second", "window_size", "out_hidden_size", "fullatt_block_indexes",
)  # fmt: skip
TOKENS = {
    "eos_token_id": "<|im_end|>",
    "image_start_token_id": "<|vision_start|>",
    "image_end_token_id": "<|vision_end|>",
}


def is_published(file_names: set[str], config: dict) -> bool:
    """Whether a checkpoint's files are Lance's published ones."""
    return AUTOENCODER in file_names and any(name.endswith("/llm_config.json") for name in file_names)


def variants(file_names: set[str]) -> tuple[list[str], str | None]:
    """The checkpoints among a repository's files (folders with a language model), and the default, the image model."""
    folders = [folder for folder, _, file in (name.partition("/") for name in file_names) if file == "llm_config.json"]
    return folders, IMAGE if IMAGE in folders else None


def read_published(folder: Path, variant: str | None = None, **kwargs: Any) -> LanceModel:
    """Load Lance as published.

    Args:
        folder: where the checkpoints, the vision transformer and the autoencoder lie side by side.
        variant: which of several checkpoints, see `choose_variant`; by default the image model.
        kwargs: as for `PreTrainedModel.from_pretrained`.

    Raises:
        CheckpointError: there is no such checkpoint, `variant` must choose between several, or keys are missing, unexpected
            or wrongly shaped.
    """
    part = checkpoint_folder(folder, variant)
    weights = open_weights(part, "model.safetensors", "ema.safetensors")
    table = weights.pop(POSITION_TABLE, None)  # fixed, recomputed
    autoencoder = rename_autoencoder(open_weights(folder, AUTOENCODER))
    config = read_config(folder, part, table, autoencoder)
    vision = open_weights(folder / VISION, "vit.safetensors")
    state_dict = {f"vit_model.{key}": tensor for key, tensor in vision.items()} | weights
    state_dict |= {f"vae.{key}": tensor for key, tensor in autoencoder.items()}
    return load_strict(LanceModel, config, state_dict, part, **kwargs)


def read_published_processor(folder: Path, variant: str | None = None, **kwargs: Any) -> LanceProcessor:
    """The processor of a published checkpoint; arguments as for `read_published`."""
    return LanceProcessor(Qwen2TokenizerFast.from_pretrained(checkpoint_folder(folder, variant)), **kwargs)


def write_published(
    model: LanceModel, processor: LanceProcessor, folder: Path, max_shard_size: int | str | None = None
) -> None:
    """Write `model` in the layout that the original code reads. `folder` must exist. By default the weights of a part are
    one file, as published. The layout has the autoencoder as a pickle, which is in memory while it is written.

    Raises:
        CheckpointError: the layout cannot describe the autoencoder, which is not built as Wan's is.
    """
    folder, config = Path(folder), model.config
    sizes = {"base_dim", "decoder_base_dim", "dim_mult", "num_res_blocks", "z_dim"}  # read off the shapes of weights
    names = sorted(WAN_AUTOENCODER.keys() - sizes)
    if differences := [name for name in names if config.vae_config.get(name) != WAN_AUTOENCODER[name]]:
        raise CheckpointError(
            f"The autoencoder has {differences} other than Wan2.2's, which Lance's published layout cannot say. Use "
            'the "transformers" layout.'
        )
    is_video = config.latent_frames > 1
    part, vision_folder = folder / (VIDEO if is_video else IMAGE), folder / VISION
    main = weights_of(model)
    vision, autoencoder = (
        {name.removeprefix(prefix): main.pop(name) for name in list(main) if name.startswith(prefix)}
        for prefix in ("vit_model.", "vae.")
    )
    table = model.latent_pos_embed.compute(config.latent_frames).to(main_dtype(model, main))
    main[POSITION_TABLE] = LazyTensor(table)
    if is_video:
        main |= {f"vit_model.{key}": tensor for key, tensor in vision.items()}
    for path in (part, vision_folder):
        path.mkdir(parents=True, exist_ok=True)
    write_sharded(main, part, "model.safetensors", max_shard_size)
    write_sharded(vision, vision_folder, "vit.safetensors")
    pickled = {key: tensor[...].contiguous() for key, tensor in rename_autoencoder(autoencoder, back=True).items()}
    with open(folder / AUTOENCODER, "wb") as file:  # a path would hide from the user that the disk is full
        torch.save(pickled, file)

    write_tokenizer(processor.tokenizer, part)
    vision_config = {"model_type": "qwen2_5_vl", "in_chans": config.vision_config.in_channels}
    vision_config |= {name: getattr(config.vision_config, name) for name in VISION_SETTINGS}
    vision_config["spatial_patch_size"] = config.vision_config.patch_size
    rope = config.text_config.rope_parameters
    ids = processor.tokenizer.convert_tokens_to_ids
    text_config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vision_start_token_id": config.image_start_token_id,
        "vision_end_token_id": config.image_end_token_id,
        "vision_token_id": ids("<|vision_pad|>"),
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        **{name: getattr(config.text_config, name) for name in TEXT_SETTINGS},
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "tie_word_embeddings": True,  # as published, although the output layer has its own weights
        "use_sliding_window": False,
        "vision_config": {name: value for name, value in vision_config.items() if name != "model_type"},
    }
    generation = {"bos_token_id": ids("<|endoftext|>"), "eos_token_id": [config.eos_token_id, ids("<|endoftext|>")]}
    generation["pad_token_id"] = ids("<|endoftext|>")
    files = {
        part / "llm_config.json": text_config,
        part / "generation_config.json": generation,
        vision_folder / "config.json": vision_config,
    }
    for path, content in files.items():
        path.write_text(json.dumps(content, indent=2) + "\n")


def checkpoint_folder(folder: Path, variant: str | None) -> Path:
    """The sub-folder of a checkpoint: that of `variant`, else the image model's, else the only one."""
    names, default = variants({f"{path.parent.name}/{path.name}" for path in Path(folder).glob("*/llm_config.json")})
    return Path(folder) / choose_variant(names, variant or default, folder)


def read_config(folder: Path, part: Path, table: LazyTensor | None, autoencoder: dict[str, LazyTensor]) -> LanceConfig:
    """The `LanceConfig` of a published checkpoint, from its configuration files and the shapes of its weights."""
    text, vision = (
        json.loads(path.read_text()) for path in (part / "llm_config.json", folder / VISION / "config.json")
    )
    tokenizer = Qwen2TokenizerFast.from_pretrained(part)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS.items()}
    if None in ids.values():
        raise CheckpointError(f"The tokenizer in {part} lacks one of Lance's markers: {ids}.")
    rope = {
        "rope_type": "default",
        "rope_theta": text.get("rope_theta", 1e6),
        "mrope_section": text["rope_scaling"]["mrope_section"],
    }
    frames, side = (1, 64) if table is None else table_size(table.shape[0])
    return LanceConfig(
        text_config=Qwen2_5_VLTextConfig(
            **{name: text[name] for name in TEXT_SETTINGS if name in text},
            rope_parameters=rope,
            tie_word_embeddings=False,
        ),
        vision_config=Qwen2_5_VLVisionConfig(
            **{name: vision[name] for name in VISION_SETTINGS if name in vision}, in_channels=vision.get("in_chans", 3)
        ),
        vae_config=autoencoder_config(autoencoder),
        max_latent_size=side,
        latent_frames=frames,
        tokenizer_length=len(tokenizer),
        **ids,
    )


def table_size(rows: int) -> tuple[int, int]:
    """Frames and side of a position table with `rows = frames · side²`. The largest possible side is right unless a square
    divides the number of frames; published tables have 1 and 31 frames."""
    side = max(side for side in range(1, int(rows**0.5) + 1) if rows % side**2 == 0)
    return rows // side**2, side


def autoencoder_config(weights: dict[str, LazyTensor]) -> dict[str, Any]:
    """Arguments of `AutoencoderKLWan` for weights under its key names: Wan2.2's, with widths from the shapes of the weights."""
    shapes = {key: tensor.shape for key, tensor in weights.items()}

    def count(pattern: str) -> int:
        return 1 + max(int(match[1]) for key in shapes if (match := re.match(pattern, key)))

    base_dim = shapes["encoder.conv_in.weight"][0]
    levels = count(r"encoder\.down_blocks\.(\d+)\.")
    widths = [shapes[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(levels)]
    return {
        **WAN_AUTOENCODER,
        "base_dim": base_dim,
        "decoder_base_dim": shapes["decoder.norm_out.gamma"][0] // (widths[0] // base_dim),
        "z_dim": shapes["post_quant_conv.weight"][0],
        "dim_mult": [width // base_dim for width in widths],
        "num_res_blocks": count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
    }


# Parts of the autoencoder's keys in Wan's layout and in diffusers', in order of application; parts without a leading dot begin
# a key. Both layouts have the numbers i and j. Wan's has a block's resampling layer as its last layer, diffusers' apart.
WAN_NAMES = (
    ("conv1.", "quant_conv."),
    ("conv2.", "post_quant_conv."),
    ("encoder.conv1.", "encoder.conv_in."),
    ("decoder.conv1.", "decoder.conv_in."),
    (".head.0.", ".norm_out."),
    (".head.2.", ".conv_out."),
    (".middle.0.", ".mid_block.resnets.0."),
    (".middle.1.", ".mid_block.attentions.0."),
    (".middle.2.", ".mid_block.resnets.1."),
    ("encoder.downsamples.{i}.downsamples.{down}.resample.", "encoder.down_blocks.{i}.downsampler.resample."),
    ("encoder.downsamples.{i}.downsamples.{down}.time_conv.", "encoder.down_blocks.{i}.downsampler.time_conv."),
    ("encoder.downsamples.{i}.downsamples.{j}.", "encoder.down_blocks.{i}.resnets.{j}."),
    ("decoder.upsamples.{i}.upsamples.{up}.resample.", "decoder.up_blocks.{i}.upsampler.resample."),
    ("decoder.upsamples.{i}.upsamples.{up}.time_conv.", "decoder.up_blocks.{i}.upsampler.time_conv."),
    ("decoder.upsamples.{i}.upsamples.{j}.", "decoder.up_blocks.{i}.resnets.{j}."),
    (".residual.0.", ".norm1."),
    (".residual.2.", ".conv1."),
    (".residual.3.", ".norm2."),
    (".residual.6.", ".conv2."),
    (".shortcut.", ".conv_shortcut."),
)


def rename_autoencoder(weights: dict[str, LazyTensor], back: bool = False) -> dict[str, LazyTensor]:
    """An autoencoder's weights with Wan's key names renamed to diffusers', or `back`."""
    blocks = {"down": "encoder.down_blocks.0.resnets.", "up": "decoder.up_blocks.0.resnets."}
    if not back:
        blocks = {"down": "encoder.downsamples.0.downsamples.", "up": "decoder.upsamples.0.upsamples."}
    layers = {
        name: len({key[len(prefix) :].partition(".")[0] for key in weights if key.startswith(prefix)})
        for name, prefix in blocks.items()
    }
    lasts = layers if back else {name: count - 1 for name, count in layers.items()}
    names = [(diffusers, wan) for wan, diffusers in reversed(WAN_NAMES)] if back else WAN_NAMES

    def renamed(key: str) -> str:
        for source, target in names:
            pattern = re.escape(source.replace("{down}", str(lasts["down"])).replace("{up}", str(lasts["up"])))
            pattern = re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", pattern)
            match = re.search(pattern if source.startswith(".") else f"^{pattern}", key)
            if match:
                key = key[: match.start()] + target.format(**match.groupdict(), **lasts) + key[match.end() :]
        return key

    return {renamed(key): tensor for key, tensor in weights.items()}
