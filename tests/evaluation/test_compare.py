import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from reca_trainer.cli import compare, evaluate
from reca_trainer.evaluation.compare import compare_runs
from reca_trainer.evaluation.image_scores import mean_lab
from reca_trainer.evaluation.report import summarize, summarize_measures
from reca_trainer.models.auto import AutoUnifiedModel


def write_run(folder, scores, prompts=None, **report):
    """The output of `evaluate`: per prompt the scores of its images, drawn as planes whose red says the score."""
    rows = []
    for prompt, values in scores.items():
        for number, value in enumerate(values):
            path = folder / "images" / prompt / "samples" / f"{number:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (300, 200), (int(255 * value), 80, 80)).save(path)
            row = {"id": prompt, "filename": f"images/{prompt}/samples/{number:05}.png", "score": float(value)}
            row |= {"prompt": (prompts or {}).get(prompt, f"prompt {prompt}"), "tag": "counting", "reason": ""}
            rows.append({**row, "categories": {"counting": [float(value), 1]}})
    about = {"benchmark": "geneval", "model": folder.name, "adapter": None, "seed": 0, "sampling": {}, "scorer": {}}
    summary = summarize(rows, "mean of categories")
    about |= {
        "title": "GenEval",
        "overall_is": "mean of categories",
        "notes": ["Not comparable <to papers>."],
        **summary,
    }
    (folder / "report.json").write_text(json.dumps({**about, **report}))
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def runs(tmp_path):
    base = {"right": [1, 1], "lost": [1, 1], "won": [0, 0], "wrong": [0, 0]}
    tuned = {"right": [1, 1], "lost": [0, 0], "won": [1, 1], "wrong": [0, 0]}
    prompts = {"wrong": 'a "photo" of <script>alert(1)</script> & more'}
    return [write_run(tmp_path / "base", base, prompts), write_run(tmp_path / "tuned", tuned, prompts)]


def test_the_page_shows_wrong_ones_first(runs, tmp_path):
    compare_runs(runs, tmp_path / "out")
    page = (tmp_path / "out/compare.html").read_text()
    shown = re.findall(r"<small>counting · (\w+)</small>", page)
    assert shown == ["lost", "wrong", "right", "won"]  # lost what the base could do, never right; then the right ones
    assert page.count("<figure") == 16 and page.count('<figure class="right"') == 8
    assert page.count('data-differ="1"') == 2


def test_the_page_needs_nothing_else_and_trusts_no_prompt(runs, tmp_path):
    compare_runs(runs, tmp_path / "out")
    page = (tmp_path / "out/compare.html").read_text()
    assert set(re.findall(r'(?:src|href)="([^:"]*):', page)) == {"data"}
    assert "http" not in page and "alert(1)</script>" not in page and "&lt;script&gt;alert(1)" in page
    assert page.count("<script>") == 1


def test_the_table_gives_paired_differences(runs, tmp_path):
    text = compare_runs(runs, tmp_path / "out")
    assert (tmp_path / "out/compare.md").read_text() == text
    assert "|  | base | tuned | difference |" in text and "| overall | 50.0 (" in text and "| +0.0 (" in text
    assert "Not comparable &lt;to papers&gt;." in text
    result = json.loads((tmp_path / "out/compare.json").read_text())
    assert result["names"] == ["base", "tuned"]
    [difference] = result["differences"]
    assert (
        difference["overall"]["difference"] == 0 and difference["overall"]["low"] < 0 < difference["overall"]["high"]
    )


def test_the_colour_cast_against_the_base_is_in_the_table(tmp_path):
    runs = [write_run(tmp_path / name, {"p": [1, 1], "q": [0, 1]}) for name in ("base", "yellow")]
    for run, values in zip(runs, ([1, 1, 3, 3], [5, 5, 9, 9]), strict=True):
        rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
        rows = [row | {"measures": {"lab_b": value}} for row, value in zip(rows, values, strict=True)]
        (run / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        report = json.loads((run / "report.json").read_text()) | {"means": summarize_measures(rows)}
        (run / "report.json").write_text(json.dumps(report))
    text = compare_runs(runs, tmp_path / "out")
    assert "| lab_b | 2 (0.04004 to 3.96) | 7 (3.08 to 10.92) | +5 (3.04 to 6.96) |" in text
    assert "<td>lab_b</td>" in (tmp_path / "out/compare.html").read_text()


def test_runs_from_before_colours_were_measured_are_still_compared(runs, tmp_path):
    assert "lab_b" not in compare_runs(runs, tmp_path / "out")


def test_answers_to_own_questions_are_refused(tmp_path):
    run = write_run(tmp_path / "a", {"p": [1]})
    (run / "results.jsonl").write_text('{"index": 0, "question": "?", "correct": true}\n')
    with pytest.raises(ValueError, match="questions of your own"):
        compare_runs([run, run], tmp_path / "out")


@pytest.mark.parametrize("place", ["../secret.png", "/absolute", "images/link.png"])
def test_only_pictures_of_the_run_itself_are_shown(tmp_path, place):
    runs = [write_run(tmp_path / name, {"p": [1, 1]}) for name in ("base", "tuned")]
    secret = tmp_path / "secret.png"
    Image.new("RGB", (300, 200), "green").save(secret)
    (tmp_path / "tuned/images/link.png").symlink_to(secret)
    compare_runs(runs, tmp_path / "out")
    assert (tmp_path / "out/compare.html").read_text().count("<img") == 4

    for run in runs:  # both name the picture by the same place
        rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
        rows[0]["filename"] = str(secret) if place == "/absolute" else place
        (run / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "base/images/link.png").symlink_to(secret)
    compare_runs(runs, tmp_path / "out")
    page = (tmp_path / "out/compare.html").read_text()
    assert page.count("<figure") == 4 and page.count("<img") == 2
    assert page.count("not shown: it lies outside the run's folder") == 2


def test_names_and_notes_cannot_change_the_table(tmp_path):
    runs = [write_run(tmp_path / name, {"p": [1]}, notes=["<script>\n| a | b |"]) for name in ("a|b", "[x](evil)\n`")]
    text = compare_runs(runs, tmp_path / "out")
    assert r"|  | a\|b | \[x\](evil) \` | difference |" in text
    assert text.endswith(r"&lt;script&gt; \| a \| b \|" + "\n")


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 1), ("protocol", "paper"), ("sampling", {"guidance_scale": 2}), ("scorer", {"d": 1})],
)
def test_runs_under_other_conditions_are_not_compared(tmp_path, name, value):
    base, other = write_run(tmp_path / "a", {"p": [1]}), write_run(tmp_path / "b", {"p": [1]}, **{name: value})
    with pytest.raises(ValueError, match=f"b has {name} .*a has "):
        compare_runs([base, other], tmp_path)


