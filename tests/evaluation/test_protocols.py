"""How the authors sampled, and that `--protocol paper` samples so."""

import inspect
import json

import pytest
from PIL import Image

from reca_trainer.cli import evaluate, main
from reca_trainer.evaluation.geneval import prompts
from reca_trainer.evaluation.protocols import PAPER, Protocol, find_protocol
from reca_trainer.models.registry import family
from tests.conftest import GOLDEN


@pytest.mark.parametrize(("benchmark", "name"), [(key, name) for key, entries in PAPER.items() for name in entries])
def test_the_family_takes_every_value(benchmark, name):
    options = inspect.signature(family(name).Model._generate_images).parameters
    assert set(PAPER[benchmark][name].sampling) <= set(options)


@pytest.mark.parametrize(
    ("benchmark", "expected"),
    [
        ("geneval", {"guidance_scale": 4.0, "guidance_interval": [0.0, 1.0], "guidance_renorm": "global"}),
        ("dpg", {"guidance_scale": 3.0, "guidance_interval": [0.0, 1.0], "guidance_renorm": "global"}),
        ("WISE", {"guidance_scale": 4.0, "guidance_interval": [0.4, 1.0], "guidance_renorm": "global"}),
        ("imgedit", {"image_guidance_scale": 1.5, "guidance_interval": [0.0, 1.0], "guidance_renorm": "text_channel"}),
        ("gedit_bench_en", {"guidance_scale": 4.0, "image_guidance_scale": 1.5, "guidance_interval": [0.4, 1.0]}),
    ],
)
def test_bagel_is_sampled_as_its_scripts_say(benchmark, expected):
    sampling = find_protocol("paper", benchmark, "bagel").sampling
    assert {name: sampling[name] for name in expected} == expected
    assert (sampling["num_inference_steps"], sampling["timestep_shift"]) == (49, 3.0)


def test_only_bagels_dpg_prefixes_the_prompts():
    prefixes = {(key, name): entry.prompt_prefix for key, entries in PAPER.items() for name, entry in entries.items()}
    assert {place: prefix for place, prefix in prefixes.items() if prefix} == {("dpg", "bagel"): "Generate an image: "}


def test_a_family_that_was_not_scored_is_refused():
    assert find_protocol("default", "geneval", "other") == Protocol()
    with pytest.raises(ValueError, match=r"no protocol for janus on geneval .but for bagel, harmon, openuni, show_o"):
        find_protocol("paper", "geneval", "janus")
    with pytest.raises(ValueError, match="no protocol for bagel on mme"):
        find_protocol("paper", "mme", "bagel")
    with pytest.raises(ValueError, match="'default' or 'paper'"):
        find_protocol("best", "geneval", "bagel")


def test_the_protocol_is_used_and_reported(bagel_folder, detector_folder, clip_folder, tmp_path):
    """A rewritten prompt, the paper's twelve images, and values that win over the paper's."""
    described = {**prompts()[0].metadata, "prompt": "A realistic bench of dark oak."}
    (tmp_path / "long.jsonl").write_text(json.dumps(described) + "\n")
    command = f"--model {bagel_folder} --benchmark geneval --prompts_file {tmp_path / 'long.jsonl'} --dtype float32"
    command += f" --detector {detector_folder} --color_classifier {clip_folder} --batch_size 12 --sampling"
    command += " num_inference_steps=2 height=32 width=32"
    evaluate.main([*command.split(), "--protocol", "paper", "--output_dir", str(tmp_path / "paper")])
    report = json.loads((tmp_path / "paper/report.json").read_text())
    values = {"num_inference_steps": 2, "height": 32, "width": 32}
    assert (report["protocol"], report["sampling"], report["images"]) == ("paper", values, 12)
    protocol = find_protocol("paper", "geneval", "bagel")
    assert report["generation"] == {
        "images_per_prompt": 12,
        "prompt_prefix": "",
        "sampling": protocol.sampling | values,
        "source": "BAGEL/eval/gen/gen_images_mp.py",
    }
    text = (tmp_path / "paper/report.md").read_text()
    assert (
        "(BAGEL/eval/gen/gen_images_mp.py, but for num_inference_steps, height, width): images_per_prompt=12" in text
    )
    assert "guidance_interval=[0.0, 1.0]" in text
    assert json.loads((tmp_path / "paper/images/00000/metadata.jsonl").read_text()) == described

    spelled = [f"{name}={json.dumps(value)}".replace('"', "") for name, value in protocol.sampling.items()]
    spelled += command.split("--sampling ")[1].split()
    options = [*command.split("--sampling")[0].split(), "--images_per_prompt", "1", "--sampling", *spelled]
    evaluate.main([*options, "--output_dir", str(tmp_path / "spelled")])
    image = "images/00000/samples/00000.png"
    assert (tmp_path / "spelled" / image).read_bytes() == (tmp_path / "paper" / image).read_bytes()
    report = json.loads((tmp_path / "spelled/report.json").read_text())
    assert (report["protocol"], report["images"], report["generation"]["source"]) == ("default", 1, None)


