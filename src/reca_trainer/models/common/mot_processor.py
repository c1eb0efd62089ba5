"""What the processors of `MoTModel` families do alike: captions in one rectangle, conditions in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from reca_trainer.models.common.padding import padded_batch
from reca_trainer.models.contract import Conversation, UnifiedProcessor, conversations_of, one_per_sample


class MoTProcessor(UnifiedProcessor):
    """A family sets `pad_token_id`, words conversations (`_word`) and frames condition images (`to_condition`)."""

    tasks = ("reconstruct", "caption", "generate", "edit")
    pad_token_id: int

    def _word(self, conversation: Conversation, with_image: bool) -> tuple[list[int], list[int], int]:
        """A conversation as ids, labels (-100 where nothing is supervised) and the number of ids before its image, -1 where
        it shows none.

        Raises:
            ValueError: `conversation_problem` refuses the conversation.
        """
        raise NotImplementedError

    def to_condition(self, image: Image.Image | None, framing: Any) -> torch.Tensor:
        """An image for the understanding encoder, `[3, h, w]` float32; `None` gives one embedding's worth of zeros.

        Args:
            framing: what decides the size, in the family's own terms.
        """
        raise NotImplementedError

    def to_conditions(self, images: Sequence[Image.Image | None], framing: Any) -> torch.Tensor | list[torch.Tensor]:
        """`to_condition` of each image: `[B, 3, h, w]` float32, or a list of `[3, h, w]` where sizes differ."""
        pixels = [self.to_condition(image, framing) for image in images]
        return torch.stack(pixels) if len({tensor.shape for tensor in pixels}) == 1 else pixels

    def _caption_batch(
        self,
        images: list[Image.Image | None] | None,
        text: list[str] | list[Conversation],
        instruction: str | list[str] | None,
        dropped: list[bool] | None,
        framing: Any,
    ) -> dict[str, Any]:
        """The batch of `caption`, with `image_position` `[B]` int64 (see `_word`) where a row shows an image."""
        if any(dropped or []):
            raise ValueError("The tasks that make images drop texts, caption does not.")
        conversations = conversations_of(text, instruction, with_images=images is not None)
        images = one_per_sample(images, len(conversations))
        pairs = zip(conversations, images, strict=True)
        rows, labels, positions = zip(*[self._word(words, image is not None) for words, image in pairs], strict=True)
        batch: dict[str, Any] = {"task": "caption", **self._pad(rows, labels)}
        if any(position >= 0 for position in positions):
            shown = [image if position >= 0 else None for image, position in zip(images, positions, strict=True)]
            batch["condition_pixel_values"] = self.to_conditions(shown, framing)
            batch["image_position"] = torch.tensor(positions)
        return batch

    def _texts(self, images: Any, texts: Any, dropped: Any) -> list[tuple[str | None, bool]]:
        """Each sample's text and whether it is dropped. Any list among the arguments gives the number of samples."""
        samples = next((values for values in (images, texts, dropped) if isinstance(values, (list, tuple))), [None])
        count = len(samples)
        return list(zip(one_per_sample(texts, count), one_per_sample(dropped, count, False), strict=True))

    def _pad(self, rows: Sequence[list[int]], labels: Sequence[list[int]] | None = None) -> dict[str, torch.Tensor]:
        return padded_batch(rows, self.pad_token_id, labels)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
