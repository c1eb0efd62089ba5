"""BAGEL: one decoder with two experts, a SigLIP encoder to understand images and a flow in VAE latents to generate them.

What is unusual about this model:

- It is a mixture of transformers, see `MoTModel`: hard routing, splits, one attention.
- All tokens of an image and its markers have one position. Only text positions count up.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.activations import ACT2FN
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from reca_trainer.models.bagel.configuration_bagel import BagelConfig
from reca_trainer.models.bagel.generation_bagel import BagelGeneration
from reca_trainer.models.bagel.processing_bagel import bounded_rule, resized_size
from reca_trainer.models.common.latents import patchify
from reca_trainer.models.common.mot_decoder import MoTLanguageModel
from reca_trainer.models.common.mot_model import Context, MoTModel, PositionTable, TimestepEmbedder, sincos
from reca_trainer.models.contract import UnifiedOutput, token_cross_entropy


class SinCosPositions(PositionTable):
    """Fixed 2-D sine-cosine table; the first half of the channels encodes the column, the second the row."""

    def compute(self) -> torch.Tensor:
        axis = sincos(self.side, self.dim // 2)  # [side, D/2]
        columns = axis[None, :].expand(self.side, -1, -1)  # [side, side, D/2], like `rows`
        rows = axis[:, None].expand(-1, self.side, -1)
        return torch.cat([columns, rows], dim=-1).reshape(self.side**2, self.dim).float()


class BagelVisionEmbeddings(nn.Module):
    """Patches with positions from the corner of a square table: `[B, 3, h, w]` -> `[B, S, D_vit]`."""

    def __init__(self, config):
        super().__init__()
        self.patch_size, self.side = config.patch_size, config.image_size // config.patch_size
        self.patch_embedding = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding(self.side**2, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches, (height, width) = patchify(pixel_values, self.patch_size)  # [B, S, 3p²]
        positions = torch.arange(self.side**2, device=patches.device).view(self.side, self.side)
        positions = positions[:height, :width].reshape(-1)  # [S]
        return self.patch_embedding(patches.to(self.patch_embedding.weight.dtype)) + self.position_embedding(positions)


class BagelVisionTransformer(nn.Module):
    """SigLIP without pooling head, its patch embedding a linear layer: `[B, 3, h, w]` -> `[B, S, D_vit]`."""

    def __init__(self, config):
        super().__init__()
        self.embeddings = BagelVisionEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(inputs_embeds=self.embeddings(pixel_values)).last_hidden_state
        return self.post_layernorm(hidden)


class BagelVisionModel(nn.Module):
    """The level that SigLIP's published module names have above the transformer."""

    def __init__(self, config):
        super().__init__()
        self.vision_model = BagelVisionTransformer(config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.vision_model(pixel_values)


class BagelConnector(nn.Module):
    """Image embeddings into the language model's space: `[B, S, D_vit]` -> `[B, S, D]`."""

    def __init__(self, config: BagelConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.activation_fn = ACT2FN[config.connector_act]
        self.fc2 = nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden)))


