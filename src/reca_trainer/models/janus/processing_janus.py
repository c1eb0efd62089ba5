"""From PIL images and strings to Janus' batches, worded by the chat template of transformers' Janus processor.

Names of special tokens in captions, instructions, questions and answers are words: `a cat <image_placeholder>` shows no
image. transformers reads them as these tokens. Janus' training code, which could decide, is not published.
"""

from __future__ import annotations

import re
from functools import cached_property, partial
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

from reca_trainer.models.common.conversations import exchange_problem, without_mark
from reca_trainer.models.common.padding import pad_rows, padding_mask
from reca_trainer.models.common.pixels import cut_to_shape, to_pixels
from reca_trainer.models.common.texts import fits, word_ids
from reca_trainer.models.contract import Conversation, UnifiedProcessor, conversations_of, one_per_sample
from reca_trainer.models.janus.configuration_janus import TINY_SPECIAL_TOKENS, JanusConfig

MASK = "\ue000"  # a character for private use, which encloses what stands for the name of a special token

_BYTES = pre_tokenizers.ByteLevel.alphabet()
TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ 'question : ' if message.role == 'user' else 'answer : ' }}"
    "{% for part in message.content %}{{ '<image_placeholder>' if part.type == 'image' else part.text }}"
    "{{ '\n' }}{% endfor %}{% endfor %}{% if add_generation_prompt %}answer :{% endif %}"
)


