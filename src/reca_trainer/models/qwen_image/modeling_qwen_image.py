"""Qwen-Image-Edit (arXiv:2508.02324): Qwen2.5-VL reads the picture and the words, a diffusion transformer generates.

    [ template, picture, words ] → Qwen2.5-VL → hidden states behind the template's head → the transformer's condition

What is unusual about this model:

- Qwen2.5-VL and the autoencoder are never trained, and no gradient passes through them. So all that the transformer reads of
  a picture without words can be computed once: `encode_batch`.
- Of two streams the transformer only reads one at its end, so the last block has layers that nothing depends on.
- A reconstruction reads the picture through Qwen2.5-VL alone. The latents of a source, which an edit has besides, would be
  the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2_5_VLForConditionalGeneration

from reca_trainer.models.common.condition_dropout import drop_condition
from reca_trainer.models.common.flow_matching import flow_loss, interpolate
from reca_trainer.models.common.guidance import guided
from reca_trainer.models.common.pixels import to_images
from reca_trainer.models.common.token_sampling import generate_answers
from reca_trainer.models.common.vision_patches import image_patches
from reca_trainer.models.contract import (
    Generators,
    UnifiedModel,
    UnifiedOutput,
    count_answer_tokens,
    per_sample,
    token_cross_entropy,
)
from reca_trainer.models.qwen_image.configuration_qwen_image import QwenImageConfig
from reca_trainer.models.qwen_image.processing_qwen_image import (
    NEGATIVE,
    QwenImageProcessor,
    bounded_size,
    snapped,
)

MAX_SIDE = 8192  # pixels
Pictures = torch.Tensor | list[torch.Tensor]


class QwenImageModel(UnifiedModel):
    """Qwen-Image-Edit for RecA.

    Shapes: `B` samples, `T` prompt tokens with those of pictures, `S` of a picture, `D` the width of Qwen2.5-VL, latents
    `[B, C, h, w]`, which the transformer reads four by four as `N` tokens.
    """

    config_class = QwenImageConfig
    base_model_prefix = ""
    tasks = ("reconstruct", "caption", "generate", "edit")
    image_tasks = ("generate", "reconstruct", "edit")
    quantized_modules = r"(transformer\.transformer_blocks|text_encoder\.model\.language_model\.layers)\.\d+\..+"
    frozen_encoders = ("text_encoder", "vae")
    supports_gradient_checkpointing = True
    supports_condition_token_dropout = True
    # With all tokens of a VLM in front of it, a strong transformer copies and its pictures lose variety; 0.85 is the share with
    # which variety came back ("Latent Scaffolding", 2026, on Z-Image).
    condition_token_dropout = 0.85
    _supports_sdpa = _supports_flash_attn = True
    _no_split_modules = ("Qwen2_5_VLVisionBlock", "Qwen2_5_VLDecoderLayer", "QwenImageTransformerBlock")

    def __init__(self, config: QwenImageConfig):
        super().__init__(config)
        config.text_encoder_config._attn_implementation = config._attn_implementation
        # The first, since that is where `device` looks, which the text encoder may have left.
        self.transformer = QwenImageTransformer2DModel.from_config(config.transformer_config)
        self.text_encoder = Qwen2_5_VLForConditionalGeneration(config.text_encoder_config)
        self.vae = AutoencoderKLQwenImage.from_config(config.vae_config)
        if self.transformer.config.guidance_embeds or self.transformer.config.use_additional_t_cond:
            raise ValueError("Transformers that take a guidance scale or a second timestep are not supported.")
        with torch.device("cpu"):  # its tables are no buffers, and would stay without contents on the meta device
            rope = self.transformer.pos_embed
            self.transformer.pos_embed = type(rope)(rope.theta, rope.axes_dim, rope.scale_rope)
        for module in (*self.transformer.modules(), *self.vae.modules()):
            module._is_hf_initialized = True  # diffusers initialises its own layers
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_encoder.get_input_embeddings()

    @property
    def lora_target_modules(self) -> str:  # type: ignore[override]
        layers = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|(img|txt)_mlp\.net\.(0\.proj|2)"
        return rf"(?!{self._without_effect})transformer\.transformer_blocks\.\d+\.({layers})"

    @property
    def _without_effect(self) -> str:
        """Pattern of the layers that only the prompt's stream behind the last block depends on."""
        last = self.transformer.config.num_layers - 1
        return rf"transformer\.transformer_blocks\.{last}\.(attn\.to_add_out|txt_mlp)\b"

    @property
    def generation_modules(self) -> list[str]:
        return [
            name
            for name, module in self.named_modules()
            if name.startswith("transformer.")
            and any(True for _ in module.parameters(recurse=False))
            and not re.match(self._without_effect, name)
        ]

    @property
    def understanding_modules(self) -> list[str]:
        return ["text_encoder"]

    @property
    def frozen_modules(self) -> list[str]:
        return ["vae"]

    @property
    def image_sides(self) -> range:
        stride = 2 * self.vae.spatial_compression_ratio
        return range(stride, MAX_SIDE + 1, stride)

    # --- losses ---

    def _reconstruct(
        self,
        corruption: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        prompt_start: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        condition_pixel_values: Pictures | None = None,
        pixel_values: torch.Tensor | None = None,
        condition_embeds: torch.Tensor | None = None,
        condition_ids: torch.Tensor | None = None,
        condition_attention_mask: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
    ) -> UnifiedOutput:
        """RecA: Qwen2.5-VL reads the picture and the instruction, the transformer denoises the same picture behind its states.

        Args:
            input_ids, attention_mask: `[B, T]` int64, the prompt, padded on the right.
            prompt_start: `[B]` int64, how many of its tokens, all before the picture, the transformer does not read.
            condition_pixel_values: `[B, 3, h, w]` float or a list of `[3, h, w]`, for Qwen2.5-VL's vision transformer.
            pixel_values: `[B, 3, H, W]` float in [-1, 1].
            condition_embeds, condition_ids, condition_attention_mask, latents: what `encode_batch` gives of the same pictures
                without an instruction; `input_ids` then has neither tokens of a picture nor an instruction.

        Raises:
            ValueError: there is an instruction beside the `condition_embeds`.
        """
        if condition_embeds is None:
            states, mask, embeds = self.encode_prompt(input_ids, prompt_start, attention_mask, condition_pixel_values)
            ids = input_ids[:, int(prompt_start[0]) :]  # [B, T']
        else:
            self._move_text_encoder(torch.device("cpu"))
            states, mask, ids, embeds = condition_embeds, condition_attention_mask, condition_ids, condition_embeds
            words = (ids if mask is None else ids.masked_fill(~mask, self._image_token))[0]
            words, rows = words[words != self._image_token], input_ids[:, int(prompt_start[0]) :]
            if rows.shape[1] != len(words) or not bool((rows == words).all()):
                raise ValueError(
                    "What Qwen2.5-VL makes of a picture was computed without an instruction, but this batch has one: set "
                    "instruction_dropout=1, or leave cache_latents off."
                )
        mask = drop_condition(corruption, mask, ids == self._image_token)
        return self._flow_matching(corruption, pixel_values, latents, states, mask, embeds)

    def _generate(
        self,
        corruption: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        prompt_start: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
    ) -> UnifiedOutput:
        """Text-to-image: denoise the picture behind its caption. The arguments are as in `_reconstruct`."""
        states, mask, _ = self.encode_prompt(input_ids, prompt_start, attention_mask)
        return self._flow_matching(corruption, pixel_values, latents, states, mask)

    def _edit(
        self,
        corruption: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        prompt_start: torch.Tensor,
        source_pixel_values: torch.Tensor,
        condition_pixel_values: Pictures,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
    ) -> UnifiedOutput:
        """Editing: read the source and the instruction, then denoise the target beside the source's latents.

        Args:
            source_pixel_values: `[B, 3, H', W']` float in [-1, 1]; the others as in `_reconstruct`.
        """
        source = self.encode_target(source_pixel_values)  # [B, C, h', w']
        states, mask, embeds = self.encode_prompt(input_ids, prompt_start, attention_mask, condition_pixel_values)
        return self._flow_matching(corruption, pixel_values, latents, states, mask, embeds, source)

    def _flow_matching(
        self,
        corruption: dict[str, torch.Tensor],
        pixel_values: torch.Tensor | None,
        latents: torch.Tensor | None,
        prompt_embeds: torch.Tensor,
        mask: torch.Tensor | None,
        understanding_embeds: torch.Tensor | None = None,
        source: torch.Tensor | None = None,
    ) -> UnifiedOutput:
        """Rectified flow: the transformer predicts the velocity `noise - latents` at `σ`, the share of noise."""
        latents = self.encode_target(pixel_values) if latents is None else latents.float()  # [B, C, h, w]
        noise, sigma = corruption["noise"].to(latents), corruption["sigmas"].to(latents)  # [B, C, h, w], [B]
        noisy = interpolate(latents, noise, sigma)  # [B, C, h, w]
        prediction = self.velocity(pack(noisy), sigma, prompt_embeds, mask, latents.shape[-2:], source)  # [B, N, 4C]
        return flow_loss(prediction, pack(noise - latents), understanding_embeds=understanding_embeds)

    def _caption(
        self,
        corruption: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        condition_pixel_values: Pictures | None = None,
    ) -> UnifiedOutput:
        """Image-to-text: next-token cross-entropy of the answers. RecA trains nothing that it depends on."""
        hidden, embeds = self._read(input_ids, attention_mask, condition_pixel_values)  # [B, T, D]
        return token_cross_entropy(self.text_encoder.lm_head, hidden[:, :-1], labels[:, 1:], embeds)

    # --- encodings ---

    @torch.no_grad()
    def encode_condition(self, condition_pixel_values: Pictures) -> torch.Tensor:
        """Pictures `[B, 3, h, w]`, or a list of `[3, h, w]`, as Qwen2.5-VL's language model reads them: `[B, S, D]`, of
        shorter rows padded with zeros."""
        self._move_text_encoder(self.device)
        patches, grids = self._patches(condition_pixel_values)
        features = self.text_encoder.model.get_image_features(patches, grids, return_dict=True)
        return pad_sequence(list(features.pooler_output), batch_first=True)

    @torch.no_grad()
    def encode_target(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pictures `[B, 3, H, W]` in [-1, 1] → the mode of the autoencoder's posterior, normalised: `[B, C, h, w]` float32."""
        posterior = self.vae.encode(pixel_values.to(self.vae.dtype)[:, :, None]).latent_dist
        latents = posterior.mode()[:, :, 0].float()
        mean, std = self._latent_statistics(latents)
        return (latents - mean) / std

    @torch.no_grad()
    def decode_target(self, target: torch.Tensor) -> torch.Tensor:
        """Normalised latents `[B, C, h, w]` → pictures `[B, 3, H, W]` float32 in [-1, 1]."""
        mean, std = self._latent_statistics(target)
        latents = (target / (1.0 / std) + mean).to(self.vae.dtype)
        return self.vae.decode(latents[:, :, None], return_dict=False)[0][:, :, 0].float()

    def _latent_statistics(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the autoencoder's latents by channel, `[C, 1, 1]` both."""
        mean, std = (latents.new_tensor(self.vae.config[f"latents_{name}"])[:, None, None] for name in ("mean", "std"))
        return mean, std

    def encode_batch(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """See `UnifiedModel.encode_batch`: all that the transformer reads of a prompt without an instruction,
        `condition_embeds` `[B, T', D]` and the `condition_ids` `[B, T']` they stand for, and the target's `latents`."""
        ids, start = batch["input_ids"], batch["prompt_start"]
        mask, pictures = batch.get("attention_mask"), batch["condition_pixel_values"]
        return {
            "condition_embeds": self.encode_prompt(ids, start, mask, pictures)[0],
            "condition_ids": ids[:, int(start[0]) :],
            "latents": self.encode_target(batch["pixel_values"]),
        }

    # --- Qwen2.5-VL and the transformer ---

    @torch.no_grad()
    def encode_prompt(
        self,
        input_ids: torch.Tensor,
        prompt_start: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        condition_pixel_values: Pictures | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """What the transformer is conditioned on: the states `[B, T', D]` behind the template's head, their mask `[B, T']`, and
        the pictures' embeddings `[B, S, D]`."""
        hidden, embeds = self._read(input_ids, attention_mask, condition_pixel_values)  # [B, T, D]
        start = int(prompt_start[0])
        return hidden[:, start:], None if attention_mask is None else attention_mask[:, start:], embeds

    def _read(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, pictures: Pictures | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states of Qwen2.5-VL `[B, T, D]`, and the embeddings of the pictures `[B, S, D]`."""
        self._move_text_encoder(self.device)
        inputs = {} if pictures is None else self._picture_inputs(input_ids, pictures)
        output = self.text_encoder.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True, **inputs
        )
        if pictures is None:
            return output.last_hidden_state, None
        vision = getattr(output, "image_outputs", None)
        if vision is None:  # older transformers keep them to themselves
            vision = self.text_encoder.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        return output.last_hidden_state, pad_sequence(list(vision.pooler_output), batch_first=True)

    def _move_text_encoder(self, device: torch.device) -> None:
        """Take Qwen2.5-VL off the accelerator, since steps on `encode_batch` do without it, and back when it is asked. Shards
        stay where they are."""
        weight = self.text_encoder.lm_head.weight
        if weight.device != device and not isinstance(weight, DTensor):
            self.text_encoder.to(device)

    def _picture_inputs(self, input_ids: torch.Tensor, pictures: Pictures) -> dict[str, torch.Tensor]:
        """What Qwen2.5-VL takes beside its text. Without `mm_token_type_ids`, as in diffusers 0.42, the tokens of a picture
        would stand in a row and not in a grid, which is not what Qwen-Image was trained with."""
        patches, grids = self._patches(pictures)
        types = (input_ids == self._image_token).int()
        return {"pixel_values": patches, "image_grid_thw": grids, "mm_token_type_ids": types}

    def _patches(self, pictures: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
        batches = [pictures] if torch.is_tensor(pictures) else [picture[None] for picture in pictures]
        vision = self.config.text_encoder_config.vision_config
        patches, grids = zip(*(image_patches(batch, vision) for batch in batches), strict=True)
        return torch.cat(patches), torch.cat(grids)

    @property
    def _image_token(self) -> int:
        return self.config.text_encoder_config.image_token_id

    def velocity(
        self,
        tokens: torch.Tensor,
        sigma: torch.Tensor,
        prompt_embeds: torch.Tensor,
        mask: torch.Tensor | None,
        grid: Sequence[int],
        source: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The transformer's velocity `[B, N, 4C]` in float32.

        Args:
            tokens: `[B, N, 4C]`, packed noisy latents of `grid = (h, w)`.
            sigma: `[B]`, their share of noise.
            prompt_embeds, mask: `[B, T', D]` and `[B, T']`; `None` where everything is read.
            source: `[B, C, h', w']`, the latents of a picture to edit.
        """
        dtype = self.transformer.img_in.weight.dtype  # not quantised
        inputs, grids = tokens, [grid]
        if source is not None:
            inputs, grids = torch.cat([tokens, pack(source).to(tokens)], dim=1), [grid, source.shape[-2:]]
        shapes = [(1, height // 2, width // 2) for height, width in grids]
        velocity = self.transformer(
            hidden_states=inputs.to(dtype),
            encoder_hidden_states=prompt_embeds.to(dtype),
            encoder_hidden_states_mask=mask,
            timestep=sigma,
            img_shapes=[shapes] * len(tokens),
            return_dict=False,
        )[0]
        return velocity[:, : tokens.shape[1]].float()

    # --- draws and counts ---

    def sample_corruption(self, batch: dict[str, Any], generator: Generators = None) -> dict[str, torch.Tensor]:
        """Draws of the flow-matching loss: `noise` `[B, C, h, w]` Gaussian, then `sigmas` `[B]` logit-normal (section 4.1
        of the report), nearer to noise for larger pictures, as the scheduler shifts them. Nothing for captions."""
        if "labels" in batch:
            return {}
        if batch.get("latents") is not None:
            batch_size, *shape = batch["latents"].shape
        else:
            batch_size, _, height, width = batch["pixel_values"].shape
            ratio = self.vae.spatial_compression_ratio
            shape = [self.vae.config.z_dim, height // ratio, width // ratio]
        noise = per_sample(lambda g: torch.randn(shape, generator=g), batch_size, generator)
        logits = per_sample(lambda g: torch.randn((), generator=g), batch_size, generator)
        scheduler = self._scheduler()
        shift = self._shift(scheduler, shape[-2] * shape[-1] // 4)
        return {"noise": noise, "sigmas": scheduler.time_shift(shift, 1.0, logits.sigmoid())}

    def _scheduler(self, **changes: Any) -> FlowMatchEulerDiscreteScheduler:
        return FlowMatchEulerDiscreteScheduler.from_config(self.config.scheduler_config, **changes)

    def _shift(self, scheduler: FlowMatchEulerDiscreteScheduler, length: int) -> float:
        """The scheduler's shift for pictures of so many tokens."""
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        return calculate_shift(length, *(scheduler.config[name] for name in names))

    def count_supervised(self, batch: dict[str, Any], corruption: dict[str, torch.Tensor]) -> int:
        """The answers' tokens, or the elements of the latents."""
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
        """See `UnifiedModel.example_batch`. The template's head, which the transformer does not read, comes on top."""
        head, stride, step = 64, self.config.understanding_stride, self.image_sides.step
        height, width = bounded_size(1, 1, self.config.resolution, step, max_image_size, min_image_size)
        side = snapped(self.config.condition_resolution, stride)
        count = (side // stride) ** 2
        input_ids = torch.zeros(batch_size, head + count + text_length, dtype=torch.long)
        input_ids[:, head : head + count] = self._image_token
        return {
            "task": "reconstruct",
            "input_ids": input_ids,
            "prompt_start": torch.full((batch_size,), head),
            "condition_pixel_values": torch.zeros(batch_size, 3, side, side),
            "pixel_values": torch.zeros(batch_size, 3, height, width),
        }

    # --- sampling ---

    def _generate_images(
        self,
        processor: QwenImageProcessor,
        text: list[str] | None,
        images: list[Image.Image] | None,
        *,
        task: str,
        generator: Generators,
        num_inference_steps: int = 40,
        guidance_scale: float = 4.0,
        negative_prompt: list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> list[Image.Image]:
        """Generate images from prompts, from what Qwen2.5-VL sees in `images` (`task="reconstruct"`), or edit them; each
        alone, as diffusers' pipelines do.

        Args:
            text: prompts; for a reconstruction the instructions, by default none.
            generator: one generator, or one per image.
            num_inference_steps: steps of the Euler method.
            guidance_scale: classifier-free guidance that keeps the length of velocities, off at 1 and below.
            negative_prompt: what guidance leads away from, by default the " " of the model cards; for a reconstruction an
                instruction about the same image, and no guidance without it.
            height, width: of the images, in pixels; by default what the processor makes of each, or of a square.
        """
        count = len(images or text or [])
        text = text or [""] * count
        if negative_prompt is None and task != "reconstruct":
            negative_prompt = [NEGATIVE] * count
        if guidance_scale <= 1:
            negative_prompt = None
        results = []
        for index in range(count):
            picture = None if images is None else images[index]
            size = processor.target_size(*(picture.size if picture else (1, 1)))
            size = (height or size[0], width or size[1])
            source = None
            if task == "edit":
                source = self.encode_target(processor.to_pixels([picture]).to(self.device))  # [1, C, h', w']
            prompts = [text[index]] if negative_prompt is None else [text[index], negative_prompt[index]]
            conditions = [self._encode(processor, prompt, picture) for prompt in prompts]
            draw = generator[index] if isinstance(generator, list) else generator
            ratio = self.vae.spatial_compression_ratio
            shape = (1, self.vae.config.z_dim, size[0] // ratio, size[1] // ratio)
            latents = randn_tensor(shape, generator=draw, device=self.device, dtype=torch.float32)
            latents = self.sample_latents(latents, conditions, num_inference_steps, guidance_scale, source)
            results += to_images(self.decode_target(latents))
        return results

    def _encode(self, processor: QwenImageProcessor, words: str, picture: Image.Image | None) -> torch.Tensor:
        """`encode_prompt` of one prompt: `[1, T', D]`."""
        pictures = None if picture is None else [processor.to_condition(picture)]
        prompt = processor.prompt([words], pictures)
        condition = None if pictures is None else torch.stack(pictures).to(self.device)
        ids, start = prompt["input_ids"].to(self.device), prompt["prompt_start"]
        return self.encode_prompt(ids, start, condition_pixel_values=condition)[0]

    @torch.no_grad()
    def sample_latents(
        self,
        latents: torch.Tensor,
        conditions: list[torch.Tensor],
        num_inference_steps: int = 40,
        guidance_scale: float = 4.0,
        source: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Integrate the transformer's velocity from noise to images.

        Args:
            latents: `[B, C, h, w]` float32, the noise.
            conditions: states `[B, T', D]` of the prompt, and with guidance of the negative prompt.
            source: `[B, C, h', w']`, the latents of a picture to edit.

        Returns:
            `[B, C, h, w]` float32.
        """
        grid, tokens = latents.shape[-2:], pack(latents)  # [B, N, 4C]
        # The stretch to the last timestep of training divides by zero where the first is the last.
        scheduler = self._scheduler(**({"shift_terminal": None} if num_inference_steps == 1 else {}))
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        scheduler.set_timesteps(sigmas=sigmas, device=self.device, mu=self._shift(scheduler, tokens.shape[1]))
        scheduler.set_begin_index(0)
        for timestep in scheduler.timesteps:
            sigma = timestep.expand(len(tokens)) / scheduler.config.num_train_timesteps
            velocity, *negative = (self.velocity(tokens, sigma, states, None, grid, source) for states in conditions)
            if negative:
                combined = guided(velocity, negative[0], guidance_scale)
                lengths = (torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (velocity, combined))
                velocity = combined * torch.div(*lengths)
            tokens = scheduler.step(velocity, timestep, tokens, return_dict=False)[0]
        ratio = self.vae.spatial_compression_ratio
        return QwenImagePipeline._unpack_latents(tokens, *(side * ratio for side in grid), ratio)[:, :, 0]

    def _generate_text(
        self,
        processor: QwenImageProcessor,
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
        self._move_text_encoder(self.device)
        batch = processor.ask(text, images)
        ids, mask = (batch[name].to(self.device) for name in ("input_ids", "attention_mask"))
        tokenizer = processor.tokenizer
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "max_new_tokens": max_new_tokens,
            "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
            "pad_token_id": tokenizer.pad_token_id,
        }
        if images:
            pictures = [picture.to(self.device) for picture in batch["condition_pixel_values"]]
            inputs |= self._picture_inputs(ids, pictures)
        return generate_answers(self.text_encoder, tokenizer, inputs, generator, temperature, ids.shape[1], **sampling)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents `[B, C, h, w]` as the transformer's tokens `[B, N, 4C]`, two by two, as the pipeline packs them."""
    return QwenImagePipeline._pack_latents(latents, *latents.shape)
