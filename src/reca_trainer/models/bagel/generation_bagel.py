"""Sampling of images and answers from BAGEL."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from PIL import Image

from reca_trainer.models.bagel.processing_bagel import BagelProcessor
from reca_trainer.models.common.guidance import guided, limit_norm
from reca_trainer.models.common.latents import unpatchify
from reca_trainer.models.common.pixels import to_images
from reca_trainer.models.contract import Generators
from reca_trainer.models.inference import differ_in_size, singly_where

if TYPE_CHECKING:
    from reca_trainer.models.common.mot_model import Context


class BagelGeneration:
    """The part of `BagelModel` that samples."""

    sampling_defaults: ClassVar = {  # from the notebook that BAGEL is published with
        "edit": {"image_guidance_scale": 2.0, "guidance_interval": (0.0, 1.0), "guidance_renorm": "text_channel"}
    }

    @singly_where(differ_in_size)
    def _generate_images(
        self,
        processor: BagelProcessor,
        text: list[str] | None,
        images: list[Image.Image] | None,
        *,
        task: str,
        generator: Generators,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 49,
        guidance_scale: float = 4.0,
        image_guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.4, 1.0),
        guidance_renorm: str = "global",
        guidance_renorm_min: float = 0.0,
        timestep_shift: float = 3.0,
        negative_prompt: list[str] | None = None,
        latents: torch.Tensor | None = None,
        posterior_noise: torch.Tensor | None = None,
    ) -> list[Image.Image]:
        """See `UnifiedModel.generate_images`. The defaults are the original's for text-to-image.

        Args:
            height, width: of the output in pixels; by default those of the resized input image, or the largest square.
            num_inference_steps: Euler steps (the original counts the 50 time points between which its 49 steps lie).
            guidance_scale: of the text; guidance is off at 1.
            image_guidance_scale: of the images, in addition; needs `guidance_scale > 1`.
            guidance_interval: guidance acts at shifted timesteps `low < t <= high`.
            guidance_renorm: `"global"` (one factor an image), `"channel"` (one a token) or `"text_channel"` (one a
                token, between text and image guidance).
            negative_prompt: the text of the context that text guidance leads away from; by default it has none.
            latents: the initial noise `[B, N, p²C]` in token order; drawn by default.
            posterior_noise: `[B, C, h, w]`, noise of the source's VAE posterior where latents are read; drawn by default.
        """
        count = len(text or images)

        def read(context: Context, texts: list[str] | None) -> Context:
            if texts is None:
                return context
            return self.read_text(context, **{k: v.to(self.device) for k, v in processor.tokenize(texts).items()})

        pictures = self.new_context(count)  # the context without the text
        if task in ("edit", "reconstruct"):
            resized = [processor.resize(image, processor.generation_size) for image in images]
            width, height = width or resized[0].width, height or resized[0].height
            if task == "edit" or processor.condition_encoder == "vae":
                pixels = processor.to_pixels(resized, processor.generation_size).to(self.device)
                pictures = self._read_source(pictures, pixels, posterior_noise, generator)
            if task == "edit" or processor.condition_encoder == "vit":
                rule = processor.understanding_size if task == "edit" else processor.condition_size
                pixels = processor.to_pixels(resized, rule).to(self.device)
                pictures = self.read_image(pictures, self.encode_condition(pixels), pixels.shape[-2:])
        contexts = {"full": read(pictures, text), "no_text": read(pictures, negative_prompt)}
        if guidance_scale > 1 and image_guidance_scale > 1:
            contexts["no_image"] = read(self.new_context(count), text)

        stride = self.config.latent_token_stride
        height, width = (side or processor.generation_size[0] for side in (height, width))
        grid = (height // stride, width // stride)
        scales = (guidance_scale, image_guidance_scale, guidance_renorm, guidance_renorm_min)
        x = self._denoise(
            contexts,
            self._initial_noise(count, grid, generator) if latents is None else latents,
            grid,
            num_inference_steps,
            timestep_shift,
            guidance_interval if guidance_scale > 1 else None,
            lambda velocities: guide(velocities, *scales),
        )  # [B, N, p²C]
        return to_images(self.decode_target(unpatchify(x, grid, self.config.latent_patch_size)), rounding="down")

    @singly_where(differ_in_size)
    def _generate_text(
        self,
        processor: BagelProcessor,
        text: list[str],
        images: list[Image.Image] | None,
        *,
        generator: Generators,
        max_new_tokens: int = 500,
        temperature: float = 0.0,
    ) -> list[str]:
        """See `UnifiedModel.generate_text`: greedy at `temperature` 0, else sampled. The original's limit is 500 tokens."""
        context = self.new_context(len(text))
        if images is not None:
            resized = [processor.resize(image, processor.generation_size) for image in images]
            pixels = processor.to_pixels(resized, processor.understanding_size).to(self.device)
            context = self.read_image(context, self.encode_condition(pixels), pixels.shape[-2:])
        tokens = {name: tensor.to(self.device) for name, tensor in processor.tokenize(text).items()}
        context = self.read_text(context, **tokens)
        start = torch.full((len(text), 1), self.config.bos_token_id, device=self.device)
        answers = self._answer(context, start, max_new_tokens, temperature, generator)
        return [processor.tokenizer.decode(ids) for ids in answers]


def guide(
    velocities: dict[str, torch.Tensor], text_scale: float, image_scale: float, renorm: str, renorm_min: float
) -> torch.Tensor:
    """Classifier-free guidance with respect to the text, then to the images, and BAGEL's renormalisation, with which
    guidance never lengthens the velocity. All `[B, N, C]`; `BagelGeneration._generate_images` describes `renorm`.

    Raises:
        ValueError: no such `renorm`.
    """
    full = velocities["full"]
    v = guided(full, velocities["no_text"], text_scale)
    if renorm == "text_channel":
        v = limit_norm(v, full, (-1,), renorm_min)
    if image_scale > 1:
        v = guided(v, velocities["no_image"], image_scale)
    if renorm == "text_channel":
        return v
    if renorm not in ("global", "channel"):
        raise ValueError(f"guidance_renorm is 'global', 'channel' or 'text_channel', not {renorm!r}.")
    return limit_norm(v, full, (-2, -1) if renorm == "global" else (-1,), renorm_min)
