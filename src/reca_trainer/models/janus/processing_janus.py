"""Images and strings to Janus batches, through transformers' own Janus processor."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from reca_trainer.models.contract import UnifiedProcessor
from reca_trainer.models.janus.configuration_janus import TINY_SPECIAL_TOKENS, JanusConfig
from reca_trainer.tasks import TASKS

_BYTES = pre_tokenizers.ByteLevel.alphabet()
TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ 'question : ' if message.role == 'user' else 'answer : ' }}"
    "{% for part in message.content %}{{ '<image_placeholder>' if part.type == 'image' else part.text }}"
    "{{ '\n' }}{% endfor %}{% endfor %}{% if add_generation_prompt %}answer :{% endif %}"
)


class JanusProcessor(UnifiedProcessor, transformers.JanusProcessor):
    """transformers' `JanusProcessor` with the task interface of `UnifiedProcessor`.

    Sequences, in the words of the chat template (`boi` begins an image, N = 576 image tokens):

    - reconstruct: `bos, user turn: [boi, N placeholders, eoi, instruction], assistant turn: boi`
    - generate: `bos, user turn: prompt, assistant turn: boi`, padded on the left so that `boi` is last
    - caption: `bos, system prompt, user turn: [boi, N placeholders, eoi, question], assistant turn: caption, eos`,
      padded on the right

    It saves and loads as transformers' own, whose call with free-form text is `transformers.JanusProcessor.__call__`.
    """

    @classmethod
    def tiny(cls, config: JanusConfig, tokenizer: PreTrainedTokenizerFast | None = None) -> JanusProcessor:
        """The processor of a `JanusConfig.tiny`, with a chat template in the style of Janus.

        Args:
            tokenizer: gets Janus' six special tokens behind its vocabulary; single bytes by default.

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

    def __call__(
        self,
        images: list[Image.Image] | None = None,
        text: list[str] | None = None,
        instruction: str | list[str] | None = None,
        task: str = "reconstruct",
        size: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """Build the batch of one task; keys, shapes and arguments as in `UnifiedProcessor.__call__`. For captions
        `instruction` may be a list, one question per image.

        Reconstruction crops images to their central square first, so that condition and target show the same: Janus
        generates squares without borders. Captioned images are padded to a square, as Janus was trained to see them.

        Raises:
            ValueError: the task or the size is unknown, images or texts are missing or differ in number, or a text
                contains one of the tokens that stand for images.
        """
        if task not in TASKS:
            raise ValueError(f"task is {task!r}; Janus knows {', '.join(TASKS)}.")
        if size is not None and tuple(size) not in self.target_sizes():
            raise ValueError(f"Janus generates {self.target_sizes()[0]} images (height, width) only, got size={size}.")
        needs = {"reconstruct": ("images",), "generate": ("text",), "caption": ("images", "text")}[task]
        for name, value in {"images": images, "text": text}.items():
            if name in needs and not value:
                raise ValueError(f"task {task!r} needs {name}, one per sample.")
        if images and text and len(images) != len(text):
            raise ValueError(f"Got {len(images)} images and {len(text)} texts; pass one text per image.")

        if task == "caption":
            questions = instruction if isinstance(instruction, list) else [instruction or ""] * len(images)
            return {"task": task, **self._captions(images, questions, text)}
        batch = {"task": task}
        if images:
            images = self.crop(images)
            batch["pixel_values"] = torch.stack([_to_tensor(image) for image in images])
        if task == "reconstruct":
            inputs = self.prompts([instruction or ""] * len(images), images, generation_mode="image")
            # one instruction for all: nothing is padded, so no mask
            return {**batch, "condition_pixel_values": inputs["pixel_values"], "input_ids": inputs["input_ids"]}
        inputs = self.prompts(text, generation_mode="image")
        return {**batch, "input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}

    def target_sizes(self) -> list[tuple[int, int]]:
        return [(self.image_processor.size["height"], self.image_processor.size["width"])]

    def prompts(
        self, text: list[str], images: list[Image.Image] | None = None, generation_mode: str = "text"
    ) -> BatchFeature:
        """Tokenise one user turn per sample, up to where the answer starts (`"text"`) or the image tokens start
        (`"image"`).

        Returns:
            `input_ids` and `attention_mask` `[B, T]` int64, padded on the left, and with `images` also `pixel_values`
            `[B, 3, h, w]` float32 for the understanding encoder.
        """
        turns = []
        for one in text:
            self._refuse_image_tokens(one)
            content = [{"type": "image"}] if images else []
            content += [{"type": "text", "text": one}] if one else []
            turns.append([{"role": "user", "content": content}])
        return transformers.JanusProcessor.__call__(
            self,
            text=self.apply_chat_template(turns, add_generation_prompt=True, tokenize=False),
            images=images or None,
            generation_mode=generation_mode,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )

    def crop(self, images: list[Image.Image]) -> list[Image.Image]:
        """The central square of each image, at the size that the model generates."""
        height, width = self.target_sizes()[0]
        return [ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BICUBIC) for image in images]

    def _captions(
        self, images: list[Image.Image], questions: list[str], captions: list[str]
    ) -> dict[str, torch.Tensor]:
        inputs = self.prompts(questions, [image.convert("RGB") for image in images])
        sequences, targets = [], []
        for ids, mask, caption in zip(inputs["input_ids"], inputs["attention_mask"], captions, strict=True):
            prompt = ids[mask.bool()].tolist()
            self._refuse_image_tokens(caption)
            # tokenised apart from the prompt: at inference the prompt is tokenised alone, too
            answer = self.tokenizer(f" {caption.strip()}", add_special_tokens=False)["input_ids"]
            answer = [*answer, self.tokenizer.eos_token_id]
            sequences.append(prompt + answer)
            targets.append([-100] * len(prompt) + answer)
        padded = self.tokenizer.pad({"input_ids": sequences}, padding_side="right", return_tensors="pt")
        longest = padded["input_ids"].shape[1]
        return {
            "condition_pixel_values": inputs["pixel_values"],
            "input_ids": padded["input_ids"],
            "attention_mask": padded["attention_mask"],
            "labels": torch.tensor([target + [-100] * (longest - len(target)) for target in targets]),
        }

    def _refuse_image_tokens(self, text: str) -> None:
        for token in (self.image_token, self.image_start_token, self.image_end_token):
            if token in text:
                raise ValueError(f"The text {text!r} contains {token}, which stands for an image; remove it.")


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """`[3, H, W]` float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
