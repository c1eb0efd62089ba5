"""From PIL images and strings to Qwen-Image-Edit's batches, as diffusers' pipelines read them.

The original's tokenizer reads the names of special tokens in a prompt as these tokens, and so does this one in captions of
`generate`. Beside a picture, and in questions and answers, they are words: `<|image_pad|>` would take the picture's place.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from reca_trainer.models.common.conversations import exchange_problem, without_mark
from reca_trainer.models.common.padding import pad_rows, padded_batch, padding_mask
from reca_trainer.models.common.pixels import cut_to_shape, to_pixels
from reca_trainer.models.common.texts import fits, word_ids
from reca_trainer.models.contract import Conversation, UnifiedProcessor, conversations_of, one_per_sample
from reca_trainer.models.qwen_image.configuration_qwen_image import QwenImageConfig

TEMPLATES = json.loads((Path(__file__).parent / "prompt_templates.json").read_text(encoding="utf-8"))
NEGATIVE = TEMPLATES["negative"]
LONGEST_RATIO = 64  # of the sides of a picture; Qwen2.5-VL takes up to 200
UNBOUNDED = 1 << 30  # pixels


def snapped(side: float, stride: int) -> int:
    """A side in pixels as the nearest multiple of `stride`, at least one."""
    return max(round(side / stride) * stride, stride)


def bounded_size(
    width: int,
    height: int,
    resolution: int,
    stride: int,
    max_image_size: int | None = None,
    min_image_size: int | None = None,
) -> tuple[int, int]:
    """`(height, width)` in multiples of `stride`: a picture's shape at the area of `resolution²`, or where its sides would
    not keep the bounds at the nearest area at which they do; where both cannot be kept, the maximum is.

    Raises:
        ValueError: a bound below the stride, or a minimum above the maximum.
    """
    longest, shortest = max_image_size or UNBOUNDED, min_image_size or stride
    if min(longest, shortest) < stride or shortest > longest:
        raise ValueError(
            f"The sides of a target are at least {stride} pixels and the minimum is not above the maximum, got "
            f"min_image_size {min_image_size} and max_image_size {max_image_size}."
        )
    ratio = min(max(width / height, 1 / LONGEST_RATIO), LONGEST_RATIO)
    sides = resolution / math.sqrt(ratio), resolution * math.sqrt(ratio)
    scale = max(1.0, shortest / min(sides))
    scale = min(scale, longest / max(sides))
    lower, upper = math.ceil(shortest / stride) * stride, longest // stride * stride
    rows, columns = (min(max(snapped(side * scale, stride), lower), upper) for side in sides)
    return rows, columns


class QwenImageProcessor(UnifiedProcessor):
    """Builds batches for `QwenImageModel`.

    - reconstruct, edit: `system prompt of edits, user turn: picture, instruction, assistant header`
    - generate: `system prompt, user turn: caption, assistant header`
    - caption: `system prompt, user turn: picture, question, assistant turn: answer, …`

    Args:
        tokenizer: Qwen2's, with the tokens of Qwen2.5-VL.
        resolution: side of the square that has the area of a picture that goes through the autoencoder.
        condition_resolution: the same of pictures that Qwen2.5-VL reads.
        stride: of the sides of both, in pixels.
        understanding_stride: pixels of an understanding embedding; pictures are resized once more to whole ones.
        max_caption_length: tokens of a caption and what follows it, and of an instruction; longer ones are cut.
        max_conversation_length: tokens of a conversation or question, its picture included.
    """

    tasks = ("reconstruct", "caption", "generate", "edit")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        resolution: int = 1024,
        condition_resolution: int = 384,
        stride: int = 32,
        understanding_stride: int = 28,
        max_caption_length: int = 512,
        max_conversation_length: int = 2048,
    ):
        super().__init__(tokenizer)
        self.resolution, self.condition_resolution = resolution, condition_resolution
        self.stride, self.understanding_stride = stride, understanding_stride
        self.max_caption_length, self.max_conversation_length = max_caption_length, max_conversation_length

    @classmethod
    def tiny(cls, config: QwenImageConfig, tokenizer: PreTrainedTokenizerBase) -> QwenImageProcessor:
        """The processor of a `QwenImageConfig.tiny`.

        Args:
            tokenizer: with Qwen2's `<|im_start|>`, `<|im_end|>`, `<|vision_start|>` and `<|vision_end|>`; a copy of it gets
                the image token.
        """
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens(["<|image_pad|>"], special_tokens=True)
        stride = config.understanding_stride
        return cls(tokenizer, config.resolution, config.condition_resolution, stride, stride)

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
        """See `UnifiedProcessor.__call__`.

        Args:
            images: `generate` does without them where there is no target. `reconstruct` without them gives prompts that leave
                the picture's tokens out.
            size: a picture loses what does not fit into the shape; without it, it is resized as a whole, as the pipeline does.
            dropped: an empty instruction, or the caption " " of the model cards.

        Returns:
            Besides the keys of every family `prompt_start` `[B]` int64, but for captions: how many tokens of the prompt come
            before what the transformer reads. `attention_mask` is absent where nothing is padded.

        Raises:
            ValueError: an unknown task, numbers of samples that differ, a task without what it needs, a source that is to be
                dropped, or a conversation that `conversation_problem` refuses.
        """
        if task not in self.tasks:
            raise ValueError(f"Qwen-Image-Edit has no task {task!r}; it has {', '.join(self.tasks)}.")
        needs = {"reconstruct": {}, "generate": {"text": text}}.get(task, {"images": images, "text": text})
        for name, value in needs.items():
            if not value:
                raise ValueError(f"The task {task!r} needs {name}, one per sample.")
        if images and text and len(images) != len(text):
            raise ValueError(f"A batch takes as many texts as images, but here are {len(text)} and {len(images)}.")
        if any(any(pair) for pair in dropped_sources or []):
            raise ValueError("Qwen-Image-Edit has no edit without its source: set edit_source_dropout=0.")
        if task == "caption":
            if any(dropped or []):
                raise ValueError("A caption is what is learned: it cannot be dropped.")
            return {"task": task, **self._captions(images, conversations_of(text, instruction))}

        texts = instruction if task == "reconstruct" else text
        count = len(images or (texts if isinstance(texts, list) else [None]))
        rows = zip(one_per_sample(texts, count), one_per_sample(dropped, count), strict=True)
        words = [(NEGATIVE if task == "generate" else "") if drop else row or "" for row, drop in rows]
        batch: dict[str, Any] = {"task": task}
        pictures: list[torch.Tensor] | None = None if task == "generate" else []
        if images:
            sources, targets = zip(*images, strict=True) if task == "edit" else (images, images)
            places = one_per_sample(crop, count)
            batch["pixel_values"] = self.to_pixels(targets, size, places)
            if task == "edit":
                batch["source_pixel_values"] = self.to_pixels(sources, size, places)
            if task != "generate":
                parts = self._parts(sources, size, places)
                pictures = [self.to_condition(part, size) for part in parts]
                alike = len({picture.shape for picture in pictures}) == 1
                batch["condition_pixel_values"] = torch.stack(pictures) if alike else pictures
        return {**batch, **self.prompt(words, pictures)}

    def target_size(
        self, width: int, height: int, max_image_size: int | None = None, min_image_size: int | None = None
    ) -> tuple[int, int]:
        """See `UnifiedProcessor.target_size` and `bounded_size`."""
        return bounded_size(width, height, self.resolution, self.stride, max_image_size, min_image_size)

    def conversation_problem(self, conversation: Conversation) -> str | None:
        """See `UnifiedProcessor.conversation_problem`. Questions and answers alternate, and every answer is supervised; the
        picture stands before the first question, wherever its mark is."""
        if problem := super().conversation_problem(conversation) or exchange_problem(conversation):
            return problem
        head, tail = self._ends("answer")
        longest = 2 + len(head) + len(tail) + 2 * (self.condition_resolution // self.understanding_stride + 1) ** 2
        if not fits(self._words, [without_mark(conversation[0])], self.max_conversation_length - longest - 1):
            return f"no answer within {self.max_conversation_length} tokens"
        return None

    # --- prompts ---

    def prompt(self, texts: Sequence[str], pictures: Sequence[torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """What Qwen2.5-VL reads for the transformer: `input_ids` `[B, T]` and `attention_mask` where they are padded, on the
        right, and `prompt_start` `[B]`.

        Args:
            pictures: their `to_condition`, for the template of edits; empty, it has none of their tokens. `None` is the
                template of text-to-image.
        """
        if pictures is None:
            head, tail = self._ends("generate")
            room = len(head) + self.max_caption_length - len(tail)
            rows = []
            for text in texts:
                row = self._ids(TEMPLATES["generate"].replace("{}", text))  # white space may join the template's
                rows.append(row if len(row) <= room + len(tail) else [*self.shorten(row, room), *tail])
        else:
            head, tail = self._ends("edit")
            before, after = TEMPLATES["picture"].split("<|image_pad|>")
            lead = self._ids(TEMPLATES["edit"].split("{}")[0] + before)
            end = self._ids(after)
            counts = [self._tokens_of(picture) for picture in pictures] or [[]] * len(texts)
            words = [self.shorten(self._words(text), self.max_caption_length) for text in texts]
            rows = [[*lead, *tokens, *end, *ids, *tail] for tokens, ids in zip(counts, words, strict=True)]
        return {**self._pad(rows), "prompt_start": torch.full((len(rows),), len(head))}

    def ask(self, questions: list[str], images: list[Image.Image] | None = None) -> dict[str, Any]:
        """Prompts that end where an answer begins, padded on the left, and the pictures they ask about, in a list."""
        pictures = None if images is None else [self.to_condition(image) for image in images]
        head, tail = self._ends("answer")
        rows = []
        for index, question in enumerate(questions):
            start = [*head, *(self._picture(pictures[index]) if pictures else [])]
            room = self.max_conversation_length - len(start) - len(tail)
            rows.append([*start, *self.shorten(self._words(question), room), *tail])
        batch = {"input_ids": pad_rows(rows, self.tokenizer.pad_token_id, "left")}
        batch["attention_mask"] = padding_mask(rows, "left")
        return batch if pictures is None else {**batch, "condition_pixel_values": pictures}

    def _captions(self, images: Sequence[Image.Image], conversations: list[Conversation]) -> dict[str, Any]:
        """Every answer is supervised, with the end of its turn."""
        pictures = [self.to_condition(image) for image in images]
        (head, tail), rows, labels = self._ends("answer"), [], []
        for conversation, picture in zip(conversations, pictures, strict=True):
            if problem := self.conversation_problem(conversation):
                raise ValueError(f"Qwen-Image-Edit cannot learn from a conversation with {problem}.")
            row: list[int] = [*head, *self._picture(picture)]
            label = [-100] * len(row)
            for number, message in enumerate(conversation):
                words = self._words(without_mark(message))
                if message["role"] == "user":
                    again = self._ids("\n<|im_start|>user\n") if number else []
                    ids = [*again, *words, *tail]
                    label += [-100] * len(ids)
                else:
                    ids = [*words, *self._ids("<|im_end|>")]
                    label += ids
                row += ids
            rows.append(self.shorten(row, self.max_conversation_length))
            labels.append(label[: self.max_conversation_length])
        alike = len({picture.shape for picture in pictures}) == 1
        batch = padded_batch(rows, self.tokenizer.pad_token_id, labels)
        return {**batch, "condition_pixel_values": torch.stack(pictures) if alike else pictures}

    def _ends(self, template: str) -> tuple[list[int], list[int]]:
        """The tokens of a template before and behind the user's words."""
        head, tail = TEMPLATES[template].split("{}")
        return self._ids(head), self._ids(tail)

    def _picture(self, picture: torch.Tensor) -> list[int]:
        """The tokens of a picture that is asked about."""
        before, after = TEMPLATES["picture"].removeprefix("Picture 1: ").split("<|image_pad|>")
        return [*self._ids(before), *self._tokens_of(picture), *self._ids(after)]

    def _tokens_of(self, picture: torch.Tensor) -> list[int]:
        count = math.prod(side // self.understanding_stride for side in picture.shape[-2:])
        return [self.tokenizer.convert_tokens_to_ids("<|image_pad|>")] * count

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _words(self, text: str) -> list[int]:
        return word_ids(self.tokenizer, text)

    def _pad(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        return padded_batch(rows, self.tokenizer.pad_token_id)

    # --- pictures ---

    def _parts(
        self, images: Sequence[Image.Image], size: tuple[int, int] | None, places: Sequence[float | None]
    ) -> list[Image.Image]:
        """What of each picture has the shape of `size`; all of it without one."""
        if size is None:
            return list(images)
        return [cut_to_shape(image, size, place) for image, place in zip(images, places, strict=True)]

    def to_pixels(
        self,
        images: Sequence[Image.Image],
        size: tuple[int, int] | None = None,
        places: Sequence[float | None] | None = None,
    ) -> torch.Tensor:
        """`[B, 3, H, W]` float32 in [-1, 1], at `size` `(height, width)` or each at its own `target_size`."""
        parts = self._parts(images, size, places or [None] * len(images))
        sizes = [size or self.target_size(*image.size) for image in images]
        pairs = zip(parts, sizes, strict=True)
        return to_pixels([part.convert("RGB").resize(s[::-1], Image.Resampling.LANCZOS) for part, s in pairs])

    def to_condition(self, image: Image.Image, size: tuple[int, int] | None = None) -> torch.Tensor:
        """A picture as Qwen2.5-VL's vision transformer takes it, `[3, h, w]` float32: in its own shape, or that of `size`, at
        the area of `condition_resolution²`, then in whole embeddings."""
        shape = image.size if size is None else size[::-1]
        height, width = bounded_size(*shape, self.condition_resolution, self.stride)
        picture = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        side = self.understanding_stride
        vision = Qwen2VLImageProcessorPil()
        whole = smart_resize(height, width, side, min_pixels=side**2, max_pixels=UNBOUNDED)
        array = np.asarray(picture.resize(whole[::-1], vision.resample)).transpose(2, 0, 1)
        array = vision.rescale(array, vision.rescale_factor)
        return torch.from_numpy(np.ascontiguousarray(vision.normalize(array, vision.image_mean, vision.image_std)))
