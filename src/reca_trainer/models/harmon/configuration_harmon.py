"""Configuration of Harmon (arXiv:2503.21979): Qwen2 between the encoder and the decoder of a masked autoregressive (MAR)
image model, on the latents of the KL-16 autoencoder."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, Qwen2Config

from reca_trainer.models.common.configuration import CompositeConfig


class HarmonMarConfig(PreTrainedConfig):
    """The MAR part (arXiv:2406.11838), with the argument names of its published configurations. The defaults are those of
    Harmon-0.5B.

    Args:
        encoder_embed_dim, encoder_depth, encoder_num_heads: width, blocks and heads of the encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the same of the decoder.
        mlp_ratio: hidden width of a block's MLP divided by the block's width.
        img_size: pixels per side of the images that the position tables were made for.
        vae_stride, vae_embed_dim: pixels per latent and channels of a latent.
        class_num: rows of the class table, which Harmon stores and never uses.
        attn_dropout, proj_dropout: dropout of attention weights and of block outputs, active in training.
        buffer_size: learned tokens beside those of the image.
        diffloss_d, diffloss_w: residual blocks and width of the diffusion head.
        num_sampling_steps: diffusion steps per token when sampling: `"N"`, `"N,M,…"` (per section of the 1000) or
            `"ddimN"` (integer stride).
        diffusion_batch_mul: draws of (timestep, noise) per token in training.
        mask_ratio_min: smallest share of tokens hidden in training.
    """

    model_type = "harmon_mar"

    encoder_embed_dim: int = 768
    encoder_depth: int = 12
    encoder_num_heads: int = 12
    decoder_embed_dim: int = 768
    decoder_depth: int = 12
    decoder_num_heads: int = 12
    mlp_ratio: float = 4.0
    img_size: int = 256
    vae_stride: int = 16
    vae_embed_dim: int = 16
    class_num: int = 1000
    attn_dropout: float = 0.1
    proj_dropout: float = 0.1
    buffer_size: int = 64
    diffloss_d: int = 6
    diffloss_w: int = 1024
    num_sampling_steps: str = "100"
    diffusion_batch_mul: int = 4
    mask_ratio_min: float = 0.7

    @property
    def native_grid(self) -> int:
        """Tokens per side that the position tables hold; other grids are interpolated from it."""
        return self.img_size // self.vae_stride


class HarmonConfig(CompositeConfig):
    """Configuration of `HarmonModel`.

    Args:
        text_config (`Qwen2Config` or `dict`): the language model; by default that of Harmon-0.5B.
        mar_config (`HarmonMarConfig` or `dict`): MAR encoder, decoder and diffusion head.
        vae_config (`dict`): arguments of diffusers' `AutoencoderKL`; by default KL-16.
        understanding_grad_scale (`float`): factor on the gradient that reconstruction and caption losses send into the
            encoder through the understanding embeddings; 0.1 in Harmon's official recipe.
        image_token_id (`int`): id that marks the image's place in `input_ids`; outside the vocabulary.
    """

    model_type = "harmon"
    sub_configs = {"text_config": Qwen2Config, "mar_config": HarmonMarConfig}  # noqa: RUF012

    text_config: dict | PreTrainedConfig | None = None
    mar_config: dict | PreTrainedConfig | None = None
    vae_config: dict | None = None
    understanding_grad_scale: float = 0.1
    image_token_id: int = -200
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any):
        if self.text_config is None:
            self.text_config = qwen2_5("0.5b")
        self.mar_config = HarmonMarConfig() if self.mar_config is None else self.mar_config
        self.vae_config = self.vae_config or kl_vae_config()
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        stride = 2 ** (len(self.vae_config["block_out_channels"]) - 1)
        if (stride, self.vae_config["latent_channels"]) != (self.mar_config.vae_stride, self.mar_config.vae_embed_dim):
            raise ValueError(
                f"vae_config makes latents of stride {stride} and {self.vae_config['latent_channels']} channels, but "
                f"mar_config expects vae_stride={self.mar_config.vae_stride} and "
                f"vae_embed_dim={self.mar_config.vae_embed_dim}."
            )

    @classmethod
    def tiny(cls, vocab_size: int = 512, **kwargs: Any) -> HarmonConfig:
        """About 0.9 million parameters in the published structure, for 32×32 images as 8×8 tokens. Without dropout, so
        that a training step depends on its explicit randomness alone.

        Args:
            vocab_size: at least that of the tokenizer given to `HarmonProcessor.tiny` and two turn markers.
        """
        text = {"vocab_size": vocab_size, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip
        mar = {"encoder_embed_dim": 64, "encoder_depth": 2, "encoder_num_heads": 4, "decoder_embed_dim": 96,
               "decoder_depth": 2, "decoder_num_heads": 4, "img_size": 32, "vae_stride": 4, "vae_embed_dim": 4,
               "class_num": 1, "attn_dropout": 0.0, "proj_dropout": 0.0, "buffer_size": 4, "diffloss_d": 2,
               "diffloss_w": 96, "num_sampling_steps": "ddim20"}  # fmt: skip
        vae = kl_vae_config(latent_channels=4, width=32, multipliers=(1, 1, 1), layers_per_block=1, scaling_factor=1.0)
        return cls(**{"text_config": text, "mar_config": mar, "vae_config": vae, **kwargs})


def kl_vae_config(
    latent_channels: int = 16,
    width: int = 128,
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
    layers_per_block: int = 2,
    scaling_factor: float = 0.2325,
) -> dict[str, Any]:
    """`AutoencoderKL` arguments of an autoencoder shaped like KL-16: attention on the encoder's last level only."""
    levels = len(multipliers)
    return {
        "down_block_types": ["DownEncoderBlock2D"] * (levels - 1) + ["AttnDownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [width * multiplier for multiplier in multipliers],
        "layers_per_block": layers_per_block,
        "latent_channels": latent_channels,
        "norm_num_groups": 32,
        "scaling_factor": scaling_factor,
    }


def qwen2_5(size: str) -> dict[str, Any]:
    """`Qwen2Config` arguments of Qwen2.5-0.5B-Instruct (`"0.5b"`) or Qwen2.5-1.5B-Instruct (`"1.5b"`)."""
    sizes = {"0.5b": (896, 4864, 24, 14), "1.5b": (1536, 8960, 28, 12)}
    hidden_size, intermediate_size, num_hidden_layers, num_attention_heads = sizes[size]
    return {
        "vocab_size": 151936,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }
