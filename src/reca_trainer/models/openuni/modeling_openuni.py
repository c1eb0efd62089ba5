"""OpenUni (arXiv:2505.23661): InternVL3 understands, SANA generates, learnable queries connect the two.

    [ prompt, queries ] → language model → hidden states of the queries → connector → projector → SANA's condition

The prompt of a reconstruction holds the image's understanding embeddings.

What is unusual about this model:

- InternVL3 and the autoencoder stay frozen. Gradients reach the queries through the frozen language model.
- A caption loss trains no weights that generate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import nn
from transformers import InternVLForConditionalGeneration, initialization
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from reca_trainer.models.common.condition_dropout import drop_condition
from reca_trainer.models.common.flow_matching import flow_loss, interpolate
from reca_trainer.models.common.guidance import guided
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
from reca_trainer.models.openuni.configuration_openuni import OpenUniConfig
from reca_trainer.models.openuni.processing_openuni import OpenUniProcessor

NUM_TRAIN_TIMESTEPS = 1000
MAX_SIDE = 8192  # pixels


class OpenUniModel(UnifiedModel):
    """OpenUni for training by reconstruction and for sampling.

    Shapes: `B` samples, `T` prompt tokens, `S` understanding embeddings of an image, `Q` queries, `D` the width of the
    language model, `caption` that of SANA's condition, latents `[B, C, h, w]`.
    """

    config_class = OpenUniConfig
    base_model_prefix = ""
    shares_weights = False
    lora_target_modules = (
        r"connector\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
        r"|projector|transformer\.(.+\.)?(to_[qkv]|to_out\.0|linear(_[12])?|proj_out)"
    )
    frozen_encoders = ("internvl.model.vision_tower", "internvl.model.multi_modal_projector", "vae")
    supports_gradient_checkpointing = True
    supports_condition_token_dropout = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _no_split_modules = ("InternVLVisionLayer", "Qwen2DecoderLayer", "SiglipEncoderLayer", "SanaTransformerBlock")
    _keep_in_fp32_modules = ("vae",)  # never float16, never quantised
    _keep_in_fp32_modules_strict = ("vae",)  # nor bfloat16: it is small and published in float32

    def __init__(self, config: OpenUniConfig):
        super().__init__(config)
        width = config.internvl_config.text_config.hidden_size
        if config.connector_config.hidden_size != width:
            raise ValueError(
                f"The connector is {config.connector_config.hidden_size} wide, InternVL's language model {width}: "
                "they must be equal, since the connector reads the language model's hidden states."
            )
        # A SigLIP model would pass this on to its layers; the connector has the layers alone.
        config.connector_config._attn_implementation = config._attn_implementation
        self.internvl = InternVLForConditionalGeneration(config.internvl_config)
        self.meta_queries = nn.Parameter(torch.empty(config.num_queries, width))
        self.connector = SiglipEncoder(config.connector_config)
        self.transformer = SanaTransformer2DModel.from_config(config.transformer_config)
        self.projector = nn.Linear(width, self.transformer.config.caption_channels)
        self.vae = AutoencoderDC.from_config(config.vae_config)
        for module in (*self.transformer.modules(), *self.vae.modules()):
            module._is_hf_initialized = True  # diffusers initialises its own layers
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            initialization.normal_(self.meta_queries, std=self.meta_queries.shape[1] ** -0.5)
        else:
            super()._init_weights(module)

    @property
    def generation_modules(self) -> list[str]:
        return ["meta_queries", "connector", "projector", "transformer"]

    @property
    def understanding_modules(self) -> list[str]:
        return ["internvl"]

    @property
    def frozen_modules(self) -> list[str]:
        return ["vae"]

    @property
    def image_sides(self) -> range:
        stride = self.config.spatial_compression_ratio * self.transformer.config.patch_size
        return range(stride, MAX_SIDE + 1, stride)

    def train(self, mode: bool = True) -> OpenUniModel:
        super().train(mode)
        if self.transformer.gradient_checkpointing:
            # Only layers in train mode are checkpointed, and gradients pass through these frozen layers to the queries.
            self.internvl.model.language_model.train(mode)
        return self

    # --- losses ---

    def _reconstruct(
        self,
        corruption: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        condition_pixel_values: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        condition_embeds: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
    ) -> UnifiedOutput:
        """RecA: read the image's own embeddings and the instruction, then denoise the same image.

        Args:
            input_ids, attention_mask: `[B, T]` int64, the prompts up to the token that opens the image, or one prompt
                `[1, T]` for all.
            condition_pixel_values: `[B, 3, s, s]` float, for InternVL's vision transformer.
            pixel_values: `[B, 3, H, W]` float in [-1, 1].
            condition_embeds, latents: `[B, S, D]` and `[B, C, h, w]`, results of `encode_batch`, alternatives to
                `condition_pixel_values` and `pixel_values`.
        """
        latents = self.encode_target(pixel_values) if latents is None else latents.float()  # [B, C, h, w]
        if condition_embeds is None:
            condition_embeds = self.encode_condition(condition_pixel_values)  # [B, S, D]
        places = (input_ids == self.config.internvl_config.image_token_id).expand(len(latents), -1)  # [B, T]
        mask = drop_condition(corruption, attention_mask, places)
        prompt_embeds = self.encode_prompt(input_ids, mask, condition_embeds)  # [B, Q, caption]
        return self._flow_matching(latents, prompt_embeds, corruption, condition_embeds)

    def _generate(
        self,
        corruption: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
    ) -> UnifiedOutput:
        """Text-to-image: denoise the image behind its caption. The arguments are as in `_reconstruct`."""
        latents = self.encode_target(pixel_values) if latents is None else latents.float()  # [B, C, h, w]
        prompt_embeds = self.encode_prompt(input_ids, attention_mask)  # [B, Q, caption]
        return self._flow_matching(latents, prompt_embeds, corruption)

    def _flow_matching(
        self,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        corruption: dict[str, torch.Tensor],
        understanding_embeds: torch.Tensor | None = None,
    ) -> UnifiedOutput:
        """Rectified flow loss of `latents` `[B, C, h, w]`: SANA predicts the velocity at `σ`, the share of noise."""
        noise = corruption["noise"].to(latents)  # [B, C, h, w]
        timestep, sigma = noise_levels(corruption["u"].to(latents.device))  # [B] both
        noisy = interpolate(latents, noise, sigma)  # [B, C, h, w]
        prediction = self._predict_velocity(noisy, timestep, prompt_embeds)  # [B, C, h, w]
        return flow_loss(prediction, noise - latents, understanding_embeds=understanding_embeds)

    def _caption(
        self,
        corruption: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        condition_pixel_values: torch.Tensor | None = None,
    ) -> UnifiedOutput:
        """Image-to-text, or text alone: next-token cross-entropy of the answers."""
        embeds = None
        if condition_pixel_values is not None:
            embeds = self.encode_condition(condition_pixel_values)  # [B, S, D]
        hidden = self._read(input_ids, attention_mask, embeds)[:, :-1]  # [B, T - 1, D]
        return token_cross_entropy(self.internvl.lm_head, hidden, labels[:, 1:], embeds)

    # --- encodings ---

    @torch.no_grad()
    def encode_condition(self, condition_pixel_values: torch.Tensor) -> torch.Tensor:
        """RecA's dense prompt: InternVL's embeddings `[B, S, D]` of images `[B, 3, s, s]`."""
        return self.internvl.model.get_image_features(condition_pixel_values, return_dict=True).pooler_output

    @torch.no_grad()
    def encode_target(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] → scaled latents `[B, C, h, w]` float32. The encoder is deterministic."""
        latents = self.vae.encode(pixel_values.to(self.vae.dtype), return_dict=False)[0]
        return latents.float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_target(self, target: torch.Tensor) -> torch.Tensor:
        """Scaled latents `[B, C, h, w]` → images `[B, 3, H, W]` float32, about [-1, 1]."""
        latents = target / self.vae.config.scaling_factor
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()

    def encode_batch(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """See `UnifiedModel.encode_batch`: `condition_embeds` `[B, S, D]` and `latents` `[B, C, h, w]`."""
        return {
            "condition_embeds": self.encode_condition(batch["condition_pixel_values"]),
            "latents": self.encode_target(batch["pixel_values"]),
        }

    # --- the language model and SANA ---

    def encode_prompt(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        understanding_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """SANA's condition: the queries' hidden states after connector and projector, `[B, Q, caption]`."""
        hidden = self._read(input_ids, attention_mask, understanding_embeds, self.meta_queries)  # [B, T + Q, D]
        queries = self.connector(hidden[:, -self.config.num_queries :]).last_hidden_state  # [B, Q, D]
        return self.projector(queries)

    def _read(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        understanding_embeds: torch.Tensor | None,
        queries: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states `[B, T + Q, D]` of the language model over prompts `[B, T]` and, behind them, `queries` `[Q, D]`."""
        internvl = self.internvl.model
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if understanding_embeds is not None:
            input_ids, mask = (rows.expand(len(understanding_embeds), -1) for rows in (input_ids, mask))
        embeds = internvl.get_input_embeddings()(input_ids)  # [B, T, D]
        if understanding_embeds is not None:
            is_image = internvl.get_placeholder_mask(input_ids, embeds, understanding_embeds)  # [B, T, D]
            embeds = embeds.masked_scatter(is_image, understanding_embeds.to(embeds.dtype))
        if queries is not None:
            queries = queries.to(embeds.dtype).expand(len(embeds), -1, -1)  # [B, Q, D]
            embeds = torch.cat([embeds, queries], dim=1)  # [B, T + Q, D]
            mask = torch.cat([mask, mask.new_ones(queries.shape[:2])], dim=1)  # [B, T + Q]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # [B, T + Q]: padding takes no position
        return internvl.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state

    def _predict_velocity(
        self, latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor
    ) -> torch.Tensor:
        """SANA's velocity `[B, C, h, w]` float32 for noisy `latents` at `timestep` `[B]` in 1..1000."""
        dtype = self.transformer.patch_embed.proj.weight.dtype  # a convolution: never quantised
        return self.transformer(
            hidden_states=latents.to(dtype),
            encoder_hidden_states=prompt_embeds.to(dtype),
            timestep=timestep * self.transformer.config.timestep_scale,
            return_dict=False,
        )[0].float()

    # --- draws and counts ---

    def sample_corruption(self, batch: dict[str, Any], generator: Generators = None) -> dict[str, torch.Tensor]:
        """Draws of the flow-matching loss: Gaussian `noise` `[B, C, h, w]`, then `u` `[B]` uniform on [0, 1), which
        `noise_levels` turns into timesteps. Captions have no draws."""
        if "labels" in batch:
            return {}
        if batch.get("latents") is not None:
            batch_size, *shape = batch["latents"].shape
        else:
            batch_size, _, height, width = batch["pixel_values"].shape
            ratio = self.config.spatial_compression_ratio
            shape = (self.transformer.config.in_channels, height // ratio, width // ratio)
        noise = per_sample(
            lambda sample_generator: torch.randn(shape, generator=sample_generator), batch_size, generator
        )
        u = per_sample(lambda sample_generator: torch.rand((), generator=sample_generator), batch_size, generator)
        return {"noise": noise, "u": u}

    def count_supervised(self, batch: dict[str, Any], corruption: dict[str, torch.Tensor]) -> int:
        """Supervised tokens of a caption, else elements of the latents."""
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
        """See `UnifiedModel.example_batch`."""
        target, condition = self.config.image_size, self.config.condition_size
        check_only_size(target, max_image_size, min_image_size)
        input_ids = torch.zeros(batch_size, self.config.num_image_tokens + text_length, dtype=torch.long)
        input_ids[:, : self.config.num_image_tokens] = self.config.internvl_config.image_token_id
        return {
            "task": "reconstruct",
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": torch.zeros(batch_size, 3, target, target),
            "condition_pixel_values": torch.zeros(batch_size, 3, condition, condition),
        }

    # --- sampling ---

    def _generate_images(
        self,
        processor: OpenUniProcessor,
        text: list[str] | None,
        images: list[Image.Image] | None,
        *,
        task: str,
        generator: Generators,
        num_inference_steps: int = 20,
        guidance_scale: float = 4.5,
        negative_prompt: list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: torch.Tensor | None = None,
    ) -> list[Image.Image]:
        """See `UnifiedModel.generate_images`.

        Args:
            text: for a reconstruction by default a request for a detailed description.
            num_inference_steps: steps of DPM-Solver++ (arXiv:2211.01095).
            guidance_scale: classifier-free guidance, off at 1 and below.
            negative_prompt: captions that guidance leads away from, by default none; for a reconstruction instructions about
                the same images, and without them there is no guidance.
            height, width: of the images in pixels; by default the size that SANA was trained at.
            latents: `[B, C, h, w]` float32, the initial noise; drawn by default.
        """
        height, width = height or processor.image_size, width or processor.image_size
        if task == "reconstruct":
            text = text or ["Describe the image in detail."] * len(images)
            guidance_scale = 1.0 if negative_prompt is None else guidance_scale
        batch_size, dropped = len(text), None
        if guidance_scale > 1:
            text = [*text, *(negative_prompt or [""] * batch_size)]
            dropped = [False] * batch_size + [negative_prompt is None] * batch_size
            images = images and [*images, *images]
        requests = {"images": images, "instruction": text}
        if task == "generate":
            requests = {"text": text, "dropped": dropped}
        batch = processor(**requests, task=task, size=(height, width))
        prompt_embeds = self._encode_batch(batch)  # [B or 2B, Q, caption]
        if latents is None:
            ratio = self.config.spatial_compression_ratio
            shape = (batch_size, self.transformer.config.in_channels, height // ratio, width // ratio)
            latents = randn_tensor(shape, generator=generator, device=self.device, dtype=torch.float32)
        latents = self.sample_latents(latents, prompt_embeds, num_inference_steps, guidance_scale)  # [B, C, h, w]
        return to_images(self.decode_target(latents))

    def _encode_batch(self, batch: dict[str, Any]) -> torch.Tensor:
        """`encode_prompt` of a processor's batch: `[B, Q, caption]`."""
        condition = batch.get("condition_pixel_values")
        return self.encode_prompt(
            batch["input_ids"].to(self.device),
            batch["attention_mask"].to(self.device),
            None if condition is None else self.encode_condition(condition.to(self.device)),
        )

    @torch.no_grad()
    def sample_latents(
        self,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        num_inference_steps: int = 20,
        guidance_scale: float = 4.5,
        on_step: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """Integrate SANA's velocity from noise to images with DPM-Solver++.

        Args:
            latents: `[B, C, h, w]`, the initial noise.
            prompt_embeds: `[B, Q, caption]`, or with `guidance_scale > 1` `[2B, Q, caption]`, the conditional half first.
            on_step: called after each step with its timestep and latents.

        Returns:
            `[B, C, h, w]` float32.
        """
        scheduler = DPMSolverMultistepScheduler.from_config(self.config.scheduler_config)
        scheduler.set_timesteps(num_inference_steps, device=self.device)
        latents = latents.to(self.device, torch.float32)
        for timestep in scheduler.timesteps:
            rows = latents if guidance_scale <= 1 else torch.cat([latents, latents])  # [B or 2B, C, h, w]
            velocity = self._predict_velocity(rows, timestep.expand(len(rows)), prompt_embeds)
            if guidance_scale > 1:
                velocity = guided(*velocity.chunk(2), guidance_scale)  # [B, C, h, w]
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            if on_step is not None:
                on_step(timestep, latents)
        return latents

    def _generate_text(
        self,
        processor: OpenUniProcessor,
        text: list[str],
        images: list[Image.Image] | None,
        *,
        generator: Generators,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        **sampling: Any,
    ) -> list[str]:
        """See `UnifiedModel.generate_text`.

        Args:
            generator: one, which seeds the draws of all answers.
            temperature: greedy at 0.
            sampling: further arguments of transformers' `generate`, such as `do_sample` and `top_p`.
        """
        batch = {name: tensor.to(self.device) for name, tensor in processor.ask(text, images).items()}
        if images:
            batch["pixel_values"] = batch.pop("condition_pixel_values")
        tokenizer, length = processor.tokenizer, batch["input_ids"].shape[1]
        batch |= {
            "max_new_tokens": max_new_tokens,
            "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
            "pad_token_id": tokenizer.pad_token_id,
        }
        return generate_answers(self.internvl, tokenizer, batch, generator, temperature, length, **sampling)


def noise_levels(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps in 1..1000 and `σ = timestep / 1000`, both `[B]` float32, of uniform draws `[B]` on [0, 1).

    OpenUni was trained with uniform timesteps, without the shift that sampling uses. σ is float32 because bfloat16 cannot
    represent half of the timesteps.
    """
    timestep = NUM_TRAIN_TIMESTEPS - (u.float() * NUM_TRAIN_TIMESTEPS).floor()
    return timestep, timestep / NUM_TRAIN_TIMESTEPS
