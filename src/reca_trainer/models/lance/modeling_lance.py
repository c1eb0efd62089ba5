"""Lance (arXiv:2605.18678): a mixture of transformers (see `MoTModel`) that understands images with Qwen2.5-VL's vision
transformer and generates them by flow matching in the latents of Wan2.2's autoencoder.

What is unusual about this model:

- Positions are three numbers (frame, row, column; multimodal rotary embeddings). The rows and columns of an image count on
  from the text before it. The frame of an understanding image is 1000, except when a question about it is answered.
- The target of an edit takes the positions of its source if both have the same number of tokens.
- All images and texts are inside a ChatML conversation, whose system prompt says what the task is.
- Only the mean of the autoencoder's posterior is normalised; its noise is added unscaled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLRotaryEmbedding,
)

from reca_trainer.models.common.mot_decoder import MoTLanguageModel
from reca_trainer.models.common.mot_model import Context, MoTModel, Place, PositionTable, TimestepEmbedder, sincos
from reca_trainer.models.common.vision_patches import image_patches
from reca_trainer.models.contract import UnifiedOutput, token_cross_entropy
from reca_trainer.models.lance.configuration_lance import LanceConfig
from reca_trainer.models.lance.generation_lance import LanceGeneration
from reca_trainer.models.lance.processing_lance import (
    CONDITION_RESOLUTION,
    RESOLUTION,
    around_images,
    bounded_size,
    bucket_size,
)


class LanceRotaryEmbedding(Qwen2_5_VLRotaryEmbedding):
    """Rotary embeddings of three positions, each for its sections of the features (arXiv:2409.12191, section 2.1)."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine `[B, T, D]`, in the dtype of `x`, of positions `[3, B, T]`, or `[B, T]` where all three are equal.
        transformers' own forward has other shapes before release 5.19."""
        sections = self.config.rope_parameters["mrope_section"]
        angles = position_ids.expand(3, -1, -1)[..., None].float() * self.inv_freq.float()  # [3, B, T, D / 2]
        angles = torch.cat([part[index % 3] for index, part in enumerate(angles.split(sections, dim=-1))], dim=-1)
        angles = torch.cat([angles, angles], dim=-1)  # [B, T, D]
        return tuple((wave * self.attention_scaling).to(x.dtype) for wave in (angles.cos(), angles.sin()))


class LatentPositions(PositionTable):
    """Fixed 3-D sine-cosine table of the first frame: a third of the channels each for frame, row and column. As in the
    original, columns beyond the side run on into the encodings of the next rows."""

    def compute(self, frames: int = 1) -> torch.Tensor:
        """The table `[frames · side², D]` float32."""
        third = self.dim // 3 // 2 * 2
        sizes = (frames, self.side, self.side)
        axes = [sincos(size, dim) for size, dim in zip(sizes, (third, third, self.dim - 2 * third), strict=True)]
        parts = [
            axis.view(*(-1 if dim == index else 1 for dim in range(3)), axis.shape[1]).expand(*sizes, -1)
            for index, axis in enumerate(axes)
        ]  # [frames, side, side, about D / 3] each
        return torch.cat(parts, dim=-1).flatten(0, 2).float()

    def holds(self, height: int, width: int) -> bool:
        return (height - 1) * self.side + width <= self.side**2


@dataclass
class LanceContext(Context):
    """A context that remembers where the source of an edit is.

    Args:
        source_position_ids: `[3, B, 2 + N]`, of the source's markers and latents; `None` before a source is read.
        has_source: `[B]` bool, the rows that have read a source; `None` where all have.
    """

    source_position_ids: torch.Tensor | None = None
    has_source: torch.Tensor | None = None

    def repeat(self, times: int) -> Context:
        ids, rows = self.source_position_ids, self.has_source
        return replace(
            super().repeat(times),
            source_position_ids=None if ids is None else ids.repeat_interleave(times, 1),
            has_source=None if rows is None else rows.repeat_interleave(times),
        )


