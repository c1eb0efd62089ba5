"""Numbers about pictures that need no judge: how close two are, which cast one has, how much several differ."""

from __future__ import annotations

from itertools import combinations
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel

from reca_trainer.images import decode_image

LAB = ("l", "a", "b")


def image_scores(
    wanted: Image.Image,
    output: Image.Image,
    clip: ClipSimilarity | None = None,
    lpips: torch.nn.Module | None = None,
) -> dict[str, float]:
    """How close `output` is to `wanted`, a picture of the same size.

    Returns:
        `psnr` in dB (infinite for equal pictures) and `ssim`, on RGB values in [0, 1]; `lab_shift_l`, `lab_shift_a` and
        `lab_shift_b`, the colour cast, see `mean_lab`; `clip_similarity` and `lpips` (lower is closer) where given what
        they need.

    Raises:
        ImportError: torchmetrics is not installed.
    """
    metrics, target, pixels = import_torchmetrics(), _to_unit(wanted), _to_unit(output)
    scores = {
        "psnr": float(metrics.peak_signal_noise_ratio(pixels, target, data_range=1.0)),
        "ssim": float(metrics.structural_similarity_index_measure(pixels, target, data_range=1.0)),
    }
    shift = mean_lab(output) - mean_lab(wanted)
    scores |= {f"lab_shift_{axis}": float(value) for axis, value in zip(LAB, shift, strict=True)}
    if clip is not None:
        scores["clip_similarity"] = clip(wanted, output)
    if lpips is not None:
        device = next(lpips.parameters()).device
        scores["lpips"] = float(lpips(pixels.to(device), target.to(device)))
    return scores


def import_torchmetrics() -> ModuleType:
    """`torchmetrics.functional.image`.

    Raises:
        ImportError: torchmetrics is not installed.
    """
    try:
        import torchmetrics.functional.image as metrics
    except ImportError as error:
        raise ImportError("PSNR, SSIM and LPIPS need torchmetrics: pip install 'reca-trainer[evaluation]'.") from error
    return metrics


def _to_unit(image: Image.Image) -> torch.Tensor:
    """`[1, 3, H, W]` float in [0, 1]."""
    image = decode_image(image)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)[None].float() / 255


# Colour

# From linear sRGB to XYZ relative to D65 white (IEC 61966-2-1); the row sums are that white.
_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_SRGB = np.arange(256) / 255
_LINEAR = np.where(_SRGB <= 0.04045, _SRGB / 12.92, ((_SRGB + 0.055) / 1.055) ** 2.4)  # of each of the 256 values


def mean_lab(image: Image.Image) -> np.ndarray:
    """The mean colour of a picture in CIE 1976 L*a*b* (D65): float `[3]`.

    L* is lightness from 0 to 100, a* green (negative) to red, b* blue (negative) to yellow. The difference of two pictures'
    means is the colour cast of one against the other: a picture that turned yellow has a larger b*.
    """
    pixels = np.frombuffer(decode_image(image).tobytes(), dtype=np.uint8).reshape(-1, 3)
    xyz = _LINEAR[pixels] @ (_XYZ / _XYZ.sum(1, keepdims=True)).T  # [H·W, 3], ones for white
    x, y, z = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29).mean(0)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


# Likeness


class ClipSimilarity:
    """The cosine of two pictures' CLIP embeddings, 0 where it is negative: alike in meaning, whatever the pixels.

    Args:
        name: id or folder of a `CLIPModel`.
        revision: commit, branch or tag on the Hub.
    """

    def __init__(self, name: str, revision: str | None = None, device: str | torch.device = "cpu"):
        self.processor = CLIPImageProcessorPil.from_pretrained(name, revision=revision)
        self.model = CLIPModel.from_pretrained(name, revision=revision).to(device).eval()

    @torch.inference_mode()
    def embed(self, images: list[Image.Image]) -> torch.Tensor:
        """`[N, D]`, of length 1."""
        pixels = self.processor(images=[decode_image(image) for image in images], return_tensors="pt")
        features = self.model.get_image_features(pixels["pixel_values"].to(self.model.device)).pooler_output
        return torch.nn.functional.normalize(features.float(), dim=-1)

    def __call__(self, a: Image.Image, b: Image.Image) -> float:
        first, second = self.embed([a, b])
        return max(float(first @ second), 0.0)


def load_lpips(device: str | torch.device = "cpu") -> torch.nn.Module:
    """torchmetrics' LPIPS (Zhang et al., 2018, arXiv 1801.03924) with AlexNet, whose weights torchvision downloads once.

    Raises:
        ImportError: torchmetrics, or torchvision, which it takes the network from, is not installed.
    """
    import_torchmetrics()
    try:
        from torchmetrics.image import LearnedPerceptualImagePatchSimilarity
    except ImportError as error:
        raise ImportError("LPIPS needs torchvision: pip install 'reca-trainer[lpips]'.") from error
    return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device).eval()


def diversity(
    images: list[Image.Image], clip: ClipSimilarity | None = None, lpips: torch.nn.Module | None = None
) -> dict[str, float]:
    """How much the pictures of one prompt differ: the mean distance of all pairs; nothing of fewer than two pictures.

    Args:
        images: of any size; LPIPS compares them at the first one's.

    Returns:
        `lpips_diversity` and `clip_diversity` (1 - cosine), each where given what it needs.
    """
    scores: dict[str, float] = {}
    if len(images) < 2:
        return scores
    if lpips is not None:
        device = next(lpips.parameters()).device
        alike = [decode_image(image).resize(images[0].size, Image.Resampling.BICUBIC) for image in images]
        pixels = torch.cat([_to_unit(image) for image in alike]).to(device)  # [N, 3, H, W]
        with torch.inference_mode():
            pairs = [float(lpips(pixels[[i]], pixels[[j]])) for i, j in combinations(range(len(images)), 2)]
        scores["lpips_diversity"] = sum(pairs) / len(pairs)
    if clip is not None:
        embeddings = clip.embed(images)  # [N, D]
        first, second = torch.triu_indices(len(images), len(images), offset=1)
        scores["clip_diversity"] = float(1 - (embeddings[first] * embeddings[second]).sum(-1).mean())
    return scores
