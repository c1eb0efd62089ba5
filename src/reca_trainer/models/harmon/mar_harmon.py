"""Harmon's masked autoregressive (MAR, arXiv:2406.11838) image model: the masking, the encoder and the decoder around the
language model, and the diffusion head that makes a token.

Shapes: B samples, h×w latent grid, L = h·w image tokens, V visible ones, C latent channels, K buffer tokens, E / D encoder
/ decoder width, W width of the diffusion head, M noise draws per token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from reca_trainer.models.common.guidance import guided
from reca_trainer.models.harmon.configuration_harmon import HarmonMarConfig

# --- masking -------------------------------------------------------------------------------------------------------


def mask_rate(quantile: Tensor, minimum: float = 0.7) -> Tensor:
    """Share of tokens to hide: the normal distribution N(1, 0.25²) truncated to [`minimum`, 1], at `quantile`
    (float64, in [0, 1])."""
    low = torch.special.ndtr(quantile.new_tensor((minimum - 1) / 0.25))
    return 1 + 0.25 * torch.special.ndtri(low + quantile * (0.5 - low))


def hidden_counts(num_tokens: int, num_iterations: int) -> list[int]:
    """The number of tokens that are still hidden after each sampling iteration. It falls along a quarter cosine, by at least
    one an iteration, and the last iteration reveals all that is left."""
    counts = [num_tokens]
    for iteration in range(1, num_iterations):
        target = math.floor(num_tokens * math.cos(math.pi / 2 * iteration / num_iterations))
        counts.append(max(1, min(target, counts[-1] - 1)))
    return [*counts[1:], 0]


class Visible(NamedTuple):
    """The visible tokens of a batch of masked images, in raster order.

    Attributes:
        index: `[B, V]` int64, their places; V is the largest number of visible tokens in the batch.
        valid: `[B, V]` bool, false at the padding of rows that have fewer; `None` where all have V.
    """

    index: Tensor
    valid: Tensor | None

    @classmethod
    def of(cls, mask: Tensor) -> Visible:
        """The visible tokens of `mask` `[B, L]` bool, true where a token is hidden."""
        counts = (~mask).sum(1)  # [B]
        most = int(counts.max())
        index = mask.int().argsort(dim=1, stable=True)[:, :most]  # [B, V]
        if int(counts.min()) == most:
            return cls(index, None)
        return cls(index, torch.arange(most, device=mask.device) < counts[:, None])

    def to(self, device: torch.device) -> Visible:
        return Visible(self.index.to(device), None if self.valid is None else self.valid.to(device))


# --- MAR encoder and decoder ---------------------------------------------------------------------------------------


class MarAttention(nn.Module):
    """Bidirectional self-attention over `[B, length, dim]`."""

    def __init__(self, dim: int, num_heads: int, attn_dropout: float, proj_dropout: float):
        super().__init__()
        self.num_heads, self.attn_dropout = num_heads, attn_dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_dropout)

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        batch, length, dim = x.shape
        query, key, value = self.qkv(x).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.attn_dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout
        )  # [B, heads, length, head_dim], as query, key and value are
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(batch, length, dim)))


class MarMLP(nn.Module):
    def __init__(self, dim: int, hidden_dim: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class MarBlock(GradientCheckpointingLayer):
    """Pre-norm ViT block."""

    def __init__(self, dim: int, num_heads: int, config: HarmonMarConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = MarAttention(dim, num_heads, config.attn_dropout, config.proj_dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MarMLP(dim, int(dim * config.mlp_ratio), config.proj_dropout)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), attention_mask)
        return x + self.mlp(self.norm2(x))


class Mar(nn.Module):
    """Encoder, decoder and diffusion head, without the language model between them."""

    def __init__(self, config: HarmonMarConfig):
        super().__init__()
        self.buffer_size, self.native_grid = config.buffer_size, config.native_grid
        encoder_dim, decoder_dim, native = config.encoder_embed_dim, config.decoder_embed_dim, config.native_grid**2

        # Published checkpoints hold a class table that Harmon never uses. It is a buffer, so that no optimizer and no
        # distributed reducer waits for its gradient.
        self.class_emb = nn.Module()
        self.class_emb.register_buffer("weight", torch.zeros(config.class_num, encoder_dim))

        self.fake_latent = nn.Parameter(torch.zeros(1, encoder_dim))
        self.z_proj = nn.Linear(config.vae_embed_dim, encoder_dim)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, config.buffer_size + native, encoder_dim))
        self.z_proj_ln = nn.LayerNorm(encoder_dim, eps=1e-6)
        self.encoder_blocks = nn.ModuleList(
            MarBlock(encoder_dim, config.encoder_num_heads, config) for _ in range(config.encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(encoder_dim, eps=1e-6)

        self.decoder_embed = nn.Linear(encoder_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, config.buffer_size + native, decoder_dim))
        self.decoder_blocks = nn.ModuleList(
            MarBlock(decoder_dim, config.decoder_num_heads, config) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, native, decoder_dim))
        self.diffloss = DiffusionHead(config)

    def position_embeddings(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        """A position table `[1, K + native², D]`, or one without buffers, fitted to `grid`: `[1, K + L, D]`. Positions of the
        image are interpolated bilinearly, those of buffers are unchanged."""
        native = self.native_grid
        if grid == (native, native):
            return table
        buffers, image = table.split([table.shape[1] - native**2, native**2], dim=1)
        image = image.unflatten(1, (native, native)).permute(0, 3, 1, 2)  # [1, D, native, native]
        image = F.interpolate(image.float(), size=grid, mode="bilinear").to(table.dtype)  # [1, D, h, w]
        return torch.cat([buffers, image.flatten(2).mT], dim=1)

    def encode(self, latents: Tensor, visible: Visible | None = None) -> Tensor:
        """Encode latents `[B, h, w, C]` to `[B, K + L, E]`, or only the `visible` ones to `[B, K + V, E]`, buffers first."""
        x = self.z_proj(latents.flatten(1, 2).to(self.fake_latent.dtype))  # [B, L, E]
        buffers = self.fake_latent.to(x.dtype).expand(len(x), self.buffer_size, -1)  # [B, K, E]
        x = torch.cat([buffers, x], dim=1)  # [B, K + L, E]
        x = self.z_proj_ln(x + self.position_embeddings(self.encoder_pos_embed_learned, latents.shape[1:3]))
        attention_mask = None  # where visible tokens are padded, `[B, 1, 1, K + V]`
        if visible is not None:
            buffers, x = x.split([self.buffer_size, x.shape[1] - self.buffer_size], dim=1)
            x = x.gather(1, visible.index[..., None].expand(-1, -1, x.shape[-1]))  # [B, V, E]
            x = torch.cat([buffers, x], dim=1)  # [B, K + V, E]
            if visible.valid is not None:
                attention_mask = F.pad(visible.valid, (self.buffer_size, 0), value=True)[:, None, None]
        for block in self.encoder_blocks:
            x = block(x, attention_mask)
        return self.encoder_norm(x)

    def decode(self, x: Tensor, visible: Visible, grid: tuple[int, int]) -> Tensor:
        """The diffusion head's condition `[B, L, D]` from the language model's output `[B, K + V, E]`."""
        x = self.decoder_embed(x)  # [B, K + V, D]
        buffers, tokens = x.split([self.buffer_size, x.shape[1] - self.buffer_size], dim=1)  # [B, K, D], [B, V, D]
        mask_token = self.mask_token.to(x.dtype)
        if visible.valid is not None:
            tokens = torch.where(visible.valid[..., None], tokens, mask_token)
        slots = mask_token.expand(len(x), grid[0] * grid[1], -1)  # [B, L, D]
        slots = slots.scatter(1, visible.index[..., None].expand_as(tokens), tokens)  # [B, L, D]
        x = torch.cat([buffers, slots], dim=1)  # [B, K + L, D]
        x = x + self.position_embeddings(self.decoder_pos_embed_learned, grid)
        for block in self.decoder_blocks:
            x = block(x)
        x = self.decoder_norm(x)[:, self.buffer_size :]  # [B, L, D]
        return x + self.position_embeddings(self.diffusion_pos_embed_learned, grid)


# --- diffusion of one token ----------------------------------------------------------------------------------------


def kept_timesteps(spacing: str, num_timesteps: int = 1000) -> list[int]:
    """The training timesteps that a sampler keeps, ascending.

    Args:
        spacing: `"N"` keeps N evenly spaced ones including both ends; `"N,M,…"` divides the timesteps into as many equal
            sections as there are numbers, and keeps N of the first, M of the second, …; `"ddimN"` keeps every k-th from 0,
            for the integer k that gives N.

    Raises:
        ValueError: a section has fewer timesteps, or there is no such k.
    """
    if spacing.startswith("ddim"):
        count = int(spacing.removeprefix("ddim"))
        for stride in range(1, num_timesteps):
            if len(range(0, num_timesteps, stride)) == count:
                return list(range(0, num_timesteps, stride))
        raise ValueError(f"num_sampling_steps={spacing!r}: no integer stride keeps {count} of {num_timesteps} steps.")
    counts = [int(count) for count in spacing.split(",")]
    size, remainder = divmod(num_timesteps, len(counts))
    kept, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < remainder)
        if not 1 <= count <= length:
            raise ValueError(f"num_sampling_steps={spacing!r}: cannot keep {count} of a section's {length} steps.")
        stride = (length - 1) / (count - 1) if count > 1 else 0.0
        kept += [start + round(stride * step) for step in range(count)]
        start += length
    return kept


class GaussianDiffusion:
    """The noise schedule of improved DDPM (arXiv:2102.09672): squared cosine, ε prediction, learned variance range.

    diffusers' `DDPMScheduler` can sample from this model. It lacks the variational bound that trains the variance, and the
    float64 tables that ε prediction needs at the cosine schedule's last steps (ᾱ ≈ 2e-9).

    Args:
        spacing: which of the 1000 training timesteps to keep, see `kept_timesteps`; by default all.
    """

    def __init__(self, spacing: str | None = None):
        edges = torch.arange(1001, dtype=torch.float64, device="cpu") / 1000
        alphas_cumprod = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)
        self.timestep_map = torch.arange(1000, device="cpu")
        if spacing is not None:
            self.timestep_map = torch.tensor(kept_timesteps(spacing), device="cpu")
            alphas_cumprod = F.pad((1 - betas).cumprod(0)[self.timestep_map], (1, 0), value=1.0)
            betas = 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]

        self.betas = betas
        self.alphas_cumprod = (1 - betas).cumprod(0)
        previous = F.pad(self.alphas_cumprod[:-1], (1, 0), value=1.0)
        variance = betas * (1 - previous) / (1 - self.alphas_cumprod)
        self.posterior_log_variance_clipped = torch.cat([variance[1:2], variance[1:]]).log()  # 0 at the first step
        self.posterior_mean_x0 = betas * previous.sqrt() / (1 - self.alphas_cumprod)
        self.posterior_mean_xt = (1 - previous) * (1 - betas).sqrt() / (1 - self.alphas_cumprod)

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`x_t = √ᾱ_t x0 + √(1 - ᾱ_t) ε` `[..., C]` float32, for `noise` ε `[..., C]` and `timesteps` `[...]`."""
        signal, sigma = self._at(timesteps, self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt())
        return signal * x0 + sigma * noise

    def posterior(self, output: Tensor, noise_prediction: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance `[..., C]` of p(x_{t-1} | x_t) at `t` `[...]`.

        Args:
            output: `[..., 2C]`, of which the second half interpolates the log variance between the posterior's and log β.
            noise_prediction: `[..., C]`, ε, in place of the first half of `output`.
        """
        recip, recip_minus_one, mean_x0, mean_xt, low, high = self._at(
            t,
            (1 / self.alphas_cumprod).sqrt(),
            (1 / self.alphas_cumprod - 1).sqrt(),
            self.posterior_mean_x0,
            self.posterior_mean_xt,
            self.posterior_log_variance_clipped,
            self.betas.log(),
        )
        x0 = recip * x_t - recip_minus_one * noise_prediction
        share = (output.chunk(2, dim=-1)[1] + 1) / 2
        return mean_x0 * x0 + mean_xt * x_t, share * high + (1 - share) * low

    def losses(
        self, output: Tensor, x0: Tensor, x_t: Tensor, noise: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Squared error of ε and variational bound in bits, each the mean over channels: two `[...]` float32 tensors.

        The bound (arXiv:2102.09672, equation 16) trains the variance only: ε is detached in it.
        """
        prediction = output.chunk(2, dim=-1)[0]  # [..., C]
        error = (noise - prediction).square().mean(-1)  # [...]
        mean, log_variance = self.posterior(output, prediction.detach(), x_t, timesteps)
        mean_x0, mean_xt, true_log_variance = self._at(
            timesteps, self.posterior_mean_x0, self.posterior_mean_xt, self.posterior_log_variance_clipped
        )
        true_mean = mean_x0 * x0 + mean_xt * x_t
        divergence = 0.5 * (
            log_variance
            - true_log_variance
            + torch.exp(true_log_variance - log_variance)
            + (true_mean - mean).square() * torch.exp(-log_variance)
            - 1
        )  # [..., C], of two Gaussians
        likelihood = discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_variance)
        bound = torch.where(timesteps[..., None] == 0, -likelihood, divergence).mean(-1) / math.log(2)
        return error, bound

    @staticmethod
    def _at(timesteps: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
        """The tables' values at `timesteps` `[...]`: `[..., 1]` float32 each."""
        return torch.stack(tables).float().to(timesteps.device)[:, timesteps, None].unbind()


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log of the probability of the bin of width 2/255 around `x` under a Gaussian; the outermost bins are open (DDPM,
    arXiv:2006.11239, equation 13). The CDF is improved DDPM's tanh approximation."""

    def cdf(value: Tensor) -> Tensor:
        value = (value - mean) * torch.exp(-log_scale)
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    upper, lower = cdf(x + 1 / 255), cdf(x - 1 / 255)
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


class TimestepEmbedding(nn.Module):
    """Timesteps `[...]` to `[..., W]`."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        features = get_timestep_embedding(
            timesteps.flatten(), 256, flip_sin_to_cos=True, downscale_freq_shift=0
        )  # [N, 256] for N timesteps
        return self.mlp(features.to(self.mlp[0].weight.dtype)).unflatten(0, timesteps.shape)


class ResidualBlock(GradientCheckpointingLayer):
    """MLP over `[..., W]` with adaptive layer norm: the condition `[..., W]` gives shift, scale and gate."""

    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    """Adaptive layer norm and projection: `[..., W]` to `[..., out_channels]`."""

    def __init__(self, width: int, out_channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(self.norm(x) * (1 + scale) + shift)


class DenoisingMLP(nn.Module):
    """Predicts noise and variance `[..., 2C]` of a noised token `[..., C]` at `timesteps` `[...]`, given `z` `[..., D]`."""

    def __init__(self, channels: int, z_dim: int, width: int, depth: int):
        super().__init__()
        self.time_embed = TimestepEmbedding(width)
        self.cond_embed = nn.Linear(z_dim, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels)

    def forward(self, x: Tensor, timesteps: Tensor, z: Tensor) -> Tensor:
        dtype = self.input_proj.weight.dtype
        condition = self.time_embed(timesteps) + self.cond_embed(z.to(dtype))  # [..., W]
        x = self.input_proj(x.to(dtype))  # [..., W]
        for block in self.res_blocks:
            x = block(x, condition)
        return self.final_layer(x, condition).float()  # [..., 2C]


class DiffusionHead(nn.Module):
    """The diffusion loss of MAR (arXiv:2406.11838, section 3.2), and its sampler."""

    def __init__(self, config: HarmonMarConfig):
        super().__init__()
        self.net = DenoisingMLP(config.vae_embed_dim, config.decoder_embed_dim, config.diffloss_w, config.diffloss_d)
        self.training_diffusion = GaussianDiffusion()
        self.sampling_diffusion = GaussianDiffusion(config.num_sampling_steps)

    def forward(self, z: Tensor, x0: Tensor, timesteps: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Loss per noised token `[...]`, and the predicted noise `[..., C]`. `z` and `x0` broadcast to `noise`."""
        x_t = self.training_diffusion.add_noise(x0, noise, timesteps)  # [..., C]
        output = self.net(x_t, timesteps, z)  # [..., 2C]
        error, bound = self.training_diffusion.losses(output, x0, x_t, noise, timesteps)  # [...] both
        return error + bound, output.chunk(2, dim=-1)[0]

    def sample(
        self,
        z: Tensor,
        noise: Tensor,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        diffusion: GaussianDiffusion | None = None,
    ) -> Tensor:
        """Draw tokens by ancestral sampling.

        Args:
            z: `[N, D]`, or `[2N, D]` with guidance, the conditional half first.
            noise: `[N, 1 + steps, C]`, the initial noise, then that of each step in the order of the steps.
            guidance_scale: s in ε = ε_uncond + s (ε_cond - ε_uncond). The variance is the conditional one.
            temperature: factor on the noise of the steps.

        Returns:
            `[N, C]` float32.
        """
        diffusion = diffusion or self.sampling_diffusion
        x = noise[:, 0]  # [N, C]
        steps = len(diffusion.timestep_map)
        for step, t in enumerate(reversed(range(steps))):
            index = torch.full((len(x),), t, device=x.device)
            timestep = torch.full((len(z),), int(diffusion.timestep_map[t]), device=x.device)
            output = self.net(x if len(z) == len(x) else torch.cat([x, x]), timestep, z)  # [N or 2N, 2C]
            prediction = output.chunk(2, dim=-1)[0]  # [N or 2N, C]
            if len(z) != len(x):
                prediction = guided(*prediction.chunk(2), guidance_scale)
                output = output[: len(x)]
            x, log_variance = diffusion.posterior(output, prediction, x, index)
            if t > 0:
                x = x + torch.exp(0.5 * log_variance) * noise[:, 1 + step] * temperature
        return x
