"""From PIL images and strings to OpenUni's batches."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PreTrainedTokenizerBase

from reca_trainer.images import fit_to_size
from reca_trainer.models.contract import UnifiedProcessor
from reca_trainer.models.openuni.configuration_openuni import OpenUniConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class OpenUniProcessor(UnifiedProcessor):
    """Builds batches for `OpenUniModel`. Every sequence is padded on the left.

    Args:
        tokenizer: InternVL3's tokenizer.
        image_size: height and width, in pixels, of the images to generate.
        condition_size: the same of the understanding encoder's input, which every image is resized to.
        num_image_tokens: understanding embeddings of an image.
        max_caption_length: tokens kept of a text-to-image prompt in training.
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

    @classmethod
    def from_config(
        cls, config: OpenUniConfig, tokenizer: PreTrainedTokenizerBase, **overrides: int
    ) -> OpenUniProcessor:
        """The processor that fits a model's configuration."""
        sizes = {name: getattr(config, name) for name in ("image_size", "condition_size", "num_image_tokens")}
        return cls(tokenizer, **{**sizes, **overrides})

    @classmethod
    def tiny(cls, config: OpenUniConfig, tokenizer: PreTrainedTokenizerBase) -> OpenUniProcessor:
        """The processor of an `OpenUniConfig.tiny`.

        Args:
            tokenizer: with Qwen2's `<|im_start|>` and `<|im_end|>`; a copy of it gets the image tokens it lacks.

        Raises:
            ValueError: tokenizer and config differ in vocabulary size or image token.
        """
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens(["<img>", "</img>", "<IMG_CONTEXT>"], special_tokens=True)
        ids = len(tokenizer), tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        expected = config.internvl_config.text_config.vocab_size, config.internvl_config.image_token_id
        if ids != expected:
            raise ValueError(
                f"With image tokens the tokenizer has {ids[0]} entries, of which <IMG_CONTEXT> is number {ids[1]}, but "
                f"the config expects {expected[0]} and {expected[1]}."
            )
        return cls.from_config(config, tokenizer)

    def __call__(
        self,
        images: list[Image.Image] | None = None,
        text: list[str | None] | None = None,
        instruction: str | list[str] | None = None,
        task: str = "reconstruct",
        size: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """See `UnifiedProcessor.__call__`.

        Args:
            images: one per sample; `generate` does without them where there is no target, `reconstruct` is then its prompt.
            text: captions (`generate`, `caption`); `None` instead of one stands for the unconditional prompt of
                classifier-free guidance.
            instruction: what is asked for (`reconstruct`), or the question (`caption`): one for all images, or a list.
            size: `(height, width)` of the target, which is cropped centrally to that shape; by default square.

        Raises:
            ValueError: an unknown task, or numbers of images and texts that differ.
        """
        if task == "generate":
            prompts = [self._generation_turn(caption) for caption in text]
        elif task in ("reconstruct", "caption"):
            count = 1 if images is None else len(images)
            requests = instruction if isinstance(instruction, list) else [instruction or ""] * count
            prompts = [self._image_turn(request) for request in requests]
        else:
            raise ValueError(f"OpenUni has no task {task!r}; it has reconstruct, generate and caption.")
        counts = {len(part) for part in (prompts, images, text) if part}
        if len(counts) > 1:
            raise ValueError(f"A batch takes as many texts as images, but here are {sorted(counts)}.")
        if task == "caption":
            return {"task": task, **self._tokenize(prompts, text), **self._condition(images)}

        # A long caption loses the end of its prompt, the token that opens the image included: so OpenUni was trained.
        max_length = self.max_caption_length if task == "generate" and images else None
        batch = {"task": task, **self._tokenize([prompt + "<img>" for prompt in prompts], max_length=max_length)}
        if images:
            batch["pixel_values"] = self._to_pixels(images, size or self.target_sizes()[0])
        if task == "reconstruct" and images:
            batch["condition_pixel_values"] = self._to_condition(batch["pixel_values"])
        return batch

    def target_sizes(self) -> list[tuple[int, int]]:
        return [(self.image_size, self.image_size)]

    def ask(self, questions: list[str], images: list[Image.Image] | None = None) -> dict[str, torch.Tensor]:
        """Prompts that end where an answer begins, and the images they ask about."""
        if not images:
            return self._tokenize([self._turn(question) for question in questions])
        return {**self._tokenize([self._image_turn(question) for question in questions]), **self._condition(images)}

    def to_images(self, pixels: torch.Tensor) -> list[Image.Image]:
        """`[B, 3, H, W]` in about [-1, 1] → PIL images, rounded to the nearest of 256 levels."""
        levels = (127.5 * pixels.float() + 128).clamp(0, 255).to(torch.uint8)
        return [Image.fromarray(image) for image in levels.permute(0, 2, 3, 1).cpu().numpy()]

    def _turn(self, request: str) -> str:
        return f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n"

    def _image_turn(self, request: str) -> str:
        return self._turn(f"<img>{'<IMG_CONTEXT>' * self.num_image_tokens}</img>\n{request}")

    def _generation_turn(self, caption: str | None) -> str:
        return self._turn("Generate an image." if caption is None else f"Generate an image: {caption.strip()}")

    def _tokenize(
        self, prompts: list[str], answers: list[str] | None = None, max_length: int | None = None
    ) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` `[B, T]`, and with `answers` behind the prompts `labels` that supervise
        them and the end of their turn."""
        rows = self.tokenizer(prompts, add_special_tokens=False)["input_ids"]
        labels = [[-100] * len(row) for row in rows]
        if answers is not None:
            answers = [answer.strip() + "<|im_end|>" for answer in answers]
            answers = self.tokenizer(answers, add_special_tokens=False)["input_ids"]
            rows, labels = ([a + b for a, b in zip(left, answers, strict=True)] for left in (rows, labels))
        rows = [row[:max_length] for row in rows]
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if answers is not None:
            length = batch["input_ids"].shape[1]
            batch["labels"] = torch.tensor([[-100] * (length - len(label)) + label for label in labels])
        return batch

    def _condition(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """Whole images for questions about them."""
        size = (self.condition_size, self.condition_size)
        images = [image.resize(size, Image.Resampling.BICUBIC) for image in images]
        return {"condition_pixel_values": self._to_condition(self._to_pixels(images, size))}

    def _to_pixels(self, images: list[Image.Image], size: tuple[int, int]) -> torch.Tensor:
        """`[B, 3, H, W]` float32 in [-1, 1] at `size = (height, width)`."""
        pixels = np.stack([np.asarray(fit_to_size(image.convert("RGB"), size)) for image in images])
        return 2 * (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255) - 1

    def _to_condition(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`[B, 3, H, W]` in [-1, 1] → the vision transformer's input `[B, 3, s, s]`: normalised, then resized
        bilinearly without antialiasing, as the queries were trained with."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        normalised = ((pixel_values + 1) / 2 - mean) / std
        return F.interpolate(normalised, size=(self.condition_size, self.condition_size), mode="bilinear")
