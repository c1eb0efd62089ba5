"""Judges answer questions about images. Anything with a `source` dict that is called as `judge(images, questions)` is one;
`LocalJudge` is a vision-language model of transformers, `endpoint_judge.EndpointJudge` one behind an endpoint."""

from __future__ import annotations

import torch
from PIL import Image
from transformers import pipeline


class LocalJudge:
    """An image-text-to-text model of transformers.

    Args:
        name: id or folder of the model.
        revision: commit, branch or tag on the Hub.
        dtype: of the weights; by default the checkpoint's.
        batch_size: questions answered at once.
        max_new_tokens: length limit of an answer.
    """

    def __init__(
        self,
        name: str,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "auto",
        batch_size: int = 1,
        max_new_tokens: int = 16,
    ):
        self._ask = pipeline("image-text-to-text", model=name, revision=revision, device=device, dtype=dtype)
        if self._ask.tokenizer.pad_token_id is None:
            self._ask.tokenizer.pad_token_id = self._ask.tokenizer.eos_token_id
        self._ask.tokenizer.padding_side = "left"  # answers continue the right end
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        commit = getattr(self._ask.model.config, "_commit_hash", None)
        self.source = {"name": str(name), "revision": commit or revision}

    def __call__(self, images: list[Image.Image], questions: list[str]) -> list[str]:
        """The model's greedy answers, one per question, about the image at the same place."""
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
            for image, question in zip(images, questions, strict=True)
        ]
        answers = self._ask(
            text=conversations,
            batch_size=self.batch_size,
            return_full_text=False,
            generate_kwargs={"do_sample": False, "max_new_tokens": self.max_new_tokens},
        )
        return [(answer[0] if isinstance(answer, list) else answer)["generated_text"].strip() for answer in answers]
