"""Sources of images: every picture of a source is a row, or the log says why not."""

import csv
import io
import json
import logging
import tarfile
import zipfile
from pathlib import Path

import datasets
import pytest
from datasets import Dataset
from PIL import Image, features

from reca_trainer import RecAConfig
from reca_trainer.data import (
    Columns,
    Draw,
    RowDataset,
    SamplingPlan,
    StreamingBatches,
    find_columns,
    load_image_dataset,
)
from reca_trainer.data.task_datasets import TaskDatasets
from tests.hostile_images import encoded

SIZE = (16, 16)

both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def grey(value: int) -> Image.Image:
    return Image.new("RGB", (20, 20), (value, value, value))


def picture(path, value: int):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    grey(value).save(path)


def archive(path, members: dict[str, bytes | int]):
    """A `.tar` (of any compression) or `.zip`; a number stands for a grey PNG or, by its name, JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = {
        name: encoded(grey(data), "JPEG" if name.endswith("jpg") else "PNG") if isinstance(data, int) else data
        for name, data in members.items()
    }
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, data in contents.items():
                file.writestr(name, data)
        return path
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as file:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def table(path, values, captions=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"image": [grey(value) for value in values]}
    Dataset.from_dict(columns | ({"text": [f"caption {v}" for v in values]} if captions else {})).to_parquet(path)


def greys(dataset, task="reconstruct", **options) -> list[tuple[int, object]]:
    """The grey value and text of every row, sorted by value."""
    columns = find_columns(dataset, **options)
    if isinstance(dataset, Dataset):
        decoded = RowDataset({task: dataset}, {task: columns})
        rows = [decoded[Draw(task, row, SIZE, 0, "")] for row in range(len(dataset))]
    else:
        plan = SamplingPlan({task: 1}, shuffle=False)
        batches = StreamingBatches({task: dataset}, {task: columns}, lambda width, height: SIZE, plan)
        rows = [row for batch in batches for row in batch]
    return sorted(((row.image.getpixel((3, 3))[0], row.text) for row in rows), key=lambda row: row[0])


def values(dataset) -> list[int]:
    return [value for value, _ in greys(dataset)]


def load(caplog, *args, **options):
    """The dataset, and what the log says."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="reca_trainer.data.sources"):
        return load_image_dataset(*args, **options), caplog.text


# --- a path is not a pattern ---

NAMES = [
    "set[12]",
    "v*",
    "what?",
    "photos [2024]",
    "a::b",
    "$HOME",
    "{x,y}",
    "~x",
    "100%",
    "a#b",
    "zip:",
    "ünï",
    "\udcff\udcfe",
]


@both_ways
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_folder_means_itself(tmp_path, name, streaming):
    for index, other in enumerate(("set1", "set2", "v1", "whatX", "photos 2", "x", "y")):
        picture(tmp_path / other / "0.png", 100 + index)
    for index in range(3):
        picture(tmp_path / name / f"{index}.png", index)
    assert values(load_image_dataset(tmp_path / name, streaming=streaming)) == [0, 1, 2]


@both_ways
@pytest.mark.parametrize("kind", [".tar", ".zip", ".parquet", ".jsonl", "saved"])
@pytest.mark.parametrize("name", ["set[12]", "v*", "f::g", "$HOME", "\udcff"], ids=ascii)
def test_a_file_means_itself(tmp_path, name, kind, streaming):
    path = tmp_path / f"{name}{kind}"
    picture(tmp_path / "files" / "1.png", 1)
    if kind == ".parquet":
        table(tmp_path / "plain.parquet", [1])
        (tmp_path / "plain.parquet").rename(path)
    elif kind == ".jsonl":
        path.write_text(json.dumps({"image": "files/1.png"}))
    elif kind == "saved":
        Dataset.from_dict({"image": [grey(1)]}).save_to_disk(tmp_path / "plain")
        (tmp_path / "plain").rename(path)
    else:
        archive(path, {"1.png": 1})
    assert values(load_image_dataset(path, streaming=streaming)) == [1]


@both_ways
def test_pictures_mean_themselves(tmp_path, streaming):
    names = [
        "f::g.png",
        "$HOME.png",
        "[12].png",
        "1.png",
        "*.png",
        "?.png",
        "\udcff.png",
        "100%.png",
        "a b#c.PNG",
        "~.png",
    ]
    for index, name in enumerate(names):
        picture(tmp_path / "photos" / name, index)
    assert values(load_image_dataset(tmp_path / "photos", streaming=streaming)) == list(range(len(names)))


