import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model
from PIL import Image

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")

from lmms_eval.models.registry_v2 import ModelRegistryV2
from lmms_eval.tasks import TaskManager

from reca_trainer import AutoUnifiedModel
from reca_trainer.cli import compare
from reca_trainer.evaluation import understanding
from reca_trainer.evaluation.generation import load_model
from reca_trainer.evaluation.lmms_eval_model import RecALmms, manifest, read_rewritten, side_by_side
from reca_trainer.evaluation.report import mean_and_margin
from reca_trainer.evaluation.understanding import TASKS, answer_questions, score_tasks

DOCS = {"draw": [{}, {}, {}], "look": [{"image": Image.new("RGB", (40, 30), color)} for color in ("red", "blue")]}


def ask(model, task):
    """What lmms-eval asks for each document of a task."""
    model.task_dict = {task: {"test": DOCS[task]}}
    visual = lambda doc: [doc["image"]] if doc else []  # noqa: E731
    options = {"max_new_tokens": 3, "until": ["\n"]}
    documents = range(len(DOCS[task]))
    return model.generate_until(
        [SimpleNamespace(args=("<image>\nmake it red", options, visual, i, task, "test")) for i in documents]
    )


def test_lmms_eval_finds_the_model():
    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("reca_trainer") is RecALmms


@pytest.mark.parametrize("task", ["draw", "look"])
def test_images_are_drawn_and_edited(bagel_folder, tmp_path, task):
    def run(batch_size, folder):
        arguments = f"pretrained={bagel_folder},mode=images,dtype=float32,output_dir={folder},num_inference_steps=2"
        arguments += ",guidance_interval=[0.0,1.0]"
        model = RecALmms.create_from_arg_string(arguments, {"batch_size": batch_size, "device": "cpu"})
        paths = [json.loads(answer)["images"] for answer in ask(model, task)]
        return [Image.open(path).convert("RGB") for [path] in paths]

    images = run(1, tmp_path / "one")
    assert len(images) == len(DOCS[task])
    assert len({image.tobytes() for image in images}) == len(images)  # each has its own seed
    for image, other in zip(images, run(2, tmp_path / "two"), strict=True):
        assert max(abs(a - b) for a, b in zip(image.tobytes(), other.tobytes(), strict=True)) <= 1


def test_questions_are_answered(bagel_folder):
    model = RecALmms(bagel_folder, dtype="float32", batch_size=2)
    answers = ask(model, "look")
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)


def test_a_question_about_several_images_shows_them_side_by_side(bagel_folder):
    model = RecALmms(bagel_folder, dtype="float32")
    shown = []
    model.model.generate_text = lambda processor, text, images, **_: shown.extend(images) or ["yes"]
    model.task_dict = {"two": {"test": [None]}}
    images = [Image.new("RGB", (20, 10), "red"), Image.new("RGB", (10, 20), "blue")]
    model.generate_until([SimpleNamespace(args=("compare", {}, lambda doc: images, 0, "two", "test"))])
    [row] = shown
    assert row.size == (50, 20) and row.getpixel((39, 19)) == (255, 0, 0) and row.getpixel((40, 0)) == (0, 0, 255)
    assert side_by_side(images[:1]) is images[0]


def test_what_it_cannot_do_is_said(bagel_folder, tmp_path):
    with pytest.raises(ValueError, match="'images' or 'text'"):
        RecALmms(bagel_folder, mode="video")
    with pytest.raises(ValueError, match="load_in_4bit is '4'"):
        RecALmms(bagel_folder, load_in_4bit="4")
    with pytest.raises(ValueError, match="prompts_file is about making images"):
        RecALmms(bagel_folder, prompts_file=str(tmp_path))
    model = RecALmms(bagel_folder, dtype="float32", mode="images")
    model.task_dict = {"two": {"test": [None]}}
    request = SimpleNamespace(args=("compare", {}, lambda doc: [Image.new("RGB", (8, 8))] * 2, 0, "two", "test"))
    with pytest.raises(ValueError, match="two, request 0: it shows 2 images"):
        model.generate_until([request])


def test_the_model_is_quantised_if_asked_to(bagel_folder):
    arguments = f"pretrained={bagel_folder},dtype=float32,load_in_4bit=True"
    model = RecALmms.create_from_arg_string(arguments, {"batch_size": 2})
    assert model.model.is_loaded_in_4bit and len(ask(model, "look")) == 2


