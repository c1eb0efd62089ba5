"""Wan's and Qwen-Image's autoencoders of videos on single frames: the `encode` and `decode` of `pretrain`."""

from __future__ import annotations

from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from reca_trainer.models.contract import UnifiedModel


def encode(model: UnifiedModel, pixels: Tensor) -> Tensor:
    """Pixels `[B, 3, H, W]` in [-1, 1] → the posterior's mode `[B, C, h, w]`."""
    return model.vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]


def decode(model: UnifiedModel, latents: Tensor) -> Tensor:
    """As `vae.decode`, but for its clamp to [-1, 1]: pixels that begin beyond it would learn nothing."""
    frames = model.vae.decoder(model.vae.post_quant_conv(latents[:, :, None]))
    return unpatchify(frames, model.vae.config.get("patch_size") or 1)[:, :, 0]
