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
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2ForCausalLM
from transformers import initialization as init

from reca_trainer.models.common.condition_dropout import drop_condition
from reca_trainer.models.common.padding import Side, stack_padded
from reca_trainer.models.common.pixels import to_images
from reca_trainer.models.common.token_sampling import generate_answers
from reca_trainer.models.contract import (
    Generators,
    UnifiedModel,
    UnifiedOutput,
    check_only_size,
    count_answer_tokens,
    per_sample,
    token_cross_entropy,
)
from reca_trainer.models.harmon.configuration_harmon import HarmonConfig
from reca_trainer.models.harmon.mar_harmon import FinalLayer, Mar, ResidualBlock, Visible, hidden_counts, mask_rate
from reca_trainer.models.harmon.processing_harmon import MAX_SIDE, HarmonProcessor


class HarmonModel(UnifiedModel):
    """Harmon: `vae` (KL-16, frozen), `mar`, `llm` (Qwen2), and the projections `proj_in` and `proj_out` around `llm`.

    Reconstruction and captions read the same understanding embeddings, through the same weights that generate: RecA
    trains all of them (`llm`, `mar`, `proj_in`, `proj_out`) and keeps understanding with a caption loss beside
    the reconstruction loss.

    LoRA adapts every linear layer of language model, MAR and projections, because generation runs through all of them,
    but not the text head (tied to the embedding) and the autoencoder.
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
    frozen_encoders = ("vae",)
    supports_gradient_checkpointing = True
    supports_condition_token_dropout = True
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

    @property
    def image_sides(self) -> range:
        stride = self.config.mar_config.vae_stride
        return range(stride, MAX_SIDE + 1, stride)

    # --- losses ---

    def _reconstruct(
        self,
        corruption: dict[str, Tensor],
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        condition_pixel_values: Tensor | None = None,
        latents: Tensor | None = None,
    ) -> UnifiedOutput:
        """RecA: read the image's own embeddings and the instruction, then predict the image's hidden tokens.

        Args:
            input_ids, attention_mask: `[B, t]`, the prompts; the embeddings replace the one `config.image_token_id` of a row.
            condition_pixel_values: `[B, 3, H', W']`; by default the condition is the target image.
            latents: `[B, h, w, C]`, the result of `encode_batch`, an alternative to `pixel_values`.
        """
        latents = self.encode_target(pixel_values) if latents is None else latents  # [B, h, w, C]
        if condition_pixel_values is None:
            understanding = self.understand(latents)  # [B, L + K, H]
        else:
            understanding = self.encode_condition(condition_pixel_values)  # [B, L' + K, H]
        understanding = self._scale_gradient(understanding)
        return self._diffusion_loss(corruption, latents, input_ids, attention_mask, understanding)

    def _generate(
        self,
        corruption: dict[str, Tensor],
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
    ) -> UnifiedOutput:
        """Text-to-image: predict the image's hidden tokens behind the caption."""
        latents = self.encode_target(pixel_values)  # [B, h, w, C]
        return self._diffusion_loss(corruption, latents, input_ids, attention_mask)

    def _diffusion_loss(
        self,
        corruption: dict[str, Tensor],
        latents: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        understanding: Tensor | None = None,
    ) -> UnifiedOutput:
        """MAR's diffusion loss (arXiv:2406.11838) of latents `[B, h, w, C]`, the mean over hidden tokens and noise draws.

        Args:
            corruption: see `sample_corruption`.
            input_ids, attention_mask: `[B, t]`, the prompts, with an image's place if there is `understanding` `[B, S, H]`.
        """
        visible = Visible.of(corruption["mask"]).to(self.device)
        corruption = {name: value.to(self.device) for name, value in corruption.items()}
        context, context_mask, _ = self._embed(input_ids, attention_mask, understanding)  # [B, T, H], [B, T]
        if understanding is not None:
            start = (input_ids == self.config.image_token_id).int().argmax(1, keepdim=True)  # [B, 1]
            order = torch.arange(context.shape[1], device=start.device)
            places = (order >= start) & (order < start + understanding.shape[1])  # [B, T]
            context_mask = drop_condition(corruption, context_mask, places)
        z = self._predict(latents, visible, context, context_mask)  # [B, L, D]
        tokens = latents.flatten(1, 2)  # [B, L, C]
        losses, prediction = self.mar.diffloss(
            z[:, None], tokens[:, None], corruption["timesteps"], corruption["noise"]
        )  # [B, M, L], [B, M, L, C]
        mask = corruption["mask"].float()  # [B, L]
        losses = losses.mean(1) * mask  # [B, L]
        return UnifiedOutput(
            loss=losses.sum() / mask.sum(),
            per_sample_loss=(losses.sum(1) / mask.sum(1)).detach(),
            prediction=prediction,
            target=corruption["noise"],
            understanding_embeds=understanding,
        )

    def _caption(
        self,
        corruption: dict[str, Tensor],
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        condition_pixel_values: Tensor | None = None,
    ) -> UnifiedOutput:
        """Image-to-text, or text alone: next-token cross-entropy of the answers. The image's embeddings replace the one
        `config.image_token_id` of a row of `input_ids` `[B, t]`."""
        understanding = None
        if condition_pixel_values is not None:
            understanding = self._scale_gradient(self.encode_condition(condition_pixel_values))  # [B, L + K, H]
        embeds, mask, labels = self._embed(input_ids, attention_mask, understanding, labels)  # [B, T, H], [B, T] both
        hidden = self.llm.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        return token_cross_entropy(self.llm.lm_head, hidden[:, :-1], labels[:, 1:], understanding)

    # --- encodings ---

    def encode_condition(self, condition_pixel_values: Tensor) -> Tensor:
        """See `UnifiedModel.encode_condition`: `understand` of the images' latents, `[B, L + K, H]`."""
        return self.understand(self.encode_target(condition_pixel_values))

    @torch.no_grad()
    def encode_target(self, pixel_values: Tensor) -> Tensor:
        """Latents `[B, h, w, C]` float32 of images `[B, 3, H, W]` in [-1, 1]: the posterior's mean, scaled."""
        mean = self.vae.encode(pixel_values.to(self.vae.dtype)).latent_dist.mean  # [B, C, h, w]
        return (mean.float() * self.vae.config.scaling_factor).permute(0, 2, 3, 1)

    @torch.no_grad()
    def decode_target(self, target: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` float32, about [-1, 1], of latents `[B, h, w, C]`."""
        latents = target.permute(0, 3, 1, 2) / self.vae.config.scaling_factor  # [B, C, h, w]
        return self.vae.decode(latents.to(self.vae.dtype)).sample.float()

    def encode_batch(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See `UnifiedModel.encode_batch`: `latents` `[B, h, w, C]`. MAR's encoder, which reads them, is trained."""
        return {"latents": self.encode_target(batch["pixel_values"])}

    def understand(self, latents: Tensor) -> Tensor:
        """Understanding embeddings `[B, L + K, H]` of latents `[B, h, w, C]`: image tokens first, buffers last."""
        return self.proj_in(self.mar.encode(latents)).roll(-self.mar.buffer_size, dims=1)

    def _scale_gradient(self, x: Tensor) -> Tensor:
        """`x` itself, whose gradient is multiplied by `config.understanding_grad_scale`."""
        return x.detach() + self.config.understanding_grad_scale * (x - x.detach())

    # --- the language model between MAR's encoder and decoder ---

    def _embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        image_embeds: Tensor | None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Embed texts `[B, t]` and replace an image's placeholder by its embeddings `[B, S, H]`.

        Returns:
            Embeddings `[B, T, H]`, attention mask and labels `[B, T]`; T is t, or with an image `t - 1 + S`.

        Raises:
            ValueError: a row has no placeholder for its image, or more than one.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        is_image = input_ids == self.config.image_token_id  # [B, t]
        expected = 0 if image_embeds is None else 1
        if (is_image.sum(1) != expected).any():
            raise ValueError(
                f"Each row of input_ids must hold {expected} image placeholders (id {self.config.image_token_id}), "
                f"found {is_image.sum(1).tolist()}."
            )
        if image_embeds is not None:
            repeats = torch.where(is_image, image_embeds.shape[1], 1).flatten()  # [B · t]

            def expand(x: Tensor) -> Tensor:  # [B, t] -> [B, T]
                return x.flatten().repeat_interleave(repeats).view(len(x), -1)

            input_ids, attention_mask, is_image = expand(input_ids), expand(attention_mask), expand(is_image)
            labels = None if labels is None else expand(labels)
        embeds = self.llm.get_input_embeddings()(input_ids.masked_fill(is_image, 0))  # [B, T, H]
        if image_embeds is not None:
            embeds = embeds.masked_scatter(is_image[..., None], image_embeds.to(embeds.dtype))
        return embeds, attention_mask, labels

    def _predict(self, latents: Tensor, visible: Visible, context: Tensor, context_mask: Tensor) -> Tensor:
        """The diffusion head's condition `[B, L, D]`, from the visible tokens and the context `[B, T, H]`."""
        encoded = self.mar.encode(latents, visible)  # [B, K + V, E]
        fused = self._fuse(encoded, visible, context_mask, context)  # [B, K + V, E]
        return self.mar.decode(fused, visible, tuple(latents.shape[1:3]))

    def _fuse(
        self,
        encoded: Tensor,
        visible: Visible,
        context_mask: Tensor,
        context: Tensor | None = None,
        cache: DynamicCache | None = None,
    ) -> Tensor:
        """The encoded tokens `[B, K + V, E]` plus the language model's output for them behind the context, which is given as
        embeddings `[B, T, H]` or as a filled cache, with its mask `[B, T]`."""
        buffers = self.mar.buffer_size
        tokens = self.proj_in(encoded).roll(-buffers, dims=1)  # [B, V + K, H]: buffers last
        valid = torch.ones(tokens.shape[:2], dtype=context_mask.dtype, device=tokens.device)
        if visible.valid is not None:
            valid[:, :-buffers] = visible.valid
        mask = torch.cat([context_mask, valid], dim=1)  # [B, T + V + K]
        inputs = tokens if context is None else torch.cat([context, tokens.to(context.dtype)], dim=1)
        position_ids = positions(mask)[:, -inputs.shape[1] :]  # [B, T + V + K], or [B, V + K] behind a cache
        # Positional arguments: releases of transformers differ in the name of the cache.
        output = self.llm.model(None, mask, position_ids, cache, inputs, use_cache=cache is not None)
        hidden = output.last_hidden_state[:, -tokens.shape[1] :]  # [B, V + K, H]
        return encoded + self.proj_out(hidden.roll(buffers, dims=1))

    # --- draws and counts ---

    def sample_corruption(self, batch: dict[str, Any], generator: Generators = None) -> dict[str, Tensor]:
        """Draw which tokens to hide, and the timesteps and noise of the diffusion loss.

        Returns:
            `mask` `[B, L]` bool, `timesteps` `[B, M, L]` int64, `noise` `[B, M, L, C]` float32; nothing for `caption`. The
            original draws one mask rate a batch. Here each sample has its own, so that its draws do not depend on its batch.
        """
        config = self.config.mar_config
        if "latents" in batch:
            batch_size, height, width, _ = batch["latents"].shape
        elif "pixel_values" in batch:
            batch_size = len(batch["pixel_values"])
            height, width = (side // config.vae_stride for side in batch["pixel_values"].shape[2:])
        else:
            return {}
        length = height * width
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

    def count_supervised(self, batch: dict[str, Any], corruption: dict[str, Tensor]) -> int:
        """Supervised tokens of a caption, else the hidden image tokens."""
        if "labels" in batch:
            return count_answer_tokens(batch["labels"])
        return int(corruption["mask"].sum())

    def decays(self, name: str, shape: torch.Size) -> bool:
        """See `UnifiedModel.decays`; the diffusion head has none."""
        return len(shape) != 1 and "diffloss" not in name

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

    # --- sampling ---

    def _generate_images(
        self,
        processor: HarmonProcessor,
        text: list[str] | None,
        images: list[Image.Image] | None,
        *,
        task: str,
        generator: Generators,
        num_inference_steps: int = 64,
        guidance_scale: float = 3.0,
        guidance_schedule: str = "constant",
        temperature: float = 1.0,
        negative_prompt: list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> list[Image.Image]:
        """See `UnifiedModel.generate_images`.

        Args:
            num_inference_steps: iterations that reveal tokens, at most as many as tokens.
            guidance_scale: classifier-free guidance against "Generate an image."; 1 turns it off.
            guidance_schedule: `"constant"`, or `"linear"` from 1 to `guidance_scale` as tokens are revealed.
            temperature: factor on the diffusion head's step noise.
            negative_prompt: captions that guidance leads away from, without an image.
            height, width: in pixels, multiples of the autoencoder's stride; by default the processor's `image_size`.
        """
        count, stride = len(text or images), self.config.mar_config.vae_stride
        text = text or [""] * count
        size = (height or processor.image_size, width or processor.image_size)
        grid = (size[0] // stride, size[1] // stride)

        prompts, understanding = processor.prompt_ids(text, task), None
        if task == "reconstruct":
            pixel_values = processor(images=images, instruction="", task=task, size=size)["pixel_values"]
            understanding = self.encode_condition(pixel_values.to(self.device))  # [B, L + K, H]
        context, context_mask = self._embed_prompts(processor, prompts, understanding)  # [B, T, H], [B, T]
        if guidance_scale != 1:
            dropped = [negative_prompt is None] * count
            prompts = processor.prompt_ids(negative_prompt or [""] * count, "generate", dropped)
            unconditional = self._embed_prompts(processor, prompts, None)
            context, context_mask = stack_prompts((context, context_mask), unconditional)  # [2B, T, H], [2B, T]
        latents = self.sample_latents(
            context,
            context_mask,
            **self.sample_noise(count, grid, generator),
            grid=grid,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            temperature=temperature,
        )  # [B, h, w, C]
        return to_images(self.decode_target(latents))

    def sample_noise(self, batch_size: int, grid: tuple[int, int], generator: Generators = None) -> dict[str, Tensor]:
        """Draw everything random in sampling.

        Returns:
            `order` `[B, L]` int64, from whose end tokens are revealed, and `noise` `[B, L, 1 + steps, C]` float32, each token's
            initial noise and step noise in the diffusion head.
        """
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
        """Sample latents `[B, h, w, C]` float32; `order` and `noise` of `sample_noise` are all that is random.

        Args:
            context: `[B, T, H]`, or `[2B, T, H]` with guidance, the conditional half first.
            context_mask: `[B, T]` or `[2B, T]`, 0 at padding on the right.
            grid: `(h, w)`.

        Raises:
            ValueError: no such `guidance_schedule`.
        """
        if guidance_schedule not in ("constant", "linear"):
            raise ValueError(f"guidance_schedule must be 'constant' or 'linear', got {guidance_schedule!r}.")
        order, noise = order.to(self.device), noise.to(self.device)
        batch_size, length = order.shape
        copies = len(context) // batch_size
        cache = DynamicCache(config=self.config.text_config)
        self.llm.model(None, context_mask, positions(context_mask), cache, context, use_cache=True)

        tokens = noise.new_zeros(batch_size, length, noise.shape[-1])  # [B, L, C]
        hidden = length
        for remaining in hidden_counts(length, min(num_inference_steps, length)):
            visible = Visible(order[:, hidden:].sort(dim=1).values, None)  # [B, V]
            encoded = self.mar.encode(tokens.unflatten(1, grid), visible)  # [B, K + V, E]
            encoded, visible = encoded.repeat(copies, 1, 1), Visible(visible.index.repeat(copies, 1), None)
            fused = self._fuse(encoded, visible, context_mask, cache=cache)  # [copies · B, K + V, E]
            cache.crop(-encoded.shape[1])
            z = self.mar.decode(fused, visible, grid)  # [copies · B, L, D]

            rows = torch.arange(batch_size, device=order.device)[:, None]  # [B, 1]
            chosen = order[:, remaining:hidden].sort(dim=1).values  # [B, n]
            z = z.view(copies, batch_size, length, -1)[:, rows, chosen].flatten(0, 2)  # [copies · B · n, D]
            scale = guidance_scale
            if guidance_schedule == "linear":
                revealed = length - max(remaining, 1)  # the original counts one token as hidden to the end
                scale = 1 + (guidance_scale - 1) * revealed / length
            sampled = self.mar.diffloss.sample(z, noise[rows, chosen].flatten(0, 1), scale, temperature)  # [B · n, C]
            tokens[rows, chosen] = sampled.unflatten(0, chosen.shape)
            hidden = remaining
        return tokens.unflatten(1, grid)

    def _embed_prompts(
        self, processor: HarmonProcessor, prompts: list[list[int]], image_embeds: Tensor | None, side: Side = "right"
    ) -> tuple[Tensor, Tensor]:
        """Embeddings `[B, T, H]` and mask `[B, T]` of prompts with the embeddings of their images."""
        ids, mask = processor.pad(prompts, side)
        return self._embed(ids.to(self.device), mask.to(self.device), image_embeds)[:2]

    def _generate_text(
        self,
        processor: HarmonProcessor,
        text: list[str],
        images: list[Image.Image] | None,
        *,
        generator: Generators,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        **sampling: Any,
    ) -> list[str]:
        """See `UnifiedModel.generate_text`.

        Args:
            generator: one, which seeds the draws of all answers.
            temperature: greedy at 0.
            sampling: further arguments of transformers' `generate`, such as `do_sample` and `top_p`.
        """
        understanding = None
        if images is not None:
            understanding = self.encode_condition(processor.condition_pixels(images).to(self.device))
        prompts = processor.question_ids(text, with_image=images is not None)
        embeds, mask = self._embed_prompts(processor, prompts, understanding, side="left")
        inputs = {"inputs_embeds": embeds, "attention_mask": mask}
        sampling = {"eos_token_id": processor.end_id, "pad_token_id": processor.end_id, **sampling}
        sampling["max_new_tokens"] = max_new_tokens
        return generate_answers(self.llm, processor.tokenizer, inputs, generator, temperature, **sampling)


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids `[B, T]` that count the tokens of an attention mask without its padding."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def stack_prompts(*prompts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Stack batches of embeddings `[B, T, H]` and masks `[B, T]`, padded on the right to the longest."""
    embeds, masks = zip(*prompts, strict=True)
    return stack_padded(embeds), stack_padded(masks)
