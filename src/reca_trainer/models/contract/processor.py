"""The half of the contract that makes batches: `UnifiedProcessor`, and what every processor needs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from transformers import ProcessorMixin

Message = dict[str, str]
Conversation = list[Message]

IMAGE_MARK = "<image>"  # where a message shows the conversation's picture


class UnifiedProcessor(ProcessorMixin):
    """Turns whole PIL images and texts into one task's batch, framed and worded as its family was trained.

    A text that is longer than the family takes loses its end. The original decides whether a text that spells a special
    token, such as `<|im_end|>`, gets that token; the docstring of `processing_<family>.py` says which.

    Attributes:
        tasks: the tasks whose batches it makes.
        fixed_size: `(height, width)` in pixels of every target; `None` where the picture decides.
        texts_cut: how many texts this processor has shortened so far.
    """

    tasks: tuple[str, ...] = ("reconstruct", "caption", "generate")
    texts_cut: int = 0

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        return None

    def __call__(
        self,
        images: list[Any] | None = None,
        text: list[str] | list[Conversation] | None = None,
        instruction: str | list[str] | None = None,
        task: str = "reconstruct",
        size: tuple[int, int] | None = None,
        *,
        crop: list[float | None] | None = None,
        dropped: list[bool] | None = None,
    ) -> dict[str, Any]:
        """Build the batch of one task; `reca_trainer.models.contract` lists its keys.

        Families with the task `edit` have a further argument `dropped_sources: list[tuple[bool, bool]]`: the samples whose
        source is dropped as latents and as embeddings; none by default.

        Args:
            images: whole, upright RGB images, one per sample, or pairs `(source, target)` for `edit`; the family cuts,
                squeezes, pads and resizes them as its original does. Without them, families with `frozen_encoders` give
                the rest of a `reconstruct` batch.
            text: captions (`generate`, `caption`) or instructions (`edit`), one per sample, their white space untouched.
                `caption` also takes conversations: messages `{"role": "user" | "assistant", "content": str}`, one of
                which may have `<image>` in its content.
            instruction: what the model is asked for: the reconstruction template, or the question behind a caption;
                one for all samples or one per sample. Conversations bring their own questions.
            size: `(height, width)` in pixels of the targets and of the sources of edits; by default that of `target_size`,
                which must then be the same for all.
            crop: where a family cuts a square out of the longer side, one place in [0, 1) per sample: of `n + 1`
                possible offsets, number `int(place * (n + 1))`. `None` is the centre.
            dropped: the samples whose text is dropped for classifier-free guidance, in the family's own unconditional
                form (`reconstruct`, `generate`, `edit`); none by default.

        Raises:
            ValueError: arguments that contradict each other; the message says which.
        """
        raise NotImplementedError

    def target_size(
        self, width: int, height: int, max_image_size: int | None = None, min_image_size: int | None = None
    ) -> tuple[int, int]:
        """`(height, width)` in pixels of the target that an image of `width` and `height` becomes.

        Args:
            max_image_size, min_image_size: bounds of the longer and the shorter side in pixels, where the picture decides;
                by default the family's.

        Raises:
            ValueError: bounds for a family with targets of one size.
        """
        if self.fixed_size is None:
            raise NotImplementedError
        if max_image_size is not None or min_image_size is not None:
            raise ValueError(
                f"{type(self).__name__} makes targets of {self.fixed_size[1]} x {self.fixed_size[0]} pixels only; leave "
                "max_image_size and min_image_size out."
            )
        return self.fixed_size

    def conversation_problem(self, conversation: Conversation) -> str | None:
        """Why the family cannot learn from a conversation about a picture, such as "no answer"; `None` if it can.

        Rows with a problem are left out and counted.
        """
        if not any(message["role"] == "assistant" for message in conversation):
            return "no answer"
        return None

    def with_arguments(self, **arguments: Any) -> UnifiedProcessor:
        """A copy of this processor with some of its constructor's arguments replaced.

        Raises:
            ValueError: the constructor has no such argument.
        """
        known = [name for name in inspect.signature(type(self)).parameters if hasattr(self, name)]
        if unknown := sorted(set(arguments) - set(known)):
            raise ValueError(f"{type(self).__name__} has no {', '.join(unknown)}; it has {', '.join(known)}.")
        return type(self)(**{name: getattr(self, name) for name in known} | arguments)

    def shorten(self, ids: list[int], length: int) -> list[int]:
        """The first `length` ids of a text or conversation; `texts_cut` counts it if it has more."""
        self.texts_cut += len(ids) > length
        return ids[:length]


def conversations_of(
    text: Sequence[str | Conversation], instruction: str | list[str] | None, with_images: bool = True
) -> list[Conversation]:
    """Captions as conversations about a picture: the question, then the caption; conversations stay as they are."""
    questions = instruction if isinstance(instruction, list) else [instruction or ""] * len(text)
    mark = f"{IMAGE_MARK}\n" if with_images else ""
    return [
        [{"role": "user", "content": mark + (question or "")}, {"role": "assistant", "content": answer}]
        if isinstance(answer, str)
        else answer
        for answer, question in zip(text, questions, strict=True)
    ]


def one_per_sample(value: Any, count: int, default: Any = None) -> list[Any]:
    """A list of `count` entries: `value` if it is one, else `value`, or `default` for `None`, once per sample.

    Raises:
        ValueError: a list of another length.
    """
    values = value if isinstance(value, list) else [default if value is None else value] * count
    if len(values) != count:
        raise ValueError(f"Got {len(values)} entries for a batch of {count} samples; pass one per sample.")
    return values


def check_only_size(side: int, *bounds: int | None) -> None:
    """Raise `ValueError` if one of the `bounds` in pixels differs from the only `side` that a family's targets have."""
    if any(bound not in (None, side) for bound in bounds):
        raise ValueError(f"This model makes targets of {side} x {side} pixels only; leave other sizes out.")
