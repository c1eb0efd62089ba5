import io
import json
import logging
import pickle
import shutil
import tarfile
import zipfile
from collections import Counter
from itertools import islice

import accelerate
import datasets
import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from PIL import Image
from torch.utils.data import DataLoader

from reca_trainer.data import (
    Columns,
    Draw,
    RowDataset,
    SamplingPlan,
    StreamingRows,
    TaskBatchSampler,
    find_columns,
    load_image_dataset,
    row_sizes,
)
from reca_trainer.data.columns import under_root, with_images
from reca_trainer.data.sampling import MicroBatch, into_steps, split_to
from reca_trainer.images import ImageError
from tests.hostile_images import encoded, noise, usable, write_corpus

SQUARE = (16, 16)
SIZES = [(16, 16), (16, 32), (32, 16)]


def square(width: int, height: int) -> tuple[int, int]:
    return SQUARE


def of_its_shape(width: int, height: int) -> tuple[int, int]:
    """Three shapes of targets."""
    return SIZES[(width > height) + 2 * (height > width)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def grey(value: int, size: tuple[int, int] = (20, 20)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def grey_of(row: dict) -> int:
    return row["image"].getpixel((3, 3))[0]


def draw(row: int = 0, task: str = "reconstruct", seed: int = 0, size: tuple[int, int] = SQUARE) -> Draw:
    return Draw(task, row, size, seed, "")


# --- sources ---


def write_folder(folder):
    folder.mkdir()
    for index in range(6):  # names that look like splits
        grey(index).save(folder / f"{['test', 'train', 'photo'][index % 3]}_{index}.png")
    lines = [{"file_name": path.name, "text": f"caption of {path.name}"} for path in sorted(folder.iterdir())]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder


def write_tar(path, indices=range(6)):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for index in indices:
            for suffix, data in (("png", encoded(grey(index))), ("txt", f"caption {index}".encode())):
                member = tarfile.TarInfo(f"{index:03d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def write_tar_folder(folder):
    write_tar(folder / "shard-0.tar", range(4))
    write_tar(folder / "shard-1.tar", range(4, 6))
    return folder


def write_parquet(path):
    path = path.with_suffix(".parquet")
    Dataset.from_dict({"img": [grey(i) for i in range(6)], "caption": [f"caption {i}" for i in range(6)]}).to_parquet(
        path
    )
    return path


def write_bare_parquet(path):
    """Encoded bytes without the type `Image`, as other tools write them."""
    path = path.with_suffix(".parquet")
    images = [{"bytes": encoded(grey(i)), "path": f"{i}.png"} for i in range(6)]
    Dataset.from_dict({"photo": images, "text": [f"caption {i}" for i in range(6)]}).to_parquet(path)
    return path


def write_zip(path):
    path = path.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(6):
            archive.writestr(f"inner/{index}.png", encoded(grey(index)))
    return path


def write_saved(folder):
    Dataset.from_dict({"image": [grey(i) for i in range(6)]}).save_to_disk(folder)
    return folder


def write_lines(path):
    files = path.with_suffix(".files")
    files.mkdir()
    path = path.with_suffix(".jsonl")
    for index in range(6):
        grey(index).save(files / f"{index}.png")
    path.write_text(
        "\n".join(json.dumps({"image": str(files / f"{i}.png"), "prompt": f"caption {i}"}) for i in range(6))
    )
    return path


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
@pytest.mark.parametrize(
    "write",
    [
        write_folder,
        lambda path: write_tar(path.with_suffix(".tar")),
        write_tar_folder,
        write_parquet,
        write_bare_parquet,
        write_zip,
        write_saved,
        write_lines,
    ],
    ids=["folder", "tar", "tar folder", "parquet", "bare parquet", "zip", "saved", "jsonl"],
)
def test_every_kind_of_source_gives_every_image_once(tmp_path, write, streaming):
    dataset = load_image_dataset(write(tmp_path / "source"), streaming=streaming)
    columns = find_columns(dataset)
    task = "generate" if columns.caption else "reconstruct"
    if streaming:
        rows = [row for [row] in StreamingRows({task: dataset}, {task: columns}, square)]
    else:
        assert row_sizes(dataset, columns.image) == [(20, 20)] * 6
        decoded = RowDataset({task: dataset}, {task: columns})
        rows = [decoded[draw(index, task)] for index in range(6)]
    assert sorted(map(grey_of, rows)) == list(range(6))
    if columns.caption:
        assert all(f"{grey_of(row)}" in row["text"] and row["text"].startswith("caption") for row in rows)


def test_split_folders_stay_splits(tmp_path):
    for split, value in (("train", 1), ("test", 2)):
        (tmp_path / "data" / split).mkdir(parents=True)
        grey(value).save(tmp_path / "data" / split / "0.png")
    dataset = load_image_dataset(tmp_path / "data", split="test")
    assert grey_of(RowDataset({"reconstruct": dataset}, {"reconstruct": Columns("image")})[draw()]) == 2
    with pytest.raises(ValueError, match="validation"):
        load_image_dataset(tmp_path / "data", split="validation")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("missing", FileNotFoundError),
        ("missing.parquet", FileNotFoundError),
        ("empty", ValueError),
        ("a.doc", ValueError),
    ],
)
def test_nothing_to_read_is_an_error_with_the_path(tmp_path, name, error):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.doc").write_text("text")
    with pytest.raises(error, match=name):
        load_image_dataset(tmp_path / name)


def test_an_empty_table_is_an_error(tmp_path):
    Dataset.from_dict({"image": []}).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"none\.parquet"):
        load_image_dataset(tmp_path / "none.parquet")


