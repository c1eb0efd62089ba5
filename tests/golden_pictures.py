"""The pictures and stored tensors of the reference cases for data (`tests/golden/data`)."""

import hashlib
import json

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from reca_trainer.images import decode_image
from tests.conftest import golden_folder

# The cases were made with Pillow 13. Older releases resize pictures that are higher than wide otherwise, by up to 38 of 255
# levels (docs/install.md).
RESIZES_AS_RECORDED = int(PIL.__version__.partition(".")[0]) >= 13


class DataGolden:
    """The data cases of one family, the raw pictures and the family's tiny checkpoint (its tokenizer).

    Attributes:
        family: `families.<name>` of `cases.json`; its `cases` by name.
    """

    def __init__(self, name: str):
        self.folder = golden_folder("data")
        info = json.loads((self.folder / "cases.json").read_text())
        self.images, self.family = info["images"], info["families"][name]
        self.cases = self.family["cases"]
        self.checkpoint = self.folder.parent / name / "checkpoint"
        self.tensors = load_file(self.folder / "cases.safetensors")

    def names(self, *tasks: str) -> list[str]:
        """Cases of these tasks."""
        return [name for name, case in self.cases.items() if case["task"] in tasks]

    def upright(self, name: str) -> Image.Image:
        """The picture as the library reads it: turned upright, transparency on white."""
        return decode_image(self.folder / self.images[name]["file"])

    def as_stored(self, name: str) -> Image.Image:
        """The picture as most originals read it: RGB, neither turned nor laid on white.

        Decoders of two Pillow builds may differ in JPEG files; then the case would say nothing about the pipeline.
        """
        with Image.open(self.folder / self.images[name]["file"]) as image:
            rgb = image.convert("RGB")
        stored = hashlib.sha256(np.asarray(rgb).tobytes()).hexdigest()
        assert stored == self.images[name]["sha256_rgb_as_stored"], f"this Pillow decodes {name} differently"
        return rgb

    def reads_alike(self, name: str) -> bool:
        """Whether the library reads the picture as the originals do: no transparency and no rotation."""
        return not self.images[name]["transparency"] and self.images[name]["exif_orientation"] == 1

    def check_pixels(self, pixels: torch.Tensor, expected: dict, tolerance: float = 2e-6) -> None:
        """Compare `[3, H, W]` float32 with a case's record: to the bit where it comes from uint8 (and Pillow resizes as it did
        there), else to a tolerance."""
        assert pixels.dtype == torch.float32 and list(pixels.shape) == [3, *expected["size"][::-1]]
        if "sha256_float32" in expected and "normalisation" in expected:
            digest = hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()
            assert digest == expected["sha256_float32"] or not RESIZES_AS_RECORDED
        if not RESIZES_AS_RECORDED:
            tolerance = 2 * 38 / 255
            for name in {"mean", "std"} & expected.keys():
                recorded = torch.tensor(expected[name])
                torch.testing.assert_close(getattr(pixels, name)((1, 2)), recorded, atol=0.02, rtol=0)
        if "float32" in expected:
            torch.testing.assert_close(pixels, self.tensors[expected["float32"]], atol=tolerance, rtol=0)
        if "pool8" in expected:
            pooled = F.adaptive_avg_pool2d(pixels[None].double(), 8)[0].float()
            torch.testing.assert_close(pooled, self.tensors[expected["pool8"]], atol=tolerance, rtol=0)
        if "grid16" in expected and "normalisation" not in expected:
            height, width = pixels.shape[1:]
            rows = [(2 * i + 1) * height // 32 for i in range(16)]
            columns = [(2 * i + 1) * width // 32 for i in range(16)]
            grid = pixels[:, rows][:, :, columns]
            torch.testing.assert_close(grid, self.tensors[expected["grid16"]], atol=tolerance, rtol=0)


def crop_place(crop: dict, image: Image.Image) -> float:
    """A recorded square crop as the place in [0, 1) that a processor takes."""
    free = max(image.size) - min(image.size)
    assert crop["side"] == min(image.size)
    return (max(crop["x0"], crop["y0"]) + 0.5) / (free + 1)


def messages(turns: list[dict]) -> list[dict]:
    """Turns `{from, value}` as messages `{role, content}`."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