def test_a_base_its_adapter_and_a_finished_run(bagel_folder, detector_folder, clip_folder, tmp_path, capsys):
    torch.manual_seed(0)
    model = AutoUnifiedModel.from_pretrained(bagel_folder)
    lora = LoraConfig(target_modules=model.lora_target_modules, init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")

    options = "--benchmark geneval --limit 6 --images_per_prompt 1 --batch_size 2 --dtype float32 --detector"
    options += f" {detector_folder} --color_classifier {clip_folder} --sampling num_inference_steps=2"
    evaluate.main(f"--model {bagel_folder} {options} --output_dir {tmp_path / 'before'}".split())
    models = f"{bagel_folder} {tmp_path / 'adapter'} {tmp_path / 'before'}"
    compare.main(f"{models} {options} --output_dir {tmp_path / 'out'}".split())

    result = json.loads((tmp_path / "out/compare.json").read_text())
    assert len(result["differences"]) == 2 and "overall" in capsys.readouterr().out
    images = [
        [path.read_bytes() for path in sorted((tmp_path / run).glob("images/*/samples/*.png"))]
        for run in result["runs"]
    ]
    assert images[0] == images[2]  # same seeds, same images
    assert all(a != b for a, b in zip(images[0], images[1], strict=True))  # the adapter acts
    report = json.loads((tmp_path / result["runs"][1] / "report.json").read_text())
    assert (report["model"], report["adapter"]) == (bagel_folder, str(tmp_path / "adapter"))
    assert (tmp_path / "out/compare.html").read_text().count("<figure") == 18
    means = [difference["means"] for difference in result["differences"]]
    assert list(means[0]) == ["lab_l", "lab_a", "lab_b"] and means[1]["lab_b"] == {"mean": 0, "margin": 0}
    colors = [mean_lab(Image.open(path)) for path in sorted((tmp_path / "before").glob("images/*/samples/*.png"))]
    measured = json.loads((tmp_path / "before/report.json").read_text())["means"]
    assert [measured[f"lab_{axis}"]["mean"] for axis in "lab"] == pytest.approx(np.mean(colors, axis=0))


def test_a_base_and_its_adapter_are_compared_in_4_bits(bagel_folder, judge_folder, clip_folder, tmp_path):
    model = AutoUnifiedModel.from_pretrained(bagel_folder)
    get_peft_model(model, LoraConfig(target_modules=model.lora_target_modules)).save_pretrained(tmp_path / "adapter")
    (tmp_path / "questions.csv").write_text(
        "item_id,text,proposition_id,dependency,tuple,question_natural_language\na,A plane.,1,0,entity - whole (p),is it red ?\n"
    )
    options = f"--benchmark dpg --prompts {tmp_path / 'questions.csv'} --judge {judge_folder} --dtype float32"
    options += f" --images_per_prompt 2 --clip {clip_folder} --sampling num_inference_steps=2 --output_dir"
    models = [bagel_folder, str(tmp_path / "adapter")]
    compare.main([*models, *options.split(), str(tmp_path / "plain")])
    compare.main([*models, "--load_in_4bit", *options.split(), str(tmp_path / "quantised")])
    results = [json.loads((tmp_path / name / "compare.json").read_text()) for name in ("plain", "quantised")]
    images = [
        [(path / "images/a/samples/00000.png").read_bytes() for path in map(Path, result["runs"])]
        for result in results
    ]
    assert images[0][0] == images[0][1] != images[1][0] == images[1][1]  # the adapter changes nothing, 4 bits do
    report = json.loads((Path(results[1]["runs"][0]) / "report.json").read_text())
    assert report["load_in_4bit"] is True and 0 < report["means"]["clip_diversity"]["mean"] < 2
    command = f"--model {bagel_folder} {options} {results[1]['runs'][0]}"
    with pytest.raises(ValueError, match="load_in_4bit was True, is None"):
        evaluate.main(command.split())  # the folder's images are those of quantised weights


def test_one_model_is_no_comparison(tmp_path):
    with pytest.raises(ValueError, match="at least two models"):
        compare.main(["only", "--benchmark", "geneval", "--output_dir", str(tmp_path)])