@pytest.mark.parametrize("suffix", [".tar", ".parquet", ".zip", ".arrow", ".jsonl"])
def test_a_damaged_file_is_an_error_with_the_path(tmp_path, suffix):
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(bytes(range(256)) * 40)
    with pytest.raises(ValueError, match=rf"damaged\{suffix}"):
        load_image_dataset(path)


def test_archive_members_cannot_leave_the_archive(tmp_path):
    """Nothing is written beside the archive; tricky names are read as rows or refused by name."""
    tricks = ["../evil.png", "/tmp/../evil.png", "good.png"]
    source = tmp_path / "a" / "b"
    source.mkdir(parents=True)
    with zipfile.ZipFile(source / "tricky.zip", "w") as archive, tarfile.open(source / "tricky.tar", "w") as tar:
        for name in tricks:
            data = encoded(grey(9))
            archive.writestr(name, data)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    for name in ("tricky.zip", "tricky.tar"):
        for streaming in (False, True):
            stream = load_image_dataset(source / name, streaming=streaming)
            columns = find_columns(stream)
            rows = StreamingRows({"reconstruct": stream}, {"reconstruct": columns}, square, on_bad_image="skip")
            assert {grey_of(row) for [row] in rows} == {9}
    outside = [path for path in tmp_path.rglob("*.png") if (tmp_path / "cache") not in path.parents]
    assert outside == []


def test_files_that_are_not_read_are_named(tmp_path, caplog):
    folder = tmp_path / "photos"
    folder.mkdir()
    grey(1).save(folder / "good.png")
    (folder / "notes.txt").write_text("hello")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with caplog.at_level(logging.WARNING):
        assert len(load_image_dataset(folder)) == 1
    assert "notes.txt" in caplog.text and "gone.png" in caplog.text and "good.png" not in caplog.text


# --- columns ---


def test_columns_are_found_by_type_and_by_name():
    image = datasets.Image()
    text, conversation = (
        datasets.Value("string"),
        [{"from": datasets.Value("string"), "value": datasets.Value("string")}],
    )

    def found(**features):
        empty = {name: [] for name in features}
        return find_columns(Dataset.from_dict(empty, features=datasets.Features(features)))

    assert found(picture_of_a_cat=image) == Columns("picture_of_a_cat")
    assert found(mask=image, image=image) == Columns("image")
    assert found(image=text, caption=text) == Columns("image", "caption")
    assert found(x=image, text=text, conversations=conversation) == Columns("x", "text", "conversations")
    assert found(x=image, text=datasets.Value("int64")) == Columns("x")


def test_column_errors_list_the_columns():
    features = datasets.Features(
        {"left": datasets.Image(), "right": datasets.Image(), "label": datasets.Value("int64")}
    )
    dataset = Dataset.from_dict({"left": [], "right": [], "label": []}, features=features)
    for options in ({}, {"image_column": "image"}, {"image_column": "label"}, {"caption_column": "words"}):
        with pytest.raises(ValueError, match=r"left \(Image\), right \(Image\), label \(int64\)"):
            find_columns(dataset, **options)
    assert find_columns(dataset, image_column="right").image == "right"
    with pytest.raises(ValueError, match=r"no image column.*label \(int64\)"):
        find_columns(dataset.select_columns("label"))


def test_a_task_that_needs_text_is_refused_without_a_column_of_it():
    dataset = Dataset.from_dict({"image": [grey(0)]})
    for task in ("caption", "generate"):
        with pytest.raises(ValueError, match=task):
            RowDataset({task: dataset}, {task: Columns("image")})
        with pytest.raises(ValueError, match=task):
            StreamingRows({task: dataset}, {task: Columns("image")}, square)


# --- sizes ---


def test_sizes_come_from_columns_or_upright_headers():
    dataset = Dataset.from_dict({"image": [grey(0, (7, 5))], "width": [70], "height": [50]})
    assert row_sizes(dataset, "image") == [(70, 50)]
    assert row_sizes(dataset.remove_columns("width"), "image") == [(7, 5)]
    data, size, _ = usable()["sideways.jpg"]
    assert row_sizes(Dataset.from_dict({"image": [data]}), "image") == [size]


