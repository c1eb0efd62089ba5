"""BAGEL's published layout: file names and key names, read and written.

| file | content |
|---|---|
| `ema.safetensors` (or `model.safetensors`, or either sharded behind an `.index.json`) | everything but the autoencoder |
| `model_bf16.safetensors` | the same in the authors' RecA release; preferred, because the `ema.safetensors` beside it is an average that hardly moved |
| `model.safetensors.index.json` | which file holds which tensor: all of them `ema.safetensors` |
| `ae.safetensors` | FLUX' autoencoder, float32, in FLUX' own key names |
| `llm_config.json`, `vit_config.json` | dimensions; `config.json` has only what the original hard-codes |
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import Qwen2Config, Qwen2TokenizerFast, SiglipVisionConfig

from reca_trainer.models.bagel.configuration_bagel import FLUX_AUTOENCODER, BagelConfig
from reca_trainer.models.bagel.modeling_bagel import BagelModel
from reca_trainer.models.bagel.processing_bagel import BagelProcessor
from reca_trainer.models.weights import (
    CheckpointError,
    LazyTensor,
    autoencoder_from_ldm,
    autoencoder_to_ldm,
    load_strict,
    main_dtype,
    open_weights,
    read_optional_config,
    weights_of,
    write_index,
    write_sharded,
    write_tokenizer,
)

WEIGHTS = ("model_bf16.safetensors", "ema.safetensors", "model.safetensors")
POSITION_TABLES = {"latent_pos_embed.pos_embed": "latent_pos_embed", "vit_pos_embed.pos_embed": "vit_pos_embed"}


def is_published(file_names: set[str], config: dict) -> bool:
    """Whether a checkpoint's files are BAGEL's published ones."""
    return {"llm_config.json", "vit_config.json", "ae.safetensors"} <= file_names


def read_published(folder: Path, **kwargs: Any) -> BagelModel:
    """Load BAGEL as published; `kwargs` as for `PreTrainedModel.from_pretrained`."""
    state_dict = open_weights(folder, *WEIGHTS)
    for name in POSITION_TABLES:  # fixed tables, recomputed
        state_dict.pop(name, None)
    layers = {int(m[1]) for key in state_dict if (m := re.match(r"vit_model\..*\.encoder\.layers\.(\d+)\.", key))}
    config = read_config(folder, vision_layers=len(layers))
    autoencoder = autoencoder_from_ldm(open_weights(folder, "ae.safetensors"))
    state_dict |= {f"vae.{key}": tensor for key, tensor in autoencoder.items()}
    return load_strict(BagelModel, config, state_dict, folder, **kwargs)


def read_published_processor(folder: Path, **kwargs: Any) -> BagelProcessor:
    """The processor of BAGEL as published; `kwargs` as for `BagelProcessor`."""
    return BagelProcessor(Qwen2TokenizerFast.from_pretrained(folder), **kwargs)


def write_published(
    model: BagelModel, processor: BagelProcessor, folder: Path, max_shard_size: int | str | None = None
) -> None:
    """Write `model` in the layout that the original inference code and its ports read. `folder` must exist. By default the
    weights are one file, as published.

    Raises:
        CheckpointError: the layout cannot describe the autoencoder, which is not built as FLUX' is.
    """
    folder = Path(folder)
    config = model.config
    fixed = {"norm_num_groups": 32, "mid_block_add_attention": True}
    built = {name: config.vae_config.get(name, fixed[name]) for name in fixed}
    if built != fixed:
        raise CheckpointError(
            f"BAGEL's published layout holds no autoencoder but FLUX' ({fixed}), and this model has another ({built}), as "
            'the tiny model that comes with the package has. Use the "transformers" layout.'
        )
    main, autoencoder = published_state_dict(model)
    weight_map = write_sharded(main, folder, "ema.safetensors", max_shard_size)  # without metadata, as published
    # Published under this name, though it lists the tensors of `ema.safetensors`.
    write_index(folder / "model.safetensors.index.json", main, weight_map)
    write_sharded(autoencoder, folder, "ae.safetensors")
    write_tokenizer(processor.tokenizer, folder)

    text = {**config.text_config.to_dict(), "rope_theta": config.text_config.rope_parameters["rope_theta"]}
    for name in ("rope_parameters", "layer_types", "dtype"):
        text.pop(name, None)
    text["architectures"] = ["Qwen2ForCausalLM"]
    vision = {**config.vision_config.to_dict(), "num_hidden_layers": config.vision_config.num_hidden_layers + 1}
    vision.pop("dtype", None)
    top = {name: getattr(config, name) for name in (
        "latent_patch_size", "max_latent_size", "vit_max_num_patch_per_side", "connector_act", "timestep_shift"
    )}  # fmt: skip
    top |= {
        "architectures": ["BagelForConditionalGeneration"],
        "model_type": "bagel",
        "visual_gen": True,
        "visual_und": True,
        "interpolate_pos": False,
        "llm_config": {**text, "qk_norm": True, "layer_module": "Qwen2MoTDecoderLayer"},
        "vit_config": vision,
        "vae_config": {"z_channels": config.vae_config["latent_channels"], "downsample": config.vae_scale_factor},
    }
    files = {"llm_config": text, "vit_config": vision, "config": top}
    flux = (FLUX_AUTOENCODER["scaling_factor"], FLUX_AUTOENCODER["shift_factor"])
    scale = (config.vae_config["scaling_factor"], config.vae_config["shift_factor"])
    if scale != flux:
        files["ae_params"] = {"scale_factor": scale[0], "shift_factor": scale[1]}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def read_config(folder: Path, vision_layers: int) -> BagelConfig:
    """The `BagelConfig` of a published checkpoint whose weights hold `vision_layers` layers of the vision encoder
    (`vit_config.json` says one more than is used)."""
    text, vision = (json.loads((folder / f"{name}_config.json").read_text()) for name in ("llm", "vit"))
    top = read_optional_config(folder)  # what the original hard-codes
    decided_here = ("model_type", "rope", "num_hidden_layers", "vision_use_head")
    vision = {name: vision[name] for name in vision if name not in decided_here}
    tokenizer = Qwen2TokenizerFast.from_pretrained(folder)
    ids = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in {
            "bos_token_id": "<|im_start|>",
            "eos_token_id": "<|im_end|>",
            "image_start_token_id": "<|vision_start|>",
            "image_end_token_id": "<|vision_end|>",
        }.items()
    }
    if None in ids.values():
        raise CheckpointError(f"The tokenizer in {folder} lacks one of BAGEL's markers: {ids}.")
    rope_theta = text.pop("rope_theta", 1e6)
    for name in ("architectures", "torch_dtype", "transformers_version", "model_type", "tie_word_embeddings"):
        text.pop(name, None)
    return BagelConfig(
        text_config=Qwen2Config(
            **text, rope_parameters={"rope_type": "default", "rope_theta": rope_theta}, tie_word_embeddings=False
        ),
        vision_config=SiglipVisionConfig(**vision, num_hidden_layers=vision_layers, vision_use_head=False),
        vae_config=autoencoder_config(folder),
        **{
            name: top[name]
            for name in ("latent_patch_size", "max_latent_size", "vit_max_num_patch_per_side", "connector_act")
            if name in top
        },
        **ids,
    )


def autoencoder_config(folder: Path) -> dict[str, Any]:
    """Arguments of `AutoencoderKL` for `ae.safetensors`, with widths from the shapes of its weights. Scale and shift are in no
    published file; `ae_params.json`, written here, has them where they are not FLUX'."""
    shapes = {key: tensor.shape for key, tensor in open_weights(folder, "ae.safetensors").items()}
    levels = 1 + max(int(m[1]) for key in shapes if (m := re.match(r"encoder\.down\.(\d+)\.", key)))
    blocks = 1 + max(int(m[1]) for key in shapes if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", key)))
    params = json.loads(path.read_text()) if (path := folder / "ae_params.json").is_file() else {}
    config = dict(
        FLUX_AUTOENCODER,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)],
        layers_per_block=blocks,
        latent_channels=shapes["decoder.conv_in.weight"][1],
        scaling_factor=params.get("scale_factor", FLUX_AUTOENCODER["scaling_factor"]),
        shift_factor=params.get("shift_factor", FLUX_AUTOENCODER["shift_factor"]),
    )
    first = shapes["encoder.conv_in.weight"][0]
    return config if first == config["block_out_channels"][0] else dict(config, conv_in_channels=first)


def published_state_dict(model: BagelModel) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """The weights of `ema.safetensors` and of `ae.safetensors`, under their published names."""
    main, autoencoder = {}, {}
    for name, tensor in weights_of(model).items():
        if name.startswith("vae."):
            autoencoder[name.removeprefix("vae.")] = tensor
        else:
            main[name] = tensor
    dtype = main_dtype(model, main)
    for key, module in POSITION_TABLES.items():
        main[key] = LazyTensor(model.get_submodule(module).compute().to(dtype))
    return main, autoencoder_to_ldm(autoencoder)
