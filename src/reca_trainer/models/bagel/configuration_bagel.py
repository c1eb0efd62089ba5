"""Configuration of BAGEL."""

from __future__ import annotations

from transformers import PreTrainedConfig, Qwen2Config, SiglipVisionConfig

from reca_trainer.models.common.configuration import CompositeConfig

# The FLUX autoencoder, as arguments of diffusers' AutoencoderKL.
FLUX_AUTOENCODER = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


class BagelConfig(CompositeConfig):
    r"""Configuration of a `BagelModel`. The defaults are those of BAGEL-7B-MoT.

    Args:
        text_config: a `Qwen2Config`, the dimensions of each of the two experts.
        vision_config: a `SiglipVisionConfig`; `num_hidden_layers` counts the layers that exist (26 of SigLIP's 27).
        vae_config: arguments of diffusers' `AutoencoderKL`, and optionally `conv_in_channels`, the width of the
            encoder's first convolution if that of its first block is another.
        latent_patch_size: side of the square of VAE latents that makes one token.
        max_latent_size: side of the position table of latent tokens.
        vit_max_num_patch_per_side: side of the position table added to the image embeddings.
        timestep_shift: shift `s` of the training timesteps, `t <- s t / (1 + (s - 1) t)`; 1 in the official RecA run.
        image_start_token_id, image_end_token_id: markers around every image.
    """

    model_type = "bagel"
    sub_configs = {"text_config": Qwen2Config, "vision_config": SiglipVisionConfig}  # noqa: RUF012

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    vae_config: dict | None = None
    latent_patch_size: int = 2
    max_latent_size: int = 64
    vit_max_num_patch_per_side: int = 70
    connector_act: str = "gelu_pytorch_tanh"
    timestep_shift: float = 1.0
    bos_token_id: int = 151644
    eos_token_id: int = 151645
    image_start_token_id: int = 151652
    image_end_token_id: int = 151653
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if self.text_config is None:
            self.text_config = Qwen2Config(
                hidden_size=3584,
                intermediate_size=18944,
                num_hidden_layers=28,
                num_attention_heads=28,
                num_key_value_heads=4,
                vocab_size=152064,
                rms_norm_eps=1e-6,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            )
        if self.vision_config is None:
            self.vision_config = SiglipVisionConfig(
                hidden_size=1152,
                intermediate_size=4304,
                num_hidden_layers=26,
                num_attention_heads=16,
                image_size=980,
                patch_size=14,
                vision_use_head=False,
            )
        self.vae_config = dict(FLUX_AUTOENCODER if self.vae_config is None else self.vae_config)
        super().__post_init__(**kwargs)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per VAE latent, along each side."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def latent_token_stride(self) -> int:
        """Pixels per latent token, along each side."""
        return self.vae_scale_factor * self.latent_patch_size

    @property
    def latent_token_dim(self) -> int:
        """Channels of one latent token."""
        return self.latent_patch_size**2 * self.vae_config["latent_channels"]
