"""Configuration of Qwen-Image-Edit."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, Qwen2_5_VLConfig

from reca_trainer.models.common.configuration import CompositeConfig

# Qwen2.5-VL-7B, as arguments of transformers' Qwen2_5_VLConfig.
QWEN2_5_VL_7B = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584, "tokens_per_second": 2},
}
# The scheduler of Qwen-Image, as arguments of diffusers' FlowMatchEulerDiscreteScheduler.
FLOW_MATCH_EULER = {
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "shift_terminal": 0.02,
}


class QwenImageConfig(CompositeConfig):
    """Configuration of a `QwenImageModel`. The defaults are those of Qwen-Image-Edit-2509.

    Args:
        text_encoder_config: a `Qwen2_5_VLConfig`.
        transformer_config: arguments of diffusers' `QwenImageTransformer2DModel`; 2511 has `zero_cond_t` besides, which gives
            the latents of a source the timestep of clean ones.
        vae_config: arguments of diffusers' `AutoencoderKLQwenImage`.
        scheduler_config: arguments of diffusers' `FlowMatchEulerDiscreteScheduler`, for sampling and for the shift of
            training timesteps.
        resolution: side of the square that has the area of a picture that goes through the autoencoder.
        condition_resolution: the same of a picture that Qwen2.5-VL reads.
    """

    model_type = "qwen_image"
    sub_configs = {"text_encoder_config": Qwen2_5_VLConfig}  # noqa: RUF012

    text_encoder_config: dict | PreTrainedConfig | None = None
    transformer_config: dict | None = None
    vae_config: dict | None = None
    scheduler_config: dict | None = None
    resolution: int = 1024
    condition_resolution: int = 384
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any):
        if self.text_encoder_config is None:
            self.text_encoder_config = {**QWEN2_5_VL_7B}
        for name, default in (("transformer", {}), ("vae", {}), ("scheduler", FLOW_MATCH_EULER)):
            values = getattr(self, f"{name}_config") or default
            setattr(self, f"{name}_config", {key: value for key, value in values.items() if key[0] != "_"})
        super().__post_init__(**kwargs)
        # transformers hands the dtype it loads in down one level only; further down the published dtype would win.
        for nested in (self.text_encoder_config.text_config, self.text_encoder_config.vision_config):
            nested.dtype = None

    @classmethod
    def tiny(cls, vocab_size: int) -> QwenImageConfig:
        """Under a million parameters in the published structure: 32 × 32 images as 8 × 8 latents, four of which make a token,
        and 16 understanding embeddings.

        Args:
            vocab_size: of the tokenizer given to `QwenImageProcessor.tiny`, plus the image token that comes last.
        """
        return cls(
            text_encoder_config={
                "text_config": {
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "vocab_size": vocab_size,
                    "max_position_embeddings": 2048,
                    "bos_token_id": None,
                    "eos_token_id": None,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
                },
                "vision_config": {
                    "depth": 2,
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "num_heads": 4,
                    "patch_size": 4,
                    "window_size": 16,
                    "fullatt_block_indexes": [1],
                    "out_hidden_size": 64,
                    "tokens_per_second": 2,
                },
                "image_token_id": vocab_size - 1,
                "video_token_id": vocab_size,  # there is none
            },
            transformer_config={
                "in_channels": 32,
                "out_channels": 8,
                "num_layers": 2,
                "attention_head_dim": 24,
                "num_attention_heads": 4,
                "joint_attention_dim": 64,
                "axes_dims_rope": [8, 8, 8],
            },
            vae_config={
                "base_dim": 16,
                "z_dim": 8,
                "dim_mult": [1, 1, 2],
                "num_res_blocks": 1,
                "temperal_downsample": [False, False],
                "latents_mean": [0.0] * 8,
                "latents_std": [1.0] * 8,
            },
            resolution=32,
            condition_resolution=32,
        )

    @property
    def understanding_stride(self) -> int:
        """Pixels of the understanding encoder's input per embedding, along each side."""
        vision = self.text_encoder_config.vision_config
        return vision.patch_size * vision.spatial_merge_size
