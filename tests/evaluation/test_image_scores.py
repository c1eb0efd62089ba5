"""Scores of pictures against known values: likeness, colour cast, diversity."""

import math
from importlib.util import find_spec
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel

from reca_trainer.evaluation.image_scores import ClipSimilarity, diversity, image_scores, load_lpips, mean_lab


def noise(seed, size=(16, 16)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def test_scores_of_known_images():
    black, grey = Image.new("RGB", (16, 16)), Image.new("RGB", (16, 16), (51, 51, 51))
    scores = image_scores(black, grey)
    assert scores["psnr"] == pytest.approx(-10 * math.log10(0.2**2), abs=1e-4)
    c1 = 0.01**2
    assert scores["ssim"] == pytest.approx(c1 / (0.2**2 + c1), abs=1e-5)  # flat images: the luminance term alone
    same = image_scores(noise(0), noise(0))
    assert same["psnr"] == math.inf and same["ssim"] == pytest.approx(1)


def test_similarity_of_an_image_with_itself_is_one(clip_folder):
    clip = ClipSimilarity(clip_folder)
    assert clip(noise(0), noise(0)) == pytest.approx(1, abs=1e-5)
    other = Image.new("RGB", (40, 20), "red")
    inputs = clip.processor(images=[noise(0), other], return_tensors="pt")
    a, b = CLIPModel.from_pretrained(clip_folder).eval().get_image_features(**inputs).pooler_output
    cosine = torch.cosine_similarity(a, b, dim=0).item()
    assert clip(noise(0), other) == pytest.approx(cosine, abs=1e-5) and cosine < 1
    assert image_scores(noise(0), noise(0), clip)["clip_similarity"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("color", "lab"),
    [
        ("white", (100, 0, 0)),
        ("black", (0, 0, 0)),
        ((119, 119, 119), (50.034, 0, 0)),
        ("red", (53.241, 80.092, 67.203)),
        ("lime", (87.735, -86.183, 83.179)),
        ("blue", (32.297, 79.188, -107.860)),
        ("yellow", (97.139, -21.554, 94.478)),
        ((2, 2, 2), (0.5483, 0, 0)),  # where both curves are straight: 24389 / 27 · 2 / 255 / 12.92
    ],
)
def test_colors_have_their_published_lab_values(color, lab):
    assert mean_lab(Image.new("RGB", (5, 3), color)) == pytest.approx(lab, abs=2e-3)


def test_the_mean_colour_is_the_mean_of_lab_not_of_rgb():
    image = Image.new("RGB", (4, 2), "white")
    image.paste("blue", (0, 0, 1, 2))
    expected = 0.75 * mean_lab(Image.new("RGB", (1, 1), "white")) + 0.25 * mean_lab(Image.new("RGB", (1, 1), "blue"))
    assert mean_lab(image) == pytest.approx(expected)


def test_a_yellow_cast_is_a_shift_of_b():
    image = noise(0, (40, 30))
    yellow = Image.fromarray((np.asarray(image) * [1.0, 1.0, 0.8]).astype(np.uint8))
    scores = image_scores(image, yellow)
    assert scores["lab_shift_b"] > 5 > abs(scores["lab_shift_l"])
    back = image_scores(yellow, image)
    assert [back[f"lab_shift_{axis}"] for axis in "lab"] == [-scores[f"lab_shift_{axis}"] for axis in "lab"]
    same = image_scores(image, image)
    assert [same[f"lab_shift_{axis}"] for axis in "lab"] == [0, 0, 0]


class Difference(torch.nn.Module):
    """Stands for LPIPS, whose weights are a download: the mean absolute difference."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, a, b):
        return self.scale * (a - b).abs().mean()


def test_diversity_is_the_mean_distance_of_all_pairs(clip_folder):
    images, clip = [noise(seed, (24, 24)) for seed in range(4)], ClipSimilarity(clip_folder)
    scores = diversity(images, clip, Difference())
    arrays = [np.asarray(image) / 255 for image in images]
    assert scores["lpips_diversity"] == pytest.approx(np.mean([abs(a - b).mean() for a, b in combinations(arrays, 2)]))
    embeddings = clip.embed(images)
    cosines = [float(a @ b) for a, b in combinations(embeddings, 2)]
    assert scores["clip_diversity"] == pytest.approx(1 - np.mean(cosines), abs=1e-6)
    same = diversity([images[0]] * 3, clip, Difference())
    assert same["lpips_diversity"] == 0 and same["clip_diversity"] == pytest.approx(0, abs=1e-6)
    assert diversity(images[:1], clip, Difference()) == {} == diversity(images)


def test_pictures_of_other_sizes_are_compared_at_the_first_ones():
    assert diversity([noise(0), noise(1, (8, 24))], lpips=Difference())["lpips_diversity"] > 0


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_lpips_says_what_it_needs():
    with pytest.raises(ImportError, match=r"pip install 'reca-trainer\[lpips\]'"):
        load_lpips()


def test_lpips_is_torchmetrics_own(tmp_path, monkeypatch):
    """With AlexNet's weights where torchvision puts them; random ones, for the real ones are a download."""
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    weights = torchvision.models.AlexNet_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]
    torch.save(torchvision.models.AlexNet().state_dict(), tmp_path / "hub/checkpoints" / weights)
    lpips, images = load_lpips(), [noise(seed, (64, 64)) for seed in range(3)]
    assert diversity(images, lpips=lpips)["lpips_diversity"] > 0
    assert diversity(images[:1] * 2, lpips=lpips)["lpips_diversity"] == pytest.approx(0, abs=1e-6)
    assert image_scores(images[0], images[1], lpips=lpips)["lpips"] > 0