def test_a_prefix_reaches_the_model_and_not_the_report(bagel_folder, judge_folder, tmp_path, capsys):
    rows = "item_id,text,proposition_id,dependency,tuple,question_natural_language\n{},1,0,entity - whole (plane),is it red ?\n"
    images = []
    for name, text, protocol in (
        ("paper", "A red plane.", "paper"),
        ("spelled", "Generate an image: A red plane.", "default"),
    ):
        (tmp_path / f"{name}.csv").write_text(rows.format(f"a,{text}"))
        command = f"--model {bagel_folder} --benchmark dpg --prompts {tmp_path / name}.csv --judge {judge_folder}"
        command += f" --dtype float32 --images_per_prompt 1 --protocol {protocol} --output_dir {tmp_path / name}"
        command += (
            " --sampling num_inference_steps=2 height=32 width=32 guidance_scale=3.0 guidance_interval=[0.0,1.0]"
        )
        evaluate.main(command.split())
        images.append((tmp_path / name / "images/a/samples/00000.png").read_bytes())
    assert images[0] == images[1]
    [row] = [json.loads(line) for line in (tmp_path / "paper/results.jsonl").read_text().splitlines()]
    assert row["prompt"] == "A red plane."
    report = json.loads((tmp_path / "paper/report.json").read_text())
    assert report["generation"]["prompt_prefix"] == "Generate an image: "
    command = command.replace(f"--output_dir {tmp_path / 'spelled'}", f"--output_dir {tmp_path / 'paper'}")
    assert main(["evaluate", *command.split()]) == 1  # the folder's images were made with the prefix
    assert "made otherwise (prompt_prefix was 'Generate an image: '" in capsys.readouterr().err


def test_openunis_reconstructions_are_guided_away_from_a_fixed_request():
    entry = find_protocol("paper", "reconstruction", "openuni")
    assert entry.sampling == {
        "num_inference_steps": 20,
        "guidance_scale": 4.5,
        "negative_prompt": "Keep the image as it is.",
    }
    assert entry.instruction == "Describe the image in details"


def test_a_reconstruction_by_protocol_is_the_one_spelled_out(tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "data" / "red.png")
    reports = []
    steps = ["--sampling", "num_inference_steps=2"]
    spelled = [*steps, "guidance_scale=4.5", "negative_prompt=Keep the image as it is."]
    spelled += ["--instruction", "Describe the image in details"]
    for name, options in (("paper", [*steps, "--protocol", "paper"]), ("spelled", spelled), ("default", steps)):
        command = f"--model {GOLDEN / 'openuni' / 'checkpoint'} --benchmark reconstruction --dtype float32"
        command += f" --dataset {tmp_path / 'data'} --output_dir {tmp_path / name}"
        evaluate.main([*command.split(), *options])
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
    paper, spelled, default = reports
    assert paper["means"] == spelled["means"] != default["means"]
    assert paper["generation"]["source"] == "OpenUni/scripts/image_edit.py"
    assert default["generation"] == {
        "instruction": "Describe this image in detail.",
        "sampling": {"num_inference_steps": 2},
        "source": None,
    }