class LanceModel(LanceGeneration, MoTModel):
    """Lance, under its published module names."""

    config_class = LanceConfig
    _no_split_modules = ("MoTDecoderLayer", "Qwen2_5_VLVisionBlock")
    # In float32, as in diffusers' pipelines.
    _keep_in_fp32_modules_strict = ("vae.encoder", "vae.decoder", "vae.quant_conv", "vae.post_quant_conv")
    frozen_encoders = ("vit_model", "vae")
    license_note = (
        "The model page of Lance says Apache-2.0. Its vision transformer is that of Qwen2.5-VL-3B, which is under the Qwen "
        "research licence, so what holds for these weights is open to question."
    )

    def __init__(self, config: LanceConfig):
        super().__init__(config)
        hidden_size = config.text_config.hidden_size
        self.vit_model = Qwen2_5_VisionTransformerPretrainedModel._from_config(config.vision_config)
        self.language_model = MoTLanguageModel(config.text_config, LanceRotaryEmbedding(config.text_config))
        self.time_embedder = TimestepEmbedder(hidden_size)
        self.vae2llm = nn.Linear(config.latent_token_dim, hidden_size)
        self.llm2vae = nn.Linear(hidden_size, config.latent_token_dim)
        self.latent_pos_embed = LatentPositions(config.max_latent_size, hidden_size)
        self.vae = AutoencoderKLWan(**config.vae_config)
        self.post_init()

    # --- losses ---

    def _reconstruct(
        self,
        corruption: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        image_position: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        condition_pixel_values: torch.Tensor | list[torch.Tensor] | None = None,
        latents: torch.Tensor | None = None,
        posterior: torch.Tensor | None = None,
        condition_embeds: torch.Tensor | None = None,
        condition_grid: torch.Tensor | None = None,
        condition_attention_mask: torch.Tensor | None = None,
    ) -> UnifiedOutput:
        """RecA: read the image's own embeddings and the instruction, then denoise the same image.

        Args:
            input_ids: `[B, T]`, the conversation up to the target, without images.
            image_position: `[B]` int64, how many of its tokens come before the image; the same in all rows.
            attention_mask: `[B, T]`, 0 at padding, which is on the right.
            latents, posterior: alternatives to `pixel_values`, see `_target_latents`.
            condition_embeds, condition_grid, condition_attention_mask: results of `encode_batch`, an alternative to
                `condition_pixel_values`.
        """
        latents = self._target_latents(corruption, pixel_values, latents, posterior)  # [B, C, h, w]
        if condition_embeds is None:
            condition_embeds = self.encode_condition(condition_pixel_values)  # [B, S, D]
            condition_grid = self.grids_of(condition_pixel_values)  # [B, 2]
        before, behind, mask = around_images(input_ids, image_position, attention_mask)
        context = self.read_text(self.new_context(len(input_ids)), before)
        if condition_attention_mask is None:
            condition_attention_mask = padding_of(condition_embeds, condition_grid)
        kept = self._drop_condition(corruption, condition_embeds, condition_attention_mask)
        context = self.read_image(context, condition_embeds, condition_grid, kept)
        context = self.read_text(context, behind, mask)
        return self._flow_matching(context, latents, corruption, understanding_embeds=condition_embeds)

    def _generate(
        self,
        corruption: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        posterior: torch.Tensor | None = None,
    ) -> UnifiedOutput:
        """Text-to-image: read the caption, then denoise the image. The arguments are as in `_reconstruct`."""
        latents = self._target_latents(corruption, pixel_values, latents, posterior)  # [B, C, h, w]
        context = self.read_text(self.new_context(len(latents)), input_ids, attention_mask)
        return self._flow_matching(context, latents, corruption)

    def _edit(
        self,
        corruption: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        image_position: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        source_pixel_values: torch.Tensor | None = None,
        condition_pixel_values: torch.Tensor | list[torch.Tensor] | None = None,
        source_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        posterior: torch.Tensor | None = None,
    ) -> UnifiedOutput:
        """Editing: read the source as image embeddings and as latents, read the instruction, then denoise the target.

        Args:
            source_pixel_values, condition_pixel_values: the source as the VAE and as the encoder take it; without them it
                is dropped.
            source_mask: `[B]` bool, the rows whose source is read, as both; `None` for all. A dropped source takes no
                position.
            input_ids, image_position, attention_mask, latents, posterior: as in `_reconstruct`.
        """
        latents, embeds = self._target_latents(corruption, pixel_values, latents, posterior), None  # [B, C, h, w]
        before, behind, mask = around_images(input_ids, image_position, attention_mask)
        context = self.read_text(self.new_context(len(input_ids)), before)
        position = context.position
        is_dropped = source_mask is not None and not bool(source_mask.any())
        if condition_pixel_values is not None and not is_dropped:
            embeds = self.encode_condition(condition_pixel_values)  # [B, S, D]
            context = self.read_image(context, embeds, self.grids_of(condition_pixel_values), present=source_mask)
        if source_pixel_values is not None and not is_dropped:
            source = self.encode_target(source_pixel_values, corruption["source_posterior_noise"])  # [B, C, h', w']
            context = self.read_latents(context, source, source_mask)
        if source_mask is not None:
            context = replace(context, position=torch.where(source_mask, context.position, position))
        context = self.read_text(context, behind, mask)
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
            image_position: `[B]` int64, how many tokens come before the image, -1 where the conversation shows none.
        """
        text, embeds = self.embed(input_ids), None  # [B, T, D]
        if condition_pixel_values is not None:
            embeds = self.encode_condition(condition_pixel_values)  # [B, S, D]
            grids = self.grids_of(condition_pixel_values)  # [B, 2]
            place = image_place(image_position.clamp(min=0), grids, self.config.vit_frame)
            mask = padding_of(embeds, grids)  # [B, S]
            hidden = self._read_around(embeds, mask, text, attention_mask, image_position, place)  # [B, T, D]
        else:
            hidden, _, _ = self._read(self.new_context(len(text)), text, causal=True, mask=attention_mask, keep=False)
        hidden = self.language_model.model.norm(hidden[:, :-1])
        return token_cross_entropy(self.output_logits, hidden, labels[:, 1:], embeds)

    # --- encodings ---

    def _encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches, grid = image_patches(pixel_values, self.config.vision_config)  # [B · patches, …], [B, 3]
        embeds = self.vit_model(patches.to(self.vit_model.dtype), grid_thw=grid).pooler_output  # [B · S, D]
        return embeds.view(len(pixel_values), -1, embeds.shape[-1])

    def grids_of(self, condition_pixel_values: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        """Rows and columns of each image's embeddings: `[B, 2]` int64."""
        stride = self.config.understanding_stride
        sizes = [[side // stride for side in image.shape[-2:]] for image in condition_pixel_values]
        return torch.tensor(sizes, device=self.device)

    @torch.no_grad()
    def encode_posterior(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See `MoTModel.encode_posterior`: the mean is normalised, the standard deviation is not."""
        posterior = self.vae.encode(pixel_values.to(self.vae.dtype)[:, :, None]).latent_dist
        mean, log_variance = posterior.parameters[:, :, 0].chunk(2, dim=1)  # [B, C, h, w] both; not clamped
        shift, scale = self._latent_statistics(mean)
        return torch.stack([(mean - shift) / scale, (0.5 * log_variance).exp()], dim=1)

    def sample_latents(self, posterior: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """See `MoTModel.sample_latents`."""
        mean, std = posterior.unbind(1)  # [B, C, h, w] both
        return (mean + std * noise.to(mean)).to(self.vae2llm.weight.dtype)

    @torch.no_grad()
    def decode_target(self, target: torch.Tensor) -> torch.Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] of latents `[B, C, h, w]`."""
        latents = target.to(self.vae.dtype)
        shift, scale = self._latent_statistics(latents)
        return self.vae.decode((latents * scale + shift)[:, :, None]).sample[:, :, 0]

    def _latent_statistics(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the VAE's latents by channel, `[C, 1, 1]`."""
        names = ("latents_mean", "latents_std")
        shift, scale = (latents.new_tensor(self.config.vae_config[name])[:, None, None] for name in names)
        return shift, scale

    @torch.no_grad()
    def encode_batch(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """See `UnifiedModel.encode_batch`: `condition_embeds` `[B, S, D]`, their `condition_grid` `[B, 2]`, and the VAE's
        `posterior` `[B, 2, C, h, w]`."""
        images = batch["condition_pixel_values"]
        return {
            "condition_embeds": self.encode_condition(images),
            "condition_grid": self.grids_of(images),
            "posterior": self.encode_posterior(batch["pixel_values"]),
        }

    # --- the language model ---

    def output_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.language_model.lm_head(hidden)[..., : self.config.tokenizer_length]

    def new_context(self, batch_size: int) -> LanceContext:
        return LanceContext(None, torch.zeros(batch_size, dtype=torch.long, device=self.device))

    def read_image(
        self,
        context: Context,
        embeds: torch.Tensor,
        grids: torch.Tensor,
        mask: torch.Tensor | None = None,
        in_own_frame: bool = True,
        present: torch.Tensor | None = None,
    ) -> Context:
        """Read understanding embeddings `[B, S, D]` of images with `grids` `[B, 2]` of rows and columns.

        Args:
            mask: `[B, S]`, 0 at padding; by default from the grids.
            in_own_frame: whether the image's frame is `config.vit_frame`, or that of the text before it.
            present: `[B]` bool, the rows that read the image; by default all.
        """
        place = image_place(context.position, grids, self.config.vit_frame if in_own_frame else None)
        mask = padding_of(embeds, grids) if mask is None else mask  # [B, S]
        return self._read_condition(context, embeds, mask, place, present)

    def read_latents(self, context: Context, latents: torch.Tensor, present: torch.Tensor | None = None) -> Context:
        position_ids, _ = self._latent_place(context, latents.shape[-2:])
        read = super().read_latents(context, latents, present)
        return replace(read, source_position_ids=position_ids, has_source=present)

    def _latent_place(self, context: Context, grid: tuple[int, int]) -> Place:
        """See `MoTModel._latent_place`. Behind a source with the same number of tokens the positions are the source's."""
        grids = torch.tensor([grid], device=self.device).expand(len(context.position), -1)
        position_ids, following = image_place(context.position, grids)  # [3, B, 2 + N], [B]
        source = context.source_position_ids
        if source is not None and source.shape == position_ids.shape:
            rows = context.has_source
            position_ids = source if rows is None else torch.where(rows[:, None], source, position_ids)
        return position_ids, following

    # --- draws and counts ---

    def example_batch(
        self,
        batch_size: int,
        max_image_size: int | None = None,
        min_image_size: int | None = None,
        text_length: int = 32,
    ) -> dict[str, Any]:
        """See `UnifiedModel.example_batch`; the condition is at the processor's default resolution."""
        stride, patch = self.config.latent_token_stride, self.config.understanding_stride
        resolution = min(RESOLUTION, self.config.max_latent_size * stride)
        height, width = bounded_size(1, 1, resolution, stride, max_image_size, min_image_size)
        side = bucket_size(1, 1, CONDITION_RESOLUTION, stride)[0] // patch * patch
        return {
            "task": "reconstruct",
            "condition_pixel_values": torch.zeros(batch_size, 3, side, side),
            "pixel_values": torch.zeros(batch_size, 3, height, width),
            "input_ids": torch.zeros(batch_size, text_length, dtype=torch.long),
            "image_position": torch.full((batch_size,), text_length // 2),
        }


def image_place(position: torch.Tensor, grids: torch.Tensor, frame: int | None = None) -> Place:
    """Positions of images between their two markers; the markers come first in the sequence.

    All three numbers of the start marker are the next `position` `[B]`. The tokens count rows and columns from there, and
    the end marker follows on the larger of both.

    Args:
        grids: rows and columns of each image, `[B, 2]`; smaller images are padded to the most tokens.
        frame: the frame of the image, instead of `position`.

    Returns:
        Position ids `[3, B, 2 + S]`, and the next position `[B]`.
    """
    start, columns = position[:, None], grids[:, 1:]  # [B, 1] both
    end = start + 1 + grids.amax(dim=1, keepdim=True)  # [B, 1]
    order = torch.arange(int(grids.prod(dim=1).max()), device=grids.device)  # [S]
    tokens = start + 1 + torch.stack([0 * order // columns, order // columns, order % columns])  # [3, B, S]
    position_ids = torch.cat([torch.cat([start, end], dim=1).expand(3, -1, -1), tokens], dim=2)  # [3, B, 2 + S]
    if frame is not None:
        frames = position_ids[:1] + (frame - start)  # [1, B, 2 + S]
        position_ids = torch.cat([frames, position_ids[1:]])
    return position_ids, end[:, 0] + 1


def padding_of(embeds: torch.Tensor, grids: torch.Tensor) -> torch.Tensor | None:
    """The mask `[B, S]` bool of embeddings `[B, S, D]` of images with `grids` `[B, 2]`; `None` where nothing is padded."""
    mask = torch.arange(embeds.shape[1], device=grids.device) < grids.prod(dim=1)[:, None]  # [B, S]
    return None if bool(mask.all()) else mask