class BagelModel(BagelGeneration, MoTModel):
    """BAGEL, under its published module names."""

    config_class = BagelConfig
    _no_split_modules = ("MoTDecoderLayer", "SiglipEncoderLayer")
    _keep_in_fp32_modules_strict = ("vae.encoder", "vae.decoder")  # published in float32, and small
    image_encoders = ("vit_model", "connector")
    frozen_encoders = (*image_encoders, "vae")

    def __init__(self, config: BagelConfig):
        super().__init__(config)
        config.vision_config._attn_implementation = "sdpa"  # chosen here because no whole SigLIP model does it
        hidden_size = config.text_config.hidden_size
        self.vit_model = BagelVisionModel(config.vision_config)
        self.connector = BagelConnector(config)
        self.vit_pos_embed = SinCosPositions(config.vit_max_num_patch_per_side, hidden_size)
        self.language_model = MoTLanguageModel(config.text_config, Qwen2RotaryEmbedding(config.text_config))
        self.time_embedder = TimestepEmbedder(hidden_size)
        self.vae2llm = nn.Linear(config.latent_token_dim, hidden_size)
        self.llm2vae = nn.Linear(hidden_size, config.latent_token_dim)
        self.latent_pos_embed = SinCosPositions(config.max_latent_size, hidden_size)
        self.vae = build_autoencoder(config.vae_config)
        self.post_init()

    # --- losses ---

    def _reconstruct(
        self,
        corruption: dict[str, torch.Tensor],
        pixel_values: torch.Tensor | None = None,
        condition_pixel_values: torch.Tensor | list[torch.Tensor] | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        posterior: torch.Tensor | None = None,
        condition_embeds: torch.Tensor | None = None,
        condition_attention_mask: torch.Tensor | None = None,
        source_pixel_values: torch.Tensor | None = None,
    ) -> UnifiedOutput:
        """RecA: read the image's own embeddings and the instruction, then denoise the same image.

        Args:
            input_ids: the instructions `[B, T]`, or one for all `[1, T]`; `None` leaves them out.
            attention_mask: `[B, T]`, 0 at padding; a row of zeros leaves its instruction out.
            latents, posterior: alternatives to `pixel_values`, see `_target_latents`.
            condition_embeds, condition_attention_mask: results of `encode_batch`, an alternative to
                `condition_pixel_values`; they are then the output's `understanding_embeds`.
            source_pixel_values: `[B, 3, H, W]`, the image to read as VAE latents, an alternative to embeddings.
        """
        latents = self._target_latents(corruption, pixel_values, latents, posterior)  # [B, C, h, w]
        understanding_embeds, context = condition_embeds, self.new_context(len(latents))
        if source_pixel_values is not None:
            if "condition_seeds" in corruption:
                raise ValueError("condition_token_dropout is about embeddings, and this condition is VAE latents.")
            source = self.encode_target(source_pixel_values, corruption["source_posterior_noise"])  # [B, C, h, w]
            context = self.read_latents(context, source)
        else:
            if condition_embeds is None:
                understanding_embeds = self.encode_condition(condition_pixel_values)  # [B, S, D]
                condition_embeds, condition_attention_mask = self._place(understanding_embeds, condition_pixel_values)
            mask = self._drop_condition(corruption, condition_embeds, condition_attention_mask)
            context = self._read_condition(context, condition_embeds, mask)
        if input_ids is not None:
            context = self.read_text(context, input_ids.expand(len(latents), -1), attention_mask)
        return self._flow_matching(context, latents, corruption, understanding_embeds=understanding_embeds)

    def _generate(
        self,
        corruption: dict[str, torch.Tensor],
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        posterior: torch.Tensor | None = None,
    ) -> UnifiedOutput:
        """Text-to-image: read the caption, then denoise the image. The arguments are as in `_reconstruct`."""
        latents = self._target_latents(corruption, pixel_values, latents, posterior)  # [B, C, h, w]
        context = self.new_context(len(latents))
        if input_ids is not None:
            context = self.read_text(context, input_ids, attention_mask)
        return self._flow_matching(context, latents, corruption)

    def _edit(
        self,
        corruption: dict[str, torch.Tensor],
        source_pixel_values: torch.Tensor,
        condition_pixel_values: torch.Tensor | list[torch.Tensor],
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        source_mask: torch.Tensor | None = None,
        condition_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        posterior: torch.Tensor | None = None,
    ) -> UnifiedOutput:
        """Editing: read the source as VAE latents and as image embeddings, read the instruction, then denoise the target.

        Args:
            source_mask, condition_mask: `[B]` bool, the rows whose source is read as latents and as embeddings; `None`
                for all. A dropped source still takes its position.
            input_ids, attention_mask, latents, posterior: as in `_reconstruct`.
        """
        latents, embeds = self._target_latents(corruption, pixel_values, latents, posterior), None  # [B, C, h, w]
        context = self.new_context(len(latents))
        if source_mask is None or bool(source_mask.any()):
            source = self.encode_target(source_pixel_values, corruption["source_posterior_noise"])  # [B, C, h', w']
            context = self.read_latents(context, source, source_mask)
        else:
            context = self.skip(context)
        if condition_mask is None or bool(condition_mask.any()):
            embeds = self.encode_condition(condition_pixel_values)  # [B, S, D]
            placed, mask = self._place(embeds, condition_pixel_values)
            context = self._read_condition(context, placed, mask, present=condition_mask)
        else:
            context = self.skip(context)
        if input_ids is not None:
            context = self.read_text(context, input_ids, attention_mask)
        return self._flow_matching(context, latents, corruption, understanding_embeds=embeds)

    def _caption(
        self,
        corruption: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        condition_pixel_values: torch.Tensor | list[torch.Tensor] | None = None,
        image_position: torch.Tensor | None = None,
    ) -> UnifiedOutput:
        """Image-to-text, or text alone: next-token cross-entropy over the supervised tokens of a conversation.

        Args:
            condition_pixel_values: `None` where no conversation shows an image.
            image_position: `[B]` int64, how many tokens come before the image, -1 where the conversation shows none;
                `None` where all images come first.
        """
        text = self.embed(input_ids)  # [B, T, D]
        embeds, image = None, None
        if condition_pixel_values is not None:
            embeds = self.encode_condition(condition_pixel_values)  # [B, S, D]
            image, image_mask = self._place(embeds, condition_pixel_values)  # [B, S, D], [B, S]
        if image is not None and image_position is not None:
            hidden = self._read_around(image, image_mask, text, attention_mask, image_position)
        else:
            context = self.new_context(len(text))
            if image is not None:
                context = self._read_condition(context, image, image_mask)
            hidden, _, _ = self._read(context, text, causal=True, mask=attention_mask, keep=False)  # [B, T, D]
        hidden = self.language_model.model.norm(hidden[:, :-1])
        return token_cross_entropy(self.output_logits, hidden, labels[:, 1:], embeds)

    # --- encodings ---

    def _encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.connector(self.vit_model(pixel_values))

    @torch.no_grad()
    def encode_posterior(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See `MoTModel.encode_posterior`."""
        posterior = self.vae.encode(pixel_values.to(self.vae.dtype)).latent_dist
        return torch.stack([posterior.mean, posterior.std], dim=1)

    def sample_latents(self, posterior: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """See `MoTModel.sample_latents`: shifted and scaled."""
        mean, std = posterior.unbind(1)  # [B, C, h, w] both
        sample = mean + std * noise.to(mean)
        scaled = self.vae.config.scaling_factor * (sample - self.vae.config.shift_factor)
        return scaled.to(self.vae2llm.weight.dtype)

    @torch.no_grad()
    def decode_target(self, target: torch.Tensor) -> torch.Tensor:
        """Images `[B, 3, H, W]`, about [-1, 1], of latents `[B, C, h, w]`."""
        latents = target.to(self.vae.dtype) / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return self.vae.decode(latents).sample

    @torch.no_grad()
    def encode_batch(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """See `UnifiedModel.encode_batch`: `condition_embeds` `[B, S, D]` with positions, the VAE's `posterior`
        `[B, 2, C, h, w]`, and `condition_attention_mask` `[B, S]` if embeddings are padded."""
        if "source_pixel_values" in batch:
            raise ValueError("cache_latents keeps understanding embeddings, and this condition is VAE latents.")
        images = batch["condition_pixel_values"]
        condition_embeds, mask = self._place(self.encode_condition(images), images)
        encoded = {"condition_embeds": condition_embeds, "posterior": self.encode_posterior(batch["pixel_values"])}
        return encoded if mask is None else {**encoded, "condition_attention_mask": mask}

    # --- the language model ---

    def _place(
        self, embeds: torch.Tensor, condition_pixel_values: torch.Tensor | list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The embeddings `[B, S, D]` of images with their positions added, and their mask `[B, S]` bool, false at padding;
        `None` where nothing is padded."""
        patch = self.config.vision_config.patch_size

        def table(image: torch.Tensor) -> torch.Tensor:  # [S, D]
            height, width = image.shape[-2:]
            return self.vit_pos_embed(height // patch, width // patch)

        if torch.is_tensor(condition_pixel_values):
            return embeds + table(condition_pixel_values).to(embeds), None
        tables = [table(image) for image in condition_pixel_values]
        lengths = torch.tensor([len(positions) for positions in tables])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]  # [B, S]
        positions = pad_sequence(tables, batch_first=True).to(embeds)  # [B, S, D]
        return embeds + positions, None if mask.all() else mask.to(embeds.device)

    def read_image(self, context: Context, embeds: torch.Tensor, size: tuple[int, int]) -> Context:
        """Read understanding embeddings `[B, S, D]` of an image of `size` pixels `(height, width)`."""
        patch = self.config.vision_config.patch_size
        positions = self.vit_pos_embed(size[0] // patch, size[1] // patch).to(embeds)
        return self._read_condition(context, embeds + positions)

    def skip(self, context: Context) -> Context:
        """The context as if behind an image: a dropped image still takes its position."""
        return Context(context.past, context.position + 1, context.mask)

    # --- draws and counts ---

    def example_batch(
        self,
        batch_size: int,
        max_image_size: int | None = None,
        min_image_size: int | None = None,
        text_length: int = 32,
    ) -> dict[str, Any]:
        """See `UnifiedModel.example_batch`; the condition is of 224 pixels."""
        stride, understanding = self.config.latent_token_stride, self.config.vision_config
        longest = self.config.max_latent_size * stride if max_image_size is None else max_image_size
        width, height = resized_size(longest, longest, *bounded_rule((longest, 512, stride), longest, min_image_size))
        condition = min(224, understanding.image_size // understanding.patch_size * understanding.patch_size)
        return {
            "task": "reconstruct",
            "condition_pixel_values": torch.zeros(batch_size, 3, condition, condition),
            "pixel_values": torch.zeros(batch_size, 3, height, width),
            "input_ids": torch.zeros(batch_size, text_length, dtype=torch.long),
        }


def build_autoencoder(vae_config: dict[str, Any]) -> AutoencoderKL:
    """diffusers' `AutoencoderKL`, whose first convolution may be narrower than its first block, as in FLUX' code."""
    vae_config = dict(vae_config)
    first = vae_config.pop("conv_in_channels", None)
    vae = AutoencoderKL(**vae_config)
    width, groups = vae_config["block_out_channels"][0], vae_config.get("norm_num_groups", 32)
    if first is not None and first != width:
        vae.encoder.conv_in = nn.Conv2d(vae_config.get("in_channels", 3), first, 3, padding=1)
        vae.encoder.down_blocks[0].resnets[0] = ResnetBlock2D(
            in_channels=first, out_channels=width, temb_channels=None, groups=groups, eps=1e-6
        )
    return vae
