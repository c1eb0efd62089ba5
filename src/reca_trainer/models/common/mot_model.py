"""A unified model around a mixture of transformers (arXiv:2411.04996), as BAGEL (arXiv:2505.14683) introduced it:

- Hard routing: text tokens, understanding-image tokens and the two markers around every image go through the
  understanding expert; only latent tokens go through the generation expert. All of them share one attention.
- A sequence is read split by split (a text, an image). A split attends to the keys and values of those before it, so a
  frozen context is computed once without gradients and needs no attention mask.
- Where understanding is frozen, no gradient passes through its tokens, not even the markers around the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import initialization as init

from reca_trainer.models.common.condition_dropout import drop_condition
from reca_trainer.models.common.flow_matching import flow_loss, interpolate, shift_timesteps
from reca_trainer.models.common.latents import patchify
from reca_trainer.models.common.mot_decoder import GENERATION
from reca_trainer.models.common.token_sampling import draw_tokens
from reca_trainer.models.contract import Generators, UnifiedModel, UnifiedOutput, count_answer_tokens, per_sample


def sincos(count: int, dim: int) -> torch.Tensor:
    """Sine-cosine encodings of the numbers below `count`: `[count, dim]` float64, sines first."""
    frequencies = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = torch.arange(count, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class PositionTable(nn.Module):
    """Fixed encodings of the places in a square grid; a family computes them.

    Args:
        side: tokens along a side of the grid.
        dim: channels of an encoding.
    """

    def __init__(self, side: int, dim: int):
        super().__init__()
        self.side, self.dim = side, dim
        self.table = nn.Buffer(self.compute(), persistent=False)  # [side², D]

    def compute(self) -> torch.Tensor:
        """The table `[side², dim]` float32, row by row."""
        raise NotImplementedError

    def holds(self, height: int, width: int) -> bool:
        """Whether there is an encoding for every place of a `height × width` grid."""
        return max(height, width) <= self.side

    def forward(self, height: int, width: int) -> torch.Tensor:
        """Encodings `[height · width, D]` of a grid in the table's top-left corner.

        Raises:
            ValueError: the table is too small.
        """
        if not self.holds(height, width):
            raise ValueError(
                f"A grid of {height} × {width} tokens exceeds the position table of side {self.side}; "
                "use a smaller image."
            )
        rows, columns = (torch.arange(size, device=self.table.device) for size in (height, width))
        return self.table[(rows[:, None] * self.side + columns).flatten()]


class TimestepEmbedder(nn.Module):
    """Timesteps in [0, 1], used as they are (not times 1000): `[B]` -> `[B, D]`."""

    frequency_dim = 256

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(self.frequency_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        half = self.frequency_dim // 2
        exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
        angles = timesteps.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)  # [B, 128]
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)  # [B, 256]
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


@dataclass
class Context:
    """What the language model has read so far.

    Args:
        past: keys and values of every layer, each `[B, kv_heads, S, head_dim]`; `None` before the first split.
        position: `[B]` int64, the next position id.
        mask: `[B, S]` bool, `False` at padding; `None` where nothing is padded.
    """

    past: list[tuple[torch.Tensor, torch.Tensor]] | None
    position: torch.Tensor
    mask: torch.Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.past is None else self.past[0][0].shape[2]

    def repeat(self, times: int) -> Context:
        """The context `[B · times, ...]` with the copies of a sample in a row."""
        past = self.past and [tuple(t.repeat_interleave(times, 0) for t in layer) for layer in self.past]
        mask = None if self.mask is None else self.mask.repeat_interleave(times, 0)
        return replace(self, past=past, position=self.position.repeat_interleave(times, 0), mask=mask)


# Position ids of a split, `[B, T]`, or `[3, B, T]` where a position is three numbers, and the next position `[B]`.
Place = tuple[torch.Tensor, torch.Tensor]


class MoTModel(UnifiedModel):
    """A family builds `vit_model`, `language_model` (a `MoTLanguageModel`), `time_embedder`, `vae2llm`, `llm2vae`,
    `latent_pos_embed` and `vae`, encodes images for understanding and generation, and gives them positions.

    Attributes:
        image_encoders: names of the submodules that make understanding embeddings.
    """

    base_model_prefix = ""
    tasks = ("reconstruct", "caption", "generate", "edit")
    shares_weights = False
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    lora_target_modules = (
        r"language_model\.model\.layers\.\d+\.(self_attn\.[qkvo]_proj_moe_gen|mlp_moe_gen\.(gate|up|down)_proj)"
    )
    image_tasks = ("generate", "reconstruct", "edit")
    quantized_modules = r"language_model\.model\.layers\.\d+\..*"  # both experts
    supports_timesteps_per_image = True
    supports_condition_token_dropout = True
    image_encoders: tuple[str, ...] = ("vit_model",)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, PositionTable):
            init.copy_(module.table, module.compute())
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.model.embed_tokens

    @property
    def generation_modules(self) -> list[str]:
        names = [name for name, _ in self.language_model.named_modules() if name.endswith(GENERATION)]
        return [f"language_model.{name}" for name in names] + ["time_embedder", "vae2llm", "llm2vae"]

    @property
    def understanding_modules(self) -> list[str]:
        twins = {name.removesuffix(GENERATION) for name in self.generation_modules if name.endswith(GENERATION)}
        head = ["language_model.lm_head", "language_model.model.embed_tokens"]
        return [*self.image_encoders, *head, *sorted(twins)]

    @property
    def frozen_modules(self) -> list[str]:
        return ["vae"]

    @property
    def image_sides(self) -> range:
        stride = self.config.latent_token_stride
        return range(stride, self.config.max_latent_size * stride + 1, stride)

    @property
    def understanding_is_frozen(self) -> bool:
        modules = (self.get_submodule(name) for name in self.understanding_modules)
        return not any(parameter.requires_grad for module in modules for parameter in module.parameters())

    # --- what a family provides ---

    def _encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Understanding embeddings `[B, S, D]` of images of one size, `[B, 3, h, w]`."""
        raise NotImplementedError

    def encode_posterior(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Mean and standard deviation of the VAE's latents: `[B, 3, H, W]` -> `[B, 2, C, h, w]`."""
        raise NotImplementedError

    def sample_latents(self, posterior: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A sample of the posterior `[B, 2, C, h, w]`, scaled for the language model: `[B, C, h, w]` in the model's dtype."""
        raise NotImplementedError

    def _latent_place(self, context: Context, grid: tuple[int, int]) -> Place | None:
        """Positions of an image's markers and latents, in this order, behind `context`; `None` where all of them have one
        position."""
        return None

    # --- losses ---

    def _target_latents(
        self,
        corruption: dict[str, torch.Tensor],
        pixel_values: torch.Tensor | None,
        latents: torch.Tensor | None,
        posterior: torch.Tensor | None,
    ) -> torch.Tensor:
        """The scaled latents `[B, C, h, w]` of a batch's targets, from its `latents`, else from the VAE's `posterior`
        `[B, 2, C, h, w]`, else from its `pixel_values`."""
        if latents is not None:
            return latents
        if posterior is None:
            posterior = self.encode_posterior(pixel_values)
        return self.sample_latents(posterior, corruption["posterior_noise"])

    def _drop_condition(
        self, corruption: dict[str, torch.Tensor], embeds: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The mask `[B, S]` of a condition `[B, S, D]`, 0 also at embeddings that the draws drop; positions stay the same."""
        places = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device) if mask is None else mask.bool()
        return drop_condition(corruption, mask, places)

    def _flow_matching(self, context, latents, corruption, understanding_embeds=None) -> UnifiedOutput:
        """Rectified flow loss of latents `[B, C, h, w]`, with K timesteps an image, all behind that image's `context`."""
        clean, grid = patchify(latents, self.config.latent_patch_size)  # [B, N, p²C]
        noise = corruption["noise"].to(clean)  # [B · K, N, p²C]
        timesteps = corruption["timesteps"].to(clean.device)  # [B · K]
        if (repeats := len(timesteps) // len(clean)) > 1:
            context, clean = context.repeat(repeats), clean.repeat_interleave(repeats, 0)
        noisy = interpolate(clean, noise, timesteps)  # [B · K, N, p²C]
        prediction = self.velocity(context, noisy, timesteps, grid)  # [B · K, N, p²C]
        return flow_loss(prediction, noise - clean, repeats, understanding_embeds)

    # --- encodings ---

    def encode_condition(self, condition_pixel_values: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        """Understanding embeddings `[B, S, D]`, RecA's dense prompt, before positions are added. Images are `[B, 3, h, w]`,
        or a list of `[3, h, w]`; rows with fewer embeddings are padded with zeros."""
        encoders = [self.get_submodule(name) for name in self.image_encoders]
        frozen = not any(parameter.requires_grad for encoder in encoders for parameter in encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            if torch.is_tensor(condition_pixel_values):
                return self._encode_images(condition_pixel_values)
            by_size: dict[torch.Size, list[int]] = {}
            for index, image in enumerate(condition_pixel_values):
                by_size.setdefault(image.shape, []).append(index)
            embeds: dict[int, torch.Tensor] = {}
            for indices in by_size.values():
                images = torch.stack([condition_pixel_values[index] for index in indices])
                embeds.update(zip(indices, self._encode_images(images), strict=True))
            return pad_sequence([embeds[index] for index in range(len(embeds))], batch_first=True)

    def encode_target(self, pixel_values: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """See `UnifiedModel.encode_target`: scaled latents `[B, C, h, w]`. They are the sample of the VAE's posterior that
        `noise` of their shape gives, or without noise the posterior's mean."""
        posterior = self.encode_posterior(pixel_values)  # [B, 2, C, h, w]
        return self.sample_latents(posterior, torch.zeros_like(posterior[:, 0]) if noise is None else noise)

    # --- the language model, split by split ---

    def new_context(self, batch_size: int) -> Context:
        return Context(None, torch.zeros(batch_size, dtype=torch.long, device=self.device))

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        frozen = not self.language_model.model.embed_tokens.weight.requires_grad
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            return self.language_model.model.embed_tokens(input_ids)

    def _markers(self, batch_size: int) -> torch.Tensor:
        ids = [self.config.image_start_token_id, self.config.image_end_token_id]
        return self.embed(torch.tensor(ids, device=self.device)).expand(batch_size, -1, -1)  # [B, 2, D]

    def _embed_latents(self, tokens: torch.Tensor, timesteps: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Embeddings `[B, N, D]` for the language model of latent tokens `[B, N, p²C]` at timesteps `[B]`."""
        hidden = self.vae2llm(tokens.to(self.vae2llm.weight.dtype)) + self.time_embedder(timesteps)[:, None]
        hidden = hidden + self.latent_pos_embed(*grid).to(hidden)
        return hidden.to(self.language_model.model.embed_tokens.weight.dtype)  # adapters may keep vae2llm in float32

    def read_text(
        self, context: Context, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> Context:
        """Read a text split `[B, T]`, its markers included, causally. A row whose mask is all 0 reads nothing."""
        if not input_ids.shape[1]:
            return context
        return self._read(context, self.embed(input_ids), causal=True, mask=attention_mask)[2]

    def _read_condition(
        self,
        context: Context,
        embeds: torch.Tensor,
        mask: torch.Tensor | None = None,
        place: Place | None = None,
        present: torch.Tensor | None = None,
    ) -> Context:
        """Read understanding embeddings `[B, S, D]` between their markers, padded where `mask` `[B, S]` is 0. Rows with a
        false `present` `[B]` read nothing."""
        if mask is not None:
            mask = F.pad(mask.bool(), (2, 0), value=True)  # the markers
        if present is not None:
            rows = present[:, None].expand(-1, 2 + embeds.shape[1])
            mask = rows if mask is None else mask & rows
        return self._read(context, torch.cat([self._markers(len(embeds)), embeds], dim=1), mask=mask, place=place)[2]

    def _read_around(
        self,
        image: torch.Tensor,
        image_mask: torch.Tensor | None,
        text: torch.Tensor,
        text_mask: torch.Tensor | None,
        image_position: torch.Tensor,
        place: Place | None = None,
    ) -> torch.Tensor:
        """Hidden states `[B, T, D]` of embedded texts `[B, T, D]`, each read with an image `[B, S, D]` in front of its token
        number `image_position` `[B]`, or with no image where that is negative.

        Every row holds its image first and then its text, so that all rows have one layout. Position ids and the attention
        mask give the order in which a row is read.
        """
        image = torch.cat([self._markers(len(image)), image], dim=1)  # [B, I, D], where I = 2 + S
        (batch_size, images), texts, device = image.shape[:2], text.shape[1], text.device
        if image_mask is None:
            image_mask = torch.ones(batch_size, images - 2, dtype=torch.bool, device=device)
        image_mask = F.pad(image_mask.bool(), (2, 0), value=True)  # [B, I]: the markers are no padding
        if text_mask is None:
            text_mask = torch.ones(batch_size, texts, dtype=torch.bool, device=device)
        text_mask = text_mask.bool()  # [B, T]

        order, image_start = torch.arange(texts, device=device), image_position[:, None]
        behind = (image_start >= 0) & (order >= image_start)  # [B, T]: the text tokens that have read the image
        if place is None:
            place = image_start.clamp(min=0).expand(-1, images), image_position + 1
        image_ids, following = place
        text_ids = order + behind * (following - image_position)[:, None]  # [B, T]
        position_ids = torch.cat([image_ids, text_ids.expand(*image_ids.shape[:-1], -1)], dim=-1)  # [..., B, I + T]

        reads_image = torch.cat([torch.ones_like(image_mask), behind], dim=1)  # [B, I + T]
        to_image = reads_image[:, :, None] & image_mask[:, None]  # [B, I + T, I]: query, key
        image_to_text = (text_mask & ~behind)[:, None].expand(-1, images, -1)  # [B, I, T]
        text_to_text = text_mask[:, None] & text_mask.new_ones(texts, texts).tril()  # [B, T, T]
        attention_mask = torch.cat([to_image, torch.cat([image_to_text, text_to_text], dim=1)], dim=2)
        sequence = torch.cat([image, text], dim=1)  # [B, I + T, D]
        hidden, _, _ = self._run(sequence, None, position_ids, None, attention_mask[:, None], False)
        return hidden[:, images:]

    def read_latents(self, context: Context, latents: torch.Tensor, present: torch.Tensor | None = None) -> Context:
        """Read a clean image, the source of an edit, as scaled latents `[B, C, h, w]`. Rows with a false `present` `[B]` read
        nothing."""
        clean, grid = patchify(latents, self.config.latent_patch_size)  # [B, N, p²C]
        timesteps = torch.zeros(len(clean), device=clean.device)
        tokens, place = self._embed_latents(clean, timesteps, grid), self._latent_place(context, grid)
        mask = None if present is None else present[:, None].expand(-1, 2 + tokens.shape[1])
        return self._read(context, self._markers(len(clean)), tokens, mask=mask, place=place)[2]

    def velocity(
        self, context: Context, noisy: torch.Tensor, timesteps: torch.Tensor, grid: tuple[int, int]
    ) -> torch.Tensor:
        """Predicted velocity `[B, N, p²C]` at latent tokens `noisy` `[B, N, p²C]` of a `grid` (rows, columns), at timesteps
        `[B]` in [0, 1]."""
        latents, place = self._embed_latents(noisy, timesteps, grid), self._latent_place(context, grid)
        _, hidden, _ = self._read(context, self._markers(len(noisy)), latents, keep=False, place=place)  # [B, N, D]
        hidden = self.language_model.model.norm_moe_gen(hidden)
        return self.llm2vae(hidden.to(self.llm2vae.weight.dtype))

    def output_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[..., V]` over the tokenizer's tokens of hidden states `[..., D]` behind the last norm."""
        return self.language_model.lm_head(hidden)

    def _read(
        self,
        context: Context,
        understanding: torch.Tensor,
        generation: torch.Tensor | None = None,
        causal: bool = False,
        mask: torch.Tensor | None = None,
        keep: bool = True,
        place: Place | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Context]:
        """Run one split of T = U + G tokens behind `context`.

        Args:
            understanding, generation: `[B, U, D]`, `[B, G, D]`, the tokens of each expert; the former come first.
            causal: whether a token sees only what precedes it (a text) or the whole split (an image with its markers).
            mask: `[B, T]`, 0 at padding, which is on the right; a row of zeros reads nothing.
            keep: whether later splits see this one; a noisy image is not kept.
            place: by default a causal split counts positions, any other has one position.

        Returns:
            The hidden states of both experts, and the context with this split if it is kept.
        """
        device = understanding.device
        batch_size, texts = understanding.shape[:2]
        length = texts + (0 if generation is None else generation.shape[1])
        split_mask = None if mask is None or bool(mask.all()) else mask.bool()
        if place is not None:
            position_ids, position = place
        elif causal:
            position_ids = context.position[:, None] + torch.arange(length, device=device)  # [B, T]
            position = context.position + (length if split_mask is None else split_mask.sum(1))
        else:
            position_ids = context.position[:, None].expand(-1, length)  # [B, T]
            position = context.position + 1

        padding = context.mask
        if padding is not None or split_mask is not None:
            before = torch.ones(batch_size, context.length, dtype=torch.bool, device=device)
            here = torch.ones(batch_size, length, dtype=torch.bool, device=device)
            padding = torch.cat(
                [before if padding is None else padding, here if split_mask is None else split_mask], dim=1
            )  # [B, S + T] after S tokens of context, false at padding
        is_causal = causal and context.length == 0 and padding is None
        attention_mask = None
        if causal and not is_causal:
            attention_mask = torch.ones(length, context.length + length, dtype=torch.bool, device=device)
            attention_mask = attention_mask.tril(context.length)[None, None]  # [1, 1, T, S + T]
        if padding is not None:
            visible = padding[:, None, None]  # [B, 1, 1, S + T]
            # Padding sees itself: softmax over a row that sees nothing is NaN.
            if attention_mask is not None:
                attention_mask = attention_mask & visible | attention_mask.triu(context.length)
            else:
                attention_mask = visible
                if split_mask is not None:
                    empty_rows = ~split_mask.any(1)[:, None]  # [B, 1]
                    split = F.pad(empty_rows.expand(-1, length), (context.length, 0))  # [B, S + T]
                    attention_mask = visible | split[:, None, None]

        understanding, generation, past = self._run(
            understanding, generation, position_ids, context.past, attention_mask, is_causal, keep
        )
        read = replace(context, past=past, position=position, mask=padding) if keep else context
        return understanding, generation, read

    def _run(
        self,
        understanding: torch.Tensor,
        generation: torch.Tensor | None,
        position_ids: torch.Tensor,
        past: list[tuple[torch.Tensor, torch.Tensor]] | None,
        attention_mask: torch.Tensor | None,
        is_causal: bool,
        keep: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[tuple[torch.Tensor, torch.Tensor]]]:
        """All layers over one split, see `MoTDecoderLayer.forward`: both experts' hidden states and, with `keep`, every
        layer's keys and values."""
        decoder = self.language_model.model
        frozen = torch.is_grad_enabled() and self.understanding_is_frozen  # slow: it looks at every weight
        rotary = decoder.rotary_emb(understanding, position_ids)
        kept = []
        for index, layer in enumerate(decoder.layers):
            before = None if past is None else past[index]
            understanding, generation, key, value = layer(
                understanding, generation, rotary, before, attention_mask, is_causal, frozen
            )
            if keep:
                kept.append((key, value))
        return understanding, generation, kept

    # --- draws and counts ---

    def sample_corruption(self, batch: dict[str, Any], generator: Generators = None) -> dict[str, torch.Tensor]:
        """Draws for B images with K = `batch["timesteps_per_image"]` timesteps each, 1 by default.

        Returns:
            `posterior_noise` `[B, C, h, w]` of the VAE (and `source_posterior_noise` of an edit's source), `timesteps`
            `[B · K]`, logit-normal and shifted by `config.timestep_shift`, and the flow's `noise` `[B · K, N, p²C]` in token
            order. Captions have no draws.
        """
        if batch.get("task") == "caption":
            return {}
        patch = self.config.latent_patch_size
        channels = self.config.latent_token_dim // patch**2
        encoded = next((batch[name] for name in ("latents", "posterior") if name in batch), None)
        if encoded is not None:
            batch_size, (height, width) = len(encoded), encoded.shape[-2:]
        else:
            batch_size = len(batch["pixel_values"])
            height, width = (side // self.config.vae_scale_factor for side in batch["pixel_values"].shape[-2:])
        tokens = (height // patch) * (width // patch)

        def normal(*shape: int) -> torch.Tensor:
            return per_sample(lambda g: torch.randn(shape, generator=g), batch_size, generator)

        corruption = {}
        if "latents" not in batch:
            corruption["posterior_noise"] = normal(channels, height, width)
        if "source_pixel_values" in batch:
            sides = (side // self.config.vae_scale_factor for side in batch["source_pixel_values"].shape[-2:])
            corruption["source_posterior_noise"] = normal(channels, *sides)
        repeats = batch.get("timesteps_per_image", 1)
        timesteps = shift_timesteps(normal(repeats).sigmoid(), self.config.timestep_shift)
        corruption["timesteps"] = timesteps.flatten()
        corruption["noise"] = normal(repeats, tokens, self.config.latent_token_dim).flatten(0, 1)
        return corruption

    def count_supervised(self, batch: dict[str, Any], corruption: dict[str, torch.Tensor]) -> int:
        """Supervised tokens of a caption, else elements of the latents, once per timestep."""
        if "labels" in batch:
            return count_answer_tokens(batch["labels"])
        return corruption["noise"].numel()

    # --- sampling ---

    def _read_source(
        self, context: Context, pixel_values: torch.Tensor, noise: torch.Tensor | None, generator: Generators
    ) -> Context:
        """Read the source of an edit as a sample of the VAE's posterior; its `noise` is drawn if it is `None`."""
        if noise is None:
            noise = self.sample_corruption({"pixel_values": pixel_values}, generator)["posterior_noise"]
        return self.read_latents(context, self.encode_target(pixel_values, noise))

    def _initial_noise(self, count: int, grid: tuple[int, int], generator: Generators) -> torch.Tensor:
        """Noise `[B, N, p²C]` in token order; B is `count`."""
        shape = (grid[0] * grid[1], self.config.latent_token_dim)
        return per_sample(lambda g: torch.randn(shape, generator=g), count, generator)

    def _denoise(
        self,
        contexts: dict[str, Context],
        noise: torch.Tensor,
        grid: tuple[int, int],
        num_inference_steps: int,
        timestep_shift: float,
        guidance_interval: tuple[float, float] | None,
        guide: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    ) -> torch.Tensor:
        """Euler steps from `noise` `[B, N, p²C]` to clean latent tokens, in float32.

        Args:
            contexts: by name; `"full"` is used in every step, the others where guidance acts.
            guidance_interval: guidance acts at shifted timesteps `low < t <= high`; `None` turns it off.
            guide: combines the velocities `[B, N, p²C]`, by the name of their context, into one.
        """
        x = noise.to(self.device, torch.float32)  # [B, N, p²C]
        times = shift_timesteps(torch.linspace(1, 0, num_inference_steps + 1), timestep_shift).tolist()
        for now, following in pairwise(times):
            timesteps = torch.full((len(x),), now, device=self.device)
            is_guided = guidance_interval is not None and guidance_interval[0] < now <= guidance_interval[1]
            velocities = {
                name: self.velocity(context, x, timesteps, grid).float()
                for name, context in contexts.items()
                if is_guided or name == "full"
            }
            v = guide(velocities) if is_guided else velocities["full"]
            x = x - v * (now - following)
        return x

    def _answer(
        self,
        context: Context,
        input_ids: torch.Tensor,
        max_new_tokens: int,
        temperature: float,
        generator: Generators,
    ) -> list[list[int]]:
        """Ids of the answers that follow `context` and the tokens `input_ids` `[B, 1]`, without `config.eos_token_id`, which
        ends them. They are greedy at `temperature` 0, else sampled."""
        end = self.config.eos_token_id
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=self.device)
        generated = []
        for _ in range(max_new_tokens):
            hidden, _, context = self._read(context, self.embed(input_ids), causal=True)
            logits = self.output_logits(self.language_model.model.norm(hidden[:, -1])).float()  # [B, V]
            input_ids = draw_tokens(logits, temperature, generator)[:, None]  # [B, 1]
            done |= input_ids[:, 0] == end
            generated.append(input_ids.masked_fill(done[:, None], end))
            if done.all():
                break
        rows = torch.cat(generated, dim=1).tolist() if generated else [[] for _ in input_ids]
        return [[token for token in row if token != end] for row in rows]
