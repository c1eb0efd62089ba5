"""OpenUni's prompts and images: PIL images and strings → one task's batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from reca_trainer.models.unified import UnifiedProcessor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class OpenUniProcessor(UnifiedProcessor):
    """Builds OpenUni's batches.

    Args:
        tokenizer: InternVL3's tokenizer.
        image_size (`int`, defaults to 512): height and width of the images to generate.
        condition_size (`int`, defaults to 448): height and width of the vision transformer's input.
        num_image_tokens (`int`, defaults to 256): understanding embeddings per image.
        max_caption_length (`int`, defaults to 128): tokens kept of a text-to-image training prompt.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int = 512,
        condition_size: int = 448,
        num_image_tokens: int = 256,
        max_caption_length: int = 128,
    ):
        super().__init__(tokenizer)
        self.image_size = image_size
        self.condition_size = condition_size
        self.num_image_tokens = num_image_tokens
        self.max_caption_length = max_caption_length

    def __call__(
        self,
        images: list[Image.Image] | None = None,
        text: list[str | None] | None = None,
        instruction: str | None = None,
        task: str = "reconstruct",
        size: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """Build the batch of one task.

        Args:
            images: RGB images, one per sample; may be absent for `generate` at inference.
            text: captions (`generate`, `caption`), where `None` stands for the unconditional prompt of classifier-free
                guidance; or one instruction per image (`reconstruct`).
            instruction: the instruction of a whole `reconstruct` batch, or the question of a `caption` batch.
            size: `(height, width)` of the target, which is cropped centrally to that shape; by default square.
        """
        if task == "caption":
            return {"task": task, **self._caption_batch(images, text, instruction)}
        if task == "reconstruct":
            prompts = [self._image_turn(one) for one in text or [instruction or ""] * len(images)]
        elif task == "generate":
            prompts = [self._generation_turn(caption) for caption in text]
        else:
            raise ValueError(f"OpenUni has no task {task!r}; it has reconstruct, generate and caption.")
        # As in training: a long caption loses the end of its prompt, the token that opens the image included.
        max_length = self.max_caption_length if task == "generate" and images else None
        batch = {"task": task, **self._tokenize([prompt + "<img>" for prompt in prompts], max_length)}
        if images:
            pixel_values = torch.stack([self._to_pixels(image, size or self.target_sizes()[0]) for image in images])
            batch["pixel_values"] = pixel_values
            if task == "reconstruct":
                batch["condition_pixel_values"] = self._to_condition(pixel_values)
        if len(prompts) != len(images or prompts):
            raise ValueError(f"Got {len(prompts)} texts for {len(images)} images; they must be as many.")
        return batch

    def question_batch(self, questions: list[str], images: list[Image.Image] | None = None) -> dict[str, torch.Tensor]:
        """Prompts that end where an answer begins, and the images they ask about."""
        prompts = [self._image_turn(question) if images else self._turn(question) for question in questions]
        batch = self._tokenize(prompts)
        if images:
            size = (self.condition_size, self.condition_size)
            pixels = torch.stack([self._to_pixels(image, size, crop=False) for image in images])
            batch["condition_pixel_values"] = self._to_condition(pixels)
        return batch

    def target_sizes(self) -> list[tuple[int, int]]:
        return [(self.image_size, self.image_size)]

    def to_images(self, pixels: torch.Tensor) -> list[Image.Image]:
        """`[B, 3, H, W]` in about [-1, 1] → PIL images, rounded to the nearest of 256 levels."""
        levels = (127.5 * pixels.float() + 128).clamp(0, 255).to(torch.uint8)
        return [Image.fromarray(image) for image in levels.permute(0, 2, 3, 1).cpu().numpy()]

    def _caption_batch(self, images: list[Image.Image], answers: list[str], question: str) -> dict[str, torch.Tensor]:
        batch = self.question_batch([question] * len(images), images)
        prompt_length = batch["attention_mask"].sum(dim=1)
        prompt = self._image_turn(question)
        batch |= self._tokenize([prompt + answer.strip() + self.tokenizer.eos_token for answer in answers])
        # Padding stands on the left, so a prompt begins where its mask does.
        start = batch["attention_mask"].argmax(dim=1) + prompt_length
        is_answer = torch.arange(batch["input_ids"].shape[1]) >= start[:, None]
        return {**batch, "labels": batch["input_ids"].where(is_answer, -100)}

    def _turn(self, request: str) -> str:
        return f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n"

    def _image_turn(self, request: str) -> str:
        return self._turn(f"<img>{'<IMG_CONTEXT>' * self.num_image_tokens}</img>\n{request}")

    def _generation_turn(self, caption: str | None) -> str:
        return self._turn("Generate an image." if caption is None else f"Generate an image: {caption.strip()}")

    def _tokenize(self, prompts: list[str], max_length: int | None = None) -> dict[str, torch.Tensor]:
        tokens = self.tokenizer(
            prompts,
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            truncation=max_length is not None,
            max_length=max_length,
            truncation_side="right",
            return_tensors="pt",
        )
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}

    def _to_pixels(self, image: Image.Image, size: tuple[int, int], crop: bool = True) -> torch.Tensor:
        """Resize bicubically to `(height, width)` after a central crop to its shape. `[3, H, W]` in [-1, 1]."""
        image = image.convert("RGB")
        fit = ImageOps.fit if crop else Image.Image.resize
        image = fit(image, size[::-1], Image.Resampling.BICUBIC)
        return 2 * (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255) - 1

    def _to_condition(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`[B, 3, H, W]` in [-1, 1] → the vision transformer's input `[B, 3, s, s]`: normalised, then resized
        bilinearly without antialiasing, as the connector's training saw it."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        normalised = ((pixel_values + 1) / 2 - mean) / std
        return F.interpolate(normalised, size=(self.condition_size, self.condition_size), mode="bilinear")


__all__ = ["OpenUniProcessor"]
