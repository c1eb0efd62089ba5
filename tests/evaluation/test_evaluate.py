import pytest

from reca_trainer.evaluation.evaluate import main, parse_sampling, spread
from reca_trainer.evaluation.geneval import TAGS, prompts


def test_sampling_options_are_json_where_they_can_be():
    pairs = ["num_inference_steps=50", "guidance_interval=[0.4, 1]", "guidance_renorm=global", "flag=true"]
    assert parse_sampling(pairs) == {
        "num_inference_steps": 50,
        "guidance_interval": [0.4, 1],
        "guidance_renorm": "global",
        "flag": True,
    }


@pytest.mark.parametrize("pair", ["steps", "=5", "num steps=5"])
def test_a_sampling_option_without_a_name_is_refused(pair):
    with pytest.raises(SystemExit, match="NAME=VALUE"):
        parse_sampling([pair])


def test_a_limited_run_still_sees_every_category():
    assert [prompt.metadata["tag"] for prompt in spread(prompts(), 6)] == list(TAGS)
    assert spread([1, 2], 5) == [1, 2] and spread([1, 2], None) == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--benchmark geneval", "either --model or --images"),
        ("--benchmark geneval --model a --images b", "either --model or --images"),
        ("--benchmark reconstruction --images b", "needs a --model"),
        ("--benchmark dpg --model a", "needs --prompts"),
        ("--benchmark understanding --model a", "needs --dataset"),
    ],
)
def test_a_command_that_cannot_work_says_so_at_once(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments.split(), "--output_dir", str(tmp_path)])
    assert message in f"{stopped.value} {capsys.readouterr().err}"