def test_a_literal_name_comes_before_the_home_folder(tmp_path, monkeypatch):
    picture(tmp_path / "home" / "0.png", 1)
    picture(tmp_path / "here" / "~" / "0.png", 2)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert values(load_image_dataset("~")) == [1]
    monkeypatch.chdir(tmp_path / "here")
    assert values(load_image_dataset("~")) == [2]


def test_a_pattern_is_no_path(tmp_path, monkeypatch):
    picture(tmp_path / "a.png", 1)
    monkeypatch.chdir(tmp_path)
    for pattern in ("*.png", str(tmp_path / "*.png"), "a/*.png"):
        with pytest.raises(FileNotFoundError, match="Patterns go into data_files"):
            load_image_dataset(pattern)


@both_ways
@pytest.mark.parametrize(
    ("patterns", "rows"),
    [
        ("*.png", [0, 1]),
        (["*.png"], [0, 1]),
        (["0.png", "[b]/*.png"], [0, 2]),
        ("**/*.png", [0, 1, 2]),
        ("b", [2]),
        (["*.tar.gz", "s/*.tgz"], [5, 6, 7]),
        ("**/*.tar", [3, 4]),
        ("*.parquet", [8, 9]),
    ],
)
def test_patterns_choose_files(tmp_path, patterns, rows, streaming):
    folder = tmp_path / "set[12]"
    for name, value in (("0.png", 0), ("1.png", 1), ("b/2.png", 2)):
        picture(folder / name, value)
    archive(folder / "s" / "a.tar", {"a.png": 3, "b.png": 4})
    archive(folder / "b.tar.gz", {"a.png": 5, "b.jpg": 6})
    archive(folder / "s" / "c.tgz", {"a.png": 7})
    table(folder / "d.parquet", [8, 9])
    assert values(load_image_dataset(folder, streaming=streaming, data_files=patterns)) == rows


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path):
    picture(tmp_path / "0.png", 0)
    with pytest.raises(FileNotFoundError, match=r"'\*\.tar' matches nothing"):
        load_image_dataset(tmp_path, data_files=["*.png", "*.tar"])


def test_patterns_follow_links_once(tmp_path):
    picture(tmp_path / "a" / "0.png", 0)
    picture(tmp_path / "elsewhere" / "1.png", 1)
    (tmp_path / "a" / "back").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    assert values(load_image_dataset(tmp_path / "a", data_files="**/*.png")) == [0, 1]


def test_the_option_chooses_files(tmp_path):
    picture(tmp_path / "photos" / "0.png", 0)
    archive(tmp_path / "photos" / "a.tar", {"a.png": 3})
    args = RecAConfig(str(tmp_path / "out"), dataset_name=str(tmp_path / "photos"), data_files=["*.tar"], use_cpu=True)
    assert values(TaskDatasets.open(None, args).datasets["reconstruct"]) == [3]
    with pytest.raises(ValueError, match="data_files"):
        RecAConfig(str(tmp_path / "out"), data_files=["*.tar"], use_cpu=True)


# --- everything in a folder is used or named ---


def write_tar(folder):
    archive(folder / "backup.tar", {"x.png": 50})
    return [], ["backup.tar"]


def write_parquet(folder):
    table(folder / "rows.parquet", [50])
    return [], ["rows.parquet"]


def write_eval(folder):
    picture(folder / "eval" / "a.png", 50)
    picture(folder / "test" / "deep" / "a.png", 51)
    return [50, 51], []


def write_train(folder):
    picture(folder / "cats" / "a.png", 50)
    return [50], []


def write_link(folder):
    picture(folder.parent / "elsewhere" / "a.png", 50)
    (folder / "linked").symlink_to(folder.parent / "elsewhere")
    (folder.parent / "elsewhere" / "back").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    return [50], ["linked/back", "self"]


def write_upper(folder):
    picture(folder / "A.PNG", 50)
    grey(51).save(folder / "B.JPEG")
    return [50, 51], []


def write_others(folder):
    (folder / "notes.doc").write_text("x")
    (folder / ".hidden.png").write_bytes(encoded(grey(50)))
    (folder / "config.json").write_text('{"a": 1}')
    return [], ["notes.doc", ".hidden.png", "config.json"]


