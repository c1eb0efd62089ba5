"""MAGVIT-v2 (arXiv:2310.05737), the tokenizer of Show-o's images.

Shapes: B images, H×W pixels, h×w tokens of `bits` channels each, N = h·w.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UNetMidBlock2D, UpDecoderBlock2D
from torch import nn


class MagvitV2Encoder(nn.Module):
    """`[B, 3, H, W]` -> `[B, bits, h, w]`, whose signs are the tokens."""

    def __init__(self, base_channels: int, latent_channels: int, multipliers: list[int], layers: list[int]):
        super().__init__()
        channels = [base_channels * multiplier for multiplier in multipliers]
        self.conv_in = nn.Conv2d(3, base_channels, 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownEncoderBlock2D(
                in_channels=before,
                out_channels=after,
                num_layers=num_layers,
                add_downsample=level < len(channels) - 1,
                downsample_padding=0,  # which pads right and bottom only
            )
            for level, (before, after, num_layers) in enumerate(
                zip([base_channels, *channels], channels, layers, strict=False)
            )
        )
        self.mid_block = build_mid_block(channels[-1])
        self.conv_norm_out = nn.GroupNorm(32, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], latent_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = self.conv_in(pixel_values)  # [B, base_channels, H, W]
        for block in self.down_blocks:
            hidden = block(hidden)
        hidden = self.mid_block(hidden)  # [B, C, h, w]
        return self.quant_conv(self.conv_out(F.silu(self.conv_norm_out(hidden))))


class MagvitV2Decoder(nn.Module):
    """`[B, bits, h, w]` of -1 and 1 -> `[B, 3, H, W]`, about [-1, 1]. The multipliers count from the output inwards."""

    def __init__(self, base_channels: int, latent_channels: int, multipliers: list[int], layers: list[int]):
        super().__init__()
        channels = [base_channels * multiplier for multiplier in reversed(multipliers)]
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.conv_in = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.mid_block = build_mid_block(channels[0])
        self.up_blocks = nn.ModuleList(
            UpDecoderBlock2D(
                in_channels=before,
                out_channels=after,
                num_layers=num_layers,
                add_upsample=level < len(channels) - 1,
            )
            for level, (before, after, num_layers) in enumerate(
                zip([channels[0], *channels], channels, reversed(layers), strict=False)
            )
        )
        self.conv_norm_out = nn.GroupNorm(32, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        hidden = self.mid_block(self.conv_in(self.post_quant_conv(latents)))  # [B, C, h, w]
        for block in self.up_blocks:
            hidden = block(hidden)  # [B, base_channels · multiplier, H, W] after the last
        return self.conv_out(F.silu(self.conv_norm_out(hidden)))


class MagvitV2(nn.Module):
    """MAGVIT-v2 with lookup-free quantisation: the signs of `bits` channels are a token's bits, most significant first."""

    def __init__(
        self,
        base_channels: int,
        latent_channels: int,
        encoder_channel_multipliers: list[int],
        encoder_layers_per_block: list[int],
        decoder_channel_multipliers: list[int],
        decoder_layers_per_block: list[int],
    ):
        super().__init__()
        self.bits = latent_channels
        self.encoder = MagvitV2Encoder(
            base_channels, latent_channels, encoder_channel_multipliers, encoder_layers_per_block
        )
        self.decoder = MagvitV2Decoder(
            base_channels, latent_channels, decoder_channel_multipliers, decoder_layers_per_block
        )

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> tokens `[B, N]` int64 in `[0, 2^bits)`, row by row."""
        positive = self.encoder(pixel_values).flatten(2) > 0  # [B, bits, N]
        return (positive * self._powers()[:, None]).sum(1)

    def decode(self, tokens: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Tokens `[B, N]` of a `grid` `(h, w)`, by default a square -> images `[B, 3, H, W]`, about [-1, 1]."""
        height, width = grid or (math.isqrt(tokens.shape[1]),) * 2
        return self.decoder(self.codes(tokens).unflatten(2, (height, width)))

    def codes(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens `[B, N]` -> their code vectors of -1 and 1 `[B, bits, N]`."""
        positive = (tokens[:, None] & self._powers()[:, None]) != 0  # [B, bits, N]
        return positive.to(self.decoder.conv_in.weight.dtype) * 2 - 1

    def _powers(self) -> torch.Tensor:
        return 2 ** torch.arange(self.bits - 1, -1, -1, device=self.decoder.conv_in.weight.device)


def build_mid_block(channels: int) -> UNetMidBlock2D:
    """Residual block, single-head self-attention, residual block."""
    return UNetMidBlock2D(channels, temb_channels=None, resnet_groups=32, attention_head_dim=channels)
