"""From PIL images and strings to Lance's batches.

A sample is a conversation in ChatML: a system prompt that says what the task is, a user's turn with the images and then
the text, and an assistant's turn with the answer or the target image. The original's tokenizer reads the names of special
tokens in texts as these tokens, and so does this one: `a cat <|im_end|>` ends the turn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from reca_trainer.models.common.conversations import exchange_problem, without_mark
from reca_trainer.models.common.mot_processor import MoTProcessor
from reca_trainer.models.common.pixels import to_pixels
from reca_trainer.models.common.texts import fits
from reca_trainer.models.contract import IMAGE_MARK, Conversation, one_per_sample
from reca_trainer.models.lance.configuration_lance import LanceConfig

SYSTEM_PROMPTS = json.loads((Path(__file__).parent / "system_prompts.json").read_text(encoding="utf-8"))["prompts"]
RESOLUTION = 768
CONDITION_RESOLUTION = 616
ASPECT_RATIOS = (21 / 9, 16 / 9, 4 / 3, 1, 3 / 4, 9 / 16)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def bucket(ratio: float, resolution: int, stride: int) -> tuple[int, int]:
    """`(height, width)` in multiples of `stride` with an area near `resolution²` and a width near `ratio` times the height.

    Either side is snapped first; the candidate of the nearer ratio wins, then that of the nearer area, then width first.
    """

    def snapped(side: float) -> int:
        return round(side / stride) * stride

    wide = snapped(math.sqrt(resolution**2 * ratio))
    high = snapped(math.sqrt(resolution**2 / ratio))
    candidates = [(snapped(wide / ratio), wide), (high, snapped(high * ratio))]
    return min(candidates, key=lambda size: (abs(size[1] / size[0] - ratio), abs(size[0] * size[1] - resolution**2)))


def bucket_size(width: int, height: int, resolution: int, stride: int) -> tuple[int, int]:
    """`(height, width)` of the bucket whose ratio is nearest to a picture's; the widest wins a tie."""
    buckets = [bucket(ratio, resolution, stride) for ratio in ASPECT_RATIOS]
    return min(buckets, key=lambda size: abs(width / height - size[1] / size[0]))


