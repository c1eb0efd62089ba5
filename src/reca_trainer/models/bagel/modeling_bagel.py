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
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2MLP,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from reca_trainer.models.bagel.configuration_bagel import BagelConfig
from reca_trainer.models.bagel.processing_bagel import BagelProcessor, resized_size
from reca_trainer.models.contract import (
    Generators,
    UnifiedModel,
    UnifiedOutput,
    count_answer_tokens,
    evaluating,
    per_sample,
    token_cross_entropy,
)

UNDERSTANDING, GENERATION = "", "_moe_gen"  # suffixes of an expert's module names, as published


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


class RMSNorm(torch.autograd.Function):
    """`Qwen2RMSNorm`, bit for bit, that keeps its input and one number a token for the backward pass: neither the input
    in float32 nor the normalised one."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x = hidden.float()
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)  # [..., 1]
        ctx.save_for_backward(hidden, weight, scale)
        return weight * (x * scale).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        hidden, weight, scale = ctx.saved_tensors
        grad, normed, grad_weight = grad.float(), hidden.float() * scale, None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight.float()
        grad = (grad - normed * (grad * normed).mean(-1, keepdim=True)) * scale
        return grad.to(hidden.dtype), grad_weight, None


class BagelRMSNorm(Qwen2RMSNorm):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return RMSNorm.apply(hidden, self.weight, self.variance_epsilon)


class SwiGLU(torch.autograd.Function):
    """`silu(gate) · up`, bit for bit; the backward pass computes `silu(gate)` again rather than keeping it."""

    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class BagelMLP(Qwen2MLP):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(SwiGLU.apply(self.gate_proj(hidden), self.up_proj(hidden)))


class BagelAttention(nn.Module):
    """Grouped-query attention whose projections and query/key norms exist once per expert."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        q_dim, kv_dim = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        for expert in (UNDERSTANDING, GENERATION):
            self.add_module(f"q_proj{expert}", nn.Linear(config.hidden_size, q_dim))
            self.add_module(f"k_proj{expert}", nn.Linear(config.hidden_size, kv_dim))
            self.add_module(f"v_proj{expert}", nn.Linear(config.hidden_size, kv_dim))
            self.add_module(f"o_proj{expert}", nn.Linear(q_dim, config.hidden_size, bias=False))
            self.add_module(f"q_norm{expert}", BagelRMSNorm(self.head_dim, eps=config.rms_norm_eps))
            self.add_module(f"k_norm{expert}", BagelRMSNorm(self.head_dim, eps=config.rms_norm_eps))

    def project(self, hidden: torch.Tensor, expert: str) -> list[torch.Tensor]:
        """`[B, T, D]` -> queries, keys, values `[B, heads, T, head_dim]`, normalised but not yet rotated."""
        heads = (*hidden.shape[:2], -1, self.head_dim)
        query = getattr(self, f"q_norm{expert}")(getattr(self, f"q_proj{expert}")(hidden).view(heads))
        key = getattr(self, f"k_norm{expert}")(getattr(self, f"k_proj{expert}")(hidden).view(heads))
        value = getattr(self, f"v_proj{expert}")(hidden).view(heads)
        return [tensor.transpose(1, 2) for tensor in (query, key, value)]

    def output(self, attended: torch.Tensor, expert: str) -> torch.Tensor:
        """`[B, heads, T, head_dim]` -> `[B, T, D]`."""
        return getattr(self, f"o_proj{expert}")(attended.transpose(1, 2).flatten(2))


