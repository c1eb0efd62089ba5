"""BAGEL: one decoder with two experts, a SigLIP encoder to understand images and a flow in VAE latents to generate them.

What is unusual about this model:

- Hard routing: text tokens, understanding-image tokens and the two markers around every image go through the
  understanding expert; only VAE latent tokens go through the generation expert. All of them share one attention.
- All tokens of an image, markers included, have the same position. Only text positions count up.
- A sequence is read split by split (a text, an image), each attending to the keys and values of those before. So a
  frozen context costs one forward pass without gradients, and no attention-mask tensor is needed behind it.
- Where understanding is frozen, no gradient passes through any of its tokens, the markers around the target included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from reca_trainer.models.bagel.configuration_bagel import BagelConfig
from reca_trainer.models.bagel.decoder_bagel import GENERATION, BagelLanguageModel
from reca_trainer.models.bagel.generation_bagel import BagelGeneration
from reca_trainer.models.bagel.latents_bagel import patchify, shift_timesteps
from reca_trainer.models.bagel.processing_bagel import resized_size
from reca_trainer.models.common.flow_matching import flow_loss, interpolate
from reca_trainer.models.contract import (
    Generators,
    UnifiedModel,
    UnifiedOutput,
    count_answer_tokens,
    per_sample,
    token_cross_entropy,
)


class SinCosPositions(nn.Module):
    """Fixed 2-D sine-cosine table; the first half of the channels encodes the column, the second the row."""

    def __init__(self, side: int, dim: int):
        super().__init__()
        self.side, self.dim = side, dim
        self.table = nn.Buffer(self.compute(), persistent=False)  # [side², D]

    def compute(self) -> torch.Tensor:
        frequencies = 10000.0 ** (-torch.arange(self.dim // 4, dtype=torch.float64) / (self.dim / 4))
        angles = torch.arange(self.side, dtype=torch.float64)[:, None] * frequencies  # [side, D/4]
        one_axis = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [side, D/2]
        columns = one_axis[None, :].expand(self.side, -1, -1)
        rows = one_axis[:, None].expand(-1, self.side, -1)
        return torch.cat([columns, rows], dim=-1).reshape(self.side**2, self.dim).float()

    def forward(self, height: int, width: int) -> torch.Tensor:
        """Rows of the table for a `height × width` grid in its top-left corner: `[height · width, D]`."""
        if max(height, width) > self.side:
            raise ValueError(
                f"A grid of {height} × {width} tokens exceeds the position table of side {self.side}; "
                "use a smaller image."
            )
        return self.table.view(self.side, self.side, self.dim)[:height, :width].reshape(height * width, self.dim)


class BagelVisionEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.patch_size, self.side = config.patch_size, config.image_size // config.patch_size
        self.patch_embedding = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding(self.side**2, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches, (height, width) = patchify(pixel_values, self.patch_size)
        positions = torch.arange(self.side**2, device=patches.device).view(self.side, self.side)
        positions = positions[:height, :width].reshape(-1)
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


class BagelTimestepEmbedder(nn.Module):
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
        angles = timesteps.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp[0].weight.dtype))


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
        """The same context for `times` as many samples, each repeated in place."""
        past = self.past and [tuple(t.repeat_interleave(times, 0) for t in layer) for layer in self.past]
        mask = None if self.mask is None else self.mask.repeat_interleave(times, 0)
        return Context(past, self.position.repeat_interleave(times, 0), mask)


class BagelModel(BagelGeneration, UnifiedModel):
    """BAGEL, under its published module names."""

    config_class = BagelConfig
    base_model_prefix = ""
    tasks = ("reconstruct", "caption", "generate", "edit")
    shares_weights = False
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("BagelDecoderLayer", "SiglipEncoderLayer")
    _keep_in_fp32_modules_strict = ("vae.encoder", "vae.decoder")  # published in float32, and small
    lora_target_modules = (
        r"language_model\.model\.layers\.\d+\.(self_attn\.[qkvo]_proj_moe_gen|mlp_moe_gen\.(gate|up|down)_proj)"
    )
    image_tasks = ("generate", "reconstruct", "edit")
    quantized_modules = r"language_model\.model\.layers\.\d+\..*"  # both experts
    frozen_encoders = ("vit_model", "connector", "vae")
    supports_timesteps_per_image = True

    def __init__(self, config: BagelConfig):
        super().__init__(config)
        config.vision_config._attn_implementation = "sdpa"  # SigLIP's layers stand here outside a model of their own
        hidden_size = config.text_config.hidden_size
        self.vit_model = BagelVisionModel(config.vision_config)
        self.connector = BagelConnector(config)
        self.vit_pos_embed = SinCosPositions(config.vit_max_num_patch_per_side, hidden_size)
        self.language_model = BagelLanguageModel(config.text_config)
        self.time_embedder = BagelTimestepEmbedder(hidden_size)
        self.vae2llm = nn.Linear(config.latent_token_dim, hidden_size)
        self.llm2vae = nn.Linear(hidden_size, config.latent_token_dim)
        self.latent_pos_embed = SinCosPositions(config.max_latent_size, hidden_size)
        self.vae = build_autoencoder(config.vae_config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, SinCosPositions):
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
        return [
            "vit_model",
            "connector",
            "language_model.lm_head",
            "language_model.model.embed_tokens",
            *sorted(twins),
        ]

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
        timesteps_per_image: int = 1,
    ) -> UnifiedOutput:
        """RecA: read the image's own embeddings and the instruction, then denoise the same image.

        Args:
            input_ids: the instructions `[B, T]`, or one for all `[1, T]`; `None` leaves them out.
            attention_mask: `[B, T]`, 0 at padding; a row of zeros leaves its instruction out.
            latents, posterior: instead of `pixel_values`, see `_target_latents`.
            condition_embeds, condition_attention_mask: instead of `condition_pixel_values`, what `encode_batch` gives;
                the output's `understanding_embeds` are then these.
            timesteps_per_image: only `sample_corruption` reads it; here `corruption` has the number already.
        """
        latents = self._target_latents(corruption, pixel_values, latents, posterior)
        understanding_embeds = condition_embeds
        if condition_embeds is None:
            understanding_embeds = self.encode_condition(condition_pixel_values)
            condition_embeds, condition_attention_mask = self._place(understanding_embeds, condition_pixel_values)
        batch_size = len(condition_embeds)
        context = self._read_condition(self.new_context(batch_size), condition_embeds, condition_attention_mask)
        if input_ids is not None:
            context = self.read_text(context, input_ids.expand(batch_size, -1), attention_mask)
        return self._flow_matching(context, latents, corruption, understanding_embeds=understanding_embeds)

    def _generate(
        self,
        corruption: dict[str, torch.Tensor],
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        posterior: torch.Tensor | None = None,
        timesteps_per_image: int = 1,
    ) -> UnifiedOutput:
        """Text-to-image; the arguments are as in `_reconstruct`."""
        latents = self._target_latents(corruption, pixel_values, latents, posterior)
        context = self.new_context(len(latents))
        if input_ids is not None:
            context = self.read_text(context, input_ids, attention_mask)
        return self._flow_matching(context, latents, corruption)

    def _edit(
        self,
        corruption: dict[str, torch.Tensor],
        source_pixel_values: torch.Tensor,
        condition_pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        posterior: torch.Tensor | None = None,
        timesteps_per_image: int = 1,
    ) -> UnifiedOutput:
        """Editing: the source as VAE latents and as image embeddings, the instruction, then the target. `latents`,
        `posterior` and `timesteps_per_image` are as in `_reconstruct`."""
        latents = self._target_latents(corruption, pixel_values, latents, posterior)
        source = self.encode_target(source_pixel_values, corruption["source_posterior_noise"])
        context = self.read_latents(self.new_context(len(input_ids)), source)
        embeds = self.encode_condition(condition_pixel_values)
        context = self.read_image(context, embeds, condition_pixel_values.shape[-2:])
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
        timesteps_per_image: int = 1,
    ) -> UnifiedOutput:
        """Text about an image: next-token cross-entropy over the supervised tokens of a conversation.

        Args:
            condition_pixel_values: `None` where no conversation shows an image.
            image_position: `[B]` int64, how many tokens come before the image, -1 where the conversation shows none;
                `None` where all images come first.
            timesteps_per_image: the trainer sets it for all tasks alike; here it changes nothing.
        """
        text, embeds, image = self.embed(input_ids), None, None
        if condition_pixel_values is not None:
            embeds = self.encode_condition(condition_pixel_values)
            image, image_mask = self._place(embeds, condition_pixel_values)
        if image is not None and image_position is not None:
            hidden = self._read_around(image, image_mask, text, attention_mask, image_position)
        else:
            context = self.new_context(len(text))
            if image is not None:
                context = self._read_condition(context, image, image_mask)
            hidden, _, _ = self._read(context, text, causal=True, mask=attention_mask, keep=False)
        hidden = self.language_model.model.norm(hidden[:, :-1])
        return token_cross_entropy(self.language_model.lm_head, hidden, labels[:, 1:], embeds)

    def _target_latents(
        self,
        corruption: dict[str, torch.Tensor],
        pixel_values: torch.Tensor | None,
        latents: torch.Tensor | None,
        posterior: torch.Tensor | None,
    ) -> torch.Tensor:
        """The scaled latents `[B, C, h, w]` of a batch's targets, which a batch holds as `latents`, as the VAE's
        `posterior` `[B, 2, C, h, w]` or as `pixel_values`."""
        if latents is not None:
            return latents
        if posterior is None:
            posterior = self.encode_posterior(pixel_values)
        return self.sample_latents(posterior, corruption["posterior_noise"])

    def _flow_matching(self, context, latents, corruption, understanding_embeds=None) -> UnifiedOutput:
        """Rectified flow (BAGEL, section 2). With K timesteps an image, all of them are behind the one `context` of
        their image."""
        clean, grid = patchify(latents, self.config.latent_patch_size)  # [B, N, p²C]
        noise = corruption["noise"].to(clean)  # [B · K, N, p²C]
        timesteps = corruption["timesteps"].to(clean.device)  # [B · K]
        if (repeats := len(timesteps) // len(clean)) > 1:
            context, clean = context.repeat(repeats), clean.repeat_interleave(repeats, 0)
        prediction = self.velocity(context, interpolate(clean, noise, timesteps), timesteps, grid)
        return flow_loss(prediction, noise - clean, repeats, understanding_embeds)

    def encode_condition(self, condition_pixel_values: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        """Understanding embeddings, RecA's dense prompt, before positions are added: images `[B, 3, h, w]`, or a list of
        `[3, h, w]`, to `[B, S, D]`, of shorter rows padded with zeros."""
        frozen = not any(p.requires_grad for m in (self.vit_model, self.connector) for p in m.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            if torch.is_tensor(condition_pixel_values):
                return self.connector(self.vit_model(condition_pixel_values))
            by_size: dict[torch.Size, list[int]] = {}
            for index, image in enumerate(condition_pixel_values):
                by_size.setdefault(image.shape, []).append(index)
            embeds: dict[int, torch.Tensor] = {}
            for indices in by_size.values():
                images = torch.stack([condition_pixel_values[index] for index in indices])
                embeds.update(zip(indices, self.connector(self.vit_model(images)), strict=True))
            return pad_sequence([embeds[index] for index in range(len(embeds))], batch_first=True)

    def _place(
        self, embeds: torch.Tensor, condition_pixel_values: torch.Tensor | list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Add the positions to the embeddings `[B, S, D]` of images: `[B, S, D]`, and which of them are no padding,
        `[B, S]` bool or `None` where all are."""
        patch = self.config.vision_config.patch_size

        def table(image: torch.Tensor) -> torch.Tensor:
            height, width = image.shape[-2:]
            return self.vit_pos_embed(height // patch, width // patch)

        if torch.is_tensor(condition_pixel_values):
            return embeds + table(condition_pixel_values).to(embeds), None
        tables = [table(image) for image in condition_pixel_values]
        lengths = torch.tensor([len(positions) for positions in tables])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        positions = pad_sequence(tables, batch_first=True).to(embeds)
        return embeds + positions, None if mask.all() else mask.to(embeds.device)

    @torch.no_grad()
    def encode_batch(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """See `UnifiedModel.encode_batch`: `condition_embeds` `[B, S, D]`, positions added, with
        `condition_attention_mask` `[B, S]` where they are padded, and the VAE's `posterior`."""
        images = batch["condition_pixel_values"]
        condition_embeds, mask = self._place(self.encode_condition(images), images)
        encoded = {"condition_embeds": condition_embeds, "posterior": self.encode_posterior(batch["pixel_values"])}
        return encoded if mask is None else {**encoded, "condition_attention_mask": mask}

    @torch.no_grad()
    def encode_posterior(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Mean and standard deviation of the VAE's latents: `[B, 3, H, W]` -> `[B, 2, C, h, w]`."""
        posterior = self.vae.encode(pixel_values.to(self.vae.dtype)).latent_dist
        return torch.stack([posterior.mean, posterior.std], dim=1)

    def sample_latents(self, posterior: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A sample of `encode_posterior`'s result, shifted and scaled: `[B, C, h, w]` in the model's dtype."""
        mean, std = posterior.unbind(1)
        sample = mean + std * noise.to(mean)
        scaled = self.vae.config.scaling_factor * (sample - self.vae.config.shift_factor)
        return scaled.to(self.vae2llm.weight.dtype)

    def encode_target(self, pixel_values: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """See `UnifiedModel.encode_target`: scaled latents `[B, C, h, w]`, by `noise` of the same shape a sample of the
        VAE's posterior (see `sample_latents`), without it the posterior's mean."""
        posterior = self.encode_posterior(pixel_values)
        return self.sample_latents(posterior, torch.zeros_like(posterior[:, 0]) if noise is None else noise)

    @torch.no_grad()
    def decode_target(self, target: torch.Tensor) -> torch.Tensor:
        """Inverse of `encode_target`, without the sampling: `[B, C, h, w]` -> `[B, 3, H, W]`, about [-1, 1]."""
        latents = target.to(self.vae.dtype) / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return self.vae.decode(latents).sample

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        frozen = not self.language_model.model.embed_tokens.weight.requires_grad
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            return self.language_model.model.embed_tokens(input_ids)

    def new_context(self, batch_size: int) -> Context:
        return Context(None, torch.zeros(batch_size, dtype=torch.long, device=self.device))

    def read_text(
        self, context: Context, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> Context:
        """Read a text split `[B, T]`, markers included, causally. Rows whose mask is 0 throughout read nothing."""
        if not input_ids.shape[1]:
            return context
        return self._read(context, self.embed(input_ids), causal=True, mask=attention_mask)[2]

    def read_image(self, context: Context, embeds: torch.Tensor, size: tuple[int, int]) -> Context:
        """Read understanding embeddings `[B, S, D]` of an image of `size` pixels `(height, width)`."""
        patch = self.config.vision_config.patch_size
        positions = self.vit_pos_embed(size[0] // patch, size[1] // patch).to(embeds)
        return self._read_condition(context, embeds + positions)

    def _read_condition(self, context: Context, embeds: torch.Tensor, mask: torch.Tensor | None = None) -> Context:
        """Read understanding embeddings `[B, S, D]` with their positions, right-padded where `mask` `[B, S]` is 0."""
        if mask is not None:
            mask = F.pad(mask.bool(), (2, 0), value=True)  # the markers
        return self._read(context, torch.cat([self._markers(len(embeds)), embeds], dim=1), mask=mask)[2]

    def _read_around(
        self,
        image: torch.Tensor,
        image_mask: torch.Tensor | None,
        text: torch.Tensor,
        text_mask: torch.Tensor | None,
        image_position: torch.Tensor,
    ) -> torch.Tensor:
        """Read embedded texts `[B, T, D]`, each with an image `[B, S, D]` in front of its token number `image_position`
        `[B]`, or with none where that is negative: the texts' hidden states `[B, T, D]`.

        All images lie before all texts in memory; positions and the mask say what comes first. Rows of any order then
        make one rectangle.
        """
        image = torch.cat([self._markers(len(image)), image], dim=1)
        (batch_size, images), texts, device = image.shape[:2], text.shape[1], text.device
        everything = torch.ones(batch_size, images, dtype=torch.bool, device=device)
        seen_image = everything if image_mask is None else F.pad(image_mask.bool(), (2, 0), value=True)
        here = torch.ones(batch_size, texts, dtype=torch.bool, device=device)
        seen_text = here if text_mask is None else text_mask.bool()

        order, at = torch.arange(texts, device=device), image_position[:, None]
        behind = (at >= 0) & (order >= at)  # [B, T]: the text tokens that have read the image
        position_ids = torch.cat([at.clamp(min=0).expand(-1, images), order + behind.long()], dim=1)
        attention_mask = torch.cat(
            [
                torch.cat([everything, behind], dim=1)[:, :, None] & seen_image[:, None],  # [B, S + T, S]
                torch.cat(
                    [
                        (seen_text & ~behind)[:, None].expand(-1, images, -1),
                        seen_text[:, None] & here.new_ones(texts, texts).tril(),
                    ],
                    dim=1,
                ),  # [B, S + T, T]
            ],
            dim=2,
        )
        sequence = torch.cat([image, text], dim=1)
        hidden, _, _ = self._run(sequence, None, position_ids, None, attention_mask[:, None], False)
        return hidden[:, images:]

    def read_latents(self, context: Context, latents: torch.Tensor) -> Context:
        """Read a clean image given as scaled latents `[B, C, h, w]`, which is what editing starts from."""
        clean, grid = patchify(latents, self.config.latent_patch_size)
        timesteps = torch.zeros(len(clean), device=clean.device)
        return self._read(context, self._markers(len(clean)), self._embed_latents(clean, timesteps, grid))[2]

    def skip(self, context: Context) -> Context:
        """Where a dropped image would have been: its position stays taken."""
        return Context(context.past, context.position + 1, context.mask)

    def velocity(
        self, context: Context, noisy: torch.Tensor, timesteps: torch.Tensor, grid: tuple[int, int]
    ) -> torch.Tensor:
        """Predicted velocity at latent tokens `noisy` `[B, N, p²C]`, timesteps `[B]` in [0, 1], `grid` tokens."""
        latents = self._embed_latents(noisy, timesteps, grid)
        _, hidden, _ = self._read(context, self._markers(len(noisy)), latents, keep=False)
        hidden = self.language_model.model.norm_moe_gen(hidden)
        return self.llm2vae(hidden.to(self.llm2vae.weight.dtype))

    def _markers(self, batch_size: int) -> torch.Tensor:
        ids = [self.config.image_start_token_id, self.config.image_end_token_id]
        return self.embed(torch.tensor(ids, device=self.device)).expand(batch_size, -1, -1)  # [B, 2, D]

    def _embed_latents(self, tokens: torch.Tensor, timesteps: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        hidden = self.vae2llm(tokens.to(self.vae2llm.weight.dtype)) + self.time_embedder(timesteps)[:, None]
        hidden = hidden + self.latent_pos_embed(*grid).to(hidden)
        return hidden.to(self.language_model.model.embed_tokens.weight.dtype)  # adapters may keep vae2llm in float32

    def _read(
        self,
        context: Context,
        understanding: torch.Tensor,
        generation: torch.Tensor | None = None,
        causal: bool = False,
        mask: torch.Tensor | None = None,
        keep: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Context]:
        """Run one split behind `context`, right-padded where `mask` `[B, T]` is 0. A causal split (text) has counting
        positions; every other (an image with its markers) has one position and full attention. What is not kept
        (a noisy image) is invisible to the splits behind it."""
        device = understanding.device
        batch_size, texts = understanding.shape[:2]
        length = texts + (0 if generation is None else generation.shape[1])
        split_mask = None if mask is None or bool(mask.all()) else mask.bool()
        if causal:
            position_ids = context.position[:, None] + torch.arange(length, device=device)
            position = context.position + (length if split_mask is None else split_mask.sum(1))
        else:
            position_ids = context.position[:, None].expand(-1, length)
            position = context.position + 1

        padding = context.mask
        if padding is not None or split_mask is not None:
            before = torch.ones(batch_size, context.length, dtype=torch.bool, device=device)
            here = torch.ones(batch_size, length, dtype=torch.bool, device=device)
            padding = torch.cat(
                [before if padding is None else padding, here if split_mask is None else split_mask], dim=1
            )
        is_causal = causal and context.length == 0 and padding is None
        attention_mask = None
        if causal and not is_causal:
            attention_mask = torch.ones(length, context.length + length, dtype=torch.bool, device=device)
            attention_mask = attention_mask.tril(context.length)[None, None]
        if padding is not None:
            visible = padding[:, None, None]
            if attention_mask is None:
                attention_mask = visible
            else:
                # Padding sees itself: of a text that is all padding it would see nothing, and become NaN.
                attention_mask = attention_mask & visible | attention_mask.triu(context.length)

        understanding, generation, past = self._run(
            understanding, generation, position_ids, context.past, attention_mask, is_causal, keep
        )
        return understanding, generation, Context(past, position, padding) if keep else context

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
        """All layers over one split, see `BagelDecoderLayer.forward`: both experts' tokens and, if they are to be kept,
        every layer's keys and values."""
        decoder = self.language_model.model
        frozen = torch.is_grad_enabled() and self.understanding_is_frozen  # asks every weight; moot without gradients
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

    def sample_corruption(self, batch: dict[str, Any], generator: Generators = None) -> dict[str, torch.Tensor]:
        """Draws per image: the VAE posterior's noise `[C, h, w]`; and `batch["timesteps_per_image"]` times (default 1)
        a logit-normal timestep, shifted by `config.timestep_shift`, and the flow's noise in token order `[N, p²C]`."""
        if batch.get("task") == "caption":
            return {}
        patch, channels = self.config.latent_patch_size, self.config.vae_config["latent_channels"]
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
        """Supervised tokens of a caption, else the noised elements of all latents and timesteps."""
        if "labels" in batch:
            return count_answer_tokens(batch["labels"])
        return corruption["noise"].numel()

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
        shortest = min(512, longest) if min_image_size is None else min_image_size
        if not stride <= shortest <= longest:
            raise ValueError(
                f"The sides of a target are at least {stride} pixels and the minimum is not above the maximum, got "
                f"min_image_size {shortest} and max_image_size {longest}."
            )
        width, height = resized_size(longest, longest, longest, shortest, stride)
        condition = min(224, understanding.image_size // understanding.patch_size * understanding.patch_size)
        return {
            "task": "reconstruct",
            "condition_pixel_values": torch.zeros(batch_size, 3, condition, condition),
            "pixel_values": torch.zeros(batch_size, 3, height, width),
            "input_ids": torch.zeros(batch_size, text_length, dtype=torch.long),
        }


def build_autoencoder(vae_config: dict[str, Any]) -> AutoencoderKL:
    """diffusers' `AutoencoderKL`; FLUX' own code lets the first convolution be narrower than the first block."""
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
