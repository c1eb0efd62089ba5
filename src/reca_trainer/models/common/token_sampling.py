"""The draws of text tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reca_trainer.models.contract import Generators


def draw_tokens(logits: torch.Tensor, temperature: float, generator: Generators = None) -> torch.Tensor:
    """The next tokens `[B]` int64 of `logits` `[B, V]`.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        generator: on the CPU, where tokens are drawn: one generator, or one per row.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1).cpu()
    if isinstance(generator, list):
        draws = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generator, strict=True)]
        return torch.cat(draws).to(logits.device)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)


@contextmanager
def seeded(generator: Generators, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's global generators, from which transformers' `generate` draws, with a draw of `generator`, and restore
    them afterwards. Without a generator nothing changes.

    Raises:
        ValueError: a list of generators.
    """
    if isinstance(generator, list):
        raise ValueError("This model draws all its answers together: pass one generator.")
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=generator is not None):
        if generator is not None:
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield


def generate_answers(
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: dict[str, Any],
    generator: Generators,
    temperature: float,
    prompt_length: int = 0,
    **sampling: Any,
) -> list[str]:
    """The answers of transformers' `generate`, greedy at `temperature` 0, without special tokens and outer white space.

    Args:
        generator: one, which seeds the draws of all answers.
        prompt_length: ids of the prompt that `generate` returns in front of an answer: none if the prompt is embeddings.
        sampling: further arguments of `generate`, such as `do_sample` and `top_p`, which override `temperature`.

    Raises:
        ValueError: a list of generators.
    """
    drawing = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with seeded(generator, language_model.device):
        tokens = language_model.generate(**inputs, **{**drawing, **sampling})
    answers = tokenizer.batch_decode(tokens[:, prompt_length:], skip_special_tokens=True)
    return [answer.strip() for answer in answers]
