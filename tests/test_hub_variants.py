"""Repositories with several checkpoints, over real HTTP: one is chosen, and no other is downloaded."""

import json
import shutil

import pytest
from peft import LoraConfig
from safetensors.torch import load, save

from reca_trainer import AutoUnifiedModel
from reca_trainer.adapters import attach
from reca_trainer.models import harmon
from reca_trainer.models.auto import locate
from reca_trainer.models.lance.modeling_lance import LatentPositions
from reca_trainer.models.registry import detect
from reca_trainer.models.weights import CheckpointError, choose_variant
from tests.conftest import GOLDEN
from tests.hub_server import Repo
from tests.test_hub import client, server  # noqa: F401 (a fixture)

OPENUNI, BAGEL, LANCE = (GOLDEN / family / "checkpoint" for family in ("openuni", "bagel", "lance"))


def files_of(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def serve(hub, repo_id, files):
    hub.repos[repo_id] = Repo(private=False)
    hub.repos[repo_id].commit("main", files)


def downloaded(hub):
    return {
        line.split()[1].rpartition("/")[2] for line in hub.requests if line.startswith("GET") and "/resolve/" in line
    }


LOAD = """
import sys
from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor
from reca_trainer.cli import main
from reca_trainer.models.auto import open_lazily

def load(name, **options):
    model = AutoUnifiedModel.from_pretrained(name, **options)
    AutoUnifiedProcessor.from_pretrained(name, **options)
    return model

def named():
    name = load("me/openuni", variant="b_512").name_or_path
    again = open_lazily(name)
    offline = open_lazily(name, local_files_only=True)
    return [name, again.name_or_path, load(name).name_or_path, offline.name_or_path]

opened = attempt(load, "me/openuni")
print(json.dumps({"open": opened, "kept": [str(path) for path in Path().rglob("blobs/*")], "wrong": attempt(load, "me/openuni", variant="b_1024"),
                  "named": named(), "info": main(["info", "me/openuni"]), "chosen": main(["info", "me/openuni/openuni_b_512.pth"])}))
"""


def test_one_of_several_checkpoints_is_chosen_before_anything_is_downloaded(tmp_path, server):  # noqa: F811
    files = files_of(OPENUNI)
    weights = files.pop("openuni_finetune.pth")
    del files["openuni_pretrain.pth"]
    variants = [f"openuni_{name}.pth" for name in ("b_512", "l_512", "l_1024")]
    serve(server, "me/openuni", {**files, **dict.fromkeys(variants, weights)})
    results, output = client(server, tmp_path, LOAD)
    message = results["open"]
    assert message.startswith("CheckpointError: One .pth file of me/openuni is the checkpoint, and none was chosen.")
    assert "These are there: openuni_b_512.pth, openuni_l_1024.pth, openuni_l_512.pth." in message
    assert results["kept"] == []
    assert "and none is 'b_1024'" in results["wrong"]
    assert results["named"] == ["me/openuni/openuni_b_512.pth"] * 4
    assert (results["info"], results["chosen"]) == (
        1,
        0,
    ) and "reca-trainer info: One .pth file of me/openuni" in output
    assert downloaded(server) & set(variants) == {"openuni_b_512.pth"}


LOAD_FOLDERS = """
from peft import LoraConfig
from reca_trainer.models.auto import open_lazily

def load(cache, name, **options):
    model = AutoUnifiedModel.from_pretrained(name, cache_dir=cache, **options)
    AutoUnifiedProcessor.from_pretrained(name, cache_dir=cache, **options)
    folders = {path.parent.name for path in Path(cache).glob("*/snapshots/*/*/*")}
    return model, [getattr(model.config, "latent_frames"), model.name_or_path, sorted(folders)]

video, by_variant = load("variant", "me/lance", variant="3B_Video")
adapters.attach(video, LoraConfig(r=2)).save_pretrained("adapter")
results = {
    "default": load("default", "me/lance")[1],
    "variant": by_variant,
    "name": load("name", "me/lance/Lance_3B_Video")[1],
    "adapter": load("adapted", "adapter")[1][0::2],
    "offline": open_lazily("me/lance/Lance_3B_Video", cache_dir="variant", local_files_only=True).config.latent_frames,
    "default offline": load("default", "me/lance", local_files_only=True)[1],
    "not there": attempt(load, "variant", "me/lance", local_files_only=True),
    "wrong": attempt(load, "wrong", "me/lance", variant="Lance_7B"),
    "kept": [str(path) for path in Path("wrong").rglob("blobs/*")],
}
print(json.dumps(results))
"""


def test_of_checkpoints_in_folders_side_by_side_only_the_chosen_one_is_downloaded(tmp_path, server):  # noqa: F811
    files = files_of(LANCE)
    weights = load(files["Lance_3B/model.safetensors"])
    table = weights["latent_pos_embed.pos_embed"]
    weights["latent_pos_embed.pos_embed"] = LatentPositions(16, table.shape[1]).compute(frames=2)
    video = {name.replace("Lance_3B", "Lance_3B_Video"): files[name] for name in files if name.startswith("Lance_3B")}
    serve(server, "me/lance", {**files, **video, "Lance_3B_Video/model.safetensors": save(weights)})
    results, _ = client(server, tmp_path, LOAD_FOLDERS)
    chosen = [2, "me/lance/Lance_3B_Video", ["Lance_3B_Video", "Qwen2.5-VL-ViT"]]
    assert results["default"] == [1, "me/lance", ["Lance_3B", "Qwen2.5-VL-ViT"]]
    assert (results["variant"], results["name"]) == (chosen, chosen)
    assert (results["adapter"], results["offline"]) == (chosen[0::2], 2)
    assert results["default offline"] == results["default"]
    assert "cannot be reached" in results["not there"]
    assert "One folder of me/lance is the checkpoint, and none is 'Lance_7B'" in results["wrong"]
    assert results["kept"] == []


@pytest.mark.parametrize(
    ("variant", "name"),
    [("1.5b", "harmon_1.5b.pth"), ("harmon_1.5b-o", "harmon_1.5b-o.pth"), ("harmon_0.5b.pth", "harmon_0.5b.pth")],
)
def test_a_variant_is_a_files_name_or_what_tells_it_from_the_others(variant, name):
    files = ["harmon_0.5b.pth", "harmon_1.5b.pth", "harmon_1.5b-o.pth"]
    assert choose_variant(files, variant, "wusize/harmon") == name
    with pytest.raises(CheckpointError, match=r"none is '5b'\. These are there: harmon_0\.5b\.pth, "):
        choose_variant(files, "5b", "wusize/harmon")


def test_a_local_folder_and_a_file_in_it_name_the_same_checkpoint(tmp_path):
    assert locate(OPENUNI / "openuni_pretrain.pth") == (OPENUNI, "openuni_pretrain.pth")
    assert locate(OPENUNI, "pretrain") == (OPENUNI, "openuni_pretrain.pth")
    assert locate(OPENUNI) == (OPENUNI, None)
    model = AutoUnifiedModel.from_pretrained(OPENUNI / "openuni_pretrain.pth")
    attach(model, LoraConfig(r=2)).save_pretrained(tmp_path)
    base = json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(OPENUNI / "openuni_pretrain.pth")
    again = AutoUnifiedModel.from_pretrained(tmp_path)
    assert again.get_base_model().name_or_path == base


def test_a_local_folder_and_a_checkpoint_in_it_name_the_same(tmp_path):
    shutil.copytree(LANCE, tmp_path / "lance")
    (tmp_path / "lance" / "Lance_3B").rename(tmp_path / "lance" / "0005000")
    assert locate(tmp_path / "lance" / "0005000") == (tmp_path / "lance", "0005000")
    assert locate(tmp_path / "lance", "0005000") == (tmp_path / "lance", "0005000")
    assert locate(tmp_path / "lance" / "Qwen2.5-VL-ViT") == (tmp_path / "lance" / "Qwen2.5-VL-ViT", None)
    shutil.copytree(tmp_path / "lance" / "0005000", tmp_path / "lance" / "0010000")
    with pytest.raises(CheckpointError, match=r"none was chosen\. These are there: 0005000, 0010000\."):
        AutoUnifiedModel.from_pretrained(tmp_path / "lance")


def test_a_harmon_file_without_its_autoencoder_says_what_is_missing(tmp_path):
    (tmp_path / "harmon_0.5b.pth").write_bytes((GOLDEN / "harmon/checkpoint/original/harmon_tiny.pth").read_bytes())
    assert detect(tmp_path) == (harmon, True)
    with pytest.raises(CheckpointError, match=r"holds none of: kl16\.ckpt"):
        AutoUnifiedModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"{ not json", b"<html>429</html>", b"\xff\xfe", b"[1, 2]", b""])
def test_a_config_that_is_no_json_stops_only_families_that_need_it(tmp_path, content):
    for path in BAGEL.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink(missing_ok=True)
    (tmp_path / "config.json").write_bytes(content)
    model = AutoUnifiedModel.from_pretrained(tmp_path)
    whole = AutoUnifiedModel.from_pretrained(BAGEL)
    assert model.config.text_config.to_dict() == whole.config.text_config.to_dict()
    (tmp_path / "llm_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json (is no JSON|holds a list)"):
        AutoUnifiedModel.from_pretrained(tmp_path)


def test_a_whole_name_comes_before_the_end_of_another(tmp_path):
    names = ["harmon_iter_5000.pth", "iter_5000.pth"]
    assert choose_variant(names, "iter_5000", "a folder") == "iter_5000.pth"
    assert choose_variant(names[:1], "iter_5000", "a folder") == "harmon_iter_5000.pth"
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"names the checkpoint iter_5000\.pth, and variant='harmon_iter_5000'"):
        locate(f"{tmp_path}/iter_5000.pth", "harmon_iter_5000")
