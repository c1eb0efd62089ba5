"""The console script, as a user types it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file

from reca_trainer import AutoUnifiedModel
from reca_trainer.adapters import attach
from reca_trainer.cli import main

CHECKPOINT = Path(__file__).parent / "golden" / "bagel" / "checkpoint"


def test_help_imports_nothing_heavy():
    code = "import sys; from reca_trainer.cli import main\ntry: main(['--help'])\nfinally: print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()"
    for command in ("merge", "export", "push", "info", "evaluate", "compare"):
        assert f"    {command} " in done.stdout


def test_merge_export_and_info(tmp_path, capsys):
    model = attach(
        AutoUnifiedModel.from_pretrained(CHECKPOINT),
        LoraConfig(r=2, init_lora_weights=False, modules_to_save=["llm2vae"]),
    )
    model.save_pretrained(tmp_path / "adapter")
    merged = ["merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--dtype", "bfloat16"]
    assert main(merged) == 0
    assert main(["export", str(tmp_path / "merged"), str(tmp_path / "published")]) == 0
    assert main(["export", str(tmp_path / "merged"), str(tmp_path / "nf4"), "--quantize", "nf4"]) == 0
    weights = load_file(tmp_path / "published" / "ema.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}

    descriptions = {}
    for name in ("adapter", "merged", "published", "nf4"):
        capsys.readouterr()
        assert main(["info", str(tmp_path / name)]) == 0
        descriptions[name] = capsys.readouterr().out
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for part in (
        "LORA adapter",
        str(CHECKPOINT),
        "14: mlp_moe_gen.down_proj, mlp_moe_gen.gate_proj",
        "llm2vae",
        f"{trained:,}",
        "2, 8",
    ):
        assert part in descriptions["adapter"], part
    total = sum(p.numel() for p in model.get_base_model().parameters()) - sum(
        p.numel() for name, p in model.named_parameters() if "lora_" in name or "modules_to_save" in name
    )
    for name, layout in (("merged", "transformers"), ("published", "published"), ("nf4", "transformers")):
        assert "bagel" in descriptions[name] and layout in descriptions[name] and f"{total:,}" in descriptions[name]
    assert "4 bits" in descriptions["nf4"]


@pytest.mark.parametrize(
    "command",
    [
        "info typo",
        "merge typo out",
        "export typo out",
        "push typo owner/name",
        "plan --model typo --gpu 24GB",
        "generate --model typo --prompts a --output_dir out",
        "evaluate --model typo --benchmark reconstruction --dataset . --output_dir out",
        "train --model_name_or_path typo --dataset_name . --output_dir out --use_cpu",
    ],
)
def test_a_mistyped_folder_is_called_one(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("picture.png")
    assert main(command.split()) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.match(rf"reca-trainer {command.split()[0]}: .*typo", message)
    assert "neither a folder on this machine" in message or "There is no folder" in message


def test_mistakes_are_one_line_and_a_status(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "other"}))
    assert main(["info", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("reca-trainer info: ") and "no checkpoint of a known family" in error
    scores = ["--benchmark", "geneval", "--output_dir", str(tmp_path / "scores")]
    assert main(["evaluate", "--images", str(tmp_path / "nowhere"), *scores]) == 1
    assert capsys.readouterr().err.startswith(f"reca-trainer evaluate: {tmp_path / 'nowhere'} holds no <prompt>/")
    with pytest.raises(SystemExit):
        main(["melt"])