@both_ways
@pytest.mark.parametrize(
    "write",
    [write_tar, write_parquet, write_eval, write_train, write_link, write_upper, write_others],
    ids=lambda write: write.__name__.removeprefix("write_"),
)
def test_what_stands_beside_pictures_is_used_or_named(tmp_path, caplog, write, streaming):
    folder = tmp_path / "photos"
    for index in range(5):
        picture(folder / f"{index}.png", index)
    more, named = write(folder)
    dataset, log = load(caplog, folder, streaming=streaming)
    assert values(dataset) == sorted([*range(5), *more])
    assert [name for name in named if f"{name}: " not in log and f"{name}/: " not in log] == []
    assert ("not used" in log) == bool(named) and f"{5 + len(more)} pictures" in log


def test_a_split_folder_beside_others_is_the_split(tmp_path, caplog):
    for folder, value in (("train", 1), ("cats", 2), ("eval", 3), (".", 4)):
        picture(tmp_path / folder / "a.png", value)
    dataset, log = load(caplog, tmp_path)
    assert values(dataset) == [1]
    assert all(f"{name}: not in the folder of the split 'train'" in log for name in ("cats/", "eval/", "a.png"))
    dataset, log = load(caplog, tmp_path, split="test")
    assert values(dataset) == [3] and "train/: not in" in log
    dataset, log = load(caplog, tmp_path, split="validation")
    assert values(dataset) == [1, 2, 3, 4]


@both_ways
def test_archives_in_subfolders_are_all_read(tmp_path, caplog, streaming):
    archive(tmp_path / "0.tar", {"a.png": 0})
    archive(tmp_path / "x" / "1.tar", {"a.png": 1})
    archive(tmp_path / "x" / "eval" / "2.tar.gz", {"a.png": 2})
    archive(tmp_path / "y" / "3.zip", {"a.png": 3, "deep/a.png": 4})
    table(tmp_path / "rows.parquet", [5])
    dataset, log = load(caplog, tmp_path, streaming=streaming)
    assert values(dataset) == [0, 1, 2, 3, 4]
    assert "4 archives" in log and "rows.parquet: a table beside archives" in log


def test_tables_of_a_split_and_of_other_kinds(tmp_path, caplog):
    table(tmp_path / "data" / "train-00000-of-00002.parquet", [0])
    table(tmp_path / "data" / "train-00001-of-00002.parquet", [1])
    table(tmp_path / "data" / "test-00000-of-00001.parquet", [2])
    (tmp_path / "info.json").write_text('[{"a": 1}]')
    dataset, log = load(caplog, tmp_path)
    assert values(dataset) == [0, 1]
    assert "test-00000-of-00001.parquet: not of the split 'train'" in log and "info.json: a table beside" in log
    assert values(load_image_dataset(tmp_path, split="test")) == [2]
    with pytest.raises(ValueError, match="no split 'validation'"):
        load_image_dataset(tmp_path, split="validation")


def test_a_folder_with_configs_is_read_as_they_say(tmp_path):
    folder = tmp_path / "set[12]"
    table(folder / "a.parquet", [1])
    table(folder / "b.parquet", [2])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: b.parquet}\n---\n"
    )
    assert values(load_image_dataset(folder)) == [2]


def test_what_stands_beside_a_saved_dataset_is_named(tmp_path, caplog):
    Dataset.from_dict({"image": [grey(1)]}).save_to_disk(tmp_path / "saved")
    picture(tmp_path / "saved" / "a.png", 2)
    dataset, log = load(caplog, tmp_path / "saved")
    assert values(dataset) == [1] and "a.png: beside a saved dataset" in log and "arrow" not in log


def test_a_part_of_a_split(tmp_path):
    for index in range(5):
        picture(tmp_path / "photos" / f"{index}.png", index)
    archive(tmp_path / "a.tar", {f"{index}.png": index for index in range(5)})
    assert values(load_image_dataset(tmp_path / "photos", split="train[1:3]")) == [1, 2]
    assert values(load_image_dataset(tmp_path / "a.tar", split="train[:40%]")) == [0, 1]


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
@both_ways
def test_avif_is_read(tmp_path, streaming):
    picture(tmp_path / "photos" / "0.avif", 7)
    assert len(values(load_image_dataset(tmp_path / "photos", streaming=streaming))) == 1
    archive(tmp_path / "a.tar", {"0.avif": encoded(grey(7), "AVIF")})
    assert len(values(load_image_dataset(tmp_path / "a.tar", streaming=streaming))) == 1