def test_sizes_are_read_once(tmp_path):
    folder = write_folder(tmp_path / "photos")
    first = load_image_dataset(folder)
    sizes = row_sizes(first, "image")
    again = load_image_dataset(folder)
    shutil.rmtree(folder)
    assert row_sizes(again, "image") == sizes


def test_unreadable_headers_are_named_or_counted_as_square(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"junk")
    grey(0, (40, 20)).save(tmp_path / "good.png")
    dataset = Dataset.from_dict({"image": [str(tmp_path / "good.png"), str(tmp_path / "bad.png")]})
    with pytest.raises(ImageError, match=r"1 of 2.*\n.*row 1 \(.*bad\.png\)"):
        row_sizes(dataset, "image")
    assert row_sizes(dataset, "image", on_bad_image="skip") == [(40, 20), (1, 1)]


# --- order ---


def targets_of(rows: int, seed: int = 0) -> list[tuple[int, int]]:
    return [SIZES[index] for index in np.random.default_rng(seed).integers(0, 3, rows)]


TASKS = {"reconstruct": targets_of(37), "caption": targets_of(11, seed=1)}


def sampler(**options) -> TaskBatchSampler:
    options = {"weights": {"reconstruct": 2, "caption": 2}, "batch_size": 4, "instruction_dropout": 0.3, **options}
    return TaskBatchSampler(options.pop("targets", TASKS), SamplingPlan(**options))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("processes", [2, 4])
