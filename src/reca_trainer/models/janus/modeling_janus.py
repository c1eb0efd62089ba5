"""Janus (arXiv:2410.13848) and Janus-Pro (arXiv:2501.17811) on transformers' implementation, whose weights, configuration
and `generate` are unchanged.

Reconstruction alignment of Janus is derived here from the method: the paper has no Janus results. A user turn shows the
image as its understanding embeddings (SigLIP, aligner), the instruction follows, and behind the token that begins an image
the language model predicts the VQ tokens v_1 ... v_N of the same image:

    L_RecA = -1/N sum_n log p(v_n | E(x), instruction, v_1 ... v_{n-1})        through `generation_head`
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import nn
from transformers import DynamicCache, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from reca_trainer.models.common.condition_dropout import drop_condition
from reca_trainer.models.common.guidance import guided
from reca_trainer.models.common.padding import stack_padded
from reca_trainer.models.common.pixels import to_images
from reca_trainer.models.contract import (
    Generators,
    UnifiedModel,
    UnifiedOutput,
    check_only_size,
    count_answer_tokens,
    per_sample,
    token_cross_entropy,
)
from reca_trainer.models.janus.configuration_janus import JanusConfig
from reca_trainer.models.janus.processing_janus import JanusProcessor


class JanusForConditionalGeneration(UnifiedModel, transformers.JanusForConditionalGeneration):
    """transformers' Janus as a `UnifiedModel`, with no parameter added.

    `forward` without a `task` and `generate` are those of transformers.

    Understanding and generation share the language model, so RecA trains it with an image-to-text loss beside the
    reconstruction loss. The vision tower, its aligner and the VQ model are frozen. LoRA adapts the language model;
    `LoraConfig(modules_to_save=...)` names modules to train in full beside it, such as `generation_head`,
    `generation_aligner` or `model.aligner`.
    """

    config_class = JanusConfig
    shares_weights = True
    lora_target_modules = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
    frozen_encoders = ("model.vision_model", "model.aligner", "model.vqmodel")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    supports_condition_token_dropout = True

    def __init__(self, config: JanusConfig):
        super().__init__(config)
        # Never sharded on its own: `encode_target` reads the codebook outside the quantizer's forward.
        self._no_split_modules.discard("JanusVQVAEVectorQuantizer")

    @classmethod
    def published_config(cls) -> JanusConfig:
        """See `UnifiedModel.published_config`: that of Janus-Pro-7B. The defaults of transformers' configuration belong to no
        published checkpoint."""
        width = 4096
        return JanusConfig(
            text_config=LlamaConfig(
                vocab_size=102400,
                hidden_size=width,
                intermediate_size=11008,
                num_hidden_layers=30,
                num_attention_heads=32,
                max_position_embeddings=16384,
            ),
            vision_config=JanusVisionConfig(projection_dim=width),
            vq_config=JanusVQVAEConfig(projection_dim=width, image_token_embed_dim=width),
            tie_word_embeddings=False,
        )

    @property
    def generation_modules(self) -> list[str]:
        names = ["language_model", "generation_embeddings", "generation_aligner", "generation_head"]
        return [*(f"model.{name}" for name in names), "lm_head"]

    @property
    def understanding_modules(self) -> list[str]:
        return ["model.vision_model", "model.aligner"]

    @property
    def frozen_modules(self) -> list[str]:
        return ["model.vqmodel"]

    def forward(self, task: str | None = None, corruption: dict[str, torch.Tensor] | None = None, **batch: Any):
        """Compute one task's loss, or run transformers' forward if there is no `task`.

        Args:
            task: one of `self.tasks`.
            corruption: the draws of condition dropout, if there is any; a next-token loss has none.
            batch: the batch that `JanusProcessor` makes for the task.

        Returns:
            `UnifiedOutput` with `prediction` the logits `[B, N, num_embeddings]` and `target` the image tokens
            `[B, N]`, or for captions the logits `[L, vocab_size]` and tokens `[L]` of the supervised positions.
        """
        if task is None:
            return transformers.JanusForConditionalGeneration.forward(self, **batch)
        return UnifiedModel.forward(self, task, corruption, **batch)

    # `generate` decides by the signature of `forward` what to prepare: positions, masks, encoded images.
    forward.__signature__ = inspect.signature(transformers.JanusForConditionalGeneration.forward)

    # --- losses ---

    def _reconstruct(
        self,
        corruption: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        condition_pixel_values: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        condition_embeds: torch.Tensor | None = None,
        tokens: torch.Tensor | None = None,
    ) -> UnifiedOutput:
        """RecA: read the image's own embeddings and the instruction, then predict the image's tokens one after the other.

        Args:
            input_ids, attention_mask: `[B, T]`, prompts with S image placeholders that end with begin-of-image, padded on
                the left.
            condition_embeds, tokens: `[B, S, D]` and `[B, N]`, results of `encode_batch`, alternatives to
                `condition_pixel_values` and `pixel_values`.
        """
        tokens = self.encode_target(pixel_values) if tokens is None else tokens  # [B, N]
        if condition_embeds is None:
            condition_embeds = self.encode_condition(condition_pixel_values)  # [B, S, D]
        places = input_ids == self.config.image_token_id  # [B, T]: none where the prompt is dropped
        prompt = self.embed_prompt(input_ids, condition_embeds[places.any(dim=1)])  # [B, T, D]
        mask = drop_condition(corruption, attention_mask, places)
        return self._image_loss(prompt, tokens, mask, condition_embeds)

    def _generate(
        self,
        corruption: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> UnifiedOutput:
        """Text-to-image: predict the image's tokens behind the caption."""
        tokens = self.encode_target(pixel_values)  # [B, N]
        return self._image_loss(self.embed_prompt(input_ids), tokens, attention_mask)

    def _image_loss(
        self,
        prompt: torch.Tensor,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        understanding_embeds: torch.Tensor | None = None,
    ) -> UnifiedOutput:
        """Cross-entropy of the image tokens `[B, N]` after a prompt `[B, T, D]` that ends with begin-of-image."""
        image = self.prepare_embeddings_for_image_generation(tokens[:, :-1])  # [B, N - 1, D]
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (0, image.shape[1]), value=1)  # [B, T + N - 1]
        hidden = self._run_language_model(torch.cat([prompt, image], dim=1), attention_mask)  # [B, T + N - 1, D]
        logits = self.model.generation_head(hidden[:, prompt.shape[1] - 1 :])  # [B, N, num_embeddings]
        losses = F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")  # [B, N]
        return UnifiedOutput(
            loss=losses.mean(),
            per_sample_loss=losses.detach().mean(dim=1),
            prediction=logits,
            target=tokens,
            understanding_embeds=understanding_embeds,
        )

    def _caption(
        self,
        corruption: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        condition_pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> UnifiedOutput:
        """Image-to-text: next-token cross-entropy of the answers."""
        understanding_embeds = self.encode_condition(condition_pixel_values)  # [B, S, D]
        prompt = self.embed_prompt(input_ids, understanding_embeds)  # [B, T, D]
        hidden = self._run_language_model(prompt, attention_mask)  # [B, T, D]
        return token_cross_entropy(self.lm_head, hidden[:, :-1], labels[:, 1:], understanding_embeds)

    # --- encodings ---

    def encode_condition(self, condition_pixel_values: torch.Tensor) -> torch.Tensor:
        """See `UnifiedModel.encode_condition`: `[B, S, D]`."""
        return self.model.get_image_features(condition_pixel_values, return_dict=True).pooler_output

    @torch.no_grad()
    def encode_target(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> VQ tokens `[B, N]` int64, row by row.

        A latent becomes the code with the smallest angle to it. The original Janus, and `get_codebook_entry` of transformers,
        which decodes, normalise codes to unit length; `JanusVQVAE.encode` of transformers does not.

        Raises:
            ValueError: the images are not of the size that the model generates.
        """
        vq = self.model.vqmodel
        with torch.autocast(pixel_values.device.type, enabled=False):
            latents = vq.quant_conv(vq.encoder(pixel_values.to(vq.quant_conv.weight.dtype)))  # [B, C, H/f, W/f]
            side, (height, width) = vq.config.num_patches, latents.shape[-2:]
            if (height, width) != (side, side):
                raise ValueError(
                    f"pixel_values of shape {tuple(pixel_values.shape)} give {height}x{width} image tokens; this "
                    f"Janus generates {side}x{side}."
                )
            codes = torch.arange(vq.quantize.num_embeddings, device=pixel_values.device)  # [K]
            codebook = F.normalize(vq.quantize.embedding(codes).float(), dim=-1)  # [K, C]
            directions = F.normalize(latents.flatten(2).transpose(1, 2).float(), dim=-1)  # [B, N, C]
            return (directions @ codebook.T).argmax(dim=-1)

    @torch.no_grad()
    def encode_batch(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """See `UnifiedModel.encode_batch`: `condition_embeds` `[B, S, D]` and `tokens` `[B, N]`."""
        return {
            "condition_embeds": self.encode_condition(batch["condition_pixel_values"]),
            "tokens": self.encode_target(batch["pixel_values"]),
        }

    @torch.no_grad()
    def decode_target(self, target: torch.Tensor) -> torch.Tensor:
        """VQ tokens `[B, N]` -> images `[B, 3, H, W]`, about [-1, 1]."""
        return self.model.vqmodel.decode(target)

    # --- the language model ---

    def embed_prompt(self, input_ids: torch.Tensor, understanding_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings `[B, T, D]` of `input_ids` `[B, T]`, with understanding embeddings `[B, S, D]` in place of image
        placeholders."""
        embeds = self.get_input_embeddings()(input_ids)
        if understanding_embeds is None:
            return embeds
        understanding_embeds = understanding_embeds.to(embeds.dtype)
        placeholders = self.model.get_placeholder_mask(input_ids, embeds, understanding_embeds)
        return embeds.masked_scatter(placeholders, understanding_embeds)

    def _run_language_model(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, cache: DynamicCache | None = None
    ) -> torch.Tensor:
        """Hidden states `[B, T, D]` of `inputs_embeds` `[B, T, D]` behind the S tokens of `cache`. With an `attention_mask`
        `[B, S + T]` padding takes no position."""
        positions = None
        if attention_mask is not None:
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]  # [B, T]
        # Positional arguments: releases of transformers differ in the name of the cache.
        output = self.model.language_model(
            None, attention_mask, positions, cache, inputs_embeds, use_cache=cache is not None
        )
        return output.last_hidden_state

    # --- draws and counts ---

    def sample_corruption(self, batch: dict[str, Any], generator: Generators = None) -> dict[str, torch.Tensor]:
        """Nothing: the loss of a next-token model has no random draws."""
        return {}

    def count_supervised(self, batch: dict[str, Any], corruption: dict[str, torch.Tensor]) -> int:
        """Supervised tokens of a caption, else the image tokens."""
        if "labels" in batch:
            return count_answer_tokens(batch["labels"])
        return len(batch["tokens" if "tokens" in batch else "pixel_values"]) * self.config.vq_config.num_patches**2

    def example_batch(
        self,
        batch_size: int,
        max_image_size: int | None = None,
        min_image_size: int | None = None,
        text_length: int = 32,
    ) -> dict[str, Any]:
        """See `UnifiedModel.example_batch`."""
        side, image_tokens = self.config.vision_config.image_size, self.config.vision_config.num_image_tokens
        check_only_size(side, max_image_size, min_image_size)
        input_ids = torch.zeros(batch_size, image_tokens + text_length, dtype=torch.long)
        input_ids[:, :image_tokens] = self.config.image_token_id
        return {
            "task": "reconstruct",
            "pixel_values": torch.zeros(batch_size, 3, side, side),
            "condition_pixel_values": torch.zeros(batch_size, 3, side, side),
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }

    # --- sampling ---

    def _generate_images(
        self,
        processor: JanusProcessor,
        text: list[str] | None,
        images: list[Image.Image] | None,
        *,
        task: str,
        generator: Generators,
        guidance_scale: float = 5.0,
        temperature: float = 1.0,
        negative_prompt: list[str] | None = None,
        num_inference_steps: int | None = None,
    ) -> list[Image.Image]:
        """See `UnifiedModel.generate_images`.

        Args:
            text: an empty prompt becomes the unconditional one.
            images: cropped to their central square.
            generator: CPU generator, or one per image.
            guidance_scale: s in `uncond + s (cond - uncond)` of the logits; 1 turns guidance off. The unconditional prompt is
                padding but for the first token and begin-of-image.
            temperature: divides the logits; 0 takes the likeliest token.
            negative_prompt: prompts without an image, in place of the unconditional one.
            num_inference_steps: one per image token; other values are refused.

        Raises:
            ValueError: another number of steps.
        """
        steps = self.config.vq_config.num_patches**2
        if num_inference_steps not in (None, steps):
            raise ValueError(
                f"num_inference_steps={num_inference_steps}, but this Janus always has num_inference_steps={steps}."
            )
        if task == "reconstruct":
            images = processor.squares(images)
        inputs = processor.prompts(text or [""] * len(images), images, generation_mode="image").to(self.device)
        input_ids, mask = inputs["input_ids"], inputs["attention_mask"]  # [B, T] both
        understanding = None
        if task == "reconstruct":
            understanding = self.encode_condition(inputs["pixel_values"])  # [B, S, D]
        else:
            input_ids = self._without_empty(processor, input_ids, text)
        prompt = self.embed_prompt(input_ids, understanding)  # [B, T, D]
        if guidance_scale != 1:
            if negative_prompt is None:
                blank, blank_mask = self.embed_prompt(processor.unconditional(input_ids)), mask
            else:
                inputs = processor.prompts(negative_prompt, generation_mode="image").to(self.device)
                blank = self.embed_prompt(self._without_empty(processor, inputs["input_ids"], negative_prompt))
                blank_mask = inputs["attention_mask"]
            # [2B, T, D] and [2B, T]
            prompt, mask = (stack_padded(parts, side="left") for parts in ((prompt, blank), (mask, blank_mask)))
        tokens = self._sample_tokens(
            prompt,
            mask,
            head=self.model.generation_head,
            embed=self.prepare_embeddings_for_image_generation,
            max_tokens=steps,
            guidance_scale=guidance_scale,
            temperature=temperature,
            generator=generator,
        )  # [B, N]
        return to_images(self.decode_target(tokens))

    @staticmethod
    def _without_empty(processor: JanusProcessor, input_ids: torch.Tensor, text: list[str]) -> torch.Tensor:
        """The prompts `[B, T]`, unconditional in the rows whose text is empty."""
        empty = torch.tensor([not prompt for prompt in text], device=input_ids.device)
        return torch.where(empty[:, None], processor.unconditional(input_ids), input_ids)

    def _generate_text(
        self,
        processor: JanusProcessor,
        text: list[str],
        images: list[Image.Image] | None,
        *,
        generator: Generators,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
    ) -> list[str]:
        """See `UnifiedModel.generate_text`.

        Args:
            generator: CPU generator, or one per question.
            max_new_tokens: length at which an answer is cut.
            temperature: divides the logits; 0 takes the likeliest token.
        """
        inputs = processor.prompts(text, images).to(self.device)
        understanding = self.encode_condition(inputs["pixel_values"]) if images else None
        tokens = self._sample_tokens(
            self.embed_prompt(inputs["input_ids"], understanding),
            inputs["attention_mask"],
            head=self.lm_head,
            embed=self.get_input_embeddings(),
            max_tokens=max_new_tokens,
            temperature=temperature,
            generator=generator,
            stop=processor.tokenizer.eos_token_id,
        )
        return [answer.strip() for answer in processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def _sample_tokens(
        self,
        prompt: torch.Tensor,
        attention_mask: torch.Tensor,
        head: nn.Module,
        embed: Callable[[torch.Tensor], torch.Tensor],
        max_tokens: int,
        generator: Generators,
        temperature: float,
        guidance_scale: float = 1.0,
        stop: int | None = None,
    ) -> torch.Tensor:
        """Sample token after token: `[B, max_tokens]` int64, or fewer once all samples have met `stop`.

        Every sample draws its own uniform numbers up front, so that its tokens do not depend on its batch.

        Args:
            prompt: `[B, T, D]`, or `[2B, T, D]` with guidance, the conditional half first.
            attention_mask: `[B, T]` or `[2B, T]`, 0 at padding on the left.
            head: output layer, `[B, D]` -> `[B, vocabulary]`.
            embed: turns tokens `[B, 1]` into the next inputs `[B, 1, D]`.
        """
        is_guided = guidance_scale != 1
        batch_size = len(prompt) // 2 if is_guided else len(prompt)
        uniform = per_sample(
            lambda draw: torch.rand(max_tokens, generator=draw, dtype=torch.float64), batch_size, generator
        )
        uniform = uniform.to(prompt.device)  # [B, max_tokens]
        cache, inputs, tokens = DynamicCache(config=self.config.text_config), prompt, []
        finished = torch.zeros(batch_size, dtype=torch.bool, device=prompt.device)
        for step in range(max_tokens):
            hidden = self._run_language_model(inputs, attention_mask, cache)  # [B or 2B, T or 1, D]
            logits = head(hidden[:, -1]).float()  # [B or 2B, vocabulary]
            if is_guided:
                logits = guided(*logits.chunk(2), guidance_scale)  # [B, vocabulary]
            if temperature == 0:
                token = logits.argmax(dim=-1)  # [B]
            else:  # inverse-CDF sampling
                cumulative = (logits / temperature).softmax(dim=-1).double().cumsum(dim=-1)  # [B, vocabulary]
                quantile = uniform[:, step : step + 1] * cumulative[:, -1:]  # [B, 1]
                token = torch.searchsorted(cumulative, quantile).squeeze(-1)  # [B]
            if stop is not None:
                token = token.where(~finished, stop)
                finished |= token == stop
            tokens.append(token)
            if stop is not None and finished.all():
                break
            inputs = embed(token[:, None])  # [B, 1, D]
            if is_guided:
                inputs = inputs.repeat(2, 1, 1)
            attention_mask = F.pad(attention_mask, (0, 1), value=1)
        return torch.stack(tokens, dim=1)
