"""Configuration of Show-o."""

from __future__ import annotations

import math

from transformers import CLIPVisionConfig, PhiConfig, PreTrainedConfig

from reca_trainer.models.common.configuration import CompositeConfig

# Tokens that Show-o appends to the text tokenizer's vocabulary, in this order; the image tokens follow.
SPECIAL_TOKENS = (
    "[PAD]",
    "<|soi|>",
    "<|eoi|>",
    "<|sov|>",
    "<|eov|>",
    "<|t2i|>",
    "<|mmu|>",
    "<|t2v|>",
    "<|v2v|>",
    "<|lvg|>",
)

# The placeholder in `input_ids` for embeddings or tokens of the condition image.
CONDITION_TOKEN_ID = -100

# The published MAGVIT-v2 (showlab/magvitv2), as arguments of `MagvitV2`. Encoder and decoder differ in layers.
MAGVIT_V2 = {
    "base_channels": 128,
    "latent_channels": 13,
    "encoder_channel_multipliers": [1, 2, 2, 4, 4],
    "encoder_layers_per_block": [4, 3, 4, 3, 4],
    "decoder_channel_multipliers": [1, 1, 2, 2, 4],
    "decoder_layers_per_block": [4, 4, 3, 4, 3],
}


class ShowOConfig(CompositeConfig):
    r"""Configuration of a `ShowOModel`. The defaults are those of `showlab/show-o-w-clip-vit-512x512`.

    Args:
        text_config: a `PhiConfig` whose vocabulary includes Show-o's special tokens, the image tokens and the mask token.
            `qk_layernorm` is on in every Show-o.
        vision_config: a `CLIPVisionConfig`, the understanding encoder of the CLIP variant.
        vq_config: arguments of `MagvitV2`, the tokenizer of generated images, and in the plain variant of condition images.
        w_clip_vit: the CLIP variant, which reads CLIP embeddings; the plain variant reads the tokens of `vq_config`.
        llm_vocab_size: length of the text tokenizer before `SPECIAL_TOKENS` are added.
        num_vq_tokens: image tokens of one generated image, a square.
    """

    model_type = "show_o"
    sub_configs = {"text_config": PhiConfig, "vision_config": CLIPVisionConfig}  # noqa: RUF012

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    vq_config: dict | None = None
    w_clip_vit: bool = True
    llm_vocab_size: int = 50295
    num_vq_tokens: int = 1024
    bos_token_id: int = 50256
    eos_token_id: int = 50256
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.vq_config = dict(MAGVIT_V2 if self.vq_config is None else self.vq_config)
        if self.text_config is None:
            self.text_config = PhiConfig(vocab_size=self.mask_token_id + 1, qk_layernorm=True)
        if not self.w_clip_vit:
            self.vision_config = None
        elif self.vision_config is None:
            self.vision_config = CLIPVisionConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                image_size=336,
                patch_size=14,
            )
        super().__post_init__(**kwargs)
        if self.text_config.vocab_size != self.mask_token_id + 1:
            raise ValueError(
                f"text_config.vocab_size is {self.text_config.vocab_size}, but llm_vocab_size {self.llm_vocab_size} + "
                f"{len(SPECIAL_TOKENS)} special tokens + {self.codebook_size} image tokens + 1 mask token make "
                f"{self.mask_token_id + 1}."
            )
        if math.isqrt(self.num_vq_tokens) ** 2 != self.num_vq_tokens:
            raise ValueError(f"num_vq_tokens is {self.num_vq_tokens}, which is no square.")

    @classmethod
    def tiny(
        cls, vocab_size: int = 512, eos_token_id: int = 0, image_size: int = 32, w_clip_vit: bool = True
    ) -> ShowOConfig:
        """Under a million parameters; an image token covers 4 × 4 pixels.

        Args:
            vocab_size: that of the tokenizer, without Show-o's special tokens.
            eos_token_id: that of the tokenizer.
            image_size: side of the images in pixels, a multiple of 8.
            w_clip_vit: whether it is the CLIP variant.
        """
        vq_config = {
            "base_channels": 32,
            "latent_channels": 8,
            "encoder_channel_multipliers": [1, 1, 1],
            "encoder_layers_per_block": [1, 1, 1],
            "decoder_channel_multipliers": [1, 1, 1],
            "decoder_layers_per_block": [1, 1, 1],
        }
        text_config = PhiConfig(
            vocab_size=vocab_size + len(SPECIAL_TOKENS) + 2 ** vq_config["latent_channels"] + 1,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            qk_layernorm=True,
        )
        vision_config = CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=image_size,
            patch_size=8,
        )
        return cls(
            text_config=text_config,
            vision_config=vision_config,
            vq_config=vq_config,
            w_clip_vit=w_clip_vit,
            llm_vocab_size=vocab_size,
            num_vq_tokens=(image_size // 4) ** 2,
            bos_token_id=eos_token_id,
            eos_token_id=eos_token_id,
        )

    def special_token_id(self, token: str) -> int:
        """Id of one of `SPECIAL_TOKENS`."""
        return self.llm_vocab_size + SPECIAL_TOKENS.index(token)

    @property
    def codebook_size(self) -> int:
        return 2 ** self.vq_config["latent_channels"]

    @property
    def image_token_offset(self) -> int:
        """Id of the first image token."""
        return self.llm_vocab_size + len(SPECIAL_TOKENS)

    @property
    def mask_token_id(self) -> int:
        return self.image_token_offset + self.codebook_size

    @property
    def vq_scale_factor(self) -> int:
        """Pixels per image token, along each side."""
        return 2 ** (len(self.vq_config["encoder_channel_multipliers"]) - 1)

    @property
    def image_size(self) -> int:
        """Side of a generated image in pixels."""
        return math.isqrt(self.num_vq_tokens) * self.vq_scale_factor
