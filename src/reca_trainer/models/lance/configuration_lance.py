"""Configuration of Lance."""

from __future__ import annotations

from transformers import PreTrainedConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig

from reca_trainer.models.common.configuration import CompositeConfig

# Mean and standard deviation of the channels of Wan2.2's latents, as published.
# fmt: off
LATENTS_MEAN = [
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
]
LATENTS_STD = [
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
]
# fmt: on

# The autoencoder of Wan2.2-TI2V-5B, as arguments of diffusers' AutoencoderKLWan.
WAN_AUTOENCODER = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": LATENTS_MEAN,
    "latents_std": LATENTS_STD,
}


class LanceConfig(CompositeConfig):
    r"""Configuration of a `LanceModel`. The defaults are those of the image checkpoint of Lance-3B.

    Args:
        text_config: a `Qwen2_5_VLTextConfig`, the dimensions of each of the two experts.
        vision_config: a `Qwen2_5_VLVisionConfig`; its embeddings are as wide as the language model.
        vae_config: arguments of diffusers' `AutoencoderKLWan`.
        latent_patch_size: side of the square of VAE latents that makes one token.
        max_latent_size: side of the position table of latent tokens.
        latent_frames: latent frames of the published position table: 1, or 31 in the video checkpoint. Images use the first.
        vit_frame: frame, the temporal position, of understanding images.
        timestep_shift: shift `s` of the training timesteps, `t <- s t / (1 + (s - 1) t)`; 4 in the official scripts.
        tokenizer_length: tokens of the tokenizer; further rows of the output layer are padding, and their logits are cut off.
        image_start_token_id, image_end_token_id: markers around every image.
    """

    model_type = "lance"
    sub_configs = {"text_config": Qwen2_5_VLTextConfig, "vision_config": Qwen2_5_VLVisionConfig}  # noqa: RUF012

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    vae_config: dict | None = None
    latent_patch_size: int = 1
    max_latent_size: int = 64
    latent_frames: int = 1
    vit_frame: int = 1000
    timestep_shift: float = 4.0
    tokenizer_length: int = 151665
    eos_token_id: int = 151645
    image_start_token_id: int = 151652
    image_end_token_id: int = 151653
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if self.text_config is None:
            self.text_config = Qwen2_5_VLTextConfig(
                hidden_size=2048,
                intermediate_size=11008,
                num_hidden_layers=36,
                num_attention_heads=16,
                num_key_value_heads=2,
                vocab_size=151936,
                max_position_embeddings=128000,
                rms_norm_eps=1e-6,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            )
        if self.vision_config is None:
            self.vision_config = Qwen2_5_VLVisionConfig(hidden_size=1280, out_hidden_size=2048, tokens_per_second=2)
        self.vae_config = dict(WAN_AUTOENCODER if self.vae_config is None else self.vae_config)
        super().__post_init__(**kwargs)

    @classmethod
    def tiny(
        cls, vocab_size: int, image_start_token_id: int, image_end_token_id: int, eos_token_id: int
    ) -> LanceConfig:
        """About a million parameters in the published structure: 32 × 32 images as 8 × 8 latents and 16 understanding
        embeddings."""
        return cls(
            text_config=Qwen2_5_VLTextConfig(
                hidden_size=96,
                intermediate_size=192,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=-(-vocab_size // 32) * 32,
                max_position_embeddings=2048,
                rms_norm_eps=1e-6,
                bos_token_id=None,
                eos_token_id=eos_token_id,
                rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4]},
            ),
            vision_config=Qwen2_5_VLVisionConfig(
                depth=3,
                hidden_size=64,
                intermediate_size=128,
                num_heads=4,
                patch_size=4,
                window_size=16,
                fullatt_block_indexes=[1, 2],
                out_hidden_size=96,
                tokens_per_second=2,
            ),
            vae_config={
                **WAN_AUTOENCODER,
                "base_dim": 32,
                "decoder_base_dim": 32,
                "z_dim": 8,
                "dim_mult": [1, 1],
                "num_res_blocks": 1,
                "temperal_downsample": [False],
                "scale_factor_spatial": 4,
                "latents_mean": [0.0] * 8,
                "latents_std": [1.0] * 8,
            },
            max_latent_size=8,
            timestep_shift=1.0,
            tokenizer_length=vocab_size,
            eos_token_id=eos_token_id,
            image_start_token_id=image_start_token_id,
            image_end_token_id=image_end_token_id,
        )

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per VAE latent, along each side."""
        return self.vae_config["scale_factor_spatial"]

    @property
    def latent_token_stride(self) -> int:
        """Pixels per latent token, along each side."""
        return self.vae_scale_factor * self.latent_patch_size

    @property
    def latent_token_dim(self) -> int:
        """Channels of one latent token."""
        return self.latent_patch_size**2 * self.vae_config["z_dim"]

    @property
    def understanding_stride(self) -> int:
        """Pixels per understanding embedding, along each side."""
        return self.vision_config.patch_size * self.vision_config.spatial_merge_size