def test_with_targets_of_one_size_several_processes_draw_exactly_what_one_draws(processes, drop_last, shuffle):
    targets = {"reconstruct": [SQUARE] * 37, "caption": [SQUARE] * 11}
    for epoch in (0, 3):
        options = {"targets": targets, "shuffle": shuffle, "drop_last": drop_last, "seed": 5}
        alone = sampler(**options)
        parts = [
            sampler(batch_size=4 // processes, num_processes=processes, process_index=index, **options)
            for index in range(processes)
        ]
        for each in (alone, *parts):
            each.set_epoch(epoch)
        assert {len(part) for part in parts} == {len(alone)}
        for whole, *shares in zip(alone, *parts, strict=True):
            assert all(shares)
            joined = [drawn for share in shares for drawn in share]
            assert [drawn for drawn in joined if not drawn.repeated] == whole
            assert len(joined) == max(len(whole), processes)
            if len(whole) == 4:
                assert joined == whole


def official_sizes(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """`count` different target sizes of about a megapixel, multiples of 16."""
    sides = [(height, width) for height in range(512, 1040, 16) for width in range(512, 1040, 16)]
    return [sides[index] for index in np.random.default_rng(seed).permutation(len(sides))[:count]]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("rows", [1000, 1203])
def test_eight_processes_and_300_sizes_take_every_row_once(rows, batch_size):
    sizes = official_sizes(300)
    targets = [sizes[index] for index in np.random.default_rng(1).integers(0, 300, rows)]
    options = {"targets": {"reconstruct": targets}, "weights": {"reconstruct": 1}, "batch_size": batch_size}
    parts = [sampler(num_processes=8, process_index=index, **options) for index in range(8)]
    for epoch in (0, 1):
        for each in parts:
            each.set_epoch(epoch)
        steps = list(zip(*parts, strict=True))
        assert len(steps) == len(parts[0])
        taken = Counter(drawn.row for step in steps for share in step for drawn in share)
        repeated = -rows % 8 if batch_size == 1 else 0  # of single rows, there is not one for every process
        assert sum(taken.values()) == rows + repeated and set(taken) == set(range(rows))
        for step in steps:
            for share in step:
                assert 1 <= len(share) <= batch_size and len({drawn.size for drawn in share}) == 1
                for drawn in share:
                    (height, width), (asked_height, asked_width) = drawn.size, targets[drawn.row]
                    area = asked_height * asked_width
                    assert abs(height * width - area) <= (0.03 if batch_size > 1 else 0.0) * area
                    assert abs(height - asked_height) <= 0.03 * asked_height
    if batch_size > 1:  # sharing is what makes batches of many sizes worthwhile
        assert sum(map(len, parts[0])) / len(parts[0]) > 0.75 * batch_size


def test_evaluation_keeps_every_target_at_its_own_size():
    targets = [(512, 1024), (512, 1008), (512, 1024)]
    options = {"targets": {"reconstruct": targets}, "weights": {"reconstruct": 1}, "batch_size": 3}
    assert [[drawn.row for drawn in batch] for batch in sampler(shuffle=False, **options)] == [[0, 2], [1]]
    assert [[drawn.size for drawn in batch] for batch in sampler(**options)] == [[(512, 1024)] * 3]


def test_a_pass_ends_by_splitting_micro_batches_before_it_repeats_any():
    def rows(steps):
        return [[list(part.rows) for part in step] for step in steps]

    parts = [MicroBatch(SQUARE, [0, 1, 2, 3]), MicroBatch(SQUARE, [4, 5]), MicroBatch(SQUARE, [6])]
    assert [list(part.rows) for part in split_to(parts, 4)] == [[0, 1], [2, 3], [4, 5], [6]]
    assert rows(into_steps(parts[:2], 2, True)) == [[[0, 1, 2, 3], [4, 5]]]
    assert rows(into_steps(parts[::-1], 2, True)) == [[[6], [4, 5]], [[0, 1], [2, 3]]]  # within the last step
    assert rows(into_steps(parts, 2, True)) == [[[0, 1], [2, 3]], [[4, 5], [6]]]  # or with the step before
    assert rows(into_steps(parts, 2, False)) == [[[0, 1, 2, 3], [4, 5]], [[6], [6]]]
    assert rows(into_steps(parts[2:], 2, True)) == [[[6], [6]]]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_of_several_sizes_two_processes_draw_what_one_accumulates(batch_size):
    targets = {"reconstruct": targets_of(36)}
    options = {"targets": targets, "weights": {"reconstruct": 1}, "batch_size": batch_size, "seed": 5}
    alone = list(sampler(**options))
    halves = zip(*[list(sampler(num_processes=2, process_index=index, **options)) for index in (0, 1)], strict=True)
    joined = [share for step in halves for share in step]
    assert joined[: len(alone) // 2 * 2 - 2] == alone[: len(alone) // 2 * 2 - 2]


def test_a_micro_batch_has_one_task_and_one_size_and_every_sample_its_own_instruction():
    batches = list(sampler())
    for batch in batches:
        assert len({(drawn.task, drawn.size) for drawn in batch}) == 1
        assert all(TASKS[drawn.task][drawn.row] == drawn.size for drawn in batch)
    assert max(len({drawn.instruction for drawn in batch}) for batch in batches) == 4
    crops = [drawn.crop for batch in batches for drawn in batch]
    assert len(set(crops)) == len(crops) and 0 <= min(crops) < 0.2 and 0.8 < max(crops) < 1


def test_an_epoch_is_every_reconstruct_row_once_in_the_weights_pattern():
    batches = list(sampler())
    rows = Counter(drawn.row for batch in batches for drawn in batch if drawn.task == "reconstruct")
    assert rows == dict.fromkeys(range(37), 1)
    pattern = ["reconstruct", "reconstruct", "caption", "caption"]
    assert [batch[0].task for batch in batches] == (pattern * len(batches))[: len(batches)]
    assert batches[-1][0].task == "reconstruct" or len(batches) % 4 == 0


def test_other_tasks_go_on_where_the_last_epoch_stopped():
    each = sampler(targets={"reconstruct": [SQUARE] * 8, "caption": [SQUARE] * 12}, batch_size=2)
    drawn = []
    for epoch in range(3):
        each.set_epoch(epoch)
        drawn += [one.row for batch in each for one in batch if one.task == "caption"]
    assert len(drawn) == 24
    assert sorted(drawn[:12]) == sorted(drawn[12:]) == list(range(12))
    assert drawn[:12] != drawn[12:]


def test_without_reconstruct_the_longest_task_makes_the_epoch():
    each = sampler(
        targets={"caption": [SQUARE] * 3, "generate": [SQUARE] * 10},
        weights={"caption": 1, "generate": 1},
        batch_size=2,
    )
    rows = Counter(one.row for batch in each for one in batch if one.task == "generate")
    assert rows == dict.fromkeys(range(10), 1)
    assert len(list(each)) == len(each) == 10


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 16, 31])
@pytest.mark.parametrize(
    "weights", [{"reconstruct": 1}, {"reconstruct": 3, "caption": 1}, {"caption": 2, "generate": 1}]
)
def test_the_length_is_exact(rows, weights):
    for drop_last in (False, True):
        targets = {task: targets_of(rows + 6, seed=rows) for task in weights}
        each = sampler(targets=targets, weights=weights, batch_size=2, drop_last=drop_last)
        for epoch in range(3):
            each.set_epoch(epoch)
            batches = list(each)
            assert len(batches) == len(each)
            assert not drop_last or {len(batch) for batch in batches} == {2}


def test_epochs_differ_and_each_is_reproduced():
    def epochs(each, numbers):
        result = []
        for number in numbers:
            each.set_epoch(number)
            result.append(list(each))
        return result

    first, second = epochs(sampler(seed=1), (0, 1))
    assert first != second
    assert epochs(pickle.loads(pickle.dumps(sampler(seed=1))), (1, 0)) == [second, first]
    assert epochs(sampler(seed=2), (0,)) != [first]


def test_seeds_never_repeat():
    seeds = []
    for seed in range(3):
        each = sampler(seed=seed)
        for epoch in range(5):
            each.set_epoch(epoch)
            seeds += [drawn.seed for batch in each for drawn in batch]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)  # a CPU generator looks at these bits only


