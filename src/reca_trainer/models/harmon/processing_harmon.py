"""From PIL images and strings to Harmon's batches.

Names of special tokens in captions, instructions, questions and answers are read as these tokens, as in the original, which
tokenises a turn whole: `a cat <|im_end|>` closes its turn. `<image>` names no token: in the question of a conversation it is
the place of the picture, elsewhere it is a word.
"""

from __future__ import annotations

import copy
from itertools import dropwhile
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reca_trainer.models.common.padding import Side, pad_rows, padding_mask
from reca_trainer.models.common.pixels import cut_to_shape, to_pixels
from reca_trainer.models.common.texts import fits
from reca_trainer.models.contract import IMAGE_MARK, Conversation, UnifiedProcessor, conversations_of, one_per_sample
from reca_trainer.models.harmon.configuration_harmon import HarmonConfig

USER, ANSWER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
UNCONDITIONAL = "Generate an image."
MAX_SIDE = 8192  # pixels of the square around a picture: a strip of 20,000 x 3 would take gigabytes
IMAGE_POSITION = 3  # after <|im_start|>, "user" and the line break


class HarmonProcessor(UnifiedProcessor):
    """Harmon's prompts (Qwen chat turns without a system turn) and images in [-1, 1].

    Args:
        tokenizer: a Qwen2 tokenizer with `<|im_start|>` and `<|im_end|>`.
        image_size (`int`): pixels per side of every image.
        image_token_id (`int`): marks the image's place in `input_ids`; the model puts the embeddings there.
        max_prompt_length (`int`): tokens of a prompt, the image counted as one; a longer text is cut, the chat turn around
            it is not.
        max_caption_length (`int`): tokens of a conversation, or of a question at inference, the image counted as one; a
            longer one loses its end.

    Raises:
        ValueError: the tokenizer lacks one of the two tokens.
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
            tokenizer: any tokenizer; its copy gets `<|im_start|>` and `<|im_end|>` if it lacks them.

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

    @property
    def fixed_size(self) -> tuple[int, int]:
        return (self.image_size, self.image_size)

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
        """Build one task's batch, see `UnifiedProcessor`.

        `reconstruct` squeezes the whole picture and has no `condition_pixel_values`: the condition is the target image,
        which the model encodes once. Without images it gives the prompts alone. `generate` cuts a box out of the picture.
        `caption` pads the picture with grey; it needs no images. A dropped text, or an empty instruction, gives the prompt
        "Generate an image.".

        Raises:
            ValueError: an unknown task, images or texts that are missing or differ in number, or a conversation that
                `conversation_problem` refuses.
        """
        if task not in self.tasks:
            raise ValueError(f"task is {task!r}; expected one of {', '.join(self.tasks)}.")
        if images is None and not (task == "caption" or (task == "reconstruct" and instruction)):
            raise ValueError(f"A {task!r} batch needs images.")
        if text is None and task != "reconstruct":
            raise ValueError(f"A {task!r} batch needs text: one string per sample.")
        if images is not None and text is not None and len(images) != len(text):
            raise ValueError(f"Got {len(images)} images and {len(text)} texts; pass one of each per sample.")

        samples = images or text or instruction
        count = 1 if isinstance(samples, str) else len(samples)
        instructions = one_per_sample(instruction, count, "")
        if task == "caption":
            return {"task": task, **self._captions(images, conversations_of(text, instructions, images is not None))}

        prompts = self.prompt_ids(instructions if task == "reconstruct" else text, task, dropped)
        input_ids, attention_mask = self.pad(prompts)
        batch = {"task": task, "input_ids": input_ids, "attention_mask": attention_mask}
        if images is None:
            return batch
        size = size or self.fixed_size
        if task == "reconstruct":
            pictures = [self.squeeze(image.convert("RGB"), size) for image in images]
        else:
            places = zip(images, one_per_sample(crop, count), strict=True)
            pictures = [self.cut(image.convert("RGB"), size, place) for image, place in places]
        return {**batch, "pixel_values": to_pixels(pictures)}

    def conversation_problem(self, conversation: Conversation) -> str | None:
        """See `UnifiedProcessor.conversation_problem`: the reasons of `exchanges_of` and `check_image`, or no answer among the
        tokens that are kept."""
        try:
            exchanges = exchanges_of(conversation)
            check_image(exchanges)
        except ValueError as error:
            return str(error)
        question, _ = exchanges[0]
        if not fits(self._tokenize_turn, [USER + question + ANSWER], self.max_caption_length - 1):
            return f"no answer within {self.max_caption_length} tokens"
        return None

    # text

    def prompt_ids(self, text: list[str], task: str, dropped: list[bool] | None = None) -> list[list[int]]:
        """Token ids of prompts for images: captions (`generate`), or instructions behind an image (`reconstruct`). A dropped
        text, or an empty instruction, becomes "Generate an image."."""
        samples = list(zip(text, one_per_sample(dropped, len(text), False), strict=True))
        if task == "generate":
            requests = [
                UNCONDITIONAL if drop else f"Generate an image: {caption.strip()}" for caption, drop in samples
            ]
            return [self._turn(request, self.max_prompt_length) for request in requests]
        # In training a line break precedes the instruction, and the image is inserted behind the first three tokens. These
        # are "<|im_start|>", "user" and "\n\n", so both line breaks come before the image.
        requests = [
            UNCONDITIONAL if drop or not instruction.strip() else f"\n{instruction}" for instruction, drop in samples
        ]
        turns = [self._turn(request, self.max_prompt_length - 1) for request in requests]
        return [[*ids[:IMAGE_POSITION], self.image_token_id, *ids[IMAGE_POSITION:]] for ids in turns]

    def question_ids(self, text: list[str], with_image: bool) -> list[list[int]]:
        """Token ids of questions, the image before the text, up to where the answer begins."""
        image = f"{IMAGE_MARK}\n" if with_image else ""
        return [self._turn(image + question, self.max_caption_length, with_image) for question in text]

    def conversation(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Token ids and labels of a conversation, cut to `max_caption_length`. Each answer and its `<|im_end|>` are
        supervised.

        Raises:
            ValueError: see `exchanges_of`.
        """
        return self._word(exchanges_of(conversation))

    def _word(self, exchanges: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Token ids and labels of a conversation's questions and answers."""
        input_ids, labels = [], []
        for question, answer in exchanges:
            prompt = self._tokenize_turn(USER + question + ANSWER)
            reply, separator = self._tokenize(answer + "<|im_end|>"), self._tokenize("\n")
            input_ids += prompt + reply + separator
            labels += [-100] * len(prompt) + reply + [-100] * len(separator)
        return self.shorten(input_ids, self.max_caption_length), labels[: self.max_caption_length]

    def _captions(self, images: list[Image.Image] | None, conversations: list[Conversation]) -> dict[str, Tensor]:
        rows = []
        for index, conversation in enumerate(conversations):
            try:
                exchanges = exchanges_of(conversation)
                check_image(exchanges, images is not None)
                rows.append(self._word(exchanges))
            except ValueError as error:
                raise ValueError(f"Conversation {index} of the batch has {error}.") from error
        input_ids, attention_mask = self.pad([ids for ids, _ in rows])
        labels = pad_rows([labels for _, labels in rows], -100)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        return batch if images is None else {**batch, "condition_pixel_values": self.condition_pixels(images)}

    def pad(self, rows: list[list[int]], side: Side = "right") -> tuple[Tensor, Tensor]:
        """Stack rows of ids, padded with `<|im_end|>`: `input_ids` and `attention_mask`, `[B, T]` int64."""
        return pad_rows(rows, self.end_id, side), padding_mask(rows, side)

    def _turn(self, text: str, max_length: int, with_image: bool = False) -> list[int]:
        """A user's turn up to where the answer begins, of at most `max_length` tokens."""
        end = self._tokenize(ANSWER)
        ids = self._tokenize_turn(USER + text) if with_image else self._tokenize(USER + text)
        return self.shorten(ids, max_length - len(end)) + end

    def _tokenize_turn(self, turn: str) -> list[int]:
        """Token ids of a turn, with the image's placeholder at its first image mark."""
        before, mark, after = turn.partition(IMAGE_MARK)
        image = [self.image_token_id] if mark else []
        return [*self._tokenize(before), *image, *self._tokenize(after)]

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    # images

    def condition_pixels(self, images: list[Image.Image]) -> Tensor:
        """Images for the understanding encoder, padded to a square with grey and resized: `[B, 3, side, side]`."""
        return to_pixels([self.pad_to_square(image.convert("RGB")) for image in images])

    def squeeze(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """Resize to `(height, width)` without keeping the aspect ratio, first to a square of the longer side as in the
        original recipe."""
        longer = min(max(image.size), MAX_SIDE)
        return image.resize((longer, longer)).resize((size[1], size[0]))

    def cut(self, image: Image.Image, size: tuple[int, int], place: float | None = None) -> Image.Image:
        """Cut the largest box with the aspect ratio of `(height, width)` and resize it.

        Args:
            place: where along the longer side, in [0, 1); `None` is the middle.
        """
        return cut_to_shape(image, size, place).resize((size[1], size[0]))

    def pad_to_square(self, image: Image.Image) -> Image.Image:
        """Paste into the middle of a grey square and resize to `image_size`."""
        if max(image.size) > MAX_SIDE:
            image = ImageOps.contain(image, (MAX_SIDE, MAX_SIDE))
        longer = max(image.size)
        square = Image.new("RGB", (longer, longer), (127, 127, 127))
        square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
        return square.resize((self.image_size, self.image_size))


def exchanges_of(conversation: Conversation) -> list[tuple[str, str]]:
    """A conversation as pairs `(question, answer)`, made as for the original's training data.

    Answers before the first question and questions after the last answer are left out; questions in a row become one.
    An image mark moves to the front of its message, whose text is then stripped.

    Raises:
        ValueError: a role other than user and assistant, no answer, or two image marks in one question; the message is a
            short reason.
    """
    exchanges, question = [], ""
    for message in dropwhile(lambda message: message["role"] == "assistant", conversation):
        role, content = message["role"], message["content"]
        if role == "user":
            if IMAGE_MARK in content:
                content = f"{IMAGE_MARK}\n{content.replace(IMAGE_MARK, '').strip()}".strip()
            question += content
        elif role == "assistant":
            exchanges.append((question, content))
            question = ""
        else:
            raise ValueError(f"a message of the role {role!r}")
    if not exchanges:
        raise ValueError("no answer to a question")
    if any(question.count(IMAGE_MARK) > 1 for question, _ in exchanges):
        raise ValueError("two image marks in one question")
    return exchanges


def check_image(exchanges: list[tuple[str, str]], with_image: bool = True) -> None:
    """Raise `ValueError`, with a short reason, where the image of a conversation's `exchanges_of` is not where the model
    was trained to see it."""
    marks = sum(IMAGE_MARK in question for question, _ in exchanges)
    if not with_image and marks:
        raise ValueError("an image mark, but no image")
    if with_image and marks > 1:
        raise ValueError("more than one image mark")
    if with_image and not exchanges[0][0].startswith(IMAGE_MARK):
        raise ValueError("no image mark at the front of the first question")