def test_a_changed_picture_or_caption_is_read_again(tmp_path):
    picture(tmp_path / "a.png", 1)
    (tmp_path / "a.txt").write_text("first")
    assert greys(load_image_dataset(tmp_path), "generate") == [(1, "first")]
    (tmp_path / "a.txt").write_text("second one")
    assert greys(load_image_dataset(tmp_path), "generate") == [(1, "second one")]
    picture(tmp_path / "b.png", 2)
    assert values(load_image_dataset(tmp_path)) == [1, 2]


# --- captions of pictures ---


def five(folder) -> list[str]:
    for index in range(5):
        picture(folder / f"{index}.png", index)
    return [f"{index}.png" for index in range(5)]


def as_metadata(folder):
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"{i}.png", "text": f"caption {i}"}) for i in (1, 3))
    )


def as_csv(folder):
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file_name", "caption"), ("1.png", "caption 1"), ("3.png", "caption 3")])


def as_captions(folder):
    (folder / "captions.jsonl").write_text(
        "\n".join(json.dumps({"image": f"./{i}.png", "caption": f"caption {i}"}) for i in (1, 3))
    )


def as_sidecars(folder):
    for index in (1, 3):
        (folder / f"{index}.txt").write_text(f"caption {index}\n")


def as_json_sidecars(folder):
    for index in (1, 3):
        (folder / f"{index}.json").write_text(json.dumps({"caption": f"caption {index}", "width": 20}))


def as_both(folder):
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "caption": "caption 1", "n": 1}))
    (folder / "3.txt").write_text("caption 3")


@both_ways
@pytest.mark.parametrize(
    "write",
    [as_metadata, as_csv, as_captions, as_sidecars, as_json_sidecars, as_both],
    ids=lambda write: write.__name__.removeprefix("as_"),
)
def test_captions_of_some_pictures(tmp_path, caplog, write, streaming):
    """All pictures are images; a task that needs captions takes those that have one."""
    folder = tmp_path / "photos"
    five(folder)
    write(folder)
    dataset, log = load(caplog, folder, streaming=streaming)
    assert values(dataset) == [0, 1, 2, 3, 4] and "not used" not in log
    args = RecAConfig(
        str(tmp_path / "out"),
        dataset_name=str(folder),
        dataset_streaming=streaming,
        text_to_image_weight=1.0,
        image_to_text_weight=1.0,
        max_steps=1,
        use_cpu=True,
    )
    with caplog.at_level(logging.WARNING):
        images = TaskDatasets.open(None, args)
    for task in ("generate", "caption"):
        assert greys(images.datasets[task], task) == [(1, "caption 1"), (3, "caption 3")]
    assert values(images.datasets["reconstruct"]) == [0, 1, 2, 3, 4]


def test_left_out_rows_are_counted_and_no_image_is_in_both_halves(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("reca_trainer"), "propagate", True)
    folder = tmp_path / "photos"
    for index in range(20):
        picture(folder / f"{index}.png", index)
        if index % 4:
            (folder / f"{index}.txt").write_text(f"caption {index}")
    args = RecAConfig(str(tmp_path / "out"), dataset_name=str(folder), text_to_image_weight=1.0, use_cpu=True)
    with caplog.at_level(logging.WARNING):
        images = TaskDatasets.open(None, args)
    assert "leaves out 5 of 20 images" in caplog.text
    train, test = images.split(5, seed=0)
    held_out = set(values(test.datasets["reconstruct"]))
    assert len(held_out) == 5
    assert set(values(train.datasets["generate"])) == {v for v in range(20) if v % 4} - held_out
    assert set(values(test.datasets["generate"])) == {v for v in held_out if v % 4}


def test_held_out_images_without_captions_are_not_evaluated_with_them(tmp_path):
    for index in range(20):
        picture(tmp_path / "photos" / f"{index}.png", index)
    for index in range(3):
        (tmp_path / "photos" / f"{index}.txt").write_text("caption")
    args = RecAConfig(
        str(tmp_path / "out"), dataset_name=str(tmp_path / "photos"), text_to_image_weight=1.0, use_cpu=True
    )
    images = TaskDatasets.open(None, args)
    parts = (images.split(2, seed) for seed in range(20))
    train, test = next(part for part in parts if min(values(part[1].datasets["reconstruct"])) > 2)
    assert not test.serves("generate") and len(test.datasets["reconstruct"]) == 2
    assert set(values(train.datasets["generate"])) == {0, 1, 2} and images.serves("generate")


