"""From PIL images and strings to Harmon's batches."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reca_trainer.models.contract import UnifiedProcessor
from reca_trainer.models.harmon.configuration_harmon import HarmonConfig
from reca_trainer.tasks import TASKS

USER, ANSWER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
UNCONDITIONAL = "Generate an image."
IMAGE_POSITION = 3  # after <|im_start|>, "user" and the line break


class HarmonProcessor(UnifiedProcessor):
    """Harmon's prompts (Qwen chat turns without a system turn) and images in [-1, 1].

    Args:
        tokenizer: a Qwen2 tokenizer with `<|im_start|>` and `<|im_end|>`.
        image_size (`int`): pixels per side of every image.
        image_token_id (`int`): marks the image's place in `input_ids`; the model puts the embeddings there.
        max_prompt_length (`int`): tokens of a prompt; longer text is cut, the chat turn around it stays whole.
        max_caption_length (`int`): tokens of question and answer together, the image counted as one.

    Raises:
        ValueError: the tokenizer lacks one of the two.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int = 512,
        image_token_id: int = -200,
        max_prompt_length: int = 128,
        max_caption_length: int = 1472,
        **kwargs: Any,
    ):
        super().__init__(tokenizer, **kwargs)
        if missing := {"<|im_start|>", "<|im_end|>"} - tokenizer.get_vocab().keys():
            raise ValueError(f"The tokenizer lacks {', '.join(sorted(missing))}; Harmon needs Qwen2.5-Instruct's.")
        self.image_size = image_size
        self.image_token_id = image_token_id
        self.max_prompt_length = max_prompt_length
        self.max_caption_length = max_caption_length

    @classmethod
    def tiny(cls, config: HarmonConfig, tokenizer: PreTrainedTokenizerBase) -> HarmonProcessor:
        """The processor of a `HarmonConfig.tiny`.

        Args:
            tokenizer: any; a copy of it gets `<|im_start|>` and `<|im_end|>` if it lacks them.

        Raises:
            ValueError: the tokenizer has more entries than the config's vocabulary.
        """
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        if len(tokenizer) > config.text_config.vocab_size:
            raise ValueError(
                f"With the turn markers the tokenizer has {len(tokenizer)} entries, but the config's vocabulary only "
                f"{config.text_config.vocab_size}."
            )
        return cls(tokenizer, image_size=config.mar_config.img_size, image_token_id=config.image_token_id)

    @property
    def end_id(self) -> int:
        """Id of `<|im_end|>`, which ends every turn and pads training batches."""
        return self.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def __call__(
        self,
        images: list[Image.Image] | None = None,
        text: list[str] | None = None,
        instruction: str | list[str] | None = None,
        task: str = "reconstruct",
        size: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """Build one task's batch, see `UnifiedProcessor`.

        `reconstruct` has no `condition_pixel_values`: the condition is the target image, which the model encodes once.
        `instruction` may be a list, one per sample. An empty instruction or caption gives the prompt "Generate an
        image."; `caption` works without images.
        """
        if task not in TASKS:
            raise ValueError(f"task is {task!r}; expected one of {', '.join(TASKS)}.")
        if images is None and task != "caption":
            raise ValueError(f"A {task!r} batch needs images.")
        if text is None and task != "reconstruct":
            raise ValueError(f"A {task!r} batch needs text: one string per sample.")
        if images is not None and text is not None and len(images) != len(text):
            raise ValueError(f"Got {len(images)} images and {len(text)} texts; pass one of each per sample.")

        count = len(text if images is None else images)
        instructions = instruction if isinstance(instruction, list) else [instruction or ""] * count
        if task == "caption":
            turns = zip(instructions, text, strict=True)
            rows = [self.conversation([turn], images is not None) for turn in turns]
            input_ids, attention_mask = self.pad([ids for ids, _ in rows])
            labels = torch.full_like(input_ids, -100)
            for row, (_, supervised) in zip(labels, rows, strict=True):
                row[: len(supervised)] = torch.tensor(supervised)
            batch = {"task": task, "input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
            return batch if images is None else {**batch, "condition_pixel_values": self.condition_pixels(images)}

        prompts = instructions if task == "reconstruct" else text
        input_ids, attention_mask = self.pad(self.prompt_ids(prompts, task))
        prepare = self.squeeze if task == "reconstruct" else self.crop
        size = size or (self.image_size, self.image_size)
        return {
            "task": task,
            "pixel_values": torch.stack([to_pixels(prepare(image.convert("RGB"), size)) for image in images]),
            "input_ids": input_ids,
            "attention_mask": attention_mask,
        }

    def target_sizes(self) -> list[tuple[int, int]]:
        return [(self.image_size, self.image_size)]

    # text

    def prompt_ids(self, text: list[str], task: str) -> list[list[int]]:
        """Token ids of image prompts: captions (`generate`), or instructions with an image before them
        (`reconstruct`). Empty ones become "Generate an image."."""
        if task == "generate":
            captions = [caption.strip() for caption in text]
            return [self._turn(f"Generate an image: {caption}" if caption else UNCONDITIONAL) for caption in captions]
        # The model was trained with a line break before the instruction but the image put after the first three
        # tokens, and "user\n\n" is three tokens: both breaks come before the image.
        prompts = [self._turn(f"\n{instruction}" if instruction.strip() else UNCONDITIONAL) for instruction in text]
        return [[*ids[:IMAGE_POSITION], self.image_token_id, *ids[IMAGE_POSITION:]] for ids in prompts]

    def question_ids(self, text: list[str], with_image: bool) -> list[list[int]]:
        """Token ids of questions, the image before the text, up to where the answer begins."""
        if not with_image:
            return [self._tokenize(USER + question + ANSWER) for question in text]
        before = [*self._tokenize(USER), self.image_token_id]
        return [before + self._tokenize(f"\n{question}{ANSWER}") for question in text]

    def conversation(self, turns: list[tuple[str, str]], with_image: bool = True) -> tuple[list[int], list[int]]:
        """Token ids and labels of `(question, answer)` turns. Supervised are the answers and the `<|im_end|>` after
        each; the image comes before the first question."""
        input_ids, labels = [], []
        for place, (question, answer) in enumerate(turns):
            prompt = self.question_ids([question], with_image and place == 0)[0]
            reply, separator = self._tokenize(answer + "<|im_end|>"), self._tokenize("\n")
            input_ids += prompt + reply + separator
            labels += [-100] * len(prompt) + reply + [-100] * len(separator)
        return input_ids[: self.max_caption_length], labels[: self.max_caption_length]

    def pad(self, rows: list[list[int]], side: str = "right") -> tuple[Tensor, Tensor]:
        """Stack rows of ids, padded with `<|im_end|>`: `input_ids` and `attention_mask`, `[B, T]` int64."""
        longest = max(len(row) for row in rows)
        input_ids = torch.full((len(rows), longest), self.end_id)
        attention_mask = torch.zeros(len(rows), longest, dtype=torch.int64)
        for place, row in enumerate(rows):
            kept = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
            input_ids[place, kept] = torch.tensor(row)
            attention_mask[place, kept] = 1
        return input_ids, attention_mask

    def _turn(self, text: str) -> list[int]:
        end = self._tokenize(ANSWER)
        return self._tokenize(USER + text)[: self.max_prompt_length - len(end)] + end

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    # images

    def condition_pixels(self, images: list[Image.Image]) -> Tensor:
        """Images to be understood: padded to a square with grey, then resized. `[B, 3, S, S]`."""
        return torch.stack([to_pixels(self.pad_to_square(image.convert("RGB"))) for image in images])

    def squeeze(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """Resize to `(height, width)` whatever the aspect ratio, by way of a square of the longer side as in the
        original recipe."""
        longer = max(image.size)
        return image.resize((longer, longer)).resize((size[1], size[0]))

    def crop(self, image: Image.Image, size: tuple[int, int], offset: tuple[int, int] | None = None) -> Image.Image:
        """Cut the largest box with the aspect ratio of `(height, width)`, at `(left, top)` or in the middle, and
        resize it."""
        scale = min(image.width / size[1], image.height / size[0])
        width, height = round(size[1] * scale), round(size[0] * scale)
        left, top = offset or ((image.width - width) // 2, (image.height - height) // 2)
        return image.crop((left, top, left + width, top + height)).resize((size[1], size[0]))

    def pad_to_square(self, image: Image.Image) -> Image.Image:
        """Paste into the middle of a grey square and resize to `image_size`."""
        longer = max(image.size)
        square = Image.new("RGB", (longer, longer), (127, 127, 127))
        square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
        return square.resize((self.image_size, self.image_size))


def to_pixels(image: Image.Image) -> Tensor:
    """`[3, H, W]` float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 * 2 - 1
