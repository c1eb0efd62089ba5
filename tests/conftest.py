"""Shared by all tests: where the reference cases are, and a process without network."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)  # two workers share the cores, and equalities to the bit want one order of summation


GOLDEN = Path(__file__).parent / "golden"  # the suite's own reference cases

# By which file a folder of reference cases shows whose they are; the first that is there decides.
MARKS = {
    "bagel": "checkpoint/llm_config.json",
    "openuni": "checkpoint/openuni_config.json",
    "show_o": "checkpoint/magvitv2",
    "lance": "checkpoint/Wan2.2_VAE.pth",
    "harmon": "checkpoint",
    "data": "images",
    "geneval": "cases.json",
}


def golden_subject() -> str | None:
    """Whose cases `RECA_GOLDEN` holds; `None` where it is not set.

    Raises:
        pytest.UsageError: the folder holds no cases of anyone; the suite's own would pass in their place.
    """
    if not os.environ.get("RECA_GOLDEN"):
        return None
    folder = Path(os.environ["RECA_GOLDEN"])
    if (folder / "cases.json").is_file():
        for subject, mark in MARKS.items():
            if (folder / mark).exists():
                return subject
    raise pytest.UsageError(f"RECA_GOLDEN={folder} holds no reference cases: none of {', '.join(MARKS.values())}.")


def golden_folder(subject: str) -> Path:
    """Where the reference cases of a subject are: `RECA_GOLDEN` if that folder holds them, else the suite's own copy."""
    return Path(os.environ["RECA_GOLDEN"]) if subject == golden_subject() else GOLDEN / subject


def pytest_collection_modifyitems(config, items):
    """With `RECA_GOLDEN` set, the reference tests of every other subject are left out, so that counts mean something."""
    subject = golden_subject()
    if subject is None:
        return
    files = {name: f"test_golden_{name}" for name in MARKS}
    other = {item for item in items for name, stem in files.items()
             if name != subject and item.path.stem.startswith(stem)}  # fmt: skip
    config.hook.pytest_deselected(items=list(other))
    items[:] = [item for item in items if item not in other]


class Golden:
    """The reference cases of one family: `cases.json`, `cases.safetensors` and a tiny checkpoint.

    `RECA_GOLDEN=<folder>` points the same tests at another folder of the same format.
    """

    def __init__(self, family: str):
        self.folder = golden_folder(family)
        self.info = json.loads((self.folder / "cases.json").read_text())
        self.checkpoint = self.folder / "checkpoint"
        self._tensors = None

    @property
    def case_names(self) -> list[str]:
        return list(self.info["cases"])

    def case(self, name: str) -> tuple[dict, dict[str, torch.Tensor]]:
        """The JSON of one case and its tensors, without the case's name in front."""
        if self._tensors is None:
            self._tensors = load_file(self.folder / "cases.safetensors")
        prefix = f"{name}."
        tensors = {key[len(prefix) :]: value for key, value in self._tensors.items() if key.startswith(prefix)}
        return self.info["cases"][name], tensors


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
