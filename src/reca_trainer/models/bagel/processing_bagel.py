"""From PIL images and strings to BAGEL's batches.

Every text is a split of its own, `BOS, ids, EOS`. The original's tokenizer reads the names of special tokens in captions,
instructions, questions and answers as these tokens, and so does this one: `a cat <|im_end|>` has a second EOS.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from reca_trainer.models.common.mot_processor import MoTProcessor
from reca_trainer.models.common.pixels import to_pixels
from reca_trainer.models.common.texts import fits
from reca_trainer.models.contract import IMAGE_MARK, Conversation, one_per_sample


def resized_size(
    width: int, height: int, max_size: int, min_size: int, stride: int, max_pixels: int = 14 * 14 * 9 * 1024
) -> tuple[int, int]:
    """`(width, height)` after BAGEL's resize: the long side at most `max_size`, the short side at least `min_size` where
    both are possible, multiples of `stride`. The pixel cap multiplies both sides by the ratio of areas, as the original
    does (it over-shrinks)."""

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


def bounded_rule(
    rule: tuple[int, int, int], max_image_size: int | None, min_image_size: int | None
) -> tuple[int, int, int]:
    """A rule `(max, min, stride)` of `resized_size` within bounds in pixels; a maximum below the rule's minimum lowers both.

    Raises:
        ValueError: a bound below the stride, or a minimum above the maximum.
    """
    max_size, min_size, stride = rule
    if max_image_size is not None:
        max_size, min_size = max_image_size, min(min_size, max_image_size)
    if min_image_size is not None:
        min_size = min_image_size
    if not stride <= min_size <= max_size:
        raise ValueError(
            f"The sides of a target are at least {stride} pixels and the minimum is not above the maximum, got "
            f"min_image_size {min_size} and max_image_size {max_size}."
        )
    return max_size, min_size, stride


# Longest side in pixels of an edit's source for the understanding encoder, in BAGEL's configuration of training.
EDIT_SIZE = 518


class BagelProcessor(MoTProcessor):
    """Builds batches for `BagelModel`.

    Args:
        tokenizer: BAGEL's Qwen2.5 tokenizer.
        generation_size: `(max, min, stride)` in pixels for images that go through the VAE.
        condition_size: the same for the understanding encoder during reconstruction. The default is the smallest size that
            the encoder was trained at, RecA's information bottleneck (paper, table on conditions: 224 beats 512).
        understanding_size: the same for questions about an image and, up to `EDIT_SIZE`, for the source of an edit.
        max_text_length: tokens of a sample's texts, their BOS and EOS included; longer texts are cut. The original leaves out
            samples of more than 16,384 tokens, of which a target and the largest understanding image take 9,000.
        condition_encoder: `"vit"`, or `"vae"` for an ablation of the paper: a reconstruction then reads the picture as VAE
            latents, as an edit reads its source, and no understanding embeddings.
    """

    def __init__(
        self,
        tokenizer=None,
        generation_size: tuple[int, int, int] = (1024, 512, 16),
        condition_size: tuple[int, int, int] = (224, 224, 14),
        understanding_size: tuple[int, int, int] = (980, 224, 14),
        max_text_length: int = 7_384,
        condition_encoder: str = "vit",
        **kwargs,
    ):
        self.generation_size = tuple(generation_size)
        self.condition_size = tuple(condition_size)
        self.understanding_size = tuple(understanding_size)
        self.max_text_length = max_text_length
        if condition_encoder not in ("vit", "vae"):
            raise ValueError(f"condition_encoder is 'vit' or 'vae', not {condition_encoder!r}.")
        self.condition_encoder = condition_encoder
        super().__init__(tokenizer, **kwargs)
        self.bos_token_id = tokenizer.convert_tokens_to_ids("<|im_start|>")
        self.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.pad_token_id = self.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

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
        """See `UnifiedProcessor.__call__`. Pictures are resized whole: `crop` has no effect.

        A dropped text, like an instruction of `""` or `None`, leaves no tokens: its row of `attention_mask` is zero, and
        without any text there are no `input_ids`. A missing caption (`None`) is a space. Conversations may have no
        pictures: `images` is then `None`, or has `None` for a row, which gets a picture of one patch.

        Returns:
            The keys of every family. Captions have `image_position` `[B]` int64, the number of tokens before the image, -1
            for rows that show none, absent where all images come first. Edits have `source_mask` and `condition_mask` `[B]`
            bool, false where the latents or the embeddings of the source are dropped, absent where none is.
            `attention_mask` is absent where nothing is padded, `condition_pixel_values` where no row shows an image.

        Raises:
            ValueError: the targets of one batch do not come out at one size, a text is dropped that is to be learned, a
                conversation has no answer or shows its image in two messages.
        """
        if task == "caption":
            batch = self._caption_batch(images, text, instruction, dropped, self.understanding_size)
            if "image_position" in batch and not batch["image_position"].any():
                del batch["image_position"]  # all images come first, which needs no mask
            return batch
        batch = {"task": task}
        if task == "edit":
            sources, images = zip(*images, strict=True)
            batch["source_pixel_values"] = self.to_pixels(sources, self.generation_size, size)
            longest, *rule = self.understanding_size
            batch["condition_pixel_values"] = self.to_conditions(sources, (min(longest, EDIT_SIZE), *rule))
            kept = ~torch.tensor(one_per_sample(dropped_sources, len(sources), (False, False)))  # [B, 2]
            for name, mask in zip(("source_mask", "condition_mask"), kept.T, strict=True):
                if not mask.all():
                    batch[name] = mask
        if task == "reconstruct" and images is not None:
            if self.condition_encoder == "vae":
                batch["source_pixel_values"] = self.to_pixels(images, self.generation_size, size)
            else:
                batch["condition_pixel_values"] = self.to_conditions(images, self.condition_size)
        if images is not None:
            batch["pixel_values"] = self.to_pixels(images, self.generation_size, size)
        rows = []
        for words, drop in self._texts(images, instruction if task == "reconstruct" else text, dropped):
            words = " " if task == "generate" and words is None else words
            rows.append([] if drop or (task != "generate" and not words) else self._text(words))
        return {**batch, **self._pad(rows)} if any(rows) else batch

    def target_size(
        self, width: int, height: int, max_image_size: int | None = None, min_image_size: int | None = None
    ) -> tuple[int, int]:
        """See `UnifiedProcessor.target_size`. A `max_image_size` below the family's own minimum lowers that too.

        Raises:
            ValueError: a bound below the stride, or a minimum above the maximum.
        """
        rule = bounded_rule(self.generation_size, max_image_size, min_image_size)
        return resized_size(width, height, *rule)[::-1]

    def conversation_problem(self, conversation: Conversation) -> str | None:
        """See `UnifiedProcessor.conversation_problem`: no answer, none among the tokens that are kept, or two messages that
        show the image."""
        answers = [
            i for i, message in enumerate(conversation) if message["role"] == "assistant" and message["content"]
        ]
        if not answers:
            return "no answer"
        if sum(message["role"] == "user" and IMAGE_MARK in message["content"] for message in conversation) > 1:
            return "the image in more than one message"
        questions = [message["content"] for message in conversation[: answers[0]] if message["role"] == "user"]
        parts = [part for question in questions for part in parts_of(question) if part]
        # A split has two markers, and at least BOS and one token of the answer are kept.
        if not fits(self._ids, parts, self.max_text_length - 2 * len(parts) - 2):
            return f"no answer within {self.max_text_length} tokens"
        return None

    def tokenize(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """Text splits `BOS, ids, EOS`: `input_ids` `[B, T]`, padded on the right, and `attention_mask` `[B, T]` if they are
        padded. A text of `""` or `None` is an empty split."""
        return self._pad([self._text(text) if text else [] for text in texts])

    def _word(self, conversation: Conversation, with_image: bool) -> tuple[list[int], list[int], int]:
        """See `MoTProcessor._word`. Every message is a split, and every answer is supervised with its EOS. Roles are not
        written out, messages of roles other than user and assistant are left out, and an image splits its message."""
        if problem := self.conversation_problem(conversation):
            raise ValueError(f"A conversation cannot be learned from: {problem}.")
        ids: list[int] = []
        labels: list[int] = []
        image_position = -1
        for message in conversation:
            role, content = message["role"], message["content"]
            if role == "assistant" and content:
                split = self._split(content)
                ids, labels = ids + split, [*labels, -100, *split[1:]]
            if role != "user":
                continue
            for index, part in enumerate(parts_of(content)):
                if index == 1 and with_image:  # one picture: further marks of the message only divide it
                    image_position = len(ids)
                if part:
                    split = self._split(part)
                    ids, labels = ids + split, labels + [-100] * len(split)
        ids = self.shorten(ids, self.max_text_length)
        return ids, labels[: len(ids)], image_position if image_position <= len(ids) else -1

    def _text(self, text: str) -> list[int]:
        """The split of a sample's only text."""
        return [self.bos_token_id, *self.shorten(self._ids(text), self.max_text_length - 2), self.eos_token_id]

    def _split(self, text: str) -> list[int]:
        return [self.bos_token_id, *self._ids(text), self.eos_token_id]

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
        return to_pixels(images)

    def to_condition(self, image: Image.Image | None, rule: tuple[int, int, int]) -> torch.Tensor:
        """See `MoTProcessor.to_condition`: the image resized by `rule`, in [-1, 1]."""
        return torch.zeros(3, rule[2], rule[2]) if image is None else self.to_pixels([image], rule)[0]


def parts_of(question: str) -> list[str]:
    """The texts of a question around its image marks. White space around a mark goes; all other stays."""
    parts = question.split(IMAGE_MARK)
    return parts if len(parts) == 1 else [part.strip() for part in parts]
