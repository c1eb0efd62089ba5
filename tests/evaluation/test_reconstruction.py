import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from reca_trainer.cli import evaluate
from reca_trainer.evaluation.reconstruction import (
    evaluate_reconstruction,
    mean_scores,
    reconstruct,
    reconstruction_loss,
    score_reconstructions,
)
from reca_trainer.evaluation.understanding import answer_questions, is_right, understanding_accuracy


def noise(seed, size=(16, 16)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def test_the_loss_is_the_same_every_time_and_for_every_company(painter):
    images = [noise(i) for i in range(4)]
    rows = score_reconstructions(painter.model, painter.processor, images)
    torch.rand(7)  # the global generator does not matter
    assert score_reconstructions(painter.model, painter.processor, images) == rows
    assert score_reconstructions(painter.model, painter.processor, images, indices=[1, 3]) == [rows[1], rows[3]]
    other = score_reconstructions(painter.model, painter.processor, images, seed=1)
    assert all(a["reconstruction_loss"] != b["reconstruction_loss"] for a, b in zip(rows, other, strict=True))


def test_the_loss_is_the_models_own_averaged_over_draws(painter):
    image, noises = noise(0), []
    sample = painter.model.sample_corruption

    def keep(batch, generator):
        noises.append(sample(batch, generator)["noise"])
        return {"noise": noises[-1]}

    painter.model.sample_corruption = keep
    loss = reconstruction_loss(painter.model, painter.processor, image, draws=3)
    pixels = painter.processor(images=[image])["pixel_values"]
    seen = painter.model.see(pixels.mean((2, 3)))[..., None, None]
    expected = ((seen + noises[0] - pixels) ** 2).mean().item()
    assert loss == pytest.approx(expected) and len({tuple(n.flatten().tolist()) for n in noises[0]}) == 3


def test_the_training_mode_survives(painter):
    painter.model.train()
    evaluate_reconstruction(painter.model, painter.processor, [noise(0)], draws=1)
    assert painter.model.training
    assert all(parameter.grad is None for parameter in painter.model.parameters())


def test_the_image_is_compared_as_the_model_was_asked_for_it(painter):
    image = noise(0, (40, 24))
    wanted, output = reconstruct(painter.model, painter.processor, image)
    assert wanted.size == output.size == (16, 16)
    assert wanted.tobytes() == image.resize((16, 16)).tobytes()


def test_no_image_is_an_error(painter):
    with pytest.raises(ValueError, match="at least one"):
        evaluate_reconstruction(painter.model, painter.processor, [])
    with pytest.raises(ValueError, match="at least one"):
        understanding_accuracy(painter.model, painter.processor, [])


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("No, it is not.", "no", True),
        ("nothing", "no", False),
        ("not a cat", "no", False),
        ("A cat.", "cat", True),
        ("a red cat", "cat", False),
        ("The red cat sits", "red cat", True),
        ("A", "A", True),
        ("a) left", "A", True),
        ("B", "A", False),
        ("", "yes", False),
        ("anything", "", False),
    ],
)
def test_what_counts_as_right(prediction, answer, right):
    assert is_right(prediction, answer) is right


def test_understanding_is_the_share_of_right_answers(painter):
    colors = ["red", "green", "blue", "red"]
    questions = [
        {"image": Image.new("RGB", (16, 16), color), "question": "Which colour?", "answer": answer}
        for color, answer in zip(colors, ["red", ["lime", "green"], "blue", "blue"], strict=True)
    ]
    rows = answer_questions(painter.model, painter.processor, questions, batch_size=3)
    assert [row["correct"] for row in rows] == [True, True, True, False]
    assert rows[3]["prediction"] == "Red." and [row["index"] for row in rows] == [0, 1, 2, 3]
    assert understanding_accuracy(painter.model, painter.processor, questions) == 0.75


@pytest.fixture
def image_folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for index in range(3):
        noise(index, (32, 32)).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "question": "What is this?", "answer": "noise"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_reconstruction_as_a_command(bagel_folder, image_folder, clip_folder, tmp_path):
    command = (
        f"--model {bagel_folder} --benchmark reconstruction --dataset {image_folder} --output_dir {tmp_path / 'out'}"
    )
    command += f" --dtype float32 --clip {clip_folder} --sampling num_inference_steps=2"
    evaluate.main(command.split())
    report = json.loads((tmp_path / "out/report.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    shifts = ["lab_shift_l", "lab_shift_a", "lab_shift_b"]
    assert list(report["means"]) == ["reconstruction_loss", "psnr", "ssim", *shifts, "clip_similarity"]
    assert report["images"] == 3 and [row["index"] for row in rows] == [0, 1, 2]
    for name, mean in mean_scores(rows).items():
        assert report["means"][name]["mean"] == pytest.approx(mean)
    assert "| psnr |" in (tmp_path / "out/report.md").read_text()


def test_understanding_as_a_command(bagel_folder, image_folder, tmp_path):
    command = (
        f"--model {bagel_folder} --benchmark understanding --dataset {image_folder} --output_dir {tmp_path / 'out'}"
    )
    evaluate.main([*command.split(), "--dtype", "float32", "--sampling", "max_new_tokens=3"])
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["prompts"] == 3 and 0 <= report["overall"]["score"] <= 1
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert sum(row["correct"] for row in rows) / 3 == pytest.approx(report["overall"]["score"])


def test_two_processes_report_what_one_reports(bagel_folder, image_folder, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = f"--model {bagel_folder} --benchmark reconstruction --dataset {image_folder} --dtype float32"
    command += " --sampling num_inference_steps=2 --output_dir"
    evaluate.main([*command.split(), str(tmp_path / "one")])
    done = subprocess.run(
        [*launch, "-m", "reca_trainer", "evaluate", *command.split(), tmp_path / "two"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr
    for name in ("report.json", "report.md", "results.jsonl"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()
