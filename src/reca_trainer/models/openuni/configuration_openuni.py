"""Configuration of OpenUni."""

from __future__ import annotations

from typing import Any

from transformers import InternVLConfig, PreTrainedConfig, SiglipVisionConfig

from reca_trainer.models.common.configuration import CompositeConfig

# InternVL3-1B, as arguments of transformers' InternVLConfig.
INTERNVL3_1B = {
    "text_config": {
        "model_type": "qwen2",
        "vocab_size": 151674,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "vision_config": {"attention_bias": True},
    "tie_word_embeddings": False,
}
# The connector of OpenUni-B, as arguments of SiglipVisionConfig.
CONNECTOR_B = {"hidden_size": 896, "intermediate_size": 3072, "num_hidden_layers": 6, "num_attention_heads": 14}
# Sana_600M_512px, as arguments of diffusers' SanaTransformer2DModel.
SANA_600M_512 = {
    "sample_size": 16,
    "num_layers": 28,
    "num_attention_heads": 36,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
# dc-ae-f32c32-sana-1.1, as arguments of diffusers' AutoencoderDC.
DC_AE_F32C32 = {
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
# SANA's sampler, as arguments of diffusers' DPMSolverMultistepScheduler.
FLOW_DPM_SOLVER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


class OpenUniConfig(CompositeConfig):
    """Configuration of an `OpenUniModel`. The defaults are those of OpenUni-B-512.

    Args:
        internvl_config: an `InternVLConfig`: the understanding model InternVL3.
        connector_config: a `SiglipVisionConfig`: the connector's layers are those of a SigLIP encoder, as wide as
            InternVL3's language model. Its fields about images and patches are unused.
        transformer_config: arguments of diffusers' `SanaTransformer2DModel`.
        vae_config: arguments of diffusers' `AutoencoderDC`.
        scheduler_config: arguments of diffusers' `DPMSolverMultistepScheduler`, for sampling only.
        num_queries: number of learnable queries, the length of SANA's condition.
    """

    model_type = "openuni"
    sub_configs = {"internvl_config": InternVLConfig, "connector_config": SiglipVisionConfig}  # noqa: RUF012

    internvl_config: dict | PreTrainedConfig | None = None
    connector_config: dict | PreTrainedConfig | None = None
    transformer_config: dict | None = None
    vae_config: dict | None = None
    scheduler_config: dict | None = None
    num_queries: int = 256
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any):
        if self.internvl_config is None:
            self.internvl_config = {**INTERNVL3_1B}
        if self.connector_config is None:
            self.connector_config = {**CONNECTOR_B}
        defaults = {
            "transformer_config": SANA_600M_512,
            "vae_config": DC_AE_F32C32,
            "scheduler_config": FLOW_DPM_SOLVER,
        }
        for name, default in defaults.items():
            values = getattr(self, name) or default
            setattr(self, name, {key: value for key, value in values.items() if not key.startswith("_")})
        super().__post_init__(**kwargs)
        # transformers passes the dtype of a load down one level only; below it the published dtype would win.
        for nested in (self.internvl_config.text_config, self.internvl_config.vision_config):
            nested.dtype = None

    @classmethod
    def tiny(cls, vocab_size: int) -> OpenUniConfig:
        """About a million parameters in the published structure: 32×32 images as 8×8 latents, 16 understanding
        embeddings and 16 queries.

        Args:
            vocab_size: that of the tokenizer given to `OpenUniProcessor.tiny`, plus three image tokens that come last.
        """
        layers = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        blocks = ["ResBlock", "ResBlock", "EfficientViTBlock"]
        channels = [16, 32, 64]
        return cls(
            internvl_config={
                "text_config": {"model_type": "qwen2", "vocab_size": vocab_size, "num_key_value_heads": 2, **layers},
                "vision_config": {"attention_bias": True, "image_size": 32, "patch_size": 4, **layers},
                "image_token_id": vocab_size - 1,
                "image_seq_length": 16,
                "tie_word_embeddings": False,
            },
            connector_config=layers,
            transformer_config={
                "in_channels": 8,
                "out_channels": 8,
                "sample_size": 8,
                "num_layers": 4,  # SANA learns places from the borders, one 3×3 convolution a layer
                "num_attention_heads": 4,
                "attention_head_dim": 24,
                "num_cross_attention_heads": 4,
                "cross_attention_head_dim": 24,
                "cross_attention_dim": 96,
                "caption_channels": 64,
            },
            vae_config={
                **DC_AE_F32C32,
                "latent_channels": 8,
                "attention_head_dim": 16,
                "encoder_block_types": blocks,
                "decoder_block_types": blocks,
                "encoder_block_out_channels": channels,
                "decoder_block_out_channels": channels,
                "encoder_layers_per_block": [1, 1, 1],
                "decoder_layers_per_block": [1, 1, 1],
                "encoder_qkv_multiscales": [[], [], [5]],
                "decoder_qkv_multiscales": [[], [], [5]],
            },
            num_queries=16,
        )

    @property
    def condition_size(self) -> int:
        """Height and width, in pixels, of the understanding encoder's input."""
        return self.internvl_config.vision_config.image_size[0]

    @property
    def num_image_tokens(self) -> int:
        """Number of understanding embeddings of an image."""
        vision = self.internvl_config.vision_config
        return int(self.condition_size // vision.patch_size[0] * self.internvl_config.downsample_ratio) ** 2

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.vae_config["encoder_block_out_channels"]) - 1)

    @property
    def image_size(self) -> int:
        """Height and width, in pixels, of the images SANA was trained at."""
        return self.transformer_config["sample_size"] * self.spatial_compression_ratio
