"""The configuration of Janus is transformers' own; here is only the tiny one."""

from __future__ import annotations

from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

# Order of the special tokens after the 256 bytes in the vocabulary of `tiny_processor`.
TINY_SPECIAL_TOKENS = {
    "bos_token": "<|begin▁of▁sentence|>",
    "eos_token": "<|end▁of▁sentence|>",
    "pad_token": "<|▁pad▁|>",
    "image_token": "<image_placeholder>",
    "boi_token": "<begin_of_image>",
    "eoi_token": "<end_of_image>",
}
TINY_TOKEN_IDS = {name: 256 + index for index, name in enumerate(TINY_SPECIAL_TOKENS)}


def tiny_config(image_size: int = 64, hidden_size: int = 128, num_hidden_layers: int = 4) -> JanusConfig:
    """A Janus of about two million parameters, for tests and for the recipe's embedded default.

    Its vocabulary is that of `tiny_processor`. As in the published models one understanding token and one image token
    cover the same patch, here 8x8 pixels.

    Args:
        image_size: side of the square images, a multiple of 8.
        hidden_size: width of the language model, a multiple of 4.
        num_hidden_layers: depth of the language model.
    """
    if image_size % 8 or hidden_size % 4:
        raise ValueError(
            f"image_size must be a multiple of 8 and hidden_size of 4, got {image_size} and {hidden_size}."
        )
    text = LlamaConfig(
        vocab_size=256 + len(TINY_SPECIAL_TOKENS),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=TINY_TOKEN_IDS["bos_token"],
        eos_token_id=TINY_TOKEN_IDS["eos_token"],
        pad_token_id=TINY_TOKEN_IDS["pad_token"],
    )
    vision = JanusVisionConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2.0,
        image_size=image_size,
        patch_size=8,
        num_image_tokens=(image_size // 8) ** 2,
        projection_dim=hidden_size,
    )
    vq = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=256,
        latent_channels=32,
        base_channels=32,
        channel_multiplier=[1, 1, 1, 1],
        num_res_blocks=1,
        projection_dim=hidden_size,
        image_token_embed_dim=hidden_size,
    )
    return JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=vq,
        image_token_id=TINY_TOKEN_IDS["image_token"],
        tie_word_embeddings=False,
    )
