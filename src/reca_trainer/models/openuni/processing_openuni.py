"""From PIL images and strings to OpenUni's batches.

Names of special tokens in the captions and prompts of `generate` are read as these tokens, as in the original, which
tokenises a prompt whole: `a cat <|im_end|>` closes its turn. In instructions, questions and answers they are words, because
`<IMG_CONTEXT>` would take a place of the image; the original has a fixed set of these texts.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PreTrainedTokenizerBase

from reca_trainer.models.common.conversations import exchange_problem, without_mark
from reca_trainer.models.common.padding import Side, pad_rows, padding_mask
from reca_trainer.models.common.pixels import cut_to_shape, to_pixels
from reca_trainer.models.common.texts import fits, word_ids
from reca_trainer.models.contract import Conversation, UnifiedProcessor, conversations_of, one_per_sample
from reca_trainer.models.openuni.configuration_openuni import OpenUniConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
USER = "<|im_start|>user\n"
TURN_END = "<|im_end|>\n<|im_start|>assistant\n"  # closes the user's turn and opens the answer
UNCONDITIONAL = "Generate an image."
TRAINING_PAD = 0  # the id that pads OpenUni's training batches, which is not the tokenizer's


class OpenUniProcessor(UnifiedProcessor):
    """Builds batches for `OpenUniModel`.

    - reconstruct: `user turn: <img>, N context tokens, </img>, instruction, assistant header, <img>`, padded on the left
    - generate: `user turn: request and caption, assistant header, <img>`, padded on the right
    - caption: `user turn: <img>, N context tokens, </img>, question, assistant turn: answer, …`, padded on the left

    Args:
        tokenizer: InternVL3's tokenizer.
        image_size: height and width, in pixels, of the images to generate.
        condition_size: height and width, in pixels, to which every image is resized for the understanding encoder.
        num_image_tokens: understanding embeddings of an image.
        max_caption_length: tokens of a text-to-image prompt in training; longer captions are cut.
        max_prompt_length: tokens of any other prompt or conversation, its image included, as in the original.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int = 512,
        condition_size: int = 448,
        num_image_tokens: int = 256,
        max_caption_length: int = 128,
        max_prompt_length: int = 2048,
    ):
        super().__init__(tokenizer)
        self.image_size = image_size
        self.condition_size = condition_size
        self.num_image_tokens = num_image_tokens
        self.max_caption_length = max_caption_length
        self.max_prompt_length = max_prompt_length

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
            tokenizer: one with Qwen2's `<|im_start|>` and `<|im_end|>`; its copy gets the image tokens that it lacks.

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

    @property
    def fixed_size(self) -> tuple[int, int]:
        return self.image_size, self.image_size

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
    ) -> dict[str, Any]:
        """See `UnifiedProcessor.__call__`.

        Args:
            images: without them `generate` makes prompts for sampling, and `reconstruct` one prompt per instruction.
            size: `(height, width)` of the target, whose aspect ratio is cut out of the image; by default a square.
            dropped: samples of `generate` whose request has no caption, or of `reconstruct` with an empty instruction.

        Raises:
            ValueError: an unknown task, missing images or texts, numbers of samples that differ, or a conversation that
                `conversation_problem` refuses.
        """
        if task not in self.tasks:
            raise ValueError(f"OpenUni has no task {task!r}; it has reconstruct, generate and caption.")
        required = {"reconstruct": {}, "generate": {"text": text}, "caption": {"images": images, "text": text}}[task]
        for name, value in required.items():
            if not value:
                raise ValueError(f"The task {task!r} needs {name}, one per sample.")
        if images and text and len(images) != len(text):
            raise ValueError(f"A batch takes as many texts as images, but here are {len(text)} and {len(images)}.")
        if task == "caption":
            if any(dropped or []):
                raise ValueError("A caption is what is learned: it cannot be dropped.")
            questions = one_per_sample(instruction, len(text), "")
            return {"task": task, **self._captions(conversations_of(text, questions)), **self._condition(images)}

        if task == "generate":
            # A target means training, in which OpenUni cuts captions to another length and pads with another id.
            length = self.max_caption_length if images else self.max_prompt_length
            drops = one_per_sample(dropped, len(text), False)
            requests = [
                UNCONDITIONAL if drop else f"Generate an image: {caption.strip()}"
                for caption, drop in zip(text, drops, strict=True)
            ]
            prompts = [self._close(self._tokenize(USER + request), length, "<img>") for request in requests]
            batch = self._pad(prompts, "right", TRAINING_PAD if images else None)
        else:
            count = len(images) if images else len(instruction) if isinstance(instruction, list) else 1
            requests, drops = one_per_sample(instruction, count), one_per_sample(dropped, count)
            turns = [
                self._turn("" if drop else request or "", with_image=True)
                for request, drop in zip(requests, drops, strict=True)
            ]
            prompts = [self._close(turn, self.max_prompt_length, "<img>") for turn in turns]
            batch = self._pad(prompts, "left", TRAINING_PAD)
        if images:
            batch["pixel_values"] = self._target(images, size or self.fixed_size, crop)
        if task == "reconstruct" and images:
            batch["condition_pixel_values"] = self._to_condition(batch["pixel_values"])
        return {"task": task, **batch}

    def conversation_problem(self, conversation: Conversation) -> str | None:
        """See `UnifiedProcessor.conversation_problem`. Questions and answers must alternate. Every answer is supervised; the
        image precedes the first question, wherever its mark is."""
        if problem := super().conversation_problem(conversation) or exchange_problem(conversation):
            return problem
        room = self.max_prompt_length - len(self._image()) - len(self._tokenize(TURN_END))
        if not fits(self._words, [f"\n{without_mark(conversation[0])}"], room - 1):
            return f"no answer within {self.max_prompt_length} tokens"
        return None

    def ask(self, questions: list[str], images: list[Image.Image] | None = None) -> dict[str, torch.Tensor]:
        """Prompts up to the start of an answer, `input_ids` and `attention_mask` `[B, T]`, padded on the left, and
        `condition_pixel_values` `[B, 3, s, s]` if there are `images`."""
        turns = [self._turn(question, with_image=bool(images)) for question in questions]
        prompts = self._pad([self._close(turn, self.max_prompt_length) for turn in turns], "left")
        return {**prompts, **self._condition(images)} if images else prompts

    def _turn(self, request: str, with_image: bool = False) -> list[int]:
        """A user's turn without its end; names of special tokens in the request are words."""
        if with_image:
            return [*self._image(), *self._words(f"\n{request}")]
        return [*self._tokenize("<|im_start|>"), *self._words(f"user\n{request}")]

    def _image(self) -> list[int]:
        """The start of a user's turn, with an image's placeholders."""
        return self._tokenize(f"{USER}<img>{'<IMG_CONTEXT>' * self.num_image_tokens}</img>")

    def _close(self, turn: list[int], length: int, behind: str = "") -> list[int]:
        """End a user's turn and open the answer, in at most `length` tokens: a longer turn loses its last words."""
        end = self._tokenize(TURN_END + behind)
        return self.shorten(turn, length - len(end)) + end

    def _captions(self, conversations: list[Conversation]) -> dict[str, torch.Tensor]:
        """Conversations as `input_ids`, `attention_mask` and `labels` `[B, T]`: each answer and the end of its turn are
        supervised."""
        rows, labels = [], []
        for conversation in conversations:
            if problem := self.conversation_problem(conversation):
                raise ValueError(f"OpenUni cannot learn from a conversation with {problem}.")
            row, label = [], []
            for number, message in enumerate(conversation):
                words = without_mark(message)
                if message["role"] == "user":
                    separator = self._tokenize("\n") if number else []
                    ids = [*separator, *self._turn(words, with_image=not number), *self._tokenize(TURN_END)]
                    label += [-100] * len(ids)
                else:
                    ids = [*self._words(words), *self._tokenize("<|im_end|>")]
                    label += ids
                row += ids
            rows.append(self.shorten(row, self.max_prompt_length))
            labels.append(label[: self.max_prompt_length])
        batch = self._pad(rows, "left", TRAINING_PAD)
        return {**batch, "labels": pad_rows(labels, -100, "left")}

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _words(self, text: str) -> list[int]:
        return word_ids(self.tokenizer, text)

    def _pad(self, rows: list[list[int]], side: Side, pad_id: int | None = None) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` `[B, T]`, padded with the tokenizer's own id by default."""
        pad_id = self.tokenizer.pad_token_id if pad_id is None else pad_id
        return {"input_ids": pad_rows(rows, pad_id, side), "attention_mask": padding_mask(rows, side)}

    def _condition(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """Whole images for the understanding encoder, as `condition_pixel_values` `[B, 3, s, s]`."""
        size = (self.condition_size, self.condition_size)
        return {"condition_pixel_values": self._to_condition(to_pixels([_resized(image, size) for image in images]))}

    def _target(
        self, images: list[Image.Image], size: tuple[int, int], crop: list[float | None] | None
    ) -> torch.Tensor:
        """Images cut to the aspect ratio of `size = (height, width)` and resized: `[B, 3, H, W]` float32 in [-1, 1]."""
        places = one_per_sample(crop, len(images))
        return to_pixels(
            [_resized(cut_to_shape(image, size, place), size) for image, place in zip(images, places, strict=True)]
        )

    def _to_condition(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`[B, 3, H, W]` in [-1, 1] → the vision transformer's input `[B, 3, s, s]`: normalised, then resized
        bilinearly without antialiasing, as the queries were trained with."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        normalised = ((pixel_values + 1) / 2 - mean) / std
        return F.interpolate(normalised, size=(self.condition_size, self.condition_size), mode="bilinear")


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC)
