"""Harmon (arXiv:2503.21979) with the losses of Reconstruction Alignment.

What is unusual about this model:
- One encoder for both directions. Understanding reads all image tokens; generation reads the visible ones of a masked image.
- The language model sits between MAR encoder and decoder and sees image tokens causally, like text.
- An image token is continuous: a small diffusion head predicts it from the decoder's output.

Shapes: B samples, h×w latent grid, L = h·w image tokens, V visible ones, C latent channels, K buffer tokens, T text
tokens, E / D MAR encoder / decoder width, H language model width, M noise draws per token.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.embeddings import get_timestep_embedding
from PIL import Image
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2ForCausalLM
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from reca_trainer.models.contract import (
    Generators,
    UnifiedModel,
    UnifiedOutput,
    check_only_size,
    count_answer_tokens,
    evaluating,
    per_sample,
    token_cross_entropy,
)
from reca_trainer.models.harmon.configuration_harmon import HarmonConfig, HarmonMarConfig
from reca_trainer.models.harmon.processing_harmon import HarmonProcessor

# --- masking -------------------------------------------------------------------------------------------------------


def mask_rate(quantile: Tensor, minimum: float = 0.7) -> Tensor:
    """Share of tokens to hide: the normal distribution N(1, 0.25²) truncated to [`minimum`, 1], at `quantile`
    (float64, in [0, 1])."""
    low = torch.special.ndtr(quantile.new_tensor((minimum - 1) / 0.25))
    return 1 + 0.25 * torch.special.ndtri(low + quantile * (0.5 - low))


def hidden_counts(num_tokens: int, num_iterations: int) -> list[int]:
    """Tokens still hidden after each sampling iteration: a quarter cosine that reveals at least one per iteration. The
    last iteration reveals what is left."""
    counts = [num_tokens]
    for iteration in range(1, num_iterations):
        target = math.floor(num_tokens * math.cos(math.pi / 2 * iteration / num_iterations))
        counts.append(max(1, min(target, counts[-1] - 1)))
    return [*counts[1:], 0]


class Visible(NamedTuple):
    """The visible tokens of a batch of masked images, in raster order.

    Attributes:
        index: `[B, V]` int64, their places; V is the largest number of visible tokens in the batch.
        valid: `[B, V]` bool, false where a row has fewer than V; `None` if no row has.
    """

    index: Tensor
    valid: Tensor | None

    @classmethod
    def of(cls, mask: Tensor) -> Visible:
        """From `mask`, `[B, L]` bool, true where hidden."""
        counts = (~mask).sum(1)
        most = int(counts.max())
        index = mask.int().argsort(dim=1, stable=True)[:, :most]
        if int(counts.min()) == most:
            return cls(index, None)
        return cls(index, torch.arange(most, device=mask.device) < counts[:, None])

    def to(self, device: torch.device) -> Visible:
        return Visible(self.index.to(device), None if self.valid is None else self.valid.to(device))


# --- MAR encoder and decoder ---------------------------------------------------------------------------------------


class MarAttention(nn.Module):
    """Bidirectional self-attention."""

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
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, dropout_p=dropout)
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
    """Masked autoregressive image model: encoder, decoder and diffusion head, without the language model between."""

    def __init__(self, config: HarmonMarConfig):
        super().__init__()
        self.buffer_size, self.native_grid = config.buffer_size, config.native_grid
        encoder_dim, decoder_dim, native = config.encoder_embed_dim, config.decoder_embed_dim, config.native_grid**2

        # Published checkpoints hold a class table that Harmon never uses: a buffer, so that no optimizer and no
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
        """Fit a position table `[1, (K +) native, D]` to `grid`: bilinear for the image part, buffers unchanged.

        Returns `[1, (K +) h*w, D]`.
        """
        native = self.native_grid
        if grid == (native, native):
            return table
        buffers, image = table.split([table.shape[1] - native**2, native**2], dim=1)
        image = image.unflatten(1, (native, native)).permute(0, 3, 1, 2)  # [1, D, native, native]
        image = F.interpolate(image.float(), size=grid, mode="bilinear").to(table.dtype)
        return torch.cat([buffers, image.flatten(2).mT], dim=1)

    def encode(self, latents: Tensor, visible: Visible | None = None) -> Tensor:
        """Encode latents `[B, h, w, C]`, all of them or the `visible` ones, to `[B, K + V, E]`, buffers first."""
        x = self.z_proj(latents.flatten(1, 2).to(self.fake_latent.dtype))  # [B, L, E]
        buffers = self.fake_latent.to(x.dtype).expand(len(x), self.buffer_size, -1)
        x = torch.cat([buffers, x], dim=1)
        x = self.z_proj_ln(x + self.position_embeddings(self.encoder_pos_embed_learned, latents.shape[1:3]))
        attention_mask = None
        if visible is not None:
            buffers, x = x.split([self.buffer_size, x.shape[1] - self.buffer_size], dim=1)
            x = x.gather(1, visible.index[..., None].expand(-1, -1, x.shape[-1]))
            x = torch.cat([buffers, x], dim=1)  # [B, K + V, E]
            if visible.valid is not None:
                attention_mask = F.pad(visible.valid, (self.buffer_size, 0), value=True)[:, None, None]
        for block in self.encoder_blocks:
            x = block(x, attention_mask)
        return self.encoder_norm(x)

    def decode(self, x: Tensor, visible: Visible, grid: tuple[int, int]) -> Tensor:
        """From the fused `[B, K + V, E]` to what the diffusion head is conditioned on, `[B, L, D]`."""
        x = self.decoder_embed(x)
        buffers, tokens = x.split([self.buffer_size, x.shape[1] - self.buffer_size], dim=1)
        mask_token = self.mask_token.to(x.dtype)
        if visible.valid is not None:
            tokens = torch.where(visible.valid[..., None], tokens, mask_token)
        slots = mask_token.expand(len(x), grid[0] * grid[1], -1)
        slots = slots.scatter(1, visible.index[..., None].expand_as(tokens), tokens)
        x = torch.cat([buffers, slots], dim=1)
        x = x + self.position_embeddings(self.decoder_pos_embed_learned, grid)
        for block in self.decoder_blocks:
            x = block(x)
        x = self.decoder_norm(x)[:, self.buffer_size :]
        return x + self.position_embeddings(self.diffusion_pos_embed_learned, grid)


# --- diffusion of one token ----------------------------------------------------------------------------------------


def kept_timesteps(spacing: str, num_timesteps: int = 1000) -> list[int]:
    """The training timesteps that a sampler keeps, ascending.

    `"N"` keeps N evenly spaced ones including both ends, `"N,M,…"` that many in each of as many equal sections, and
    `"ddimN"` every k-th from 0, for the integer k that gives N.
    """
    if spacing.startswith("ddim"):
        count = int(spacing.removeprefix("ddim"))
        for stride in range(1, num_timesteps):
            if len(range(0, num_timesteps, stride)) == count:
                return list(range(0, num_timesteps, stride))
        raise ValueError(f"num_sampling_steps={spacing!r}: no integer stride keeps {count} of {num_timesteps} steps.")
    counts = [int(count) for count in spacing.split(",")]
    short, longer = divmod(num_timesteps, len(counts))
    kept, start = [], 0
    for section, count in enumerate(counts):
        length = short + (section < longer)
        if not 1 <= count <= length:
            raise ValueError(f"num_sampling_steps={spacing!r}: cannot keep {count} of a section's {length} steps.")
        stride = (length - 1) / (count - 1) if count > 1 else 0.0
        kept += [start + round(stride * step) for step in range(count)]
        start += length
    return kept


class GaussianDiffusion:
    """The noise schedule of improved DDPM (arXiv:2102.09672): squared cosine, ε prediction, learned variance range.

    diffusers' `DDPMScheduler` samples from this model, but has neither the variational bound that trains the variance
    nor float64 tables, which ε prediction needs at the cosine schedule's last steps (ᾱ ≈ 2e-9).

    Args:
        spacing: which of the 1000 training timesteps to keep, see `kept_timesteps`; all by default.
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
        """x_t = √ᾱ_t x0 + √(1 - ᾱ_t) ε, float32; `timesteps` has the shape of `noise` without its last dimension."""
        signal, sigma = self._at(timesteps, self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt())
        return signal * x0 + sigma * noise

    def posterior(self, output: Tensor, noise_prediction: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of p(x_{t-1} | x_t) for the head's `output` `[..., 2C]`, whose second half places the
        variance between the posterior's and β; the first half is replaced by `noise_prediction` `[..., C]`."""
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

        The bound (eq. 16 of arXiv:2102.09672) trains the variance only: ε is detached in it.
        """
        prediction = output.chunk(2, dim=-1)[0]
        error = (noise - prediction).square().mean(-1)

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
        )
        likelihood = discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_variance)
        bound = torch.where(timesteps[..., None] == 0, -likelihood, divergence).mean(-1) / math.log(2)
        return error, bound

    @staticmethod
    def _at(timesteps: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
        """The tables' values at `timesteps`, float32, with a trailing channel dimension."""
        return torch.stack(tables).float().to(timesteps.device)[:, timesteps, None].unbind()


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log of the mass that a Gaussian puts on x's bin of width 2/255, the outermost bins open (as in DDPM). The CDF is
    the tanh approximation that improved DDPM trains with."""

    def cdf(value: Tensor) -> Tensor:
        value = (value - mean) * torch.exp(-log_scale)
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    upper, lower = cdf(x + 1 / 255), cdf(x - 1 / 255)
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


class TimestepEmbedding(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        features = get_timestep_embedding(timesteps.flatten(), 256, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.mlp(features.to(self.mlp[0].weight.dtype)).unflatten(0, timesteps.shape)


class ResidualBlock(GradientCheckpointingLayer):
    """MLP with adaptive layer norm: shift, scale and gate come from the condition."""

    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    def __init__(self, width: int, out_channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(self.norm(x) * (1 + scale) + shift)


class DenoisingMLP(nn.Module):
    """Predicts noise and variance of a noised token `[..., C]` at `timesteps` `[...]`, given `z` `[..., D]`."""

    def __init__(self, channels: int, z_dim: int, width: int, depth: int):
        super().__init__()
        self.time_embed = TimestepEmbedding(width)
        self.cond_embed = nn.Linear(z_dim, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels)

    def forward(self, x: Tensor, timesteps: Tensor, z: Tensor) -> Tensor:
        dtype = self.input_proj.weight.dtype
        condition = self.time_embed(timesteps) + self.cond_embed(z.to(dtype))
        x = self.input_proj(x.to(dtype))
        for block in self.res_blocks:
            x = block(x, condition)
        return self.final_layer(x, condition).float()  # [..., 2C]


class DiffusionHead(nn.Module):
    """The diffusion loss of MAR (arXiv:2406.11838, section 3.2), and the sampler that goes with it."""

    def __init__(self, config: HarmonMarConfig):
        super().__init__()
        self.net = DenoisingMLP(config.vae_embed_dim, config.decoder_embed_dim, config.diffloss_w, config.diffloss_d)
        self.training_diffusion = GaussianDiffusion()
        self.sampling_diffusion = GaussianDiffusion(config.num_sampling_steps)

    def forward(self, z: Tensor, x0: Tensor, timesteps: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Loss per noised token `[...]`, and the predicted noise `[..., C]`. `z` and `x0` broadcast to `noise`."""
        x_t = self.training_diffusion.add_noise(x0, noise, timesteps)
        output = self.net(x_t, timesteps, z)
        error, bound = self.training_diffusion.losses(output, x0, x_t, noise, timesteps)
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
            noise: `[N, 1 + steps, C]`, the starting point and the noise of each step in the order of the steps.
            guidance_scale: s in ε = ε_uncond + s (ε_cond - ε_uncond). The variance is the conditional one.
            temperature: factor on the noise of the steps.

        Returns `[N, C]` float32.
        """
        diffusion = diffusion or self.sampling_diffusion
        x = noise[:, 0]
        steps = len(diffusion.timestep_map)
        for step, t in enumerate(reversed(range(steps))):
            index = torch.full((len(x),), t, device=x.device)
            timestep = torch.full((len(z),), int(diffusion.timestep_map[t]), device=x.device)
            output = self.net(x if len(z) == len(x) else torch.cat([x, x]), timestep, z)
            prediction = output.chunk(2, dim=-1)[0]
            if len(z) != len(x):
                conditional, unconditional = prediction.chunk(2)
                prediction = unconditional + guidance_scale * (conditional - unconditional)
                output = output[: len(x)]
            x, log_variance = diffusion.posterior(output, prediction, x, index)
            if t > 0:
                x = x + torch.exp(0.5 * log_variance) * noise[:, 1 + step] * temperature
        return x


# --- the model -----------------------------------------------------------------------------------------------------


class HarmonModel(UnifiedModel):
    """Harmon: `vae` (KL-16, frozen), `mar`, `llm` (Qwen2) and the projections between the latter two.

    Reconstruction and captions read the same understanding embeddings, through the same weights that generate: RecA
    trains all of them (`llm`, `mar`, `proj_in`, `proj_out`) and keeps understanding with a caption loss beside
    the reconstruction loss.

    LoRA goes to every linear layer of language model, MAR and projections, because generation runs through all of
    them; the text head (tied to the embedding) and the autoencoder stay as they are.
    """

    config_class = HarmonConfig
    config: HarmonConfig
    shares_weights = True
    lora_target_modules = (
        r"llm\.model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
        r"|mar\.(z_proj|decoder_embed|(encoder|decoder)_blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12]))"
        r"|mar\.diffloss\.net\..*(mlp\.[02]|cond_embed|input_proj|linear|adaLN_modulation\.1)"
        r"|proj_(in|out)\.[02]"
    )
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules = ("vae", "mar.diffloss")  # never float16, never quantised
    _keep_in_fp32_modules_strict = ("vae",)  # small and frozen: never bfloat16 either
    _no_split_modules = ("Qwen2DecoderLayer", "MarBlock", "ResidualBlock")
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: HarmonConfig):
        super().__init__(config)
        encoder_dim, hidden_size = config.mar_config.encoder_embed_dim, config.text_config.hidden_size
        self.vae = AutoencoderKL(**config.vae_config).eval()
        for module in self.vae.modules():
            module._is_hf_initialized = True  # a new autoencoder keeps diffusers' initialisation
        self.mar = Mar(config.mar_config)
        self.proj_in = nn.Sequential(
            nn.Linear(encoder_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.llm = Qwen2ForCausalLM(config.text_config)
        self.proj_out = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, encoder_dim)
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Mar):
            for table in (module.fake_latent, module.mask_token, module.encoder_pos_embed_learned,
                          module.decoder_pos_embed_learned, module.diffusion_pos_embed_learned,
                          module.class_emb.weight):  # fmt: skip
                init.normal_(table, std=0.02)
        elif isinstance(module, ResidualBlock | FinalLayer):  # starts as the identity, as in DiT
            init.zeros_(module.adaLN_modulation[1].weight)
            if isinstance(module, FinalLayer):
                init.zeros_(module.linear.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    @property
    def generation_modules(self) -> list[str]:
        return ["llm", "mar", "proj_in", "proj_out"]

    @property
    def understanding_modules(self) -> list[str]:
        """None: understanding and generation share all trained weights."""
        return []

    @property
    def frozen_modules(self) -> list[str]:
        return ["vae"]

    # losses

    def _reconstruct(
        self,
        corruption: dict[str, Tensor],
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        condition_pixel_values: Tensor | None = None,
    ) -> UnifiedOutput:
        """The image again from its understanding embeddings, which enter each row of `input_ids` at its one
        `config.image_token_id`. Without `condition_pixel_values` the condition is the target image."""
        latents = self.encode_target(pixel_values)  # [B, h, w, C]
        if condition_pixel_values is None:
            understanding = self.understand(latents)
        else:
            understanding = self.encode_condition(condition_pixel_values)
        understanding = self._scale_gradient(understanding)  # [B, S, H]
        return self._diffusion_loss(corruption, latents, input_ids, attention_mask, understanding)

    def _generate(
        self,
        corruption: dict[str, Tensor],
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
    ) -> UnifiedOutput:
        """Text-to-image."""
        return self._diffusion_loss(corruption, self.encode_target(pixel_values), input_ids, attention_mask)

    def _diffusion_loss(
        self,
        corruption: dict[str, Tensor],
        latents: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        understanding: Tensor | None = None,
    ) -> UnifiedOutput:
        """MAR's diffusion loss of latents `[B, h, w, C]`, the mean over hidden tokens and noise draws."""
        visible = Visible.of(corruption["mask"]).to(self.device)
        corruption = {name: value.to(self.device) for name, value in corruption.items()}
        context, context_mask, _ = self._embed(input_ids, attention_mask, understanding)

        z = self._predict(latents, visible, context, context_mask)  # [B, L, D]
        losses, prediction = self.mar.diffloss(
            z[:, None], latents.flatten(1, 2)[:, None], corruption["timesteps"], corruption["noise"]
        )  # [B, M, L], [B, M, L, C]

        mask = corruption["mask"].float()
        losses = losses.mean(1) * mask  # [B, L]
        return UnifiedOutput(
            loss=losses.sum() / mask.sum(),
            per_sample_loss=(losses.sum(1) / mask.sum(1)).detach(),
            prediction=prediction,
            target=corruption["noise"],
            understanding_embeds=understanding,
        )

    def _predict(self, latents: Tensor, visible: Visible, context: Tensor, context_mask: Tensor) -> Tensor:
        """What the diffusion head is conditioned on, `[B, L, D]`, from the visible tokens and the context."""
        encoded = self.mar.encode(latents, visible)
        fused = self._fuse(encoded, visible, context_mask, context)
        return self.mar.decode(fused, visible, tuple(latents.shape[1:3]))

    def _caption(
        self,
        corruption: dict[str, Tensor],
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        condition_pixel_values: Tensor | None = None,
    ) -> UnifiedOutput:
        """Next-token cross-entropy of the answers. The image, if there is one, enters each row of `input_ids` at its one
        `config.image_token_id`."""
        understanding = None
        if condition_pixel_values is not None:
            understanding = self._scale_gradient(self.encode_condition(condition_pixel_values))
        embeds, mask, labels = self._embed(input_ids, attention_mask, understanding, labels)
        hidden = self.llm.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        return token_cross_entropy(self.llm.lm_head, hidden[:, :-1], labels[:, 1:], understanding)

    def encode_condition(self, condition_pixel_values: Tensor) -> Tensor:
        """See `UnifiedModel.encode_condition`: `understand` of the images' latents, `[B, L + K, H]`."""
        return self.understand(self.encode_target(condition_pixel_values))

    @torch.no_grad()
    def encode_target(self, pixel_values: Tensor) -> Tensor:
        """Latents `[B, h, w, C]` float32 of images `[B, 3, H, W]` in [-1, 1]: the posterior's mean, scaled."""
        mean = self.vae.encode(pixel_values.to(self.vae.dtype)).latent_dist.mean
        return (mean.float() * self.vae.config.scaling_factor).permute(0, 2, 3, 1)

    @torch.no_grad()
    def decode_target(self, target: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` float32, about [-1, 1], of latents `[B, h, w, C]`."""
        latents = target.permute(0, 3, 1, 2) / self.vae.config.scaling_factor
        return self.vae.decode(latents.to(self.vae.dtype)).sample.float()

    def understand(self, latents: Tensor) -> Tensor:
        """Understanding embeddings `[B, L + K, H]` of latents `[B, h, w, C]`: image tokens first, buffers last."""
        return self.proj_in(self.mar.encode(latents)).roll(-self.mar.buffer_size, dims=1)

    def _scale_gradient(self, x: Tensor) -> Tensor:
        return x.detach() + self.config.understanding_grad_scale * (x - x.detach())

    def _embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        image_embeds: Tensor | None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Embed text and put an image's `[B, S, H]` embeddings where its placeholder is.

        Returns embeddings `[B, T - 1 + S, H]`, attention mask and labels `[B, T - 1 + S]`.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        is_image = input_ids == self.config.image_token_id
        expected = 0 if image_embeds is None else 1
        if (is_image.sum(1) != expected).any():
            raise ValueError(
                f"Each row of input_ids must hold {expected} image placeholders (id {self.config.image_token_id}), "
                f"found {is_image.sum(1).tolist()}."
            )
        if image_embeds is not None:
            repeats = torch.where(is_image, image_embeds.shape[1], 1).flatten()

            def expand(x: Tensor) -> Tensor:
                return x.flatten().repeat_interleave(repeats).view(len(x), -1)

            input_ids, attention_mask, is_image = expand(input_ids), expand(attention_mask), expand(is_image)
            labels = None if labels is None else expand(labels)
        embeds = self.llm.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        if image_embeds is not None:
            embeds = embeds.masked_scatter(is_image[..., None], image_embeds.to(embeds.dtype))
        return embeds, attention_mask, labels

    def _fuse(
        self,
        encoded: Tensor,
        visible: Visible,
        context_mask: Tensor,
        context: Tensor | None = None,
        cache: DynamicCache | None = None,
    ) -> Tensor:
        """Add to the encoded tokens `[B, K + V, E]` what the language model makes of them after the context, which is
        given as embeddings `[B, T, H]` or as a filled cache, with its mask `[B, T]`."""
        buffers = self.mar.buffer_size
        tokens = self.proj_in(encoded).roll(-buffers, dims=1)  # buffers last
        valid = torch.ones(tokens.shape[:2], dtype=context_mask.dtype, device=tokens.device)
        if visible.valid is not None:
            valid[:, :-buffers] = visible.valid
        mask = torch.cat([context_mask, valid], dim=1)
        inputs = tokens if context is None else torch.cat([context, tokens.to(context.dtype)], dim=1)
        hidden = self.llm.model(
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=positions(mask)[:, -inputs.shape[1] :],
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state[:, -tokens.shape[1] :]
        return encoded + self.proj_out(hidden.roll(buffers, dims=1))

    def sample_corruption(self, batch: dict[str, Any], generator: Generators = None) -> dict[str, Tensor]:
        """Draw which tokens to hide, and the timesteps and noise of the diffusion loss.

        Returns `mask` `[B, L]` bool, `timesteps` `[B, M, L]` int64, `noise` `[B, M, L, C]` float32; nothing for
        `caption`. Each sample has its own mask rate, where the original draws one per batch: a sample's draws then do
        not depend on its batch.
        """
        if "pixel_values" not in batch:
            return {}
        config = self.config.mar_config
        batch_size, _, height, width = batch["pixel_values"].shape
        length = (height // config.vae_stride) * (width // config.vae_stride)
        shape = (config.diffusion_batch_mul, length)

        def draw_mask(generator: torch.Generator | None) -> Tensor:
            rate = mask_rate(torch.rand((), generator=generator, dtype=torch.float64), config.mask_ratio_min)
            order = torch.randperm(length, generator=generator)
            mask = torch.zeros(length, dtype=torch.bool)
            mask[order[: math.ceil(length * float(rate))]] = True
            return mask

        return {
            "mask": per_sample(draw_mask, batch_size, generator),
            "timesteps": per_sample(lambda g: torch.randint(1000, shape, generator=g), batch_size, generator),
            "noise": per_sample(
                lambda g: torch.randn(*shape, config.vae_embed_dim, generator=g), batch_size, generator
            ),
        }

    def decays(self, name: str, shape: torch.Size) -> bool:
        return len(shape) != 1 and "diffloss" not in name

    def count_supervised(self, batch: dict[str, Any], corruption: dict[str, Tensor]) -> int:
        """Supervised tokens of a caption, else the hidden image tokens."""
        if "labels" in batch:
            return count_answer_tokens(batch["labels"])
        return int(corruption["mask"].sum())

    # sampling

    def example_batch(
        self,
        batch_size: int,
        max_image_size: int | None = None,
        min_image_size: int | None = None,
        text_length: int = 32,
    ) -> dict[str, Any]:
        """See `UnifiedModel.example_batch`. Targets have twice the side that the position tables were made for, as in the
        published checkpoints."""
        side = 2 * self.config.mar_config.img_size
        check_only_size(side, max_image_size, min_image_size)
        input_ids = torch.zeros(batch_size, 1 + text_length, dtype=torch.long)
        input_ids[:, 0] = self.config.image_token_id
        return {
            "task": "reconstruct",
            "pixel_values": torch.zeros(batch_size, 3, side, side),
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }

    @evaluating
    def generate_images(
        self,
        processor: HarmonProcessor,
        text: list[str] | None = None,
        images: list[Image.Image] | None = None,
        *,
        task: str = "generate",
        generator: Generators = None,
        num_inference_steps: int = 64,
        guidance_scale: float = 3.0,
        guidance_schedule: str = "constant",
        temperature: float = 1.0,
        height: int | None = None,
        width: int | None = None,
    ) -> list[Image.Image]:
        """Generate images, see `UnifiedModel.generate_images`.

        Args:
            num_inference_steps: iterations that reveal tokens, at most one per token.
            guidance_scale: classifier-free guidance against "Generate an image."; 1 turns it off.
            guidance_schedule: `"constant"`, or `"linear"` from 1 to `guidance_scale` as tokens are revealed.
            temperature: factor on the diffusion head's step noise.
            height, width: in pixels, multiples of the autoencoder's stride; the processor's `image_size` by default.
        """
        given = {"generate": text, "reconstruct": images}
        if task not in given:
            raise ValueError(f"task is {task!r}; Harmon generates images for 'generate' and 'reconstruct'.")
        if given[task] is None:
            raise ValueError(f"task {task!r} needs {'text' if task == 'generate' else 'images'}.")
        count = len(given[task])
        text = [""] * count if text is None else text
        if len(text) != count:
            raise ValueError(f"Got {count} images and {len(text)} instructions; pass one per image.")
        stride = self.config.mar_config.vae_stride
        size = (height or processor.image_size, width or processor.image_size)
        if size[0] % stride or size[1] % stride:
            raise ValueError(f"height and width must be multiples of {stride}, got {size}.")
        grid = (size[0] // stride, size[1] // stride)

        prompts, understanding = processor.prompt_ids(text, task), None
        if task == "reconstruct":
            pixel_values = processor(images=images, instruction="", task=task, size=size)["pixel_values"]
            understanding = self.encode_condition(pixel_values.to(self.device))
        context, context_mask = self._embed_prompts(processor, prompts, understanding)
        if guidance_scale != 1:
            prompts = processor.prompt_ids([""] * count, "generate", dropped=[True] * count)
            unconditional = self._embed_prompts(processor, prompts, None)
            context, context_mask = stack_prompts((context, context_mask), unconditional)
        latents = self.sample_latents(
            context,
            context_mask,
            **self.sample_noise(count, grid, generator),
            grid=grid,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            temperature=temperature,
        )
        pixels = (127.5 * self.decode_target(latents) + 128).clamp(0, 255).to(torch.uint8)
        return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]

    def sample_noise(self, batch_size: int, grid: tuple[int, int], generator: Generators = None) -> dict[str, Tensor]:
        """Draw everything random in sampling: `order` `[B, L]` int64 (tokens are revealed from its end) and `noise`
        `[B, L, 1 + steps, C]` float32 (the diffusion head's noise for each token)."""
        length = grid[0] * grid[1]
        steps = len(self.mar.diffloss.sampling_diffusion.timestep_map)
        shape = (length, 1 + steps, self.config.mar_config.vae_embed_dim)
        return {
            "order": per_sample(lambda g: torch.randperm(length, generator=g), batch_size, generator),
            "noise": per_sample(lambda g: torch.randn(shape, generator=g), batch_size, generator),
        }

    def sample_latents(
        self,
        context: Tensor,
        context_mask: Tensor,
        order: Tensor,
        noise: Tensor,
        grid: tuple[int, int],
        num_inference_steps: int = 64,
        guidance_scale: float = 3.0,
        guidance_schedule: str = "constant",
        temperature: float = 1.0,
    ) -> Tensor:
        """Sample latents `[B, h, w, C]`, deterministic given `order` and `noise` from `sample_noise`.

        Args:
            context: `[B, T, H]`, or `[2B, T, H]` with guidance, the conditional half first.
            context_mask: the same without H, false at padding on the right.
        """
        if guidance_schedule not in ("constant", "linear"):
            raise ValueError(f"guidance_schedule must be 'constant' or 'linear', got {guidance_schedule!r}.")
        order, noise = order.to(self.device), noise.to(self.device)
        batch_size, length = order.shape
        copies = len(context) // batch_size
        cache = DynamicCache(config=self.config.text_config)
        self.llm.model(
            inputs_embeds=context,
            attention_mask=context_mask,
            position_ids=positions(context_mask),
            past_key_values=cache,
            use_cache=True,
        )

        tokens = noise.new_zeros(batch_size, length, noise.shape[-1])
        hidden = length
        for remaining in hidden_counts(length, min(num_inference_steps, length)):
            visible = Visible(order[:, hidden:].sort(dim=1).values, None)
            encoded = self.mar.encode(tokens.unflatten(1, grid), visible).repeat(copies, 1, 1)
            visible = Visible(visible.index.repeat(copies, 1), None)
            fused = self._fuse(encoded, visible, context_mask, cache=cache)
            cache.crop(-encoded.shape[1])
            z = self.mar.decode(fused, visible, grid)  # [copies * B, L, D]

            rows = torch.arange(batch_size, device=order.device)[:, None]
            chosen = order[:, remaining:hidden].sort(dim=1).values  # [B, n]
            z = z.view(copies, batch_size, length, -1)[:, rows, chosen].flatten(0, 2)  # [copies * B * n, D]
            scale = guidance_scale
            if guidance_schedule == "linear":
                revealed = length - max(remaining, 1)  # the original counts one token as hidden to the end
                scale = 1 + (guidance_scale - 1) * revealed / length
            sampled = self.mar.diffloss.sample(z, noise[rows, chosen].flatten(0, 1), scale, temperature)
            tokens[rows, chosen] = sampled.unflatten(0, chosen.shape)
            hidden = remaining
        return tokens.unflatten(1, grid)

    def _embed_prompts(
        self, processor: HarmonProcessor, prompts: list[list[int]], image_embeds: Tensor | None, side: str = "right"
    ) -> tuple[Tensor, Tensor]:
        ids, mask = processor.pad(prompts, side)
        return self._embed(ids.to(self.device), mask.to(self.device), image_embeds)[:2]

    @evaluating
    def generate_text(
        self,
        processor: HarmonProcessor,
        text: list[str],
        images: list[Image.Image] | None = None,
        *,
        generator: torch.Generator | None = None,
        max_new_tokens: int = 128,
        **sampling: Any,
    ) -> list[str]:
        """Answer questions, greedily unless `sampling` (arguments of transformers' `generate`) says otherwise;
        `generator` then seeds the draws."""
        with torch.random.fork_rng(enabled=generator is not None):
            if generator is not None:
                torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            understanding = None
            if images is not None:
                pixel_values = processor.condition_pixels(images).to(self.device)
                understanding = self.encode_condition(pixel_values)
            prompts = processor.question_ids(text, with_image=images is not None)
            embeds, mask = self._embed_prompts(processor, prompts, understanding, side="left")
            answers = self.llm.generate(
                inputs_embeds=embeds,
                attention_mask=mask,
                **{"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": processor.end_id,
                   "pad_token_id": processor.end_id, **sampling},
            )  # fmt: skip
        return [answer.strip() for answer in processor.tokenizer.batch_decode(answers, skip_special_tokens=True)]


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids `[B, T]` that count the tokens which `attention_mask` keeps, padding aside."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def stack_prompts(*prompts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Stack batches of embeddings `[B, T, H]` and masks `[B, T]`, padded on the right to the longest."""
    longest = max(embeds.shape[1] for embeds, _ in prompts)
    embeds = torch.cat([F.pad(embeds, (0, 0, 0, longest - embeds.shape[1])) for embeds, _ in prompts])
    return embeds, torch.cat([F.pad(mask, (0, longest - mask.shape[1])) for _, mask in prompts])
