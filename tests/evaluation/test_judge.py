import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from transformers.utils.import_utils import is_serve_available

from reca_trainer.cli import compare, evaluate
from reca_trainer.evaluation.endpoint_judge import EndpointJudge
from reca_trainer.evaluation.judge import LocalJudge

IMAGES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (30, 20, 3), dtype=np.uint8)) for i in range(5)
] + [Image.new("RGB", (20, 30), color) for color in ("red", "blue")]
QUESTIONS = ["is it red ?", "is it yes or no .", "is it red ?", "red", "is it red ?", "is it red ?", "is it red ?"]


def test_answers_do_not_depend_on_the_batch(judge_folder):
    answers = LocalJudge(judge_folder)(IMAGES, QUESTIONS)
    assert len(answers) == 7 and len(set(answers)) > 2
    assert LocalJudge(judge_folder, batch_size=4)(IMAGES, QUESTIONS) == answers


def test_the_judge_says_what_it_is(judge_folder):
    assert LocalJudge(judge_folder).source == {"name": judge_folder, "revision": None}


def test_dpg_from_the_model_to_the_comparison(bagel_folder, judge_folder, tmp_path):
    (tmp_path / "questions.csv").write_text(
        "item_id,text,proposition_id,dependency,tuple,question_natural_language\n"
        "a,A red plane.,1,0,entity - whole (plane),is it red ?\nb,A blue plane.,1,0,entity - whole (plane),is it no ?\n"
    )
    command = f"--benchmark dpg --prompts {tmp_path / 'questions.csv'} --judge {judge_folder} --batch_size 3"
    command += f" --dtype float32 --sampling num_inference_steps=2 --grids {tmp_path / 'grids'} --output_dir"
    evaluate.main(["--model", bagel_folder, *command.split(), str(tmp_path / "one")])
    rows = [json.loads(line) for line in (tmp_path / "one/results.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["a"] * 4 + ["b"] * 4
    assert Image.open(tmp_path / "grids/b.png").size == (64, 64)

    compare.main([str(tmp_path / "one"), bagel_folder, *command.split(), str(tmp_path / "both")])
    [difference] = json.loads((tmp_path / "both/compare.json").read_text())["differences"]
    assert difference["overall"]["difference"] == 0
    assert set(difference["categories"]) == {"entity", "entity - whole"}

    evaluate.main(["--images", str(tmp_path / "grids"), *command.split()[:-3], "--output_dir", str(tmp_path / "cut")])
    again = [json.loads(line) for line in (tmp_path / "cut/results.jsonl").read_text().splitlines()]
    assert [(row["id"], row["answers"]) for row in again] == [(row["id"], row["answers"]) for row in rows]


@pytest.fixture
def served(judge_folder):
    """The address of `transformers serve` with the judge's model."""
    if not is_serve_available():
        pytest.skip("transformers serve is not installed: pip install 'transformers[serving]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", judge_folder]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)], stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        output = []
        for line in server.stderr:
            output.append(line)
            if "running on" in line:
                break
        else:
            pytest.fail("".join(output))
        yield f"http://127.0.0.1:{port}/v1"
        server.terminate()
        server.communicate()


def test_an_endpoint_answers_as_the_model_here(judge_folder, served, tmp_path):
    here = LocalJudge(judge_folder, max_new_tokens=4)(IMAGES, QUESTIONS)
    assert EndpointJudge(served, judge_folder, max_tokens=4)(IMAGES, QUESTIONS) == here

    (tmp_path / "questions.csv").write_text(
        "item_id,text,proposition_id,dependency,tuple,question_natural_language\n"
        "a,A plane.,1,0,entity - whole (plane),is it red ?\na,A plane.,2,1,other - count (plane),is it yes or no .\n"
    )
    (tmp_path / "images/a/samples").mkdir(parents=True)
    for number, image in enumerate(IMAGES[:4]):
        image.save(tmp_path / f"images/a/samples/{number:05}.png")
    reports = []
    for place in ([], ["--judge_url", served]):
        command = f"--images {tmp_path / 'images'} --benchmark dpg --prompts {tmp_path / 'questions.csv'}"
        command += f" --judge {judge_folder} --output_dir {tmp_path / 'out'}"
        evaluate.main([*command.split(), "--judge_instruction", "", *place])
        reports.append(json.loads((tmp_path / "out/report.json").read_text()))
    assert reports[0]["overall"] == reports[1]["overall"] and reports[0]["categories"] == reports[1]["categories"]
    assert reports[0]["notes"][1:] == reports[1]["notes"][1:]  # how many answers were neither yes nor no