def test_evaluation_draws_depend_on_the_row_alone():
    def draws(**options):
        each = sampler(shuffle=False, weights={"reconstruct": 1}, **options)
        each.set_epoch(options.get("batch_size", 0))
        return {drawn.row: drawn for batch in each for drawn in batch}

    assert draws() == draws(batch_size=1) == draws(batch_size=3, instruction_dropout=1.0)
    assert len(draws()) == 37
    assert len({drawn.seed for drawn in draws().values()}) == 37
    assert {(drawn.crop, drawn.dropped) for drawn in draws().values()} == {(None, False)}


def test_instructions_vary_and_texts_are_dropped_with_their_probability():
    targets = dict.fromkeys(("reconstruct", "caption", "generate"), [SQUARE] * 600)

    def drawn(task, **options):
        each = sampler(targets=targets, weights=dict.fromkeys(targets, 1), batch_size=5, **options)
        return [sample for batch in each for sample in batch if sample.task == task]

    def dropped(task, **options):
        return sum(sample.dropped for sample in drawn(task, **options))

    assert len({sample.instruction for sample in drawn("reconstruct")}) > 150
    assert len({sample.instruction for sample in drawn("caption")}) > 10
    assert all(sample.instruction for task in ("reconstruct", "caption") for sample in drawn(task))
    options = {"instruction_dropout": 0.25, "caption_dropout": 0.1}
    assert 110 < dropped("reconstruct", **options) < 190 and 35 < dropped("generate", **options) < 90
    assert dropped("caption", **options) == 0
    assert dropped("reconstruct", instruction_dropout=0.0) == 0 == dropped("generate", caption_dropout=0.0)
    assert dropped("reconstruct", instruction_dropout=1.0) == 600 == dropped("generate", caption_dropout=1.0)
    mixed = [{s.dropped for s in batch} for batch in sampler(targets=targets, weights={"reconstruct": 1}, **options)]
    assert {True, False} in mixed
    choices = {"reconstruct": ["Draw it."], "caption": ["What?"]}
    for task, text in (("reconstruct", "Draw it."), ("caption", "What?")):
        assert {sample.instruction for sample in drawn(task, instructions=choices)} == {text}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"generate": 1}}, "'generate' has weight 1 but no rows"),
        ({"weights": {"paint": 1}}, "paint"),
        ({"weights": {"reconstruct": 0.5}}, "whole numbers"),
        ({"weights": {"reconstruct": 0}}, "positive weight"),
        ({"batch_size": 64, "drop_last": True}, "drop_last"),
        ({"num_processes": 2, "process_index": 2}, "process 2 of 2"),
        ({"instruction_dropout": 1.5}, "probability"),
        ({"caption_dropout": -0.5}, "caption_dropout is a probability"),
    ],
)
def test_impossible_samplers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sampler(**options)


# --- rows ---


@pytest.fixture
def photos(tmp_path):
    """Rows 0…5, of which 1 is junk, 2 is cut off and 5 is missing."""
    files = []
    for index in range(6):
        files.append(tmp_path / f"photo{index}.png")
        noise(20, 20, seed=index).save(files[-1])
    files[1].write_bytes(b"junk")
    files[2].write_bytes(files[2].read_bytes()[:300])
    files[5].unlink()
    return Dataset.from_dict({"image": [str(file) for file in files], "text": [f"caption {i}" for i in range(6)]})


def rows_of(dataset: Dataset, task: str = "reconstruct", **options) -> RowDataset:
    return RowDataset({task: dataset}, {task: find_columns(dataset)}, **options)


@pytest.mark.parametrize("row", [1, 2, 5])
def test_a_bad_image_is_an_error_with_row_and_file(photos, row):
    with pytest.raises(ImageError, match=rf"row {row} \(.*photo{row}\.png\)"):
        rows_of(photos)[draw(row)]


def test_skipped_images_are_replaced_by_rows_drawn_from_all(tmp_path):
    noise(20, 20).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"junk")
    names = ["bad"] * 40 + ["good"] * 20  # a damaged shard, and one that is not
    texts = [f"caption {index}" for index in range(60)]
    dataset = Dataset.from_dict({"image": [str(tmp_path / f"{name}.png") for name in names], "text": texts})
    rows = rows_of(dataset, "generate", on_bad_image="skip")
    stand_ins = Counter(rows[draw(row, "generate")]["text"] for row in range(40))
    assert len(stand_ins) > 12 and max(stand_ins.values()) < 8
    result = rows[draw(3, "generate")]
    listed = [int(problem.split()[1]) for problem in result["skipped"]]
    assert listed[0] == 3 and len(set(listed)) == len(listed) and max(listed) < 40
    assert rows[draw(3, "generate", seed=9)]["text"] == result["text"]
    assert rows[draw(50, "generate")]["text"] == "caption 50"


def test_a_dataset_of_bad_images_stops(photos):
    with pytest.raises(ImageError, match=r"None of 3 rows(.|\n)*photo1\.png(.|\n)*photo5\.png"):
        rows_of(photos.select([1, 2, 5]), on_bad_image="skip")[draw(0)]


