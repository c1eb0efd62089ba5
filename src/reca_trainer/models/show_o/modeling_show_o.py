"""Show-o (arXiv:2408.12528): one Phi reads text causally and predicts masked image tokens in any order.

What is unusual about this model:

- One sequence, one vocabulary, one output layer for text and MAGVIT-v2 image tokens. Understanding and generation share
  every weight of the language model.
- Attention is causal over text and full within an image ("omni-attention"); `ShowOModel.attention_mask` says which tokens
  belong to the image in each task and variant.
- Phi's query and key norms are on, although Phi's configuration says otherwise.
- The CLIP variant reads CLIP embeddings of an image, the plain variant its MAGVIT-v2 tokens. Reconstruction in the CLIP
  variant sends no gradient into its inputs: the projector and the embeddings learn from image-to-text alone.

Shapes: B samples, L tokens of a sequence, P tokens of the condition image and n of the target image among them, D model
width, M supervised positions of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import CLIPVisionModel, DynamicCache, PhiForCausalLM

from reca_trainer.models.common.condition_dropout import drop_condition
from reca_trainer.models.common.padding import stack_padded
from reca_trainer.models.common.pixels import to_images
from reca_trainer.models.common.token_sampling import draw_tokens
from reca_trainer.models.contract import (
    Generators,
    UnifiedModel,
    UnifiedOutput,
    check_only_size,
    count_answer_tokens,
    one_per_sample,
    per_sample,
    token_cross_entropy,
)
from reca_trainer.models.inference import read_images, spread
from reca_trainer.models.show_o.configuration_show_o import CONDITION_TOKEN_ID, ShowOConfig
from reca_trainer.models.show_o.magvit_show_o import MagvitV2
from reca_trainer.models.show_o.processing_show_o import ShowOProcessor, resize_and_crop


class ShowOModel(UnifiedModel):
    """Show-o. The language model, its embeddings and output layer, and the projector are trained; CLIP and MAGVIT-v2
    are frozen.

    In every task's output `prediction` holds the logits `[M, vocabulary]` of the supervised positions, sample by sample and
    in the order of the sequence, and `target` their token ids `[M]`.
    """

    config_class = ShowOConfig
    base_model_prefix = ""
    shares_weights = True
    image_tasks = ("generate", "reconstruct", "edit")
    no_guidance_scale = 0.0
    supports_gradient_checkpointing = True
    supports_condition_token_dropout = True
    _supports_sdpa = True
    _no_split_modules = ("PhiDecoderLayer", "CLIPEncoderLayer", "ResnetBlock2D")
    _keep_in_fp32_modules = _keep_in_fp32_modules_strict = ("vq_model",)  # tokens are signs, which rounding flips
    lora_target_modules = r"language_model\.model\.layers\.\d+\.(self_attn\.([qkv]_proj|dense)|mlp\.fc[12])"

    def __init__(self, config: ShowOConfig):
        super().__init__(config)
        self.frozen_encoders = ("vision_tower", "vq_model") if config.w_clip_vit else ("vq_model",)
        self.language_model = PhiForCausalLM(config.text_config)
        self.vq_model = MagvitV2(**config.vq_config)
        if config.w_clip_vit:
            width, hidden_size = config.vision_config.hidden_size, config.text_config.hidden_size
            self.vision_tower = CLIPVisionModel(config.vision_config)
            self.mm_projector = nn.Sequential(
                nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
            )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.lm_head

    @property
    def generation_modules(self) -> list[str]:
        return ["language_model", "mm_projector"] if self.config.w_clip_vit else ["language_model"]

    @property
    def understanding_modules(self) -> list[str]:
        return ["vision_tower"] if self.config.w_clip_vit else []

    @property
    def frozen_modules(self) -> list[str]:
        return ["vq_model"]

    # --- losses ---

    def _reconstruct(
        self,
        corruption: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        condition_pixel_values: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        condition_features: torch.Tensor | None = None,
        tokens: torch.Tensor | None = None,
    ) -> UnifiedOutput:
        """RecA: read the image's own embeddings and the instruction, then predict the image's masked tokens.

        Args:
            input_ids, attention_mask: `[B, L]`, see `ShowOProcessor`.
            condition_features, tokens: results of `encode_batch`, alternatives to `condition_pixel_values` and
                `pixel_values`.
        """
        tokens = self.encode_target(pixel_values) if tokens is None else tokens  # [B, n]
        if condition_features is None:
            condition = self.encode_condition(condition_pixel_values)  # [B, P, D]
        else:
            condition = self._project(condition_features)  # [B, P, D]
        mask = corruption["mask"].to(tokens.device)  # [B, n]
        masked = tokens.masked_fill(mask, self.config.mask_token_id)  # [B, n]
        embeds = self.embed(input_ids, condition, masked)  # [B, L, D]
        if self.config.w_clip_vit:
            embeds = embeds.detach()  # as in the official run
        attention_mask = drop_condition(corruption, attention_mask, input_ids == CONDITION_TOKEN_ID)
        hidden = self.attend(embeds, self.attention_mask("reconstruct", input_ids, attention_mask))  # [B, L, D]
        hidden = hidden[:, -1 - tokens.shape[1] : -1]  # [B, n, D]: the image tokens without their markers
        return token_cross_entropy(self.language_model.lm_head, hidden, tokens, condition, supervised=mask)

    def _generate(
        self,
        corruption: dict[str, torch.Tensor],
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> UnifiedOutput:
        """Text-to-image: predict the masked tokens behind the caption, and the two markers around them."""
        tokens = self.encode_target(pixel_values)  # [B, n]
        mask = corruption["mask"].to(tokens.device)  # [B, n]
        masked = tokens.masked_fill(mask, self.config.mask_token_id)  # [B, n]
        embeds = self.embed(input_ids, target=masked)  # [B, L, D]
        hidden = self.attend(embeds, self.attention_mask("generate", input_ids, attention_mask))  # [B, L, D]
        segment = tokens.shape[1] + 2
        labels = input_ids[:, -segment:].clone()  # [B, n + 2]
        labels[:, 1:-1] = tokens.masked_fill(~mask, -100)
        return token_cross_entropy(self.language_model.lm_head, hidden[:, -segment:], labels)

    def _caption(
        self,
        corruption: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        condition_pixel_values: torch.Tensor | None = None,
    ) -> UnifiedOutput:
        """Image-to-text, or text alone: next-token cross-entropy over the supervised tokens."""
        condition = None
        if condition_pixel_values is not None:
            condition = self.encode_condition(condition_pixel_values)  # [B, P, D]
        embeds = self.embed(input_ids, condition)  # [B, L, D]
        hidden = self.attend(embeds, self.attention_mask("caption", input_ids, attention_mask))  # [B, L, D]
        return token_cross_entropy(self.language_model.lm_head, hidden[:, :-1], labels[:, 1:], condition)

    # --- encodings ---

    def encode_condition(self, condition_pixel_values: torch.Tensor) -> torch.Tensor:
        """See `UnifiedModel.encode_condition`: CLIP's embeddings behind the projector, or in the plain variant the embeddings
        of the image's tokens, `[B, P, D]`."""
        return self._project(self.condition_features(condition_pixel_values))

    @torch.no_grad()
    def condition_features(self, condition_pixel_values: torch.Tensor) -> torch.Tensor:
        """The frozen part of `encode_condition`: CLIP's embeddings `[B, P, D_clip]`, or in the plain variant the image's tokens
        `[B, P]`."""
        if not self.config.w_clip_vit:
            return self.encode_target(condition_pixel_values)
        tower = self.vision_tower(condition_pixel_values.to(self.vision_tower.dtype), output_hidden_states=True)
        return tower.hidden_states[-2][:, 1:]  # without the class token

    def _project(self, features: torch.Tensor) -> torch.Tensor:
        """The trained part of `encode_condition`: results of `condition_features` to `[B, P, D]`."""
        table = self.language_model.model.embed_tokens
        return self.mm_projector(features.to(table.weight.dtype)) if self.config.w_clip_vit else table(features)

    @torch.no_grad()
    def encode_target(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> ids `[B, n]` int64 of their tokens."""
        with torch.autocast(pixel_values.device.type, enabled=False):
            dtype = self.vq_model.decoder.conv_in.weight.dtype
            return self.vq_model.encode(pixel_values.to(dtype)) + self.config.image_token_offset

    def encode_batch(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """See `UnifiedModel.encode_batch`: `condition_features`, before the projector, which is trained, and `tokens`
        `[B, n]` int64."""
        return {
            "condition_features": self.condition_features(batch["condition_pixel_values"]),
            "tokens": self.encode_target(batch["pixel_values"]),
        }

    @torch.no_grad()
    def decode_target(self, target: torch.Tensor) -> torch.Tensor:
        """Ids `[B, n]` of a square image -> `[B, 3, H, W]` float32, about [-1, 1]."""
        codes = (target - self.config.image_token_offset).clamp(0, self.config.codebook_size - 1)
        with torch.autocast(target.device.type, enabled=False):
            return self.vq_model.decode(codes).float()

    # --- the language model ---

    def embed(
        self, input_ids: torch.Tensor, condition: torch.Tensor | None = None, target: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embed sequences with their images filled in: `[B, L, D]`.

        Args:
            input_ids: `[B, L]`, see `ShowOProcessor`.
            condition: `[B, P, D]` of `encode_condition`, which replaces `CONDITION_TOKEN_ID`.
            target: image-token ids `[B, n]`, which replace the mask token.

        Raises:
            ValueError: the numbers of images or of their tokens are not those that the sequences have places for.
        """
        places = input_ids == CONDITION_TOKEN_ID
        check_places(places, condition, "condition")
        ids = input_ids.masked_fill(places, 0)
        if target is not None:
            masked = input_ids == self.config.mask_token_id
            check_places(masked, target, "target")
            ids = ids.masked_scatter(masked, target)
        embeds = self.language_model.model.embed_tokens(ids)  # [B, L, D]
        if condition is None:
            return embeds
        return embeds.masked_scatter(places[..., None], condition.to(embeds.dtype))

    def attention_mask(self, task: str, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Omni-attention: which position (query) sees which (key), `[B, 1, L, L]` bool.

        Every position sees those before it. In addition,

        - `generate`, and `reconstruct` in the plain variant: the positions of an image and its markers see each other;
        - `reconstruct` in the CLIP variant: all see the condition, and the target's tokens see each other;
        - `caption`: all see the condition; in the plain variant all see everything up to the condition's end marker.

        No position sees padding, except one that would see nothing else. In `caption` padding is last and needs no mask.
        """
        config = self.config
        length = input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()  # [L, L]: query, key
        begins = (input_ids == config.special_token_id("<|soi|>")).long()  # [B, L], like all that follow
        ends = (input_ids == config.special_token_id("<|eoi|>")).long()
        condition = input_ids == CONDITION_TOKEN_ID
        if task == "caption":
            if not config.w_clip_vit:
                condition = (ends.cumsum(1) - ends == 0) & (ends.sum(1, keepdim=True) > 0)
            return (causal | condition[:, None])[:, None]  # [B, 1, L, L]
        if task == "reconstruct" and config.w_clip_vit:
            image = (input_ids == config.mask_token_id).long()  # the only one
            allowed = causal | condition[:, None]
        else:
            number = begins.cumsum(1)
            image = number * (number - ends.cumsum(1) + ends)  # 1 in the first image, 2 in the second, 0 outside
            allowed = causal
        allowed = allowed | ((image[:, :, None] == image[:, None]) & (image[:, None] > 0))  # [B, L, L]
        visible = allowed & attention_mask.bool()[:, None]  # [B, L, L]
        return torch.where(visible.any(-1, keepdim=True), visible, allowed)[:, None]

    def attend(
        self, embeds: torch.Tensor, mask: torch.Tensor | None, cache: DynamicCache | None = None
    ) -> torch.Tensor:
        """Hidden states `[B, T, D]` of the language model for inputs `[B, T, D]` behind the S tokens of `cache`. The `mask`
        `[B, 1, T, S + T]` bool says which positions see which; `None` lets all see all."""
        if mask is not None:
            blocked = torch.finfo(embeds.dtype).min
            mask = torch.zeros(mask.shape, dtype=embeds.dtype, device=mask.device).masked_fill(~mask, blocked)
        # Positional arguments: releases of transformers differ in the name of the cache.
        output = self.language_model.model(None, mask, None, cache, embeds, use_cache=cache is not None)
        return output.last_hidden_state

    def drop_text(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, drop: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Text-to-image sequences `[B, L]` and their mask, without a caption where `drop` `[B]` bool is true:
        `PAD.. t2i bos eos soi ..`."""
        config = self.config
        prefix = int((input_ids[0] == config.special_token_id("<|soi|>")).int().argmax())
        drop = drop.to(input_ids.device)[:, None]
        head = torch.tensor(
            [config.special_token_id("<|t2i|>"), config.bos_token_id, config.eos_token_id], device=input_ids.device
        )
        empty = input_ids.clone()
        empty[:, : prefix - 3] = config.special_token_id("[PAD]")
        empty[:, prefix - 3 : prefix] = head
        valid = (empty != config.special_token_id("[PAD]")).to(attention_mask.dtype)
        return torch.where(drop, empty, input_ids), torch.where(drop, valid, attention_mask)

    def _without_condition(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequences `[B, L]` and their mask with everything before the target's start marker turned into padding."""
        prefix = int((input_ids[0] == self.config.mask_token_id).int().argmax()) - 1
        input_ids, attention_mask = input_ids.clone(), attention_mask.clone()
        input_ids[:, :prefix] = self.config.special_token_id("[PAD]")
        attention_mask[:, :prefix] = 0
        return input_ids, attention_mask

    # --- draws and counts ---

    def sample_corruption(self, batch: dict[str, Any], generator: Generators = None) -> dict[str, torch.Tensor]:
        """Draw which tokens of each image are masked: `mask` `[B, n]` bool. Captions have no draws."""
        if batch.get("task") == "caption" or "labels" in batch:
            return {}
        if "tokens" in batch:
            batch_size, count = batch["tokens"].shape
        else:
            batch_size, _, *sides = batch["pixel_values"].shape
            count = math.prod(side // self.config.vq_scale_factor for side in sides)

        def draw(sample_generator: torch.Generator | None) -> torch.Tensor:
            time = torch.rand(1, generator=sample_generator)
            noise = torch.rand(1, count, generator=sample_generator)
            return mask_tokens(time, noise)[0]

        return {"mask": per_sample(draw, batch_size, generator)}

    def count_supervised(self, batch: dict[str, Any], corruption: dict[str, torch.Tensor]) -> int:
        """Supervised tokens of a caption, else the masked image tokens; `generate` adds the image's two markers."""
        if "labels" in batch:
            return count_answer_tokens(batch["labels"])
        mask = corruption["mask"]
        has_condition = bool({"condition_pixel_values", "condition_features"} & batch.keys())
        return int(mask.sum()) + (0 if has_condition else 2 * len(mask))

    def decays(self, name: str, shape: torch.Size) -> bool:
        """See `UnifiedModel.decays`; norms decay too."""
        return not name.endswith("bias")

    def example_batch(
        self,
        batch_size: int,
        max_image_size: int | None = None,
        min_image_size: int | None = None,
        text_length: int = 32,
    ) -> dict[str, Any]:
        """See `UnifiedModel.example_batch`. The plain variant's condition has half the target's side; the CLIP variant pads
        all texts to 125 tokens."""
        config = self.config
        side, padding = config.image_size, 0
        check_only_size(side, max_image_size, min_image_size)
        if config.w_clip_vit:
            condition = config.vision_config.image_size
            condition_tokens = (condition // config.vision_config.patch_size) ** 2
            text_length = min(text_length, 125)
            padding = 125 - text_length
        else:
            condition = side // 2
            condition_tokens = (condition // config.vq_scale_factor) ** 2
        begin, end = config.special_token_id("<|soi|>"), config.special_token_id("<|eoi|>")
        row = [config.special_token_id("<|mmu|>"), begin, *[CONDITION_TOKEN_ID] * condition_tokens, end]
        row += [0] * text_length + [config.special_token_id("[PAD]")] * padding
        row += [begin, *[config.mask_token_id] * config.num_vq_tokens, end]
        input_ids = torch.tensor(row).repeat(batch_size, 1)
        return {
            "task": "reconstruct",
            "pixel_values": torch.zeros(batch_size, 3, side, side),
            "condition_pixel_values": torch.zeros(batch_size, 3, condition, condition),
            "input_ids": input_ids,
            "attention_mask": (input_ids != config.special_token_id("[PAD]")).long(),
        }

    # --- sampling ---

    def _generate_images(
        self,
        processor: ShowOProcessor,
        text: list[str] | None,
        images: list[Image.Image] | None,
        *,
        task: str,
        generator: Generators,
        mask_images: list[Image.Image] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        temperature: float = 1.0,
        negative_prompt: list[str] | None = None,
    ) -> list[Image.Image]:
        """See `UnifiedModel.generate_images`. `edit` is inpainting; the authors use 16 steps and guidance 1.75 for it.

        Args:
            mask_images: for `edit`, one per image or one for all; white areas are generated anew from `text`.
            guidance_scale: classifier-free guidance away from an empty caption; off at 0.
            temperature: of the noise in the confidences that decide which tokens are kept; it decreases over the steps.
            negative_prompt: captions in place of the empty one.

        Raises:
            ValueError: `mask_images` are missing for `edit`, or given for another task.
        """
        if (mask_images is None) == (task == "edit"):
            needs = "needs mask_images" if task == "edit" else "takes no mask_images"
            raise ValueError(f"task={task!r} {needs}.")
        condition, known = None, None
        if task == "reconstruct":
            batch = processor(images=images, instruction=text, task="reconstruct")
            condition = self.encode_condition(batch["condition_pixel_values"].to(self.device))  # [B, P, D]
        else:
            batch = processor.prompts(text)
            if task == "edit":
                known = self.encode_target(processor.crop(images).to(self.device))  # [B, n]
                masks = read_images("mask_images", mask_images)
                masks = self.token_mask(spread({"images": images, "mask_images": masks})["mask_images"])
                known = known.masked_fill(masks, self.config.mask_token_id)
        input_ids, mask = batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device)
        negative = None
        if negative_prompt is not None:
            batch = processor.prompts(negative_prompt)
            negative = batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device)
        *_, (tokens, _) = self.generate_tokens(
            input_ids,
            mask,
            self.sampling_noise(len(input_ids), generator),
            num_inference_steps,
            guidance_scale=guidance_scale,
            temperature=temperature,
            condition=condition,
            known=known,
            negative=negative,
        )
        return to_images(self.decode_target(tokens), rounding="down")

    @torch.no_grad()
    def generate_tokens(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        noise: Iterable[tuple[torch.Tensor, torch.Tensor]],
        num_inference_steps: int,
        guidance_scale: float = 0.0,
        temperature: float = 1.0,
        condition: torch.Tensor | None = None,
        known: torch.Tensor | None = None,
        negative: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Masked parallel decoding: each step predicts all unknown tokens and keeps the most confident ones.

        Args:
            input_ids, attention_mask: `[B, L]`, sequences of `generate` or, with `condition`, of `reconstruct`.
            noise: each step's draws, see `sampling_noise`.
            known: `[B, n]` ids to start from; by default the mask token everywhere.
            condition: `[B, P, D]` of `encode_condition`, for reconstructions.
            negative: `input_ids` and `attention_mask` `[B, L']` of the sequences of `generate` that guidance leads away from;
                by default those of an empty caption.

        Yields:
            After each step the ids `[B, n]` that it predicts, and the same with the mask token where it is not confident,
            from which the next step starts. The last step's prediction is the image.
        """
        config = self.config
        if negative is not None:  # all sequences are padded to one length L, on the left
            pad = config.special_token_id("[PAD]")
            input_ids, negative_ids = stack_padded((input_ids, negative[0]), pad, "left").chunk(2)
            attention_mask, negative_mask = stack_padded((attention_mask, negative[1]), side="left").chunk(2)
            negative = negative_ids, negative_mask
        masked = input_ids == config.mask_token_id  # [B, L]
        count = int(masked[0].sum())
        tokens = input_ids[masked].view(-1, count) if known is None else known  # [B, n]
        embeds = self.embed(input_ids, condition)  # [B, L, D]
        mask = self.attention_mask("generate" if condition is None else "reconstruct", input_ids, attention_mask)
        if guidance_scale > 0:
            if negative is None:
                blank = self._without_condition(input_ids, attention_mask)
                negative = self.drop_text(*blank, torch.ones(len(tokens)).bool())
            embeds = torch.cat([embeds, self.embed(negative[0])])  # [2B, L, D]
            mask = torch.cat([mask, self.attention_mask("generate", *negative)])  # [2B, 1, L, L]
        # Tokens before the target never see it, so their keys and values are computed once.
        prefix = embeds.shape[1] - count - 2
        cache = DynamicCache(config=config.text_config)
        self.attend(embeds[:, :prefix], mask[:, :, :prefix, :prefix], cache)

        codebook = slice(config.image_token_offset, config.mask_token_id)
        for step, (exponential, uniform) in zip(range(num_inference_steps), noise, strict=False):
            image = self.language_model.model.embed_tokens(tokens)  # [B, n, D]
            image = torch.cat([image, image]) if guidance_scale > 0 else image
            target = torch.cat([embeds[:, prefix : prefix + 1], image, embeds[:, -1:]], dim=1)  # [B or 2B, n + 2, D]
            hidden = self.attend(target, mask[:, :, prefix:], cache)[:, 1:-1]  # [B or 2B, n, D]
            cache.crop(-(count + 2))
            logits = self.language_model.lm_head(hidden)[..., codebook].float()  # [B or 2B, n, codebook]
            if guidance_scale > 0:
                conditional, unconditional = logits.chunk(2)
                logits = (1 + guidance_scale) * conditional - guidance_scale * unconditional  # [B, n, codebook]
            progress = (step + 1) / num_inference_steps
            temperature *= 1 - progress  # compounds over the steps, as in the original
            unknown = tokens == config.mask_token_id  # [B, n]
            sampled, confidence = sample_tokens(
                logits, exponential.to(logits.device), uniform.to(logits.device), temperature
            )  # [B, n] both
            sampled = torch.where(unknown, sampled + config.image_token_offset, tokens)
            confidence = confidence.masked_fill(~unknown, torch.finfo(confidence.dtype).max)
            remaining = unknown.sum(1, keepdim=True) - 1  # [B, 1]: at least one token is kept
            masked_again = remaining.clamp(max=math.floor(count * mask_ratio(progress))).clamp(min=1)
            cutoff = confidence.sort(dim=1).values.gather(1, masked_again)  # [B, 1]
            tokens = sampled.masked_fill(confidence < cutoff, config.mask_token_id)
            yield sampled, tokens

    def sampling_noise(
        self, batch_size: int, generator: Generators = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Endless draws for `generate_tokens`: for each step Exp(1) variates `[B, n, codebook]`, which choose the tokens, and
        uniform ones `[B, n]`, which choose the tokens to keep."""
        count, codebook = self.config.num_vq_tokens, self.config.codebook_size

        def exponential(sample_generator: torch.Generator | None) -> torch.Tensor:
            return torch.empty(count, codebook).exponential_(generator=sample_generator)

        def uniform(sample_generator: torch.Generator | None) -> torch.Tensor:
            return torch.rand(count, generator=sample_generator)

        while True:
            yield per_sample(exponential, batch_size, generator), per_sample(uniform, batch_size, generator)

    def token_mask(self, mask_images: list[Image.Image]) -> torch.Tensor:
        """The tokens `[B, n]` bool under the white areas of masks, which are cropped as their images are."""
        side = math.isqrt(self.config.num_vq_tokens)
        masks = [resize_and_crop(image, self.config.image_size).convert("L") for image in mask_images]
        levels = np.stack([np.asarray(mask) for mask in masks])  # [B, H, W]
        values = torch.from_numpy(levels).float()[:, None] / 255
        values = F.interpolate(values, (side, side), mode="bicubic", align_corners=False)  # [B, 1, h, w]
        return (values.flatten(1) >= 0.5).to(self.device)

    def _generate_text(
        self,
        processor: ShowOProcessor,
        text: list[str],
        images: list[Image.Image] | None,
        *,
        generator: Generators,
        max_new_tokens: int = 100,
        temperature: float = 0.0,
    ) -> list[str]:
        """See `UnifiedModel.generate_text`: greedy at `temperature` 0, as in the authors' evaluation, else sampled."""
        conditions: list[torch.Tensor | None] = [None] * len(text)
        if images is not None:  # [1, P, D] each
            conditions = self.encode_condition(processor.understanding_pixels(images).to(self.device)).split(1)
        generators = one_per_sample(generator, len(text))
        questions = processor.questions(text, images is not None)
        answers = []
        for input_ids, condition, row_generator in zip(questions, conditions, generators, strict=True):
            ids, _ = self.answer(input_ids.to(self.device), condition, max_new_tokens, temperature, row_generator)
            answers.append(processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
        return answers

    @torch.no_grad()
    def answer(
        self,
        input_ids: torch.Tensor,
        condition: torch.Tensor | None,
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[list[int], torch.Tensor]:
        """Continue one sequence `[1, T]` up to its EOS: the new ids, and their logits `[new, vocabulary]`."""
        cache = DynamicCache(config=self.config.text_config)
        embeds = self.embed(input_ids, condition)
        mask = self.attention_mask("caption", input_ids, None)
        ids, logits = [], []
        while len(ids) < max_new_tokens and self.config.eos_token_id not in ids:
            logits.append(self.language_model.lm_head(self.attend(embeds, mask, cache)[:, -1]).float())
            ids.append(int(draw_tokens(logits[-1], temperature, generator)))
            # A new token sees all before it, so it needs no mask.
            embeds, mask = self.language_model.model.embed_tokens(input_ids.new_tensor([ids[-1:]])), None
        return ids, torch.cat(logits)


def check_places(places: torch.Tensor, images: torch.Tensor | None, name: str) -> None:
    """Raise `ValueError` unless each sequence has as many `places` `[B, L]` as its image `[B, P, …]` has tokens."""
    batch_size, tokens = (len(places), 0) if images is None else images.shape[:2]
    if batch_size != len(places) or bool((places.sum(1) != tokens).any()):
        raise ValueError(
            f"{len(places)} sequences have {sorted(set(places.sum(1).tolist()))} places for the {name} image, but there are "
            f"{batch_size} images of {tokens} tokens; do the processor's sizes belong to this model?"
        )


def mask_ratio(time: float | torch.Tensor) -> float | torch.Tensor:
    """The share of an image's tokens that is masked at time `t` in [0, 1]: `cos(π t / 2)`."""
    if isinstance(time, torch.Tensor):
        return torch.cos(time * (math.pi / 2)).clamp(min=0)
    return max(math.cos(math.pi / 2 * time), 0.0)


def mask_tokens(time: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The tokens to mask, `[B, n]` bool: a random share `mask_ratio(time)` of each sample's, but at least one.

    Args:
        time: `[B]` uniform in [0, 1).
        noise: `[B, n]` uniform in [0, 1).
    """
    count = (noise.shape[1] * mask_ratio(time)).round().clamp(min=1)
    return noise.argsort(dim=-1) < count[:, None]


def sample_tokens(
    logits: torch.Tensor, exponential: torch.Tensor, uniform: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample `softmax(logits)` by exponential races; a sample's confidence is `log p + temperature · Gumbel noise`.

    Args:
        logits: `[B, n, codebook]`.
        exponential: Exp(1) variates of the same shape.
        uniform: `[B, n]` in [0, 1), the source of the Gumbel noise.

    Returns:
        Codebook indices `[B, n]` int64 and their confidences `[B, n]`.
    """
    probabilities = logits.softmax(-1)  # [B, n, codebook]
    sampled = (probabilities / exponential).argmax(-1)  # [B, n]
    chosen = probabilities.gather(-1, sampled[..., None])[..., 0]  # [B, n]
    tiny = 1e-20
    gumbel = -(-(uniform.clamp(min=tiny).log())).clamp(min=tiny).log()
    return sampled, chosen.clamp(min=tiny).log() + temperature * gumbel
