"""The configuration of Janus: transformers' own, and a tiny one."""

from __future__ import annotations

import transformers
from transformers import JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

# The last ids of a tiny vocabulary, in this order.
TINY_SPECIAL_TOKENS = {
    "bos_token": "<|begin▁of▁sentence|>",
    "eos_token": "<|end▁of▁sentence|>",
    "pad_token": "<|▁pad▁|>",
    "image_token": "<image_placeholder>",
    "boi_token": "<begin_of_image>",
    "eoi_token": "<end_of_image>",
}


class JanusConfig(transformers.JanusConfig):
    """transformers' `JanusConfig`, with no field added."""

    @classmethod
    def tiny(cls, vocab_size: int = 262, image_size: int = 32, patch_size: int = 4) -> JanusConfig:
        """A Janus of about one and a half million parameters, for tests and for the recipe's embedded default.

        Args:
            vocab_size: that of the tokenizer given to `JanusProcessor.tiny`, plus six special tokens that come last. The
                default is that of its default tokenizer of single bytes.
            image_size: side of the images in pixels, a multiple of `patch_size`.
            patch_size: pixels along each side of an understanding embedding and of an image token, which are of one size as in
                the published models; a power of 2.

        Raises:
            ValueError: `image_size` is no multiple of `patch_size`.
        """
        if image_size % patch_size:
            raise ValueError(f"image_size must be a multiple of {patch_size}, got {image_size}.")
        hidden_size, tokens = 128, (image_size // patch_size) ** 2
        ids = {name: vocab_size - len(TINY_SPECIAL_TOKENS) + i for i, name in enumerate(TINY_SPECIAL_TOKENS)}
        text = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=max(1024, 4 * tokens),
            bos_token_id=ids["bos_token"],
            eos_token_id=ids["eos_token"],
            pad_token_id=ids["pad_token"],
        )
        vision = JanusVisionConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            mlp_ratio=2.0,
            image_size=image_size,
            patch_size=patch_size,
            num_image_tokens=tokens,
            projection_dim=hidden_size,
        )
        vq = JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=512,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1] * patch_size.bit_length(),
            num_res_blocks=1,
            projection_dim=hidden_size,
            image_token_embed_dim=hidden_size,
        )
        return cls(
            text_config=text,
            vision_config=vision,
            vq_config=vq,
            image_token_id=ids["image_token"],
            tie_word_embeddings=False,
        )
