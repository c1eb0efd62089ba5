"""Images as rows of tokens."""

from __future__ import annotations

import torch


def patchify(images: torch.Tensor, patch_size: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """`[B, C, H, W]` -> tokens `[B, h · w, p²C]`, row-major, each ordered (row, column, channel); and the grid `(h, w)`."""
    batch_size, channels, height, width = images.shape
    grid = (height // patch_size, width // patch_size)
    if (grid[0] * patch_size, grid[1] * patch_size) != (height, width):
        raise ValueError(f"{height} × {width} is not a multiple of the patch size {patch_size}.")
    tokens = images.reshape(batch_size, channels, grid[0], patch_size, grid[1], patch_size)
    return tokens.permute(0, 2, 4, 3, 5, 1).reshape(batch_size, grid[0] * grid[1], -1), grid


def unpatchify(tokens: torch.Tensor, grid: tuple[int, int], patch_size: int) -> torch.Tensor:
    """Inverse of `patchify`."""
    height, width = grid
    images = tokens.view(len(tokens), height, width, patch_size, patch_size, -1).permute(0, 5, 1, 3, 2, 4)
    return images.reshape(len(tokens), -1, height * patch_size, width * patch_size)
