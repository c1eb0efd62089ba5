"""Images as the patches of Qwen2.5-VL's vision transformer."""

from __future__ import annotations

from typing import Any

import torch


def image_patches(pixel_values: torch.Tensor, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `[B, 3, h, w]` as input of Qwen2.5-VL's vision transformer, which reads each as a video of equal frames.

    Returns:
        Patches `[B · N, 3 · frames · p²]`, in which those of one embedding follow each other, and grids `[B, 3]` (frames,
        rows, columns).
    """
    batch_size, channels, height, width = pixel_values.shape
    patch, merge, frames = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    rows, columns = height // patch, width // patch
    parts = pixel_values.view(
        batch_size, channels, rows // merge, merge, patch, columns // merge, merge, patch
    ).permute(0, 2, 5, 3, 6, 1, 4, 7)  # [B, row, column, row in merge, column in merge, C, p, p]
    patches = parts.reshape(-1, channels, 1, patch, patch).expand(-1, -1, frames, -1, -1).flatten(1)
    return patches, torch.tensor([[1, rows, columns]] * batch_size, device=pixel_values.device)
