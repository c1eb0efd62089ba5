"""`reca-trainer generate | reconstruct | edit`, `recipes`, `init` and `train`, as a user types them."""

import json

import pytest
import torch
from PIL import Image

import reca_trainer
from reca_trainer import toy
from reca_trainer.cli import main
from reca_trainer.recipes import FOLDER

QUICK = ["--sampling", "num_inference_steps=2", "height=24", "width=24"]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, colour in enumerate([(255, 0, 0), (0, 0, 255)]):
        Image.new("RGB", (32, 32), colour).save(folder / f"{index}.png")
    return folder


def test_pictures_of_prompts_are_those_of_the_library(tmp_path, capsys):
    out = tmp_path / "out"
    prompts = ["a red circle", "a blue square"]
    command = ["generate", "--prompts", *prompts, "--samples", "2", "--seed", "3", "--batch-size", "3"]
    assert main([*command, "--output_dir", str(out), *QUICK]) == 0
    assert "4 pictures" in capsys.readouterr().out
    names = sorted(path.name for path in out.iterdir())
    assert names == ["0000-0.png", "0000-1.png", "0001-0.png", "0001-1.png", "grid.png", "settings.json"]
    model, processor = toy.load()
    [expected] = model.eval().generate_images(
        processor,
        text=[prompts[1]],
        generator=[torch.Generator().manual_seed(4)],
        num_inference_steps=2,
        height=24,
        width=24,
    )
    with Image.open(out / "0001-1.png") as picture:
        difference = torch.tensor(list(picture.tobytes())) - torch.tensor(list(expected.tobytes()))
    assert difference.abs().max() <= 1
    assert json.loads((out / "settings.json").read_text())["texts"] == prompts
    assert main([*command, "--output_dir", str(out), *QUICK]) == 1  # nothing is written over
    assert "is not empty" in capsys.readouterr().err


def test_pictures_are_made_again_and_edited(tmp_path, pictures, capsys):
    (pictures / "settings.json").write_text("{}")  # as `generate` writes
    command = ["reconstruct", "--images", str(pictures), "--output_dir", str(tmp_path / "again"), *QUICK]
    assert main(command) == 0
    assert f"Left out of {pictures}, being no pictures: settings.json\n" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("make it green\n\nmake it white\n")
    command = ["edit", "--images", str(pictures), "--prompts_file", str(tmp_path / "prompts.txt")]
    assert main([*command, "--output_dir", str(tmp_path / "edited"), *QUICK]) == 0
    assert len(list((tmp_path / "again").glob("0*.png"))) == 2
    assert len(list((tmp_path / "edited").glob("0*.png"))) == 4


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generate --prompts_file empty.txt --output_dir out", "has no prompt"),
        ("reconstruct --images nowhere --output_dir out", "There is no picture at nowhere"),
        ("generate --prompts a --samples 0 --output_dir out", "--samples and --batch_size are 1 or more"),
        ("init no_such_recipe", "no recipe of that name"),
        ("train --config no_such_recipe", "no recipe of that name"),
    ],
)
def test_mistakes_are_one_sentence(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    assert main(command.split()) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_recipes_are_listed_and_written_to_edit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(path.stem in listed for path in FOLDER.glob("**/*.yaml"))
    assert main(["init", "bagel-lora"]) == 0 and main(["init", "fsdp2", "launch.yaml"]) == 0
    written = capsys.readouterr().out
    assert "reca-trainer train --config bagel_lora.yaml" in written
    assert "accelerate launch --config_file launch.yaml -m reca_trainer train" in written
    assert (tmp_path / "bagel_lora.yaml").read_text() == (FOLDER / "bagel_lora.yaml").read_text()
    assert (tmp_path / "launch.yaml").read_text() == (FOLDER / "accelerate" / "fsdp2.yaml").read_text()
    assert main(["init", "bagel_lora"]) == 1
    assert "is there already" in capsys.readouterr().err


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"reca-trainer {reca_trainer.__version__}\n"


def test_train_needs_no_clone(tmp_path, monkeypatch, pictures):
    monkeypatch.chdir(tmp_path)
    options = (
        "--max_steps 1 --per_device_train_batch_size 2 --eval_strategy no --eval_on_start false --preview_steps 0"
    )
    command = f"train --dataset_name {pictures} --eval_size 0 --use_cpu true --output_dir out {options}"
    assert main(command.split()) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