def test_rewritten_prompts_are_drawn(bagel_folder, tmp_path):
    (tmp_path / "rewritten.json").write_text(json.dumps([{"prompt_id": 7, "Prompt": "Mooncakes.", "Category": "x"}]))
    options = {"dtype": "float32", "mode": "images", "num_inference_steps": 2}

    def draw(text, name, **more):
        model = RecALmms(bagel_folder, output_dir=str(tmp_path / name), **options, **more)
        model.task_dict = {"WISE": {"test": [{"prompt_id": 7, "Prompt": "Food"}]}}
        [answer] = model.generate_until([SimpleNamespace(args=(text, {}, lambda doc: [], 0, "WISE", "test"))])
        [path] = json.loads(answer)["images"]
        return Path(path).read_bytes()

    plain, rewritten = draw("Food", "a"), draw("Food", "b", prompts_file=str(tmp_path / "rewritten.json"))
    assert plain != rewritten == draw("Mooncakes.", "c")
    model = RecALmms(bagel_folder, prompts_file=str(tmp_path / "rewritten.json"), **options)
    model.task_dict = {"WISE": {"test": [{"prompt_id": 8}]}}
    with pytest.raises(ValueError, match=r"no prompt for WISE, request 0 \(prompt_id 8"):
        model.generate_until([SimpleNamespace(args=("", {}, lambda doc: [], 0, "WISE", "test"))])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON"),
        ("[" * 10_000, "no JSON"),
        ("[]", "must be a JSON list"),
        ('{"prompt_id": 1}', "must be a JSON list"),
        ("[1]", "entry 0, needs"),
        ('[{"prompt_id": "1", "Prompt": "a"}]', "entry 0, needs"),
        ('[{"prompt_id": true, "Prompt": "a"}]', "entry 0, needs"),
        ('[{"prompt_id": 1, "Prompt": "a"}, {"prompt_id": 2}]', "entry 1, needs"),
        ('[{"prompt_id": 1, "Prompt": "a"}, {"prompt_id": 1, "Prompt": "b"}]', "prompt_id 1 is already there"),
    ],
)
def test_a_broken_file_of_rewritten_prompts_is_refused(tmp_path, content, message):
    (tmp_path / "broken.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rewritten(tmp_path / "broken.json")


@pytest.fixture
def own_tasks(tmp_path):
    """A folder of lmms-eval tasks: `colors` asks for the colour of four pictures, each of them red by its answers."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = []
    for number, color in enumerate(("red", "green", "blue", "red")):
        Image.new("RGB", (32, 32), color).save(folder / f"{number}.png")
        rows.append({"image": str(folder / f"{number}.png"), "question": "Which colour?", "answer": "red"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "utils.py").write_text(
        "from PIL import Image\n"
        "def visual(doc):\n    return [Image.open(doc['image'])]\n"
        "def text(doc, kwargs=None):\n    return doc['question']\n"
        "def score(doc, results):\n    return {'right': float(bool(results[0])), 'length': float(len(results[0]))}\n"
    )
    for task in ("colors", "pope"):
        (folder / f"{task}.yaml").write_text(
            f"task: {task}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'rows.jsonl'}\n"
            "test_split: test\noutput_type: generate_until\ndoc_to_visual: !function utils.visual\n"
            "doc_to_text: !function utils.text\ndoc_to_target: answer\ngeneration_kwargs:\n  max_new_tokens: 3\n"
            "process_results: !function utils.score\nmetric_list:\n"
            "  - metric: right\n    aggregation: mean\n    higher_is_better: true\n"
            "  - metric: length\n    aggregation: mean\n    higher_is_better: true\n"
        )
    return folder


def test_a_task_gives_its_means_with_margins(bagel_folder, own_tasks):
    means, version = score_tasks(bagel_folder, ["colors"], include_path=own_tasks, dtype="float32", batch_size=2)
    assert means.keys() == {"colors right", "colors length"} and version
    answers = answer_questions(
        *load_model(bagel_folder, None, "float32"),
        [{"image": own_tasks / f"{n}.png", "question": "Which colour?", "answer": ""} for n in range(4)],
        max_new_tokens=3,
    )
    lengths = [float(len(row["prediction"])) for row in answers]
    assert means["colors length"] == pytest.approx(mean_and_margin(lengths))
    limited, _ = score_tasks(bagel_folder, ["colors"], 2, include_path=own_tasks, dtype="float32")
    assert limited["colors length"]["mean"] == sum(lengths[:2]) / 2
    with pytest.raises(ValueError, match="no task 'colours'"):
        score_tasks(bagel_folder, ["colours"], include_path=own_tasks)


def test_a_base_and_its_adapter_are_compared(bagel_folder, own_tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(understanding, "score_tasks", partial(score_tasks, include_path=own_tasks))
    model = AutoUnifiedModel.from_pretrained(bagel_folder)
    lora = LoraConfig(target_modules=r".*layers\.\d+\.self_attn\.v_proj", init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    command = f"{bagel_folder} {tmp_path / 'adapter'} --benchmark understanding --tasks colors --dtype float32"
    compare.main([*command.split(), "--output_dir", str(tmp_path / "out"), "--sampling", "max_new_tokens=3"])
    text = capsys.readouterr().out
    assert "|  | bagel0 | adapter | difference |" in text and "| colors length | " in text
    result = json.loads((tmp_path / "out/compare.json").read_text())
    reports = [json.loads((Path(run) / "report.json").read_text()) for run in result["runs"]]
    for name, difference in result["differences"][0]["means"].items():
        before, after = (report["means"][name] for report in reports)
        assert difference["mean"] == after["mean"] - before["mean"]
        assert difference["margin"] == pytest.approx((before["margin"] ** 2 + after["margin"] ** 2) ** 0.5)
    assert not (tmp_path / "out/compare.html").exists()  # there are no images to show


@pytest.mark.slow
def test_two_processes_report_what_one_reports(bagel_folder, own_tasks, tmp_path):
    """lmms-eval deals the questions out, and the one that is left over is asked twice."""
    with open(own_tasks / "rows.jsonl", "a") as file:
        file.write((own_tasks / "rows.jsonl").read_text().splitlines()[1] + "\n")
    (tmp_path / "score.py").write_text(
        "import json, sys\nfrom reca_trainer.evaluation.understanding import score_tasks\n"
        f"means, _ = score_tasks({bagel_folder!r}, ['colors'], include_path={str(own_tasks)!r}, dtype='float32')\n"
        "if means:\n    open(sys.argv[1], 'w').write(json.dumps(means))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    for processes in ("1", "2"):
        command = [*launch, processes, tmp_path / "score.py", tmp_path / processes]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "1").read_text() == (tmp_path / "2").read_text()


def test_the_papers_table_is_known_to_lmms_eval():
    manager = TaskManager("WARNING")
    for task, metric in TASKS.items():
        assert f"metric: {metric}\n" in Path(manager.task_index[task]["yaml_path"]).read_text()
