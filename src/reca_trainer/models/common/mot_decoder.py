"""The decoder of a mixture of transformers (arXiv:2411.04996): two experts, and one attention over all tokens. The kind of a
token decides which expert computes its projections, norms and MLP. Module names are those of BAGEL (arXiv:2505.14683)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2MLP,
    Qwen2RMSNorm,
    apply_rotary_pos_emb,
)

UNDERSTANDING, GENERATION = "", "_moe_gen"  # suffixes of an expert's module names, as published


class RMSNorm(torch.autograd.Function):
    """`Qwen2RMSNorm`, bit for bit. For the backward pass it keeps its input and one number a token, where autograd would
    also keep the input in float32 and the normalised one."""

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


class MoTRMSNorm(Qwen2RMSNorm):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return RMSNorm.apply(hidden, self.weight, self.variance_epsilon)


class SwiGLU(torch.autograd.Function):
    """`silu(gate) · up`, bit for bit; the backward pass computes `silu(gate)` again instead of keeping it."""

    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class MoTMLP(Qwen2MLP):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(SwiGLU.apply(self.gate_proj(hidden), self.up_proj(hidden)))


class MoTAttention(nn.Module):
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
            self.add_module(f"q_norm{expert}", MoTRMSNorm(self.head_dim, eps=config.rms_norm_eps))
            self.add_module(f"k_norm{expert}", MoTRMSNorm(self.head_dim, eps=config.rms_norm_eps))

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


class MoTDecoderLayer(GradientCheckpointingLayer):
    """One layer of both experts over one split of the sequence."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = MoTAttention(config)
        for expert in (UNDERSTANDING, GENERATION):
            self.add_module(f"mlp{expert}", MoTMLP(config))
            self.add_module(f"input_layernorm{expert}", MoTRMSNorm(config.hidden_size, eps=config.rms_norm_eps))
            self.add_module(
                f"post_attention_layernorm{expert}", MoTRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
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
            frozen: whether understanding tokens are constants, as in the official run: their queries, keys, values and
                outputs are computed without gradients, which would otherwise pass through the markers around the target.

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
        # All tokens of the split in one sequence of T = U + G: [B, heads, T, head_dim].
        query, key, value = (torch.cat(parts, dim=2) for parts in zip(*projected, strict=True))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past is not None:
            # [B, kv_heads, S + T, head_dim], where S is what was read before
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)

        with torch.set_grad_enabled(any(needs_grad[expert] for expert, _ in streams)):
            attended = F.scaled_dot_product_attention(
                query, key, value, attn_mask=attention_mask, is_causal=is_causal, enable_gqa=self.self_attn.groups > 1
            )  # [B, heads, T, head_dim]

        outputs: dict[str, torch.Tensor] = {}
        lengths = [hidden.shape[1] for _, hidden in streams]
        for (expert, hidden), part in zip(streams, attended.split(lengths, dim=2), strict=True):
            with torch.set_grad_enabled(needs_grad[expert]):
                hidden = hidden + self.self_attn.output(part, expert)  # [B, U or G, D]
                normed = getattr(self, f"post_attention_layernorm{expert}")(hidden)
                outputs[expert] = hidden + getattr(self, f"mlp{expert}")(normed)
        return outputs.get(UNDERSTANDING), outputs.get(GENERATION), key, value


class MoTDecoder(nn.Module):
    """Embeddings, layers and the last norm of each expert.

    Args:
        config: a configuration like transformers' `Qwen2Config`: the dimensions of one expert.
        rotary_emb: turns position ids into the cosine and sine of `apply_rotary_pos_emb`.
    """

    def __init__(self, config, rotary_emb: nn.Module):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MoTDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = MoTRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm_moe_gen = MoTRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = rotary_emb


class MoTLanguageModel(nn.Module):
    """The decoder with its output layer; arguments as for `MoTDecoder`."""

    def __init__(self, config, rotary_emb: nn.Module):
        super().__init__()
        self.model = MoTDecoder(config, rotary_emb)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
