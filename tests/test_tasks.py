"""The table of tasks, and what users say of them by name."""

import pytest

from reca_trainer import RecAConfig
from reca_trainer.cli import with_underscores
from reca_trainer.cli.train import _with_recipe_file
from reca_trainer.data import Columns
from reca_trainer.recipes import FOLDER, recipe_file
from reca_trainer.tasks import TASKS, parse_task_mix


def test_a_task_mix_names_its_tasks():
    assert parse_task_mix("reconstruct=2, caption=1") == {"reconstruct": 2, "caption": 1}
    for wrong in ("2:2:0", "reconstruct", "reconstruct=-1", "reconstruct=1,reconstruct=2", "paint=1", ""):
        with pytest.raises(ValueError, match="task_mix names tasks"):
            parse_task_mix(wrong)


def test_the_mix_and_the_weights_agree(tmp_path):
    args = RecAConfig(output_dir=str(tmp_path), use_cpu=True, task_mix="reconstruct=2,caption=1")
    assert args.task_pattern({"reconstruct": 1.0, "caption": 1.0, "generate": 0.0}) == {"reconstruct": 2, "caption": 1}
    with pytest.raises(ValueError, match="disagree about generate"):
        args.task_pattern({"reconstruct": 1.0, "caption": 1.0, "generate": 1.0})


def test_every_task_has_its_own_number_weight_and_loss():
    for attribute in ("index", "weight_option", "loss_name"):
        assert len({getattr(task, attribute) for task in TASKS.values()}) == len(TASKS)
    assert sorted(task.index for task in TASKS.values()) == list(range(len(TASKS)))


def test_columns_say_which_tasks_they_serve():
    assert [task for task in TASKS if Columns("image").serve(task)] == ["reconstruct"]
    assert [task for task in TASKS if Columns("image", caption="text").serve(task)] == ["reconstruct", "caption", "generate"]
    assert [task for task in TASKS if Columns("b", instruction="c", source="a").serve(task)] == ["reconstruct", "edit"]
    assert [task for task in TASKS if Columns("image", conversation="turns").serve(task)] == ["reconstruct", "caption"]


def test_a_recipe_is_named_or_a_file(tmp_path):
    assert recipe_file("bagel_lora") == recipe_file("bagel_lora.yaml") == FOLDER / "bagel_lora.yaml"
    (tmp_path / "mine.yaml").write_text("max_steps: 3\n")
    assert recipe_file(str(tmp_path / "mine.yaml")) == tmp_path / "mine.yaml"
    with pytest.raises(FileNotFoundError, match=r"Recipes: .*bagel_lora"):
        recipe_file("bagel_lore")
    expected = ["--lora_r", "8", "--config", str(FOLDER / "bagel_full.yaml")]
    for written in (["--config", "bagel_full"], ["--config=bagel_full"]):
        assert _with_recipe_file(["--lora_r", "8", *written]) == expected


def test_options_take_dashes_and_leave_values_alone():
    written = ["a-model", "--max-shard-size=2-GB", "--dtype", "--some-value", "-x-y"]
    assert with_underscores(written) == ["a-model", "--max_shard_size=2-GB", "--dtype", "--some_value", "-x-y"]
