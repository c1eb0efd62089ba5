"""Models of named sizes with random weights, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2Config, SiglipVisionConfig

from reca_trainer.models.bagel import Config, Model

INSTRUCTION_LENGTH = 14  # tokens, markers included


def autoencoder(widths: list[int], layers: int) -> dict[str, Any]:
    """Arguments of an `AutoencoderKL` shaped like FLUX', narrower."""
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": widths,
        "layers_per_block": layers,
        "latent_channels": 16,
        "norm_num_groups": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def bagel(hidden: int, feed_forward: int, layers: int, heads: int, kv_heads: int, vision: tuple[int, int, int, int]):
    """BAGEL's configuration at another size; `vision` is (width, feed-forward width, layers, heads) of the encoder."""
    width, vision_feed_forward, vision_layers, vision_heads = vision
    return Config(
        text_config=Qwen2Config(
            hidden_size=hidden,
            intermediate_size=feed_forward,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=2048,
            max_position_embeddings=4096,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=width,
            intermediate_size=vision_feed_forward,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_heads,
            image_size=980,
            patch_size=14,
            vision_use_head=False,
        ),
        vae_config=autoencoder([32, 64, 128, 128], 1),
        bos_token_id=2,
        eos_token_id=3,
        image_start_token_id=4,
        image_end_token_id=5,
    )


PRESETS = {
    "tiny": lambda: bagel(64, 160, 2, 4, 2, (32, 64, 2, 2)),
    "small": lambda: bagel(256, 1024, 4, 4, 2, (192, 512, 3, 3)),
    "mid": lambda: bagel(512, 2304, 6, 8, 2, (384, 1024, 4, 6)),
    "bagel-7b-mot": Config,
}


def build_model(preset: str, dtype: torch.dtype, device: str, seed: int = 0) -> Model:
    """A `preset` with random weights, made on `device`."""
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Model(PRESETS[preset]())
    finally:
        torch.set_default_dtype(default)
    if dtype != torch.float32:
        model.vae.float()
    return model


def reconstruction_batch(
    model: Model,
    batch_size: int,
    resolution: int,
    images: str = "pixels",
    instruction_length: int = INSTRUCTION_LENGTH,
    seed: int = 0,
) -> dict[str, Any]:
    """A batch of square noise images: as `pixels`, as `latents` beside the condition's pixels, or `encoded` as
    `cache_latents` keeps them."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    grid, channels = 224 // config.vision_config.patch_size, config.vae_config["latent_channels"]
    side, size = grid * config.vision_config.patch_size, resolution // config.vae_scale_factor

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(batch_size, *shape, generator=generator)

    shape = (1, instruction_length)
    batch = {
        "task": "reconstruct",
        "input_ids": torch.randint(6, config.text_config.vocab_size, shape, generator=generator),
    }
    if images == "encoded":
        batch["condition_embeds"] = uniform(grid, grid, config.text_config.hidden_size) - 0.5
        batch["posterior"] = uniform(2, channels, size, size)
        return batch
    batch["condition_pixel_values"] = uniform(3, side, side) * 2 - 1
    if images == "latents":
        batch["latents"] = torch.randn(batch_size, channels, size, size, generator=generator)
    else:
        batch["pixel_values"] = uniform(3, resolution, resolution) * 2 - 1
    return batch
