"""Scores that need no judge and are cheap enough for the training loop: how well images come back from their own
understanding embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from reca_trainer.evaluation.generation import image_seed
from reca_trainer.evaluation.image_scores import ClipSimilarity, image_scores
from reca_trainer.images import decode_image
from reca_trainer.models.contract import UnifiedModel, UnifiedProcessor

INSTRUCTION = "Describe this image in detail."


def evaluate_reconstruction(
    model: UnifiedModel, processor: UnifiedProcessor, images: Sequence[Image.Image], **options
):
    """Mean scores over held-out images, one flat dict to be logged: see `score_reconstructions` for names and options.

    Everything random is drawn from `seed`, so that two steps of a training, or two models, can be compared. Every
    process computes all of it, which is what sharded models need.

    Raises:
        ValueError: there is no image.
    """
    return mean_scores(score_reconstructions(model, processor, images, **options))


def mean_scores(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each score over the rows of `score_reconstructions`."""
    if not rows:
        raise ValueError("Reconstruction needs at least one held-out image.")
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if name != "index"}


def score_reconstructions(
    model: UnifiedModel,
    processor: UnifiedProcessor,
    images: Sequence[Image.Image],
    indices: Iterable[int] | None = None,
    instruction: str = INSTRUCTION,
    draws: int = 4,
    seed: int = 0,
    clip: ClipSimilarity | None = None,
    lpips: torch.nn.Module | None = None,
    **sampling: Any,
) -> list[dict[str, float]]:
    """Scores of single images.

    Args:
        indices: which of `images`; all by default. An image's scores depend on its index and on no other image.
        instruction: what the model is asked for.
        draws: corruptions per image for the loss; with more it depends less on the timesteps that were drawn.
        clip, lpips: optional further scores, see `image_scores.ClipSimilarity` and `image_scores.load_lpips`.
        sampling: passed to `generate_images`: `num_inference_steps`, `guidance_scale`, …

    Returns:
        Per image its `index`, `reconstruction_loss` (fixed corruption), and what `image_scores` says of the reconstruction:
        `psnr` (dB), `ssim`, the colour cast `lab_shift_l`, `lab_shift_a` and `lab_shift_b`, `clip_similarity`, `lpips`.

    Raises:
        ImportError: torchmetrics is not installed.
    """
    rows = []
    for index in tqdm(range(len(images)) if indices is None else indices, desc="reconstruction", unit="image"):
        image = images[index]
        loss = reconstruction_loss(model, processor, image, index, instruction, draws, seed)
        wanted, output = reconstruct(model, processor, image, index, instruction, seed, **sampling)
        scores = image_scores(wanted, output, clip, lpips)
        rows.append({"index": index, "reconstruction_loss": loss, **scores})
    return rows


@torch.no_grad()
def reconstruction_loss(
    model: UnifiedModel,
    processor: UnifiedProcessor,
    image: Image.Image,
    index: int = 0,
    instruction: str = INSTRUCTION,
    draws: int = 4,
    seed: int = 0,
) -> float:
    """The model's own reconstruction loss, with the same corruption every time it is called.

    Noise and timesteps of each draw depend on `seed`, `index` and the draw only: losses of two checkpoints differ by
    what they learned and by nothing else.
    """
    batch = processor(images=[decode_image(image)] * draws, instruction=instruction, task="reconstruct")
    corruption = model.sample_corruption(batch, [_generator(seed, index, draw) for draw in range(draws)])
    training = model.training
    model.eval()
    output = model(corruption=_to(corruption, model.device), **_to(batch, model.device))
    model.train(training)
    return float(output.per_sample_loss.float().mean())


def reconstruct(
    model: UnifiedModel,
    processor: UnifiedProcessor,
    image: Image.Image,
    index: int = 0,
    instruction: str = INSTRUCTION,
    seed: int = 0,
    **sampling: Any,
) -> tuple[Image.Image, Image.Image]:
    """The image as the model was asked for it (resized by its processor), and as it came back, of the same size."""
    image = decode_image(image)
    target = processor(images=[image], instruction=instruction, task="reconstruct")["pixel_values"][0]
    [output] = model.generate_images(
        processor,
        text=[instruction] if instruction else None,
        images=[image],
        task="reconstruct",
        generator=[_generator(seed, index, 0)],
        **sampling,
    )
    array = ((target.float().clamp(-1, 1) * 0.5 + 0.5) * 255).round().to(torch.uint8).permute(1, 2, 0)
    wanted = Image.fromarray(array.cpu().contiguous().numpy())
    if output.size != wanted.size:
        output = output.resize(wanted.size, Image.Resampling.BICUBIC)
    return wanted, output.convert("RGB")


def _generator(seed: int, index: int, draw: int) -> torch.Generator:
    return torch.Generator().manual_seed(image_seed(seed, str(index), draw))


def _to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
