"""From PIL images and strings to Show-o's batches.

`input_ids` is the whole sequence, with `CONDITION_TOKEN_ID` in place of the condition image and the mask token in place of
the target's tokens. For `P` tokens of the condition and `n` of the target:

| task | CLIP variant | plain variant |
|---|---|---|
| reconstruct | `mmu soi P eoi bos prompt eos PAD.. soi n eoi` | `PAD.. mmu soi P eoi bos prompt eos soi n eoi` |
| generate | `PAD.. t2i bos caption eos soi n eoi` | the same |
| caption | `mmu system soi P eoi text PAD..` | `mmu soi P eoi text PAD..` |

Targets are whole pictures squeezed to a square. Only `caption` crops a picture, to its centre, as in the encoders' training.

Names of special tokens in captions, instructions, questions and answers are words: `a cat <|endoftext|>` has no further EOS.
The original reads them as these tokens, and its masks and labels then go wrong, because they find images by their markers
and answers by their EOS.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerBase

from reca_trainer.models.common.padding import Side, pad_rows
from reca_trainer.models.common.pixels import to_pixels
from reca_trainer.models.common.texts import fits, word_ids
from reca_trainer.models.contract import IMAGE_MARK, Conversation, UnifiedProcessor, conversations_of, one_per_sample
from reca_trainer.models.show_o.configuration_show_o import CONDITION_TOKEN_ID, SPECIAL_TOKENS, ShowOConfig

# LLaVA's system prompt, which precedes an image in the CLIP variant's visual instruction tuning.
SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class ShowOProcessor(UnifiedProcessor):
    """Builds batches for `ShowOModel`.

    Args:
        tokenizer: Phi-1.5's tokenizer; the special tokens it lacks are added to it.
        image_size: side of generated images in pixels.
        vq_scale_factor: pixels per image token, along each side.
        codebook_size: number of different image tokens.
        clip_image_size, clip_patch_size: of the CLIP encoder, in pixels; `clip_image_size` is `None` in the plain variant.
        max_text_length: tokens of the text part of a sequence; by default as in the official runs, 576 (CLIP variant) or
            381 (plain variant).
        recon_text_length: tokens in front of a reconstruction's target without the condition's; shorter texts are padded to
            it (CLIP variant).
        down_scale: the plain variant's information bottleneck: the condition is the target shrunk by this factor.
        resize_back: whether the shrunk condition is enlarged to `image_size` again, which keeps its number of tokens.

    Raises:
        ValueError: the tokenizer has no EOS or its special tokens are not where Show-o has them, or a shrunk condition is
            smaller than a token.
    """

    def __init__(
        self,
        tokenizer=None,
        image_size: int = 512,
        vq_scale_factor: int = 16,
        codebook_size: int = 8192,
        clip_image_size: int | None = 336,
        clip_patch_size: int = 14,
        max_text_length: int | None = None,
        recon_text_length: int = 128,
        down_scale: int = 2,
        resize_back: bool = False,
        **kwargs,
    ):
        self.image_size = image_size
        self.vq_scale_factor = vq_scale_factor
        self.codebook_size = codebook_size
        self.clip_image_size = clip_image_size
        self.clip_patch_size = clip_patch_size
        self.max_text_length = max_text_length or (381 if clip_image_size is None else 576)
        self.recon_text_length = recon_text_length
        self.down_scale = down_scale
        self.resize_back = resize_back
        if tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no EOS token, which Show-o puts around every text.")
        if clip_image_size is None and image_size // down_scale < vq_scale_factor:
            raise ValueError(
                f"An image of {image_size} pixels shrunk {down_scale} times is smaller than one token of {vq_scale_factor} "
                "pixels."
            )
        tokenizer.add_special_tokens({"pad_token": SPECIAL_TOKENS[0]})
        tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
        super().__init__(tokenizer, **kwargs)
        ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
        if ids != list(range(ids[0], ids[0] + len(ids))) or len(tokenizer) != ids[-1] + 1:
            raise ValueError(
                f"Show-o's special tokens must be the tokenizer's last {len(ids)}, in the order {SPECIAL_TOKENS}; this "
                f"tokenizer of {len(tokenizer)} tokens has them at {ids}."
            )
        self.pad_id, self.soi_id, self.eoi_id, self.t2i_id, self.mmu_id = (ids[i] for i in (0, 1, 2, 5, 6))
        self.eos_id = tokenizer.eos_token_id  # Show-o has no other BOS
        self.mask_token_id = len(tokenizer) + codebook_size
        if clip_image_size is None and down_scale == 1:
            warnings.warn(
                "down_scale=1 makes a reconstruction's condition the very tokens of its target: the model learns to copy "
                "them, the loss falls to zero and text-to-image generation collapses. Use down_scale=2 or more.",
                stacklevel=2,
            )

    @classmethod
    def from_config(cls, tokenizer: PreTrainedTokenizerBase, config: ShowOConfig, **kwargs: Any) -> ShowOProcessor:
        """The processor of a model.

        Args:
            tokenizer: of `config.llm_vocab_size` tokens.
            kwargs: further arguments of the class.

        Raises:
            ValueError: the tokenizer has another number of tokens.
        """
        clip = config.vision_config
        sizes = {
            "image_size": config.image_size,
            "vq_scale_factor": config.vq_scale_factor,
            "codebook_size": config.codebook_size,
            "clip_image_size": clip and clip.image_size,
            "clip_patch_size": clip.patch_size if clip else 14,
        }
        processor = cls(tokenizer, **{**sizes, **kwargs})
        if processor.mask_token_id != config.mask_token_id:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} tokens with Show-o's special ones, the model expects "
                f"{config.image_token_offset}."
            )
        return processor

    @property
    def num_image_tokens(self) -> int:
        return (self.image_size // self.vq_scale_factor) ** 2

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
        padding: bool | str = True,
    ) -> dict[str, Any]:
        """See `UnifiedProcessor.__call__`.

        Args:
            text: `caption` without `images` is language modelling.
            instruction: for `caption` the question; without one the caption alone is read and supervised. For `reconstruct` a
                long instruction is cut in front of the assistant's header.
            crop: has no effect, because nothing is cropped at random.
            dropped: the samples whose caption or instruction becomes empty.
            padding: `True` pads to the longest sequence of the batch, `"max_length"` to the length of the official runs. The
                losses are the same.

        Raises:
            ValueError: an unknown task, missing images or texts, numbers of samples that differ, a `size` that is not the
                model's, or a conversation that `conversation_problem` refuses.
        """
        if task not in self.tasks:
            raise ValueError(f"Show-o has no task {task!r}; it has {', '.join(self.tasks)}.")
        if size is not None and tuple(size) != self.fixed_size:
            raise ValueError(
                f"This Show-o generates images of {self.image_size} × {self.image_size} pixels only, not "
                f"{size[0]} × {size[1]}."
            )
        name, samples = ("images", images or instruction) if task == "reconstruct" else ("text", text)
        if not samples:
            raise ValueError(f"The task {task!r} needs {name}, one per sample.")
        count = 1 if isinstance(samples, str) else len(samples)
        if images is not None and len(images) != count:
            raise ValueError(f"A batch takes as many texts as images, but here are {count} and {len(images)}.")
        dropped = one_per_sample(dropped, count, False)
        batch: dict[str, Any] = {"task": task}
        if task == "reconstruct":
            instructions = one_per_sample(instruction, count)
            if images:
                batch["pixel_values"] = self.squeeze(images)
                batch["condition_pixel_values"] = self.shrink(batch["pixel_values"])
            batch.update(self.reconstruction_prompts(without_dropped(instructions, dropped), padding))
        elif task == "caption":
            if any(dropped):
                raise ValueError("A caption is what is learned: it cannot be dropped.")
            if images is not None:
                batch["condition_pixel_values"] = self.understanding_pixels(images)
            questions = one_per_sample(instruction, len(samples))
            batch.update(self.conversations(text, questions, images is not None, padding))
        else:
            if images is not None:
                batch["pixel_values"] = self.squeeze(images)
            batch.update(self.prompts(without_dropped(text, dropped), padding))
        return batch

    def conversation_problem(self, conversation: Conversation) -> str | None:
        """See `UnifiedProcessor.conversation_problem`: the reasons of `_rounds`, or no answer among the tokens that are
        kept."""
        try:
            question, _ = self._rounds(conversation)[0]
        except ValueError as error:
            return str(error)
        if not fits(self._tokenize, [question], self.max_conversation_length - 1):
            return f"no answer within the first {self.max_conversation_length} tokens"
        return None

    def prompts(self, text: list[str], padding: bool | str = True) -> dict[str, torch.Tensor]:
        """Text-to-image sequences: `input_ids` and `attention_mask` `[B, L]`. A long caption is cut in front of its EOS."""
        rows = []
        for caption in text:
            words = self.shorten(self._tokenize(caption), self.max_text_length - 2)
            rows.append([self.t2i_id, self.eos_id, *words, self.eos_id, *self._target()])
        return self._rectangular(rows, "left", self.max_length if padding == "max_length" else None)

    def reconstruction_prompts(
        self, instructions: list[str | None], padding: bool | str = True
    ) -> dict[str, torch.Tensor]:
        """RecA sequences (the condition's place, the instruction, the target's place): `input_ids` and `attention_mask`
        `[B, L]`."""
        clip = self.clip_image_size is not None
        head = [self.mmu_id, self.soi_id, *self._condition(reconstruct=True), self.eoi_id]
        # The CLIP variant pads everything but the condition to one length, in which the head's three markers count.
        room = (self.recon_text_length - 3 if clip else self.max_text_length) - 2
        rows = []
        for instruction in instructions:
            prompt = self._question(f"USER: \n {instruction}", room) if instruction else []
            pad = [self.pad_id] * (room - len(prompt)) if clip else []
            rows.append([*head, self.eos_id, *prompt, self.eos_id, *pad, *self._target()])
        length = None
        if padding == "max_length" and not clip:
            length = self.max_text_length + 5 + len(self._condition(reconstruct=True)) + self.num_image_tokens
        return self._rectangular(rows, "left", length)

    def conversations(
        self,
        text: list[str] | list[Conversation],
        questions: list[str | None],
        with_image: bool,
        padding: bool | str = True,
    ) -> dict[str, torch.Tensor]:
        """Image-to-text sequences: `input_ids`, `attention_mask` and `labels` `[B, L]`. Supervised are answers with their EOS,
        or all of a caption that answers no question.

        Raises:
            ValueError: a conversation cannot be worded.
        """
        head = self._image_head() if with_image else []
        room = self.max_length - len(head)
        rows, labels = [], []
        conversations = conversations_of(text, questions, with_image)
        for caption, question, conversation in zip(text, questions, conversations, strict=True):
            if isinstance(caption, str) and not (question or "").strip():
                ids = self.shorten([self.eos_id, *self._tokenize(caption), self.eos_id], room)
                if with_image:  # a long text without an image loses its EOS
                    ids[-1] = self.eos_id
                label = ids
            else:
                ids, label = self._conversation(conversation)
                ids = self.shorten(ids, room)
            rows.append(head + ids)
            labels.append([-100] * len(head) + label[:room])
        length = self.max_length if padding == "max_length" else None
        batch = self._rectangular(rows, "right", length)
        batch["labels"] = pad_rows(labels, -100, length=batch["input_ids"].shape[1])
        return batch

    def questions(self, text: list[str], with_image: bool) -> list[torch.Tensor]:
        """Sequences `[1, T]` up to the start of an answer, with questions of at most `max_text_length` tokens. In the plain
        variant an EOS and a line break precede a question about an image."""
        head, separator = self._image_head() if with_image else [], ""
        if with_image and self.clip_image_size is None:
            head, separator = [*head, self.eos_id], "\n"
        questions = [self._question(f"USER: {separator}{question}", self.max_text_length) for question in text]
        return [torch.tensor([head + question]) for question in questions]

    @property
    def max_length(self) -> int:
        """Tokens of a text-to-image or image-to-text sequence in the official runs."""
        return self.max_text_length + self.num_image_tokens + 3

    @property
    def max_conversation_length(self) -> int:
        """Tokens that are kept of a conversation about an image."""
        return self.max_length - len(self._image_head())

    def squeeze(self, images: list[Image.Image]) -> torch.Tensor:
        """`[B, 3, H, W]` float32 in [-1, 1]: whole images resized to a square of `image_size`, bicubic."""
        side = (self.image_size,) * 2
        return to_pixels([image.convert("RGB").resize(side, Image.Resampling.BICUBIC) for image in images])

    def shrink(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The condition `[B, 3, h, w]` of a reconstruction from its target `[B, 3, H, W]`: resized bilinearly, and still in
        [-1, 1], because the official run does not normalise it for CLIP."""
        if self.clip_image_size is not None:
            return F.interpolate(pixel_values, (self.clip_image_size,) * 2, mode="bilinear", align_corners=False)
        if self.down_scale == 1:
            return pixel_values
        small = (self.image_size // self.down_scale,) * 2
        shrunk = F.interpolate(pixel_values, small, mode="bilinear", align_corners=False)
        if not self.resize_back:
            return shrunk
        return F.interpolate(shrunk, (self.image_size,) * 2, mode="bilinear", align_corners=False)

    def understanding_pixels(self, images: list[Image.Image]) -> torch.Tensor:
        """`[B, 3, h, w]` float32 for questions about images: normalised for CLIP, or in the plain variant as in `crop`."""
        if self.clip_image_size is None:
            return self.crop(images)
        side = self.clip_image_size
        sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        # CLIP's conversion to RGB would look for a transparent colour, which an image made from a palette may still name.
        clip = CLIPImageProcessorPil(**sizes, do_convert_rgb=False)
        return clip([without_ends(image) for image in images], return_tensors="pt")["pixel_values"]

    def crop(self, images: list[Image.Image]) -> torch.Tensor:
        """`[B, 3, H, W]` float32 in [-1, 1]: the shorter side resized to `image_size`, bicubic, and the centre cut out."""
        return to_pixels([resize_and_crop(image, self.image_size) for image in images])

    def _tokenize(self, text: str) -> list[int]:
        return word_ids(self.tokenizer, text)

    def _question(self, text: str, length: int) -> list[int]:
        """A question followed by the assistant's header, in `length` tokens; a long question is cut, the header is not."""
        ids, header = self._tokenize(f"{text} ASSISTANT:"), self._tokenize(" ASSISTANT:")
        return ids if len(ids) <= length else self.shorten(ids, length - len(header)) + header

    def _target(self) -> list[int]:
        return [self.soi_id, *[self.mask_token_id] * self.num_image_tokens, self.eoi_id]

    def _condition(self, reconstruct: bool) -> list[int]:
        if self.clip_image_size is not None:
            count = (self.clip_image_size // self.clip_patch_size) ** 2
        elif reconstruct and not self.resize_back:
            count = (self.image_size // self.down_scale // self.vq_scale_factor) ** 2
        else:
            count = self.num_image_tokens
        return [CONDITION_TOKEN_ID] * count

    def _image_head(self) -> list[int]:
        system = [] if self.clip_image_size is None else self._tokenize(SYSTEM_PROMPT)
        return [self.mmu_id, *system, self.soi_id, *self._condition(reconstruct=False), self.eoi_id]

    def _conversation(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        ids, labels = [], []
        for question, answer in self._rounds(conversation):
            question_ids, answer_ids = self._tokenize(question), [*self._tokenize(answer), self.eos_id]
            ids += question_ids + answer_ids
            labels += [-100] * len(question_ids) + answer_ids
        return ids, labels

    def _rounds(self, conversation: Conversation) -> list[tuple[str, str]]:
        """A conversation as worded pairs `(question, answer)`. An empty answer ends no pair: its header becomes part of the
        next question. An answer before the first question is left out.

        Raises:
            ValueError: the original learns nothing from the conversation; the message says why.
        """
        roles = [message["role"] for message in conversation]
        if unknown := set(roles) - {"user", "assistant"}:
            raise ValueError(f"a message of {min(unknown)}")
        skipped = int(roles[:1] == ["assistant"])
        roles = roles[skipped:]
        for previous, role in zip(["assistant", *roles], roles, strict=False):
            if role == previous:
                raise ValueError(f"two messages of {role} one after the other")
        rounds, question = [], ""
        for role, message in zip(roles, conversation[skipped:], strict=True):
            content = message["content"]
            if IMAGE_MARK in content:
                content = content.replace(IMAGE_MARK, "").strip()
            if role == "user":
                question += f"USER: {content} " if content else "USER:"
            elif content and question.endswith("USER:"):
                raise ValueError("an answer to an empty question")
            elif content:
                rounds.append((f"{question}ASSISTANT:", f" {content}"))
                question = ""
            else:
                question += "ASSISTANT:"
        if question or not rounds:
            raise ValueError("no answer to the last question")
        return rounds

    def _rectangular(self, rows: list[list[int]], side: Side, length: int | None) -> dict[str, torch.Tensor]:
        input_ids = pad_rows(rows, self.pad_id, side, length)
        return {"input_ids": input_ids, "attention_mask": (input_ids != self.pad_id).long()}


def without_dropped(texts: list[str | None], dropped: list[bool]) -> list[str | None]:
    return ["" if drop else text for text, drop in zip(texts, dropped, strict=True)]


def without_ends(image: Image.Image) -> Image.Image:
    """The image in RGB. A very long strip loses its ends, which a centre crop does not keep: resizing a strip of 20,000 × 3
    pixels to a shorter side of 512 would take gigabytes."""
    width, height = image.size
    image, longest = image.convert("RGB"), 64 * min(width, height)
    left, top = max(width - longest, 0) // 2, max(height - longest, 0) // 2
    return image.crop((left, top, width - left, height - top)) if left or top else image


def resize_and_crop(image: Image.Image, side: int) -> Image.Image:
    """The image in RGB, its shorter side resized to `side` pixels, bicubic, and cropped to the central square."""
    image = without_ends(image)
    width, height = image.size
    size = (side, int(side * height / width)) if width < height else (int(side * width / height), side)
    left, top = (round((length - side) / 2) for length in size)
    return image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