def test_the_hostile_corpus_is_used_or_reported_by_name(tmp_path):
    good, bad = write_corpus(tmp_path / "corpus")
    dataset = load_image_dataset(tmp_path / "corpus")
    assert len(dataset) == len(good | bad)
    sizes = row_sizes(dataset, "image", on_bad_image="skip")
    decoded, used, reported = rows_of(dataset), set(), set()
    for index, size in enumerate(sizes):
        try:
            row = decoded[draw(index)]
            assert row["image"].size == size and row["image"].mode == "RGB"
            used.add(row["source"].rpartition("/")[2].rstrip(")"))
        except ImageError as error:
            reported.add(str(error).partition(")")[0].rpartition("/")[2])
    assert (used, reported) == (good, bad)


def test_captions_and_conversations_keep_every_turn_and_their_white_space():
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": " A cat.\n"}]
    later = [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "No."}]
    dataset = Dataset.from_dict(
        {"image": [grey(0)] * 3, "text": ["a", " b\n", "  "], "conversations": [turns + later, [], []]}
    )
    caption, generate = rows_of(dataset, "caption"), rows_of(dataset, "generate")
    assert caption[draw(0, "caption")]["text"] == [
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": " A cat.\n"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "No."},
    ]
    assert [caption[draw(i, "caption")]["text"] for i in (1, 2)] == [" b\n", None]
    assert [generate[draw(i, "generate")]["text"] for i in range(3)] == ["a", " b\n", None]
    assert rows_of(dataset)[draw(0)]["text"] is None


def test_messages_with_parts_and_lists_of_captions():
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    dataset = Dataset.from_dict({"image": [grey(0)], "messages": [messages], "captions": [["a", "b", "c"]]})
    row = rows_of(dataset, "caption")[draw(0, "caption")]
    assert [message["role"] for message in row["text"]] == ["system", "user", "assistant"]
    assert row["text"][1]["content"] == "<image>\nWhat is it?"
    generate = rows_of(dataset, "generate")
    assert [generate[draw(0, "generate", seed)]["text"] for seed in range(4)] == ["a", "b", "c", "a"]


@pytest.mark.parametrize(
    "captions",
    [json.dumps({"short": "a", "long": ["b", "c"]}), {"short": "a", "middle": "b", "long": "c"}],
    ids=["json", "object"],
)
def test_captions_in_objects_are_drawn_by_the_seed(captions):
    dataset = Dataset.from_dict({"image": [grey(0)], "captions": [captions]})
    generate = RowDataset({"generate": dataset}, {"generate": Columns("image", "captions")})
    assert [generate[draw(0, "generate", seed)]["text"] for seed in range(4)] == ["a", "b", "c", "a"]


def test_a_caption_may_begin_with_a_brace():
    dataset = Dataset.from_dict({"image": [grey(0)], "text": ["{curly} hair"]})
    assert rows_of(dataset, "generate")[draw(0, "generate")]["text"] == "{curly} hair"


def test_turns_of_unknown_roles_are_errors_with_the_row():
    dataset = Dataset.from_dict({"image": [grey(0)], "messages": [[{"role": "tool", "content": "x"}]]})
    with pytest.raises(ValueError, match=r"row 0.*role 'tool'"):
        rows_of(dataset, "caption")[draw(0, "caption")]


def conversations(answers: list[str], images: list) -> Dataset:
    turns = [[{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}] for answer in answers]
    return Dataset.from_dict({"image": images, "conversations": turns})


def test_conversations_a_family_cannot_learn_from_are_replaced_and_listed():
    dataset = conversations(["a", "void", "c"], [grey(0), grey(1), grey(2)])
    rows = rows_of(
        dataset, "caption", conversation_problem=lambda turns: (turns[1]["content"] == "void" and "void") or None
    )
    row = rows[draw(1, "caption")]
    assert (row["text"][1]["content"], grey_of(row)) in (("a", 0), ("c", 2))
    assert row["skipped"] == ["row 1: the conversation is left out: void."]


