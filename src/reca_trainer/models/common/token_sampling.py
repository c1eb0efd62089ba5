"""The draws of text tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from reca_trainer.models.contract import Generators


def draw_tokens(logits: torch.Tensor, temperature: float, generator: Generators = None) -> torch.Tensor:
    """The next tokens `[B]` int64 of `logits` `[B, V]`.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        generator: on the CPU, where tokens are drawn; one, or one per row.
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
    """Code that draws from PyTorch's global generators, such as transformers' `generate`, draws as `generator` says, and
    leaves them as they were. Without one nothing changes.

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