class BagelDecoderLayer(GradientCheckpointingLayer):
    """One layer of both experts over one split of the sequence."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = BagelAttention(config)
        for expert in (UNDERSTANDING, GENERATION):
            self.add_module(f"mlp{expert}", BagelMLP(config))
            self.add_module(f"input_layernorm{expert}", BagelRMSNorm(config.hidden_size, eps=config.rms_norm_eps))
            self.add_module(
                f"post_attention_layernorm{expert}", BagelRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            )

    def forward(
        self,
        understanding: torch.Tensor | None,
        generation: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor | None,
        is_causal: bool,
        frozen: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Both experts' tokens through one layer.

        Args:
            understanding: `[B, U, D]` or `None`; they come first in the split.
            generation: `[B, G, D]` or `None`.
            position_embeddings: cosine and sine, `[B, U + G, head_dim]`.
            past: keys and values `[B, kv_heads, S, head_dim]` of the splits before.
            attention_mask: bool, broadcastable to `[B, 1, U + G, S + U + G]`, `True` where attention is allowed.
            frozen: whether understanding tokens are constants: their queries, keys, values and outputs are computed
                without gradients (section "Freezing" of the official run; a gradient would otherwise pass through the
                markers around the target).

        Returns:
            The new `understanding` and `generation`, and all keys and values, those of `past` included.
        """
        streams = [(UNDERSTANDING, understanding), (GENERATION, generation)]
        streams = [(expert, hidden) for expert, hidden in streams if hidden is not None]
        grad = torch.is_grad_enabled()
        needs_grad = {UNDERSTANDING: grad and not frozen, GENERATION: grad}

        projected = []
        for expert, hidden in streams:
            with torch.set_grad_enabled(needs_grad[expert]):
                projected.append(self.self_attn.project(getattr(self, f"input_layernorm{expert}")(hidden), expert))
        query, key, value = (torch.cat(parts, dim=2) for parts in zip(*projected, strict=True))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)

        with torch.set_grad_enabled(any(needs_grad[expert] for expert, _ in streams)):
            attended = F.scaled_dot_product_attention(
                query, key, value, attn_mask=attention_mask, is_causal=is_causal, enable_gqa=self.self_attn.groups > 1
            )

        outputs: dict[str, torch.Tensor] = {}
        lengths = [hidden.shape[1] for _, hidden in streams]
        for (expert, hidden), part in zip(streams, attended.split(lengths, dim=2), strict=True):
            with torch.set_grad_enabled(needs_grad[expert]):
                hidden = hidden + self.self_attn.output(part, expert)
                normed = getattr(self, f"post_attention_layernorm{expert}")(hidden)
                outputs[expert] = hidden + getattr(self, f"mlp{expert}")(normed)
        return outputs.get(UNDERSTANDING), outputs.get(GENERATION), key, value


class BagelDecoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([BagelDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = BagelRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm_moe_gen = BagelRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2RotaryEmbedding(config)


class BagelLanguageModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.model = BagelDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


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


class BagelModel(UnifiedModel):
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
        """Rectified flow: `x_t = (1 - t) x_0 + t ε`, and the velocity `ε - x_0` is the target (BAGEL, section 2). With
        K timesteps an image, all of them are behind the one `context` of their image."""
        clean, grid = patchify(latents, self.config.latent_patch_size)  # [B, N, p²C]
        noise = corruption["noise"].to(clean)  # [B · K, N, p²C]
        timesteps = corruption["timesteps"].to(clean.device)  # [B · K]
        if (repeats := len(timesteps) // len(clean)) > 1:
            context, clean = context.repeat(repeats), clean.repeat_interleave(repeats, 0)
        t = timesteps.to(clean.dtype)[:, None, None]
        prediction = self.velocity(context, (1 - t) * clean + t * noise, timesteps, grid)
        target = noise - clean
        error = (prediction.float() - target.float()).square().mean(dim=(1, 2))  # [B · K]
        return UnifiedOutput(
            loss=error.mean(),
            per_sample_loss=error.detach().view(len(latents), repeats).mean(1),
            prediction=prediction,
            target=target,
            understanding_embeds=understanding_embeds,
        )

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

    @evaluating
    def generate_images(
        self,
        processor: BagelProcessor,
        text: list[str] | None = None,
        images: list[Image.Image] | None = None,
        *,
        task: str = "generate",
        generator: Generators = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 49,
        guidance_scale: float = 4.0,
        image_guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.4, 1.0),
        guidance_renorm: str = "global",
        guidance_renorm_min: float = 0.0,
        timestep_shift: float = 3.0,
        latents: torch.Tensor | None = None,
        posterior_noise: torch.Tensor | None = None,
    ) -> list[Image.Image]:
        """See `UnifiedModel.generate_images`.

        Args:
            height, width: of the output; by default the resized input image's, or the largest square size.
            num_inference_steps: Euler steps (the original counts the 50 time points between which its 49 steps lie).
            guidance_scale: of the text; guidance is off at 1.
            image_guidance_scale: of the images, on top; needs `guidance_scale > 1`.
            guidance_interval: guidance acts at shifted timesteps `low < t <= high`.
            guidance_renorm: `"global"` (one factor an image), `"channel"` (one a token) or `"text_channel"` (one a
                token, between text and image guidance).
            latents: the initial noise `[B, N, p²C]` in token order, instead of drawing it.
            posterior_noise: `[B, C, h, w]`, noise of the source's VAE posterior in editing, instead of drawing it.
        """
        count = len(images if text is None else text)
        if images is not None and len({image.size for image in images}) > 1:
            options = {
                "task": task,
                "height": height,
                "width": width,
                "num_inference_steps": num_inference_steps,
                "guidance_scale": guidance_scale,
                "image_guidance_scale": image_guidance_scale,
                "guidance_interval": guidance_interval,
                "guidance_renorm": guidance_renorm,
                "guidance_renorm_min": guidance_renorm_min,
                "timestep_shift": timestep_shift,
            }
            return self._one_by_one(processor, text, images, generator, latents, options)
        tokens = None if text is None else {k: v.to(self.device) for k, v in processor.tokenize(text).items()}

        def read_prompt(context: Context) -> Context:
            return context if tokens is None else self.read_text(context, **tokens)

        pictures = self.new_context(count)  # what remains without the text
        if task in ("edit", "reconstruct"):
            resized = [processor.resize(image, processor.generation_size) for image in images]
            width, height = width or resized[0].width, height or resized[0].height
            if task == "edit":
                pixels = processor.to_pixels(resized, processor.generation_size).to(self.device)
                if posterior_noise is None:
                    posterior_noise = self.sample_corruption({"pixel_values": pixels}, generator)["posterior_noise"]
                pictures = self.read_latents(pictures, self.encode_target(pixels, posterior_noise))
            rule = processor.understanding_size if task == "edit" else processor.condition_size
            pixels = processor.to_pixels(resized, rule).to(self.device)
            pictures = self.read_image(pictures, self.encode_condition(pixels), pixels.shape[-2:])
        contexts = {"full": read_prompt(pictures), "no_text": pictures}
        if guidance_scale > 1 and image_guidance_scale > 1:
            contexts["no_image"] = read_prompt(self.new_context(count))

        stride = self.config.latent_token_stride
        height, width = (side or processor.generation_size[0] for side in (height, width))
        grid = (height // stride, width // stride)
        if latents is None:
            shape = (grid[0] * grid[1], self.config.latent_token_dim)
            latents = per_sample(lambda g: torch.randn(shape, generator=g), count, generator)
        x = latents.to(self.device, torch.float32)
        times = shift_timesteps(torch.linspace(1, 0, num_inference_steps + 1), timestep_shift).tolist()
        low, high = guidance_interval
        for now, following in pairwise(times):
            timesteps = torch.full((count,), now, device=self.device)
            guided = guidance_scale > 1 and low < now <= high
            velocities = {
                name: self.velocity(context, x, timesteps, grid).float()
                for name, context in contexts.items()
                if guided or name == "full"
            }
            v = velocities["full"]
            if guided:
                v = guide(velocities, guidance_scale, image_guidance_scale, guidance_renorm, guidance_renorm_min)
            x = x - v * (now - following)
        decoded = self.decode_target(unpatchify(x, grid, self.config.latent_patch_size))
        array = ((decoded * 0.5 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()
        return [Image.fromarray(np.ascontiguousarray(image)) for image in array]

    def _one_by_one(self, processor, text, images, generator, latents, sampling) -> list[Image.Image]:
        """Images of different sizes do not form a rectangular batch."""
        result = []
        for index, image in enumerate(images):
            result += self.generate_images(
                processor,
                text=None if text is None else [text[index]],
                images=[image],
                generator=generator[index] if isinstance(generator, list) else generator,
                latents=None if latents is None else latents[index : index + 1],
                **sampling,
            )
        return result

    @evaluating
    def generate_text(
        self,
        processor: BagelProcessor,
        text: list[str],
        images: list[Image.Image] | None = None,
        *,
        max_new_tokens: int = 500,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> list[str]:
        """See `UnifiedModel.generate_text`. Greedy at `temperature` 0, else sampled; the original's limit is 500."""
        if images is not None and len({image.size for image in images}) > 1:
            options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "generator": generator}
            pairs = zip(text, images, strict=True)
            return [self.generate_text(processor, [question], [image], **options)[0] for question, image in pairs]
        context = self.new_context(len(text))
        if images is not None:
            resized = [processor.resize(image, processor.generation_size) for image in images]
            pixels = processor.to_pixels(resized, processor.understanding_size).to(self.device)
            context = self.read_image(context, self.encode_condition(pixels), pixels.shape[-2:])
        tokens = {name: tensor.to(self.device) for name, tensor in processor.tokenize(text).items()}
        context = self.read_text(context, **tokens)
        ids = torch.full((len(text), 1), self.config.bos_token_id, device=self.device)
        done = torch.zeros(len(text), dtype=torch.bool, device=self.device)
        generated = []
        for _ in range(max_new_tokens):
            hidden, _, context = self._read(context, self.embed(ids), causal=True)
            logits = self.language_model.lm_head(self.language_model.model.norm(hidden[:, -1])).float()
            if temperature > 0:
                ids = torch.multinomial((logits / temperature).softmax(-1).cpu(), 1, generator=generator)
                ids = ids.to(self.device)
            else:
                ids = logits.argmax(-1, keepdim=True)
            done |= ids[:, 0] == self.config.eos_token_id
            generated.append(ids.masked_fill(done[:, None], self.config.eos_token_id))
            if done.all():
                break
        rows = torch.cat(generated, dim=1).tolist() if generated else [[] for _ in text]
        return [processor.tokenizer.decode([i for i in row if i != self.config.eos_token_id]) for row in rows]


def patchify(images: torch.Tensor, patch_size: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """`[B, C, H, W]` -> tokens `[B, h · w, p²C]`, row-major, each ordered (row, column, channel); and the grid `(h, w)`."""
    batch_size, channels, height, width = images.shape
    grid = (height // patch_size, width // patch_size)
    if (grid[0] * patch_size, grid[1] * patch_size) != (height, width):
        raise ValueError(f"{height} × {width} is not a multiple of the patch size {patch_size}.")
    tokens = images.reshape(batch_size, channels, grid[0], patch_size, grid[1], patch_size)
    return tokens.permute(0, 2, 4, 3, 5, 1).reshape(batch_size, grid[0] * grid[1], -1), grid


def unpatchify(tokens: torch.Tensor, grid: tuple[int, int], patch_size: int) -> torch.Tensor:
    """Inverse of `patchify`."""
    height, width = grid
    images = tokens.view(len(tokens), height, width, patch_size, patch_size, -1).permute(0, 5, 1, 3, 2, 4)
    return images.reshape(len(tokens), -1, height * patch_size, width * patch_size)


def shift_timesteps(timesteps: torch.Tensor, shift: float) -> torch.Tensor:
    return shift * timesteps / (1 + (shift - 1) * timesteps)


def guide(
    velocities: dict[str, torch.Tensor], text_scale: float, image_scale: float, renorm: str, renorm_min: float
) -> torch.Tensor:
    """Classifier-free guidance with respect to the text, then to the images, and BAGEL's renormalisation, which never
    lets guidance lengthen the velocity. All `[B, N, C]`; `renorm` is described in `BagelModel.generate_images`."""
    full = velocities["full"]

    def shorten(v: torch.Tensor, dim: tuple[int, ...]) -> torch.Tensor:
        norm, reference = (torch.linalg.vector_norm(x, dim=dim, keepdim=True) for x in (v, full))
        return v * (reference / (norm + 1e-8)).clamp(renorm_min, 1.0)

    v = velocities["no_text"] + text_scale * (full - velocities["no_text"])
    if renorm == "text_channel":
        v = shorten(v, (-1,))
    if image_scale > 1:
        v = velocities["no_image"] + image_scale * (v - velocities["no_image"])
    if renorm == "text_channel":
        return v
    if renorm not in ("global", "channel"):
        raise ValueError(f"guidance_renorm is 'global', 'channel' or 'text_channel', not {renorm!r}.")
    return shorten(v, (-2, -1) if renorm == "global" else (-1,))


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