def test_no_caption_at_all_is_an_error_of_the_task(tmp_path):
    picture(tmp_path / "photos" / "0.png", 0)
    (tmp_path / "photos" / "0.txt").write_text(" ")
    args = RecAConfig(
        str(tmp_path / "out"), dataset_name=str(tmp_path / "photos"), text_to_image_weight=1.0, use_cpu=True
    )
    with pytest.raises(ValueError, match="None of 1 images has a caption"):
        TaskDatasets.open(None, args)


def test_tables_of_captions_may_differ_in_types(tmp_path):
    for index, (folder, number) in enumerate((("a", 1), ("b", "two"))):
        picture(tmp_path / folder / "0.png", index)
        line = json.dumps({"file_name": "0.png", "number": number, "text": f"of {index}"})
        (tmp_path / folder / "metadata.jsonl").write_text(line)
    dataset = load_image_dataset(tmp_path)
    assert greys(dataset, "generate") == [(0, "of 0"), (1, "of 1")] and dataset["number"][:] == ["1", "two"]


def test_what_may_hold_images_is_named_first(tmp_path, caplog):
    picture(tmp_path / "0.png", 0)
    for index in range(20):
        (tmp_path / f"{index}.npy").write_text("x")
    archive(tmp_path / "z.tar", {"a.png": 1})
    assert "z.tar: an archive beside pictures" in load(caplog, tmp_path)[1]


def test_entries_without_a_picture_here_are_named(tmp_path, caplog):
    picture(tmp_path / "photos" / "0.png", 0)
    picture(tmp_path / "secret.png", 9)
    names = ["0.png", "gone.png", "../secret.png", str(tmp_path / "secret.png"), None]
    lines = [json.dumps({"file_name": name, "text": "x"}) for name in names]
    (tmp_path / "photos" / "metadata.jsonl").write_text("\n".join(lines))
    dataset, log = load(caplog, tmp_path / "photos")
    assert values(dataset) == [0]
    assert "3 entries name no picture here (gone.png, ../secret.png" in log and "1 entries have no picture" in log


TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Grey."}]
MESSAGES = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "Grey."}]


@both_ways
@pytest.mark.parametrize("given", ["folder", "file"])
@pytest.mark.parametrize("prefix", ["", "images/"])
@pytest.mark.parametrize("name", ["llava.json", "llava_ov_si.jsonl"])
def test_entries_beside_a_folder_of_images(tmp_path, name, prefix, given, streaming):
    """LLaVA's and BAGEL's layouts."""
    folder = tmp_path / "set[12]"
    rows = []
    for index in range(3):
        picture(folder / "images" / "coco" / f"{index}.png", index)
        rows.append({"id": str(index), "image": f"{prefix}coco/{index}.png", "conversations": TURNS})
    lines = json.dumps(rows) if name.endswith("json") else "\n".join(map(json.dumps, rows))
    (folder / name).write_text(lines)
    dataset = load_image_dataset(folder if given == "folder" else folder / name, streaming=streaming)
    assert greys(dataset, "caption") == [(index, MESSAGES) for index in range(3)]


@both_ways
def test_paths_start_from_the_folder_of_each_table(tmp_path, streaming):
    for index, folder in enumerate("ab"):
        picture(tmp_path / folder / "0.png", index)
        (tmp_path / folder / "rows.jsonl").write_text(json.dumps({"image": "0.png"}))
    assert values(load_image_dataset(tmp_path, data_files="*/rows.jsonl", streaming=streaming)) == [0, 1]


def test_image_root_comes_before_the_folder_of_the_table(tmp_path):
    picture(tmp_path / "0.png", 1)
    picture(tmp_path / "root" / "0.png", 2)
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "0.png"}]))
    name, out = str(tmp_path / "rows.json"), str(tmp_path / "out")
    for root, value in ((None, 1), (str(tmp_path / "root"), 2)):
        args = RecAConfig(out, dataset_name=name, image_root=root, use_cpu=True)
        assert values(TaskDatasets.open(None, args).datasets["reconstruct"]) == [value]


# --- archives ---


