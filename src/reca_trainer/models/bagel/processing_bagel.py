"""From PIL images and strings to BAGEL's batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from reca_trainer.images import aspect_buckets
from reca_trainer.models.contract import UnifiedProcessor


def resized_size(
    width: int, height: int, max_size: int, min_size: int, stride: int, max_pixels: int = 14 * 14 * 9 * 1024
) -> tuple[int, int]:
    """`(width, height)` after BAGEL's resize: the long side at most `max_size`, the short side at least `min_size` where
    both are possible, multiples of `stride`. The pixel cap multiplies both sides by the ratio of areas, as the original
    does (it over-shrinks; the cap is not reached at the resolutions used here)."""

    def snap(sides: tuple[int, int], scale: float) -> tuple[int, int]:
        # Two roundings, half to even, as the original: to a pixel, then to a multiple of the stride.
        pixels = (round(side * scale) for side in sides)
        return tuple(max(stride, round(side / stride) * stride) for side in pixels)

    scale = max(min(max_size / max(width, height), 1.0), min_size / min(width, height))
    size = snap((width, height), scale)
    if size[0] * size[1] > max_pixels:
        size = snap(size, max_pixels / (size[0] * size[1]))
    if max(size) > max_size:
        size = snap(size, max_size / max(size))
    return size


class BagelProcessor(UnifiedProcessor):
    """Builds batches for `BagelModel`.

    Args:
        tokenizer: BAGEL's Qwen2.5 tokenizer.
        generation_size: `(max, min, stride)` in pixels for images that go through the VAE.
        condition_size: the same for the understanding encoder during reconstruction. The smallest size that it was
            trained at: this is RecA's information bottleneck (paper, table on conditions: 224 beats 512).
        understanding_size: the same for questions about an image and for editing.
    """

    def __init__(
        self,
        tokenizer=None,
        generation_size: tuple[int, int, int] = (1024, 512, 16),
        condition_size: tuple[int, int, int] = (224, 224, 14),
        understanding_size: tuple[int, int, int] = (980, 224, 14),
        **kwargs,
    ):
        self.generation_size = tuple(generation_size)
        self.condition_size = tuple(condition_size)
        self.understanding_size = tuple(understanding_size)
        super().__init__(tokenizer, **kwargs)
        self.bos_token_id = tokenizer.convert_tokens_to_ids("<|im_start|>")
        self.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def __call__(
        self,
        images: list[Image.Image] | None = None,
        text: list[str] | None = None,
        instruction: str | list[str] | None = None,
        task: str = "reconstruct",
        size: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """See `UnifiedProcessor.__call__`. `task="edit"` additionally takes `images` as pairs `(source, target)`; a
        reconstruction without images is its instruction `[1, T]`.

        Raises:
            ValueError: the images of one batch do not come out at one size.
        """
        batch: dict[str, Any] = {"task": task}
        if task == "edit":
            sources, images = zip(*images, strict=True)
            batch["source_pixel_values"] = self.to_pixels(sources, self.generation_size, size)
            batch["condition_pixel_values"] = self.to_pixels(sources, self.understanding_size)
        if task == "reconstruct" and images is not None:
            batch["condition_pixel_values"] = self.to_pixels(images, self.condition_size)
        if task == "caption":
            batch["condition_pixel_values"] = self.to_pixels(images, self.understanding_size)
        elif images is not None:
            batch["pixel_values"] = self.to_pixels(images, self.generation_size, size)

        if task == "reconstruct":
            if instruction:
                batch["input_ids"] = self.tokenize([instruction])["input_ids"]
        elif task == "caption":
            questions = [instruction] * len(text) if isinstance(instruction, str) else instruction
            batch.update(self.tokenize(questions, answers=text))
        else:
            batch.update(self.tokenize(text))
        return batch

    def target_sizes(self) -> list[tuple[int, int]]:
        max_size, min_size, stride = self.generation_size
        return aspect_buckets(min_size, max_size, stride)

    def tokenize(self, texts: list[str], answers: list[str] | None = None) -> dict[str, torch.Tensor]:
        """Text splits `BOS, ids, EOS`, right-padded: `input_ids` and `attention_mask` `[B, T]`.

        With `answers`, each is a second split behind its text and `labels` supervise its ids and EOS. A text of `""` or
        `None` leaves its split out.
        """
        rows, labels = [], []
        for index, text in enumerate(texts):
            row = self._split(text) if text else []
            label = [-100] * len(row)
            if answers is not None:
                answer = self._split(answers[index])
                row, label = row + answer, [*label, -100, *answer[1:]]
            rows.append(row)
            labels.append(label)
        length = max(map(len, rows))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eos_token_id
        batch = {
            "input_ids": torch.tensor([row + [pad] * (length - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        }
        if answers is not None:
            batch["labels"] = torch.tensor([label + [-100] * (length - len(label)) for label in labels])
        return batch

    def _split(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [self.bos_token_id, *ids, self.eos_token_id]

    def resize(self, image: Image.Image, rule: tuple[int, int, int]) -> Image.Image:
        """Resize with BAGEL's rule `(max, min, stride)`, bicubic, no crop."""
        size = resized_size(*image.size, *rule)
        return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)

    def to_pixels(
        self, images: list[Image.Image], rule: tuple[int, int, int], size: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """`[B, 3, H, W]` float32 in [-1, 1], resized to `size` `(height, width)` or by `rule`."""
        if size is not None:
            images = [image.resize(size[::-1], Image.Resampling.BICUBIC) for image in images]
        else:
            images = [self.resize(image, rule) for image in images]
        sizes = sorted({image.size for image in images})
        if len(sizes) > 1:
            raise ValueError(
                f"The images of one batch come out at different sizes (width, height): {sizes}. "
                "Batch images of one aspect ratio, or pass `size`."
            )
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in images]).astype(np.float32) / 255.0
        return torch.from_numpy((pixels - 0.5) / 0.5).permute(0, 3, 1, 2).contiguous()