class JanusProcessor(UnifiedProcessor, transformers.JanusProcessor):
    """transformers' `JanusProcessor` with the task interface of `UnifiedProcessor`.

    Sequences, worded by the chat template (`boi` begins an image, `eoi` ends it, N = 576 image tokens):

    - reconstruct: `bos, user turn: [boi, N placeholders, eoi, instruction], assistant turn: boi`
    - generate: `bos, user turn: prompt, assistant turn: boi`
    - caption: `bos, system prompt, user turn: [boi, N placeholders, eoi, question], assistant turn: answer, eos, …`,
      padded on the right

    The first two are padded on the left, so that `boi` is last. Where a text is dropped, everything between `bos` and the
    last `boi`, the image too, becomes padding tokens that are attended to.

    The processor saves and loads as transformers' does. `transformers.JanusProcessor.__call__` takes free-form text.

    Attributes:
        max_length: tokens of a conversation, its image included: Janus was trained on sequences of 4,096 tokens
            (arXiv:2410.13848, section 4.1).
        max_text_length: tokens of a caption, instruction or question, which leaves room in such a sequence for an image that
            is read and one that is generated.
    """

    max_length: int = 4096
    max_text_length: int = 2048

    @classmethod
    def tiny(cls, config: JanusConfig, tokenizer: PreTrainedTokenizerFast | None = None) -> JanusProcessor:
        """The processor of a `JanusConfig.tiny`, with a chat template in the style of Janus.

        Args:
            tokenizer: its copy gets Janus' six special tokens behind its vocabulary; by default tokens are single bytes.

        Raises:
            ValueError: tokenizer and config differ in vocabulary size.
        """
        if tokenizer is None:
            backend = Tokenizer(models.BPE(vocab={b: i for i, b in enumerate(sorted(_BYTES))}, merges=[]))
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.decoder = decoders.ByteLevel()
        else:
            backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.add_special_tokens(list(TINY_SPECIAL_TOKENS.values()))
        if backend.get_vocab_size() != config.text_config.vocab_size:
            raise ValueError(
                f"The tokenizer has {backend.get_vocab_size()} entries with Janus' special tokens, but the config's "
                f"vocab_size is {config.text_config.vocab_size}."
            )
        bos = TINY_SPECIAL_TOKENS["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
        names = dict(TINY_SPECIAL_TOKENS)
        image_tokens = {name: names.pop(name) for name in ("image_token", "boi_token", "eoi_token")}
        side = config.vision_config.image_size
        return cls(
            image_processor=JanusImageProcessorPil(
                size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3
            ),
            tokenizer=PreTrainedTokenizerFast(
                tokenizer_object=backend, extra_special_tokens=image_tokens, padding_side="left", **names
            ),
            chat_template=TINY_CHAT_TEMPLATE,
            num_image_tokens=config.vision_config.num_image_tokens,
        )

    @property
    def fixed_size(self) -> tuple[int, int]:
        return self.image_processor.size["height"], self.image_processor.size["width"]

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

        Targets are squares cut out of the images, and a reconstruction's condition shows the same square, because Janus
        generates squares without borders. Captioned images are padded to a square, as in Janus' training.

        Raises:
            ValueError: the task or the size is unknown, images or texts are missing or differ in number, or
                `conversation_problem` refuses a conversation.
        """
        if task not in self.tasks:
            raise ValueError(f"task is {task!r}; Janus knows {', '.join(self.tasks)}.")
        if size is not None and tuple(size) != self.fixed_size:
            raise ValueError(f"Janus generates {self.fixed_size} images (height, width) only, got size={size}.")
        required = {"reconstruct": ("images",), "generate": ("text",), "caption": ("images", "text")}[task]
        required = () if task == "reconstruct" and instruction else required
        for name, value in {"images": images, "text": text}.items():
            if name in required and not value:
                raise ValueError(f"task {task!r} needs {name}, one per sample.")
        if images and text and len(images) != len(text):
            raise ValueError(f"Got {len(images)} images and {len(text)} texts; pass one text per image.")

        if task == "caption":
            if any(dropped or []):
                raise ValueError("A caption is what is learned: it cannot be dropped.")
            questions = one_per_sample(instruction, len(text), "")
            return {"task": task, **self._captions(images, conversations_of(text, questions))}
        batch = {"task": task}
        if images:
            images = self.squares(images, crop)
            batch["pixel_values"] = to_pixels(images)
        if task == "reconstruct":
            samples = images or instruction
            requests = one_per_sample(instruction, 1 if isinstance(samples, str) else len(samples), "")
            inputs = self.prompts([request or "" for request in requests], images, "image", with_image=True)
            if images:
                batch["condition_pixel_values"] = inputs["pixel_values"]
        else:
            inputs = self.prompts(text, generation_mode="image")
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        is_dropped = torch.tensor(one_per_sample(dropped, len(ids), False))
        return {
            **batch,
            "input_ids": torch.where(is_dropped[:, None], self.unconditional(ids), ids),
            "attention_mask": mask,
        }

    def conversation_problem(self, conversation: Conversation) -> str | None:
        """See `UnifiedProcessor.conversation_problem`. Questions and answers must alternate. Every answer is supervised; the
        image precedes the first question, wherever its mark is."""
        return super().conversation_problem(conversation) or exchange_problem(conversation)

    def prompts(
        self,
        text: list[str],
        images: list[Image.Image] | None = None,
        generation_mode: str = "text",
        with_image: bool = False,
    ) -> BatchFeature:
        """Tokenise one user turn per sample, up to where the answer (`generation_mode="text"`) or the image tokens
        (`"image"`) start. Turns have placeholders for an image if there are `images`, or `with_image`.

        Returns:
            `input_ids` and `attention_mask` `[B, T]` int64, padded on the left, and with `images` also `pixel_values`
            `[B, 3, h, w]` float32 for the understanding encoder.
        """
        opening = DEFAULT_SYSTEM_PROMPT if self.use_default_system_prompt and generation_mode == "text" else ""
        closing = self.image_start_token if generation_mode == "image" else ""
        begin = self.tokenizer("")["input_ids"]  # bos
        rows = []
        for request in text:
            message = _message("user", self._mask(self._shorten_text(request)), with_image=with_image or bool(images))
            wording = self.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
            rows.append([*begin, *self._encode(f"{opening}{wording}{closing}")])
        inputs = {
            "input_ids": pad_rows(rows, self.tokenizer.pad_token_id, "left"),
            "attention_mask": padding_mask(rows, "left"),
        }
        if images:
            inputs["pixel_values"] = self.image_processor(images, return_tensors="pt")["pixel_values"]
        return BatchFeature(inputs)

    def squares(self, images: list[Image.Image], crop: list[float | None] | None = None) -> list[Image.Image]:
        """The largest square of each image, at its `crop` along the longer side, resized to `fixed_size`."""
        height, width = self.fixed_size
        places = one_per_sample(crop, len(images))
        squares = [cut_to_shape(image, (height, width), place) for image, place in zip(images, places, strict=True)]
        return [square.convert("RGB").resize((width, height), Image.Resampling.BICUBIC) for square in squares]

    def unconditional(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Prompts `[B, T]` without their content, as in Janus' guidance: padding but for `bos` and the last token."""
        kept = input_ids == self.tokenizer.bos_token_id
        kept[:, -1] = True
        return input_ids.where(kept, self.tokenizer.pad_token_id)

    def _captions(self, images: list[Image.Image], conversations: list[Conversation]) -> dict[str, torch.Tensor]:
        for conversation in conversations:
            if problem := self.conversation_problem(conversation):
                raise ValueError(f"Janus cannot learn from a conversation with {problem}.")
        contents = [[without_mark(message) for message in conversation] for conversation in conversations]
        inputs = self.prompts([question for question, *_ in contents], [image.convert("RGB") for image in images])
        sequences, targets = [], []
        for ids, mask, texts in zip(inputs["input_ids"], inputs["attention_mask"], contents, strict=True):
            sequence, target = [], []
            prompts = [ids[mask.bool()].tolist(), *self._later_prompts(texts)]
            for prompt, answer in zip(prompts, texts[1::2], strict=True):
                # An answer is tokenised apart from its prompt, because at inference the prompt is tokenised alone.
                answer_ids = [*word_ids(self.tokenizer, f" {answer}"), self.tokenizer.eos_token_id]
                sequence += prompt + answer_ids
                target += [-100] * len(prompt) + answer_ids
            sequences.append(self.shorten(sequence, self.max_length))
            targets.append(target[: self.max_length])
        return {
            "condition_pixel_values": inputs["pixel_values"],
            "input_ids": pad_rows(sequences, self.tokenizer.pad_token_id),
            "attention_mask": padding_mask(sequences),
            "labels": pad_rows(targets, -100),
        }

    def _later_prompts(self, texts: list[str]) -> list[list[int]]:
        """The ids between the `eos` of an answer and the next answer, for alternating questions and answers.

        Raises:
            ValueError: the chat template does not word a conversation turn by turn.
        """
        texts = [self._mask(text) for text in texts]
        prompts = []
        for index in range(2, len(texts), 2):
            question, answer, later = texts[index - 2 : index + 1]
            turns = [_message("user", question), _message("assistant", answer), _message("user", later)]
            whole = self.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            start = self.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
            between = whole.removeprefix(f"{start} {answer}").removeprefix(self.tokenizer.eos_token)
            if between == whole:
                raise ValueError(
                    f"The chat template does not begin a conversation with its first turn: {whole!r}, {start!r}."
                )
            prompts.append(self._encode(between))
        return prompts

    def _shorten_text(self, text: str) -> str:
        if fits(partial(word_ids, self.tokenizer), [text], self.max_text_length):
            return text
        words = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        last = len(self.shorten(words["input_ids"], self.max_text_length)) - 1
        return text[: words["offset_mapping"][last][1]]

    def _mask(self, text: str) -> str:
        """A text with the names of special tokens hidden from chat template and tokenizer; `_encode` reads them as words."""
        for number, name in enumerate(self._masked):
            text = text.replace(name, f"{MASK}{number}{MASK}")
        return text

    def _encode(self, wording: str) -> list[int]:
        """Token ids of turns that the chat template has worded, with placeholders for their images."""
        image = self.image_start_token + self.num_image_tokens * self.image_token + self.image_end_token
        pieces = re.split(f"{MASK}([0-9]+){MASK}", wording.replace(self.image_token, image))
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            if index % 2:
                ids += word_ids(self.tokenizer, self._masked[int(piece)])
            else:
                ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        return ids

    @cached_property
    def _masked(self) -> list[str]:
        """The strings that `_mask` hides: `MASK` and the special tokens, long ones first since they may contain short ones."""
        names = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return [MASK, *sorted(names, key=len, reverse=True)]


def _message(role: str, text: str, with_image: bool = False) -> dict[str, Any]:
    content = [{"type": "image"}] if with_image else []
    return {"role": role, "content": [*content, {"type": "text", "text": text}] if text else content}