@both_ways
def test_formats_of_pictures_may_change_between_and_within_shards(tmp_path, streaming):
    archive(tmp_path / "0.tar", {f"{index:02d}.jpg": index for index in range(10)})
    archive(tmp_path / "1.tar", {f"{index:02d}.png": index for index in range(10, 20)})
    archive(tmp_path / "2.tar", {f"{index:02d}.{('png', 'jpg')[index % 2]}": index for index in range(20, 30)})
    assert values(load_image_dataset(tmp_path, streaming=streaming)) == list(range(30))


@both_ways
def test_captions_inside_archives(tmp_path, streaming):
    caption, turns = json.dumps({"caption": "of 1"}).encode(), json.dumps({"conversations": TURNS}).encode()
    members = {"0.png": 0, "0.txt": b"of 0", "1.png": 1, "1.json": caption, "2.png": 2, "2.json": turns, "3.png": 3}
    for path in (tmp_path / "a.tar", tmp_path / "b.tar.gz", tmp_path / "c.zip"):
        dataset = load_image_dataset(archive(path, members), streaming=streaming)
        args = RecAConfig(
            str(tmp_path / "out"), text_to_image_weight=1.0, image_to_text_weight=1.0, max_steps=1, use_cpu=True
        )
        images = TaskDatasets.open(dataset, args)
        assert values(dataset) == [0, 1, 2, 3]
        assert greys(images.datasets["generate"], "generate") == [(0, "of 0"), (1, "of 1")]
        assert greys(images.datasets["caption"], "caption") == [(0, "of 0"), (1, "of 1"), (2, MESSAGES)]


def test_metadata_inside_a_zip_archive(tmp_path):
    lines = json.dumps({"file_name": "b/1.png", "text": "of 1"}).encode()
    dataset = load_image_dataset(
        archive(tmp_path / "a.zip", {"a/metadata.jsonl": lines, "a/b/1.png": 1, "a/0.png": 0})
    )
    assert greys(dataset, "generate") == [(0, None), (1, "of 1")]


@both_ways
def test_metadata_that_cannot_be_read_costs_no_picture(tmp_path, caplog, streaming):
    (tmp_path / "photos").mkdir()
    for name, junk in (("metadata.jsonl", b"{"), ("captions.jsonl", b"\xff"), ("metadata.csv", b"\0")):
        (tmp_path / "photos" / name).write_bytes(junk)
    picture(tmp_path / "photos" / "0.png", 0)
    dataset, log = load(caplog, tmp_path / "photos", streaming=streaming)
    assert values(dataset) == [0] and log.count("cannot be read as a table") + log.count("names no picture here") == 3
    dataset, log = load(caplog, archive(tmp_path / "a.zip", {"metadata.jsonl": b"{", "0.png": 0}), streaming=streaming)
    assert values(dataset) == [0] and "metadata.jsonl in" in log


@both_ways
def test_samples_of_several_pictures(tmp_path, streaming):
    """The same several in every sample are columns; otherwise each is a row."""
    masks = {f"{index}.{name}": index + 10 * (name != "jpg") for index in (1, 2) for name in ("jpg", "mask.png")}
    dataset = load_image_dataset(archive(tmp_path / "masks.tar", masks), streaming=streaming)
    assert greys(dataset) == [(1, None), (2, None)]
    assert greys(dataset, image_column="mask.png") == [(11, None), (12, None)]
    dotted = {"a.png": 0, "photo.1.png": 1, "photo.2.png": 2, "photo.3.png": 3}
    assert values(load_image_dataset(archive(tmp_path / "dotted.tar", dotted), streaming=streaming)) == [0, 1, 2, 3]


def test_a_member_is_never_a_file_of_this_machine(tmp_path, monkeypatch):
    picture(tmp_path / "0.png", 9)
    monkeypatch.chdir(tmp_path)
    absolute = str(tmp_path / "0.png")
    for name in ("a.tar", "a.zip"):
        assert values(load_image_dataset(archive(tmp_path / name, {"0.png": 1, absolute: 2}))) == [1, 2]


def test_members_without_a_picture_are_named(tmp_path, caplog):
    path = archive(tmp_path / "a.tar", {"metadata.jsonl": b"{}", "0.png": 0, "1.txt": b"of 1", ".2.png": 2})
    dataset, log = load(caplog, path)
    assert values(dataset) == [0] and "metadata.jsonl: belongs to no picture" in log and "1.txt: belongs" in log