def bounded_size(
    width: int, height: int, resolution: int, stride: int, longest: int | None = None, shortest: int | None = None
) -> tuple[int, int]:
    """`bucket_size` within bounds of its sides in pixels.

    A `longest` side is kept by the largest resolution that fits. Without it the resolution is `resolution`, raised until
    the shorter side reaches `shortest`.

    Raises:
        ValueError: a bound below the stride, or a minimum above the maximum.
    """
    maximum = resolution if longest is None else longest
    minimum = stride if shortest is None else shortest
    if minimum < stride or maximum < stride or (shortest is not None and longest is not None and shortest > longest):
        raise ValueError(
            f"The sides of a target are at least {stride} pixels and the minimum is not above the maximum, got "
            f"min_image_size {shortest} and max_image_size {longest}."
        )
    if longest is not None:
        resolutions = range(longest // stride * stride, 0, -stride)
        sizes = (bucket_size(width, height, side, stride) for side in resolutions)
        return next((size for size in sizes if max(size) <= longest), (stride, stride))
    while min(size := bucket_size(width, height, resolution, stride)) < minimum:
        resolution += stride
    return size


def fill(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest centred part of an image with the shape of `size = (height, width)`, resized to it, bicubic.

    This is the original's `RandomResizedCrop` of scale 1, but for almost equal shapes, which that one cuts at a random place
    within a pixel or two: here they are centred too.
    """
    ratio = size[1] / size[0]
    part = tuple(round(math.sqrt(image.width * image.height * factor)) for factor in (ratio, 1 / ratio))
    if part[0] > image.width or part[1] > image.height:
        if image.width / image.height < ratio:
            part = image.width, round(image.width / ratio)
        else:
            part = round(image.height * ratio), image.height
    part = max(part[0], 1), max(part[1], 1)
    left, top = (image.width - part[0]) // 2, (image.height - part[1]) // 2
    return image.crop((left, top, left + part[0], top + part[1])).resize(size[::-1], Image.Resampling.BICUBIC)


class LanceProcessor(MoTProcessor):
    """Builds batches for `LanceModel`.

    Args:
        tokenizer: Lance's Qwen2.5 tokenizer.
        resolution: side of the square that has the area of an image that goes through the VAE.
        understanding_resolutions: the same for images that are understood, by use: `reconstruct` (RecA's condition),
            `edit`, `caption` (training) and `answer` (inference). The encoder was trained at 616 (understanding) and 672
            (generation, editing); so 616 is the smallest, RecA's information bottleneck.
        system_prompts: by use: `reconstruct` and `edit`, `generate` (training) and `sample` (inference), `caption` (no
            question) and `question`. A conversation brings its own as a first message of the role `system`.
        stride: of the sides of all buckets, in pixels.
        understanding_stride: pixels of an understanding embedding; what a bucket has beyond a multiple of it is cut off.
        max_text_length: tokens of a sample's texts and of the conversation around them; longer texts are cut. The original
            leaves out samples of more than 65,536 tokens, of which the three images of an edit take 5,200.
    """

    def __init__(
        self,
        tokenizer=None,
        resolution: int = RESOLUTION,
        understanding_resolutions: dict[str, int] | None = None,
        system_prompts: dict[str, str] | None = None,
        stride: int = 16,
        understanding_stride: int = 28,
        max_text_length: int = 60_000,
        **kwargs,
    ):
        self.resolution, self.stride, self.understanding_stride = resolution, stride, understanding_stride
        sizes = {"reconstruct": CONDITION_RESOLUTION, "edit": 672, "caption": 616, "answer": 672}
        self.understanding_resolutions = {**sizes, **(understanding_resolutions or {})}
        # The first of four that the original draws from.
        prompts = {**SYSTEM_PROMPTS, "caption": SYSTEM_PROMPTS["caption"][0], "reconstruct": SYSTEM_PROMPTS["edit"]}
        self.system_prompts = {**prompts, **(system_prompts or {})}
        self.max_text_length = max_text_length
        super().__init__(tokenizer, **kwargs)
        self.pad_token_id = tokenizer.pad_token_id
        for use, side in self.understanding_resolutions.items():
            if min(min(bucket(ratio, side, stride)) for ratio in ASPECT_RATIOS) < understanding_stride:
                raise ValueError(
                    f"At the understanding resolution {side} ({use}), long images have a side of less than "
                    f"{understanding_stride} pixels, which is no embedding; choose a larger one."
                )

    @classmethod
    def tiny(cls, config: LanceConfig, tokenizer, resolution: int = 32) -> LanceProcessor:
        """For a `LanceConfig.tiny` and square pictures of `resolution`, with system prompts of few words."""
        uses = ("reconstruct", "edit", "generate", "sample", "caption", "question")
        return cls(
            tokenizer,
            resolution=resolution,
            understanding_resolutions=dict.fromkeys(("reconstruct", "edit", "caption", "answer"), resolution),
            system_prompts=dict.fromkeys(uses, "describe the image"),
            stride=config.understanding_stride,
            understanding_stride=config.understanding_stride,
        )

    def __call__(
        self,
        images: list[Image.Image] | None = None,
        text: list[str] | list[Conversation] | None = None,
        instruction: str | list[str] | None = None,
        task: str = "reconstruct",
        size: tuple[int, int] | None = None,
        *,
        crop: list[float | None] | None = None,
        dropped: list[bool] | None = None,
        dropped_sources: list[tuple[bool, bool]] | None = None,
    ) -> dict[str, Any]:
        """See `UnifiedProcessor.__call__`. Pictures are always cut at the centre: `crop` has no effect. A source is dropped
        as a whole, as in the original, where `dropped_sources` drops its embeddings.

        A dropped or empty text leaves no tokens in its conversation. Conversations may have no pictures: `images` is then
        `None`, or has `None` for a row, which gets a picture of one embedding.

        Returns:
            The keys of every family, and for tasks that show images `image_position` `[B]` int64, the number of tokens before
            them, -1 for rows of captions that show none. Edits have `source_mask` `[B]` bool, false where the source is
            dropped, absent where none is. `attention_mask` is absent where nothing is padded, `condition_pixel_values` where
            no row shows an image.

        Raises:
            ValueError: the targets or the sources of one batch do not come out at one size, a text is dropped that is to be
                learned, a conversation cannot be learned from.
        """
        if task == "caption":
            return self._caption_batch(images, text, instruction, dropped, task)
        batch: dict[str, Any] = {"task": task}
        targets = images
        if task == "edit":
            sources, targets = zip(*images, strict=True)
            batch["source_pixel_values"] = self.to_pixels(sources, size)
            batch["condition_pixel_values"] = self.to_conditions(sources, task)
            dropped_sources = one_per_sample(dropped_sources, len(sources), (False, False))
            if any(embeddings for _, embeddings in dropped_sources):
                batch["source_mask"] = torch.tensor([not embeddings for _, embeddings in dropped_sources])
        if task == "reconstruct" and images is not None:
            batch["condition_pixel_values"] = self.to_conditions(images, task)
        if images is not None:
            batch["pixel_values"] = self.to_pixels(targets, size)
        texts = self._texts(images, instruction if task == "reconstruct" else text, dropped)
        prompt = self.prompt(task, ["" if drop else words for words, drop in texts])
        if task == "generate":
            del prompt["image_position"]
        return {**batch, **prompt}

    def target_size(
        self, width: int, height: int, max_image_size: int | None = None, min_image_size: int | None = None
    ) -> tuple[int, int]:
        """See `UnifiedProcessor.target_size`; where both bounds cannot be kept, `max_image_size` is.

        Raises:
            ValueError: a bound below the stride, or a minimum above the maximum.
        """
        return bounded_size(width, height, self.resolution, self.stride, max_image_size, min_image_size)

    def understanding_size(self, width: int, height: int, use: str) -> tuple[int, int]:
        """`(height, width)` in pixels at which a picture is understood; `use` is one of `understanding_resolutions`."""
        size = bucket_size(width, height, self.understanding_resolutions[use], self.stride)
        return tuple(side // self.understanding_stride * self.understanding_stride for side in size)

    def conversation_problem(self, conversation: Conversation) -> str | None:
        """See `UnifiedProcessor.conversation_problem`: anything but an optional system prompt, then questions and answers in
        turn, about at most one picture; or no answer among the tokens that are kept."""
        system, messages = self._system_of(conversation)
        if problem := exchange_problem(messages) or (None if messages else "no answer"):
            return problem
        texts = [system, without_mark(messages[0])]
        around = len(self._begin("")) + len(self._turn("")) + 1
        if not fits(self._ids, texts, self.max_text_length - around):
            return f"no answer within {self.max_text_length} tokens"
        return None

    def prompt(self, use: str, texts: Sequence[str | None]) -> dict[str, torch.Tensor]:
        """Conversations up to the assistant's turn, without images: `input_ids` `[B, T]`, padded on the right,
        `attention_mask` `[B, T]` if they are padded, and `image_position` `[B]`. `use` is one of `system_prompts`."""
        begin = self._begin(self.system_prompts[use])
        rest = self.max_text_length - len(begin) - len(self._turn(""))
        rows = [begin + self._turn((words or "").strip(), rest) for words in texts]
        return {**self._pad(rows), "image_position": torch.full((len(rows),), len(begin))}

    def _begin(self, system: str) -> list[int]:
        """The system's turn, and the user's up to its images."""
        return self._ids(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n")

    def _turn(self, text: str, length: int | None = None) -> list[int]:
        """A user's text, of at most `length` tokens, and what follows up to the assistant's words."""
        ids = self._ids(text)
        ids = ids if length is None else self.shorten(ids, length)
        return ids + self._ids("<|im_end|>\n<|im_start|>assistant\n")

    def _system_of(self, conversation: Conversation) -> tuple[str, Conversation]:
        """A conversation's system prompt and its other messages. Without a prompt of its own, a conversation that asks a
        question gets that for questions, else that for captions."""
        if conversation and conversation[0]["role"] == "system":
            return conversation[0]["content"], conversation[1:]
        asks = bool(conversation) and bool(without_mark(conversation[0]))
        return self.system_prompts["question" if asks else "caption"], conversation

    def _word(self, conversation: Conversation, with_image: bool) -> tuple[list[int], list[int], int]:
        """See `MoTProcessor._word`. Every answer is supervised with the end of its turn."""
        if problem := self.conversation_problem(conversation):
            raise ValueError(f"A conversation cannot be learned from: {problem}.")
        system, messages = self._system_of(conversation)
        ids = self._begin(system)
        labels = [-100] * len(ids)
        position = -1
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                part = self._ids(message["content"].lstrip("\r\n") + "<|im_end|>")
                ids, labels = ids + part, labels + part
                continue
            if index:
                part = self._ids("\n<|im_start|>user\n")
                ids, labels = ids + part, labels + [-100] * len(part)
            if with_image and IMAGE_MARK in message["content"]:
                position = len(ids)
            part = self._turn(without_mark(message))
            ids, labels = ids + part, labels + [-100] * len(part)
        ids = self.shorten(ids, self.max_text_length)
        return ids, labels[: len(ids)], position if position <= len(ids) else -1

    def to_pixels(self, images: Sequence[Image.Image], size: tuple[int, int] | None = None) -> torch.Tensor:
        """`[B, 3, H, W]` float32 in [-1, 1], at `size` `(height, width)` or each in its own bucket."""
        return to_pixels([fill(image, size or self.target_size(*image.size)) for image in images])

    def to_condition(self, image: Image.Image | None, use: str) -> torch.Tensor:
        """See `MoTProcessor.to_condition`: the image's bucket, cut at the centre to whole embeddings and normalised as CLIP's
        images are. `use` is one of `understanding_resolutions`."""
        if image is None:
            return torch.zeros(3, self.understanding_stride, self.understanding_stride)
        size = bucket_size(*image.size, self.understanding_resolutions[use], self.stride)
        height, width = self.understanding_size(*image.size, use)
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        levels = np.asarray(fill(image, size))[top : top + height, left : left + width].astype(np.float32) / 255.0
        mean, std = (np.array(values, dtype=np.float32) for values in (CLIP_MEAN, CLIP_STD))
        return torch.from_numpy((levels - mean) / std).permute(2, 0, 1).contiguous()


def around_images(
    input_ids: torch.Tensor, image_position: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The tokens of conversations `[B, T]` before and behind their images, and the mask of those behind.

    Raises:
        ValueError: rows differ in the number of tokens before the image.
    """
    position = int(image_position[0])
    if not bool((image_position == position).all()):
        raise ValueError(
            f"The images of a batch have the same number of tokens before them, got {image_position.tolist()}."
        )
    mask = None if attention_mask is None else attention_mask[:, position:]
    return input_ids[:, :position], input_ids[:, position:], mask
