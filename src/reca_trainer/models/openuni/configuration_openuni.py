"""Configuration of OpenUni: InternVL3, learnable queries, a connector, the SANA diffusion transformer and DC-AE."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import InternVLConfig, PreTrainedConfig, SiglipVisionConfig


class OpenUniConfig(PreTrainedConfig):
    """Configuration of an [`OpenUniModel`](https://arxiv.org/abs/2505.23661).

    Args:
        internvl_config (`InternVLConfig` or `dict`): the understanding model, InternVL3.
        connector_config (`SiglipVisionConfig` or `dict`): the connector, whose layers are those of a SigLIP
            encoder, as wide as InternVL3's language model. What the class says of images and patches is unused.
        transformer_config (`dict`): arguments of diffusers' `SanaTransformer2DModel`.
        vae_config (`dict`): arguments of diffusers' `AutoencoderDC`.
        scheduler_config (`dict`): arguments of diffusers' `DPMSolverMultistepScheduler`, used for sampling only.
        num_queries (`int`, defaults to 256): number of learnable queries, the length of SANA's condition.
    """

    model_type = "openuni"
    sub_configs_defaults: ClassVar = {"internvl_config": InternVLConfig, "connector_config": SiglipVisionConfig}

    internvl_config: dict[str, Any] | PreTrainedConfig | None = None
    connector_config: dict[str, Any] | PreTrainedConfig | None = None
    transformer_config: dict[str, Any] | None = None
    vae_config: dict[str, Any] | None = None
    scheduler_config: dict[str, Any] | None = None
    num_queries: int = 256
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        # transformers hands the dtype it loads in down one level only; further down the published dtype would win.
        for nested in (self.internvl_config.text_config, self.internvl_config.vision_config):
            nested.dtype = None
        for name in ("transformer_config", "vae_config", "scheduler_config"):
            values = getattr(self, name) or {}
            setattr(self, name, {key: value for key, value in values.items() if not key.startswith("_")})

    @property
    def condition_size(self) -> int:
        """Height and width, in pixels, of the image that the understanding encoder sees."""
        return self.internvl_config.vision_config.image_size[0]

    @property
    def num_image_tokens(self) -> int:
        """Number of understanding embeddings an image becomes."""
        vision = self.internvl_config.vision_config
        return int(self.condition_size // vision.patch_size[0] * self.internvl_config.downsample_ratio) ** 2

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per latent, in height and in width."""
        return 2 ** (len(self.vae_config["encoder_block_out_channels"]) - 1)

    @property
    def image_size(self) -> int:
        """Height and width, in pixels, of the images SANA was trained at."""
        return self.transformer_config["sample_size"] * self.spatial_compression_ratio

    @classmethod
    def tiny(cls, vocab_size: int = 512, image_token_id: int = 511) -> OpenUniConfig:
        """About a million parameters in the published structure: 64×64 images as 8×8 latents, 16 understanding
        embeddings of a 56×56 condition, 16 queries.

        Args:
            vocab_size: size of a tokenizer that has the tokens `<img>`, `</img>` and `<IMG_CONTEXT>`.
            image_token_id: the last one's id.
        """
        text = {
            "model_type": "qwen2",
            "vocab_size": vocab_size,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        vision = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "attention_bias": True,
            "image_size": 56,
            "patch_size": 7,
        }
        blocks = ["ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"]
        channels, layers, scales = [16, 16, 32, 32], [1, 1, 1, 1], [[], [], [], [5]]
        return cls(
            internvl_config={
                "text_config": text,
                "vision_config": vision,
                "image_token_id": image_token_id,
                "image_seq_length": 16,
                "tie_word_embeddings": False,
            },
            connector_config={
                "hidden_size": 64,
                "intermediate_size": 192,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
            },
            transformer_config={
                "in_channels": 8,
                "out_channels": 8,
                "sample_size": 8,
                "patch_size": 1,
                "num_layers": 2,
                "num_attention_heads": 4,
                "attention_head_dim": 24,
                "num_cross_attention_heads": 4,
                "cross_attention_head_dim": 24,
                "cross_attention_dim": 96,
                "caption_channels": 64,
            },
            vae_config={
                "in_channels": 3,
                "latent_channels": 8,
                "attention_head_dim": 16,
                "encoder_block_types": blocks,
                "decoder_block_types": blocks,
                "encoder_block_out_channels": channels,
                "decoder_block_out_channels": channels,
                "encoder_layers_per_block": layers,
                "decoder_layers_per_block": layers,
                "encoder_qkv_multiscales": scales,
                "decoder_qkv_multiscales": scales,
                "downsample_block_type": "conv",
                "upsample_block_type": "interpolate",
                "scaling_factor": 0.41407,
            },
            scheduler_config={
                "prediction_type": "flow_prediction",
                "use_flow_sigmas": True,
                "flow_shift": 3.0,
            },
            num_queries=16,
        )


__all__ = ["OpenUniConfig"]
