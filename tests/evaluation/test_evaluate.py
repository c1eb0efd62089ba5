import ast
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image

import reca_trainer
from reca_trainer.callbacks import ReconstructionScores
from reca_trainer.cli import main
from reca_trainer.cli.compare import make_parser as comparison_parser
from reca_trainer.cli.evaluate import make_parser
from reca_trainer.evaluation.arguments import EvaluationArguments, parse_sampling
from reca_trainer.evaluation.evaluate import spread
from reca_trainer.evaluation.generation import parse_value
from reca_trainer.evaluation.geneval import TAGS, prompts
from reca_trainer.evaluation.image_scores import image_scores, load_lpips, mean_lab


def test_sampling_options_are_json_where_they_can_be():
    pairs = ["num_inference_steps=50", "guidance_interval=[0.4, 1]", "guidance_renorm=global", "flag=true"]
    assert parse_sampling(pairs) == {
        "num_inference_steps": 50,
        "guidance_interval": [0.4, 1],
        "guidance_renorm": "global",
        "flag": True,
    }


@pytest.mark.parametrize(
    ("value", "meaning"),
    [("[0.0,1.0]", [0.0, 1.0]), ("4.5", 4.5), ("global", "global"), (50, 50), (True, True), ("[0.0", "[0.0")],
)
def test_what_another_tool_hands_on_as_a_string_is_read(value, meaning):
    assert parse_value(value) == meaning and type(parse_value(value)) is type(meaning)


@pytest.mark.parametrize("pair", ["steps", "=5", "num steps=5"])
def test_a_sampling_option_without_a_name_is_refused(pair):
    with pytest.raises(ValueError, match="NAME=VALUE"):
        parse_sampling([pair])


def test_a_limited_run_still_sees_every_category():
    assert [prompt.metadata["tag"] for prompt in spread(prompts(), 6)] == list(TAGS)
    assert spread([1, 2], 5) == [1, 2] and spread([1, 2], None) == [1, 2]


def test_the_command_line_gives_what_python_gives():
    command = "--model a --benchmark reconstruction --dataset d --output_dir out --lpips --sampling height=32 width=32"
    [args] = make_parser().parse_args_into_dataclasses(command.split(), look_for_args_file=False)
    assert args == EvaluationArguments(
        model="a",
        benchmark="reconstruction",
        dataset="d",
        output_dir="out",
        lpips=True,
        sampling={"height": 32, "width": 32},
    )


def test_every_option_is_explained():
    assert all(option.metadata["help"] for option in fields(EvaluationArguments))
    text = make_parser().format_help()
    assert all(f"--{option.name}" in text for option in fields(EvaluationArguments))
    assert "{geneval,dpg,understanding}" in comparison_parser().format_help()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--benchmark geneval", "either --model or --images"),
        ("--benchmark geneval --model a --images b", "either --model or --images"),
        ("--benchmark reconstruction --images b", "needs a --model"),
        ("--benchmark dpg --model a", "needs --prompts"),
        ("--benchmark understanding --model a --dataset b --protocol paper", "about images that were made"),
        ("--benchmark understanding --model a --lpips", "about images that were made"),
        (
            "--benchmark understanding --model a --dataset b --tasks mme",
            "--tasks is for understanding without --dataset",
        ),
        ("--benchmark geneval --model a --tasks mme", "--tasks is for understanding without --dataset"),
        ("--benchmark reconstruction --model a", "reconstruction needs --dataset"),
        ("--benchmark geneval --images a --load_in_4bit", "--load_in_4bit is about making images"),
        ("--benchmark geneval --images a --protocol paper", "--protocol is about making images"),
        ("--benchmark geneval --images a --prompts_file b", "--prompts_file is about making images"),
        ("--benchmark dpg --model a --prompts b --judge c --prompts_file d", "--prompts_file is GenEval's"),
        ("--benchmark geneval --model a --sampling steps", "NAME=VALUE"),
        ("--benchmark geneval --model a --guidance 4", "--guidance"),
    ],
)
def test_a_command_that_cannot_work_says_so_at_once(arguments, message, tmp_path, capsys):
    assert main(["evaluate", *arguments.split(), "--output_dir", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("package", "options", "extra"),
    [
        ("scipy", "--benchmark geneval", "evaluation"),
        ("torchmetrics", "--benchmark reconstruction --dataset b", "evaluation"),
        ("torchmetrics", "--benchmark dpg --prompts b --judge c --lpips", "evaluation"),
        ("torchvision", "--benchmark dpg --prompts b --judge c --lpips", "lpips"),
        ("httpx2", "--benchmark dpg --prompts b --judge c --judge_url http://d", "evaluation"),
        ("lmms_eval", "--benchmark understanding", "lmms"),
    ],
)
def test_a_package_that_is_missing_is_named(package, options, extra, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["evaluate", *options.split(), "--model", "a", "--output_dir", str(tmp_path)]) == 1
    name = options.split()[1]
    line = f"reca-trainer evaluate: {name} needs {package}: pip install 'reca-trainer[{extra}]'.\n"
    assert capsys.readouterr().err == line


def test_packages_of_extras_are_imported_where_they_are_used():
    extras, folder = (
        {"torchmetrics", "torchvision", "scipy", "httpx2", "anyio", "lmms_eval"},
        Path(reca_trainer.__file__).parent,
    )
    importing = {}
    for path in folder.rglob("*.py"):
        for statement in ast.parse(path.read_text()).body:
            names = [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else []
            names += [statement.module or ""] if isinstance(statement, ast.ImportFrom) else []
            if packages := extras & {name.partition(".")[0] for name in names}:
                importing.setdefault(path.name, set()).update(packages)
    assert importing == {"endpoint_judge.py": {"anyio", "httpx2"}, "lmms_eval_model.py": {"lmms_eval"}}


def test_without_torchmetrics_only_its_scores_are_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    image = Image.new("RGB", (16, 16))
    for scores in (lambda: image_scores(image, image), load_lpips, lambda: ReconstructionScores(None)):
        with pytest.raises(ImportError, match=r"need torchmetrics: pip install 'reca-trainer\[evaluation\]'"):
            scores()
    assert mean_lab(image) == pytest.approx([0, 0, 0])
