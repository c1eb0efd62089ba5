"""Sampling of images and answers from Lance."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from PIL import Image

from reca_trainer.models.common.guidance import guided, limit_norm
from reca_trainer.models.common.latents import unpatchify
from reca_trainer.models.common.pixels import to_images
from reca_trainer.models.contract import Generators
from reca_trainer.models.inference import differ_in_size, singly_where
from reca_trainer.models.lance.processing_lance import LanceProcessor, around_images

if TYPE_CHECKING:
    from reca_trainer.models.common.mot_model import Context

RENORM_DIMENSIONS = {"global": (-2, -1), "channel": (-1,)}


def differ_in_use(text: list[str], images: list[Image.Image] | None) -> bool:
    """Whether some texts ask a question and others have none, so that their system prompts differ."""
    return len({not question for question in text}) > 1


class LanceGeneration:
    """The part of `LanceModel` that samples."""

    @singly_where(differ_in_size)
    def _generate_images(
        self,
        processor: LanceProcessor,
        text: list[str] | None,
        images: list[Image.Image] | None,
        *,
        task: str,
        generator: Generators,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 4.0,
        guidance_interval: tuple[float, float] = (0.4, 1.0),
        guidance_renorm: str = "global",
        guidance_renorm_min: float = 0.0,
        use_kv_cache: bool = True,
        timestep_shift: float = 3.5,
        negative_prompt: list[str] | None = None,
        latents: torch.Tensor | None = None,
        posterior_noise: torch.Tensor | None = None,
    ) -> list[Image.Image]:
        """See `UnifiedModel.generate_images`. The defaults are those of the official script.

        Args:
            height, width: of the output in pixels; by default those of the input image in training, or the processor's
                square.
            guidance_scale: of the text; guidance is off at 1.
            guidance_interval: guidance acts at shifted timesteps `low < t <= high`.
            guidance_renorm: `"global"` (one factor an image), `"channel"` (one a token) or `"none"`.
            use_kv_cache: the original's option, which changes its guidance: with a cache, what follows the text has the same
                positions with the text and without it. A cache is always used here.
            negative_prompt: the text of the context that guidance leads away from; by default it has none.
            latents: the initial noise `[B, N, p²C]` in token order; drawn by default.
            posterior_noise: `[B, C, h, w]`, noise of the source's VAE posterior in editing; drawn by default.
        """
        if guidance_renorm not in (*RENORM_DIMENSIONS, "none"):
            raise ValueError(f"guidance_renorm is 'global', 'channel' or 'none', not {guidance_renorm!r}.")
        count = len(text or images)
        default_size = processor.target_size(*(images[0].size if images else (1, 1)))
        stride = self.config.latent_token_stride
        sides = zip((height, width), default_size, strict=True)
        grid = tuple((side or default) // stride for side, default in sides)

        use = "sample" if task == "generate" else task
        before, behind, mask = self._prompt(processor, use, text or [""] * count)
        start = self.read_text(self.new_context(count), before)
        if images is not None:
            start = self._read_pictures(start, processor.to_conditions(images, task))
        if task == "edit":
            pixels = processor.to_pixels(images).to(self.device)
            start = self._read_source(start, pixels, posterior_noise, generator)
        contexts = {"full": self.read_text(start, behind, mask)}
        if guidance_scale > 1:
            _, behind, mask = self._prompt(processor, use, negative_prompt or [""] * count)
            contexts["no_text"] = self.read_text(start, behind, mask)
            if negative_prompt is None and use_kv_cache:
                position = contexts["no_text"].position
                moved = replace(start, position=start.position + contexts["full"].position - position)
                contexts["no_text"] = replace(self.read_text(moved, behind, mask), position=position)

        x = self._denoise(
            contexts,
            self._initial_noise(count, grid, generator) if latents is None else latents,
            grid,
            num_inference_steps,
            timestep_shift,
            guidance_interval if guidance_scale > 1 else None,
            lambda velocities: guide(velocities, guidance_scale, guidance_renorm, guidance_renorm_min),
        )  # [B, N, p²C]
        return to_images(self.decode_target(unpatchify(x, grid, self.config.latent_patch_size)))

    @singly_where(differ_in_use)
    def _generate_text(
        self,
        processor: LanceProcessor,
        text: list[str],
        images: list[Image.Image] | None,
        *,
        generator: Generators,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
    ) -> list[str]:
        """See `UnifiedModel.generate_text`: greedy at `temperature` 0, else sampled. The original's limit is 256 tokens.
        Without a question the system prompt asks for a description."""
        before, behind, mask = self._prompt(processor, "question" if text[0] else "caption", text)
        start = self.read_text(self.new_context(len(text)), before)
        if images is not None:
            start = self._read_pictures(start, processor.to_conditions(images, "answer"), in_own_frame=False)
        # The last token of each row, the same line feed in all, predicts the answer's first token.
        context = self.read_text(start, behind[:, :-1], None if mask is None else mask[:, 1:])
        last = behind[:1, -1:] if mask is None else behind[mask[:, -1].bool()][:1, -1:]
        answers = self._answer(context, last.expand(len(text), -1), max_new_tokens, temperature, generator)
        return [processor.tokenizer.decode(answer).strip() for answer in answers]

    def _prompt(
        self, processor: LanceProcessor, use: str, text: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The tokens of prompts before and behind their images, see `LanceProcessor.prompt` and `around_images`."""
        return around_images(**{name: tensor.to(self.device) for name, tensor in processor.prompt(use, text).items()})

    def _read_pictures(
        self, context: Context, pixel_values: torch.Tensor | list[torch.Tensor], in_own_frame: bool = True
    ) -> Context:
        """Read the embeddings of images from `LanceProcessor.to_conditions`."""
        is_batch = torch.is_tensor(pixel_values)
        pixel_values = pixel_values.to(self.device) if is_batch else [image.to(self.device) for image in pixel_values]
        embeds, grids = self.encode_condition(pixel_values), self.grids_of(pixel_values)
        return self.read_image(context, embeds, grids, in_own_frame=in_own_frame)


def guide(velocities: dict[str, torch.Tensor], scale: float, renorm: str, renorm_min: float) -> torch.Tensor:
    """Classifier-free guidance with respect to the text, and the renormalisation with which it never lengthens the velocity.
    All `[B, N, C]`; `LanceGeneration._generate_images` describes `renorm`."""
    v = guided(velocities["full"], velocities["no_text"], scale)
    if renorm == "none":
        return v
    return limit_norm(v, velocities["full"], RENORM_DIMENSIONS[renorm], renorm_min)