def test_conversations_without_an_image_are_left_out_and_counted(caplog):
    images = [encoded(grey(0)), None, encoded(grey(2)), None]
    dataset = conversations(list("abcd"), [image and {"bytes": image, "path": None} for image in images])
    columns = find_columns(dataset)
    with caplog.at_level(logging.WARNING):
        kept = with_images(dataset, columns)
    assert len(kept) == 2 and "Left out 2 of 4 conversations" in caplog.text
    caption = RowDataset({"caption": kept}, {"caption": columns})
    assert [caption[draw(i, "caption")]["text"][1]["content"] for i in range(2)] == ["a", "c"]
    with pytest.raises(ValueError, match="None of 1 conversations has an image"):
        with_images(dataset.select([1]), columns)
    stream = dataset.to_iterable_dataset()
    rows = [row for [row] in StreamingRows({"caption": stream}, {"caption": columns}, square)]
    assert sorted(row["text"][1]["content"] for row in rows) == ["a", "c"]
    assert sum("no image" in problem for row in rows for problem in row["skipped"]) >= 1


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
def test_llava_as_published_loads_under_its_image_root(tmp_path, streaming):
    """Ids of two types, rows without an image, and paths relative to a folder of images."""
    (tmp_path / "images" / "coco").mkdir(parents=True)
    rows = []
    for index in range(3):
        grey(index).save(tmp_path / "images" / "coco" / f"{index}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"answer {index}"}]
        rows.append({"id": f"a{index}", "image": f"coco/{index}.png", "conversations": turns})
    rows.insert(1, {"id": 7, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]})
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    dataset = load_image_dataset(tmp_path / "llava.json", streaming=streaming)
    columns = find_columns(dataset)
    dataset = with_images(under_root(dataset, columns, tmp_path / "images"), columns)
    if streaming:
        decoded = [row for [row] in StreamingRows({"caption": dataset}, {"caption": columns}, square)]
    else:
        assert dataset["id"] == ["a0", "a1", "a2"]
        caption = RowDataset({"caption": dataset}, {"caption": columns})
        decoded = [caption[draw(index, "caption")] for index in range(len(dataset))]
    assert sorted((grey_of(row), row["text"][1]["content"]) for row in decoded) == [
        (index, f"answer {index}") for index in range(3)
    ]


def test_an_image_path_cannot_leave_the_root(tmp_path):
    (tmp_path / "images").mkdir()
    grey(0).save(tmp_path / "secret.png")
    dataset = Dataset.from_dict({"image": ["../secret.png"]})
    with pytest.raises(ValueError, match="leads out of image_root"):
        under_root(dataset, Columns("image"), tmp_path / "images")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        under_root(dataset, Columns("image"), tmp_path / "nowhere")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataloader_resumes_exactly_by_skipping(workers):
    dataset = Dataset.from_dict({"image": [grey(i) for i in range(37)]})
    rows = rows_of(dataset)

    def loader():
        each = sampler(targets={"reconstruct": TASKS["reconstruct"]}, weights={"reconstruct": 1}, seed=3)
        each.set_epoch(2)
        return DataLoader(rows, batch_sampler=each, num_workers=workers, collate_fn=contents)

    whole = list(loader())
    assert sorted(value for batch in whole for _, value in batch) == list(range(37))
    assert list(accelerate.skip_first_batches(loader(), 5)) == whole[5:]


def contents(rows: list[dict]) -> list[tuple[Draw, int]]:
    return [(row["draw"], grey_of(row)) for row in rows]


# --- streams ---


def stream_of(values, bad=(), cut=()) -> IterableDataset:
    """Encoded grey images of three shapes in two shards; `bad` are junk, `cut` lose their pixels behind the header."""

    def examples(shards):
        for shard in shards:
            for value in shard:
                data = encoded(grey(value, [(20, 20), (40, 20), (20, 40)][value % 3]))
                data = b"junk" if value in bad else data[:45] if value in cut else data
                yield {"image": {"bytes": data, "path": f"{value}.png"}, "text": f"caption {value}"}

    values = list(values)
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return IterableDataset.from_generator(
        examples, gen_kwargs={"shards": [values[::2], values[1::2]]}, features=features
    )


def streaming_rows(stream, tasks=("reconstruct",), **options) -> StreamingRows:
    reading = {name: options.pop(name) for name in ("endless", "buffer_size", "on_bad_image") if name in options}
    target_size = options.pop("target_size", of_its_shape)
    plan = SamplingPlan(**{"weights": dict.fromkeys(tasks, 1), **options})
    columns = dict.fromkeys(tasks, Columns("image", "text"))
    return StreamingRows(dict.fromkeys(tasks, stream), columns, target_size, plan, **reading)


def test_streams_are_split_over_processes_and_workers_without_loss_or_repetition():
    def batches(workers=0, **options):
        rows = streaming_rows(stream_of(range(37)), ("reconstruct", "caption"), seed=3, buffer_size=8, **options)
        rows.set_epoch(1)
        return list(DataLoader(rows, batch_size=None, collate_fn=contents, num_workers=workers))

    whole = batches(batch_size=4)
    seen = Counter(value for batch in whole for drawn, value in batch if drawn.task == "reconstruct")
    assert seen == dict.fromkeys(range(37), 1)
    assert {len({(drawn.task, drawn.size) for drawn, _ in batch}) for batch in whole} == {1}
    for workers in (0, 2):
        halves = [batches(workers, batch_size=2, num_processes=2, process_index=index) for index in (0, 1)]
        drawn = [(drawn, value) for half in halves for batch in half for drawn, value in batch]
        seen = Counter(value for drawn, value in drawn if drawn.task == "reconstruct")
        assert seen == dict.fromkeys(range(37), 1)
        assert len(halves[0]) == len(halves[1]) and all(map(len, halves[0] + halves[1]))
    assert len({drawn.seed for batch in whole for drawn, _ in batch}) == sum(map(len, whole))