def test_an_archive_without_an_end_may_be_cut_off(tmp_path, caplog):
    path = archive(tmp_path / "a.tar", {f"{index}.png": index for index in range(4)})
    with tarfile.open(path) as file:
        header = file.getmember("2.png").offset
    path.write_bytes(path.read_bytes()[:header])
    dataset, log = load(caplog, path)
    assert values(dataset) == [0, 1] and "a.tar ends without the mark of a tar's end" in log


@pytest.mark.parametrize("kind", ["cut", "damaged", "joined"])
def test_a_damaged_archive_is_named(tmp_path, kind):
    path = archive(tmp_path / "a.tar", {f"{index}.png": index for index in range(4)})
    data = path.read_bytes()
    with tarfile.open(path) as file:
        header = file.getmember("2.png").offset
    changed = {
        "cut": data[: header + 600],
        "damaged": data[:header] + b"x" * 512 + data[header + 512 :],
        "joined": data * 2,
    }
    path.write_bytes(changed[kind])
    with pytest.raises(ValueError, match=r"a\.tar"):
        load_image_dataset(path)


# --- cells ---


@both_ways
@pytest.mark.parametrize("stored", ["paths", "bytes", "pictures"])
@pytest.mark.parametrize("column", ["image", "images"])
def test_the_first_image_of_a_list_is_used(tmp_path, column, stored, streaming):
    for index in range(4):
        picture(tmp_path / f"{index}.png", index)
    make = {
        "paths": lambda index: str(tmp_path / f"{index}.png"),
        "bytes": lambda index: {"bytes": encoded(grey(index)), "path": None},
        "pictures": grey,
    }[stored]
    dataset = Dataset.from_dict({column: [[make(0), make(1)], [make(2), make(3)]]})
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    assert values(dataset) == [0, 2]
    assert greys(dataset, image_column=column) == [(0, None), (2, None)]


def test_lists_of_images_beside_conversations(tmp_path):
    args = RecAConfig(str(tmp_path), image_to_text_weight=1.0, use_cpu=True)
    pair = [{"user": "What?", "assistant": "Grey.", "source": "x"}]
    dataset = Dataset.from_dict({"images": [[grey(1), grey(2)], []], "texts": [pair, pair]})
    images = TaskDatasets.open(dataset, args)
    assert greys(images.datasets["caption"], "caption") == [(1, MESSAGES)]


def test_image_root_of_lists_of_paths(tmp_path):
    picture(tmp_path / "a" / "1.png", 1)
    dataset = Dataset.from_dict({"images": [["a/1.png", "a/2.png"]]})
    args = RecAConfig(str(tmp_path / "out"), image_root=str(tmp_path), use_cpu=True)
    assert values(TaskDatasets.open(dataset, args).datasets["reconstruct"]) == [1]


@pytest.mark.parametrize(
    "turns",
    [
        [{"from": "USER", "value": "What?"}, {"from": "ASSISTANT", "value": "Grey."}],
        [{"from": "human", "value": "What?"}, {"from": "chatgpt", "value": "Grey."}],
        [{"role": "User", "content": "What?"}, {"role": "model", "content": "Grey."}],
        [{"user": "What?", "assistant": "Grey."}],
        {"user": "What?", "assistant": "Grey."},
        json.dumps([{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Grey."}]),
        json.dumps([{"user": "What?", "assistant": "Grey."}]),
    ],
    ids=["USER", "chatgpt", "model", "pairs", "pair", "JSON", "JSON pairs"],
)
def test_conversations_as_others_write_them(turns):
    dataset = Dataset.from_dict({"image": [grey(1)], "conversations": [turns]})
    assert find_columns(dataset) == Columns("image", None, "conversations")
    assert greys(dataset, "caption") == [(1, MESSAGES)]


def test_empty_conversations_as_text_leave_the_caption(tmp_path):
    dataset = Dataset.from_dict({"image": [grey(1)], "conversations": ["[]"], "text": ["grey"]})
    assert greys(dataset, "caption") == [(1, "grey")]


@pytest.mark.parametrize(
    ("cell", "caption"), [('["a", "b"]', "a"), ("[1]", "[1]"), ("[cat] on a mat", "[cat] on a mat")]
)
def test_captions_that_begin_with_a_bracket(cell, caption):
    dataset = Dataset.from_dict({"image": [grey(1)], "text": [cell]})
    assert greys(dataset, "generate") == [(1, caption)]
