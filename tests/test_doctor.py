"""`reca-trainer doctor`: the same report twice, in every family, and nothing in it that others should not see."""

import hashlib
import re

import pytest
import torch

from reca_trainer import doctor
from reca_trainer.cli.doctor import main
from reca_trainer.models.weights import CheckpointError
from reca_trainer.toy import CHECKPOINT
from tests.conftest import GOLDEN

FOLDERS = {
    "harmon": GOLDEN / "harmon" / "checkpoint",
    "openuni": GOLDEN / "openuni" / "checkpoint",
    "show_o": GOLDEN / "show_o" / "checkpoint" / "show-o-w-clip-vit",
}


def test_the_report_holds_neither_tokens_nor_names_nor_paths(capsys, monkeypatch, tmp_path):
    for name, value in {"HF_TOKEN": "hf_" + "a" * 34, "USER": "somebody", "HOME": str(tmp_path / "somebody")}.items():
        monkeypatch.setenv(name, value)
    main(["--model", str(CHECKPOINT), "--load_in_4bit", "--lora_r", "4"])
    printed = capsys.readouterr().out
    assert "logged in" in printed
    for secret in ("hf_", "somebody", str(tmp_path), str(CHECKPOINT.parent)):
        assert secret not in printed
    for heading in ("## machine", f"## files of {CHECKPOINT.name}", "## what it does"):
        assert heading in printed
    file = CHECKPOINT / "config.json"
    assert hashlib.sha256(file.read_bytes()).hexdigest() in printed
    full, packed = (float(value) for value in re.findall(r"reconstruction loss +([\d.]+)", printed))
    assert full != packed and abs(full - packed) < 0.2 * full
    step = re.search(r"a step of LoRA +rank 4: loss ([\d.]+), norm of its gradient ([\d.]+)", printed)
    assert float(step[1]) == full and float(step[2]) > 0  # an adapter starts from nothing
    assert re.search(r"memory +[\d.]+ GB at most, planned [\d.]+ GB", printed)


def test_layers_that_stay_unquantised_give_the_unquantised_loss():
    options = {"num_inference_steps": 2, "lora_r": 2, "quantize": True, "skipped": [".*"]}
    report = doctor.examine_model(CHECKPOINT, torch.float32, **options)
    full, packed = (value for name, value in report if name == "reconstruction loss")
    assert packed == f"{full.split(',')[0]} in NF4, with the same noise"


def test_two_reports_of_one_model_are_the_same():
    reports = [
        {
            name: value
            for name, value in doctor.examine_model(CHECKPOINT, torch.float32, num_inference_steps=2)
            if name in ("batch", "reconstruction loss", "a step of LoRA")
        }
        for _ in range(2)
    ]
    assert reports[0] == reports[1] and len(reports[0]) == 3


@pytest.mark.parametrize("family", FOLDERS)
def test_every_family_is_examined(family):
    report = dict(doctor.examine_model(FOLDERS[family], torch.float32, num_inference_steps=2, lora_r=2))
    assert set(report) == {
        "loading",
        "batch",
        "reconstruction loss",
        "reconstruct",
        "generate",
        "a step of LoRA",
        "memory",
    }


def test_a_damaged_model_is_an_error_and_no_report(tmp_path):
    for path in CHECKPOINT.iterdir():
        (tmp_path / path.name).symlink_to(path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        dict(doctor.examine_files(tmp_path))
