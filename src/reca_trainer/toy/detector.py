"""What is in an image of the world, found by rules alone.

Each grid cell is compared with every object the world can draw there (shape, size, shift). For one such template with
coverage `m`, background `b` and pixels `x`, the colour that fits best is `f = b + Σ m (x - b) / Σ m²`; the template that
leaves the least squared error wins, and there is an object if it explains most of what differs from the background.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from reca_trainer.toy.world import BACKGROUNDS, COLOURS, SHAPES, SIZES, Object, Scene, World, mask

MIN_CONTRAST = 60.0  # RGB distance of an object's colour from the background
MIN_EXPLAINED = 0.7  # fraction of a cell's squared difference from the background that its object must explain
MAX_COLOUR_ERROR = 80.0  # RGB distance beyond which a colour is none of the world's


class Detector:
    """Reads scenes off images.

    Args:
        world: where the images come from, or should.
        tolerance: shift in pixels, beyond the world's own jitter, at which an object is still found.
    """

    def __init__(self, world: World, tolerance: int = 1):
        self.world = world
        side, reach = world.cell_size, world.jitter + tolerance
        shifts = range(-reach, reach + 1)
        self.templates = [
            (shape, size, (x, y)) for shape in SHAPES for size in SIZES for y in shifts for x in shifts
        ]  # fmt: skip
        masks = [mask(shape, SIZES[size] * side, side, offset) for shape, size, offset in self.templates]
        self.masks = np.stack(masks).reshape(len(masks), -1)  # [templates, pixels of a cell]
        self.colours = np.array(list(COLOURS.values()), dtype=np.float32)
        self.backgrounds = np.array(list(BACKGROUNDS.values()), dtype=np.float32)

    def __call__(self, images: Sequence[Image.Image]) -> list[Scene]:
        """The scene in each image. Images of another size are resized to the world's first."""
        return [self._detect(image) for image in images]

    def _detect(self, image: Image.Image) -> Scene:
        side, grid, resolution = self.world.cell_size, self.world.grid, self.world.resolution
        if image.size != (resolution, resolution):
            image = image.resize((resolution, resolution), Image.Resampling.BICUBIC)
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
        ring = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        background = np.median(ring, axis=0)
        cells = pixels.reshape(grid, side, grid, side, 3).transpose(0, 2, 1, 3, 4).reshape(grid**2, side**2, 3)
        difference = cells - background  # [cells, pixels, 3]
        energy = (difference**2).sum(axis=(1, 2))
        projected = np.einsum("tp,cpk->ctk", self.masks, difference)
        norms = (self.masks**2).sum(axis=1)
        gain = (projected**2).sum(axis=2) / norms  # squared difference that each template explains: [cells, templates]
        objects = []
        for cell in range(grid**2):
            best = int(gain[cell].argmax())
            contrast = projected[cell, best] / norms[best]
            if np.linalg.norm(contrast) < MIN_CONTRAST or gain[cell, best] < MIN_EXPLAINED * energy[cell]:
                continue
            shape, size, offset = self.templates[best]
            colour = _nearest(background + contrast, self.colours, tuple(COLOURS))
            objects.append(Object(shape, colour, size, cell, offset))
        return Scene(tuple(objects), _nearest(background, self.backgrounds, tuple(BACKGROUNDS)))


def _nearest(colour: np.ndarray, palette: np.ndarray, names: tuple[str, ...]) -> str | None:
    distances = np.linalg.norm(palette - colour, axis=1)
    return names[int(distances.argmin())] if distances.min() <= MAX_COLOUR_ERROR else None