def test_a_stream_of_one_size_gives_several_processes_exactly_what_it_gives_one():
    def batches(workers=0, **options):
        rows = streaming_rows(stream_of(range(37)), seed=3, buffer_size=8, target_size=square, **options)
        return list(DataLoader(rows, batch_size=None, collate_fn=contents, num_workers=workers))

    whole = batches(batch_size=4)
    for workers in (0, 2):
        halves = [batches(workers, batch_size=2, num_processes=2, process_index=index) for index in (0, 1)]
        joined = [[row for row in left + right if not row[0].repeated] for left, right in zip(*halves, strict=True)]
        assert joined == whole


@pytest.mark.parametrize("batch_size", [1, 4])
def test_eight_processes_take_every_row_of_a_stream_of_300_sizes_once(batch_size):
    sizes = official_sizes(300)

    def target_size(width, height):
        return sizes[width - 1]  # widths stand for shapes

    def examples():
        for width in np.random.default_rng(1).integers(0, 300, 800):
            yield {"image": {"bytes": encoded(grey(0, (int(width) + 1, 8))), "path": None}}

    stream = IterableDataset.from_generator(examples, features=datasets.Features({"image": datasets.Image()}))
    taken, steps = Counter(), []
    for index in range(8):
        plan = SamplingPlan({"reconstruct": 1}, batch_size, num_processes=8, process_index=index)
        rows = StreamingRows({"reconstruct": stream}, {"reconstruct": Columns("image")}, target_size, plan)
        shares = [[row["draw"] for row in batch] for batch in rows]
        steps.append(len(shares))
        for share in shares:
            assert len({drawn.size for drawn in share}) == 1
            taken.update(drawn.row for drawn in share)
    assert len(set(steps)) == 1
    assert taken == dict.fromkeys(range(800), 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_each_epoch_of_a_stream_is_reshuffled_and_reproducible(workers):
    rows = streaming_rows(stream_of(range(20)), batch_size=2)
    loader = DataLoader(
        rows, batch_size=None, collate_fn=contents, num_workers=workers, persistent_workers=workers > 0
    )
    epochs = []
    for epoch in (0, 1, 0):
        rows.set_epoch(epoch)
        epochs.append(list(loader))
    assert epochs[0] == epochs[2] != epochs[1]
    for epoch in epochs:
        assert sorted(value for batch in epoch for _, value in batch) == list(range(20))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_endless_stream_resumes_exactly_in_a_later_pass(workers):
    rows = streaming_rows(stream_of(range(20)), batch_size=2, endless=True)

    def loader():
        return DataLoader(rows, batch_size=None, collate_fn=contents, num_workers=workers)

    per_pass = sum(1 for _ in streaming_rows(stream_of(range(20)), batch_size=2))
    whole = list(islice(loader(), 3 * per_pass))
    passes = [whole[start : start + per_pass] for start in range(0, len(whole), per_pass)]
    for one in passes:
        assert sorted(value for batch in one for _, value in batch) == list(range(20))
    assert passes[0] != passes[1]
    assert len({drawn.seed for batch in whole for drawn, _ in batch}) == 60
    skipped = per_pass + 3
    assert list(islice(accelerate.skip_first_batches(loader(), skipped), 5)) == whole[skipped : skipped + 5]


def test_an_unshuffled_stream_keeps_its_order_and_its_seeds():
    def draws(epoch, batch_size):
        rows = streaming_rows(stream_of(range(20)), shuffle=False, batch_size=batch_size)
        rows.set_epoch(epoch)
        return {value: drawn.seed for batch in rows for drawn, value in contents(batch)}

    assert draws(0, 2) == draws(4, 3)
    assert len(set(draws(0, 2).values())) == 20


def test_bad_images_in_a_stream_are_named():
    for options in ({"bad": {7}}, {"cut": {7}}):
        with pytest.raises(ImageError, match=r"row \d+ \(7\.png\)"):
            list(streaming_rows(stream_of(range(12), **options)))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_bad_images_in_a_stream_are_skipped_and_listed(batch_size):
    stream = stream_of(range(12), bad={0, 7}, cut={1, 5, 11})
    rows = [row for batch in streaming_rows(stream, batch_size=batch_size, on_bad_image="skip") for row in batch]
    good = {2, 3, 4, 6, 8, 9, 10}
    assert {grey_of(row) for row in rows} == good
    assert len(rows) == 10  # 12 less the two without a header
    problems = [problem for row in rows for problem in row["skipped"]]
    assert all(any(f"({value}.png)" in problem for problem in problems) for value in (0, 7, 1, 5, 11))


@pytest.mark.parametrize("options", [{"bad": set(range(9))}, {"cut": set(range(9))}])
def test_a_stream_of_bad_images_stops(options):
    with pytest.raises(ImageError, match=r"\d\.png"):
        list(streaming_rows(stream_of(range(9), **options), on_bad_image="skip"))


def test_an_empty_stream_stops():
    with pytest.raises(ImageError, match="no micro-batch"):
        list(streaming_rows(stream_of([])))
