import io
import json
import logging
import multiprocessing
import shutil
import tarfile
import zipfile
from collections import Counter

import accelerate
import datasets
import pytest
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader

from reca_trainer.data import (
    Columns,
    Draw,
    RowDataset,
    SamplingPlan,
    StreamingBatches,
    TaskBatchSampler,
    find_columns,
    load_image_dataset,
    row_sizes,
    sizes,
)
from reca_trainer.data.columns import under_root, with_images
from reca_trainer.images import ImageError
from tests.hostile_images import encoded, noise, usable, write_corpus

SQUARE = (16, 16)


def square(width: int, height: int) -> tuple[int, int]:
    return SQUARE


@pytest.fixture(autouse=True)
def _separate_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def grey(value: int, size: tuple[int, int] = (20, 20)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def grey_of(row: dict) -> int:
    return row.image.getpixel((3, 3))[0]


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
        rows = [row for [row] in StreamingBatches({task: dataset}, {task: columns}, square)]
    else:
        assert row_sizes(dataset, columns.image) == [(20, 20)] * 6
        decoded = RowDataset({task: dataset}, {task: columns})
        rows = [decoded[draw(index, task)] for index in range(6)]
    assert sorted(map(grey_of, rows)) == list(range(6))
    if columns.caption:
        assert all(f"{grey_of(row)}" in row.text and row.text.startswith("caption") for row in rows)


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
            rows = StreamingBatches({"reconstruct": stream}, {"reconstruct": columns}, square, on_bad_image="skip")
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

    def columns_of(**features):
        empty = {name: [] for name in features}
        return find_columns(Dataset.from_dict(empty, features=datasets.Features(features)))

    assert columns_of(picture_of_a_cat=image) == Columns("picture_of_a_cat")
    assert columns_of(mask=image, image=image) == Columns("image")
    assert columns_of(image=text, caption=text) == Columns("image", "caption")
    assert columns_of(x=image, text=text, conversations=conversation) == Columns("x", "text", "conversations")
    assert columns_of(x=image, text=datasets.Value("int64")) == Columns("x")


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
            StreamingBatches({task: dataset}, {task: Columns("image")}, square)


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
    stand_ins = Counter(rows[draw(row, "generate")].text for row in range(40))
    assert len(stand_ins) > 12 and max(stand_ins.values()) < 8
    result = rows[draw(3, "generate")]
    listed = [int(problem.split()[1]) for problem in result.skipped]
    assert listed[0] == 3 and len(set(listed)) == len(listed) and max(listed) < 40
    assert rows[draw(3, "generate", seed=9)].text == result.text
    assert rows[draw(50, "generate")].text == "caption 50"


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
            assert row.image.size == size and row.image.mode == "RGB"
            used.add(row.source.rpartition("/")[2].rstrip(")"))
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
    assert caption[draw(0, "caption")].text == [
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": " A cat.\n"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "No."},
    ]
    assert [caption[draw(i, "caption")].text for i in (1, 2)] == [" b\n", None]
    assert [generate[draw(i, "generate")].text for i in range(3)] == ["a", " b\n", None]
    assert rows_of(dataset)[draw(0)].text is None


def test_messages_with_parts_and_lists_of_captions():
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    dataset = Dataset.from_dict({"image": [grey(0)], "messages": [messages], "captions": [["a", "b", "c"]]})
    row = rows_of(dataset, "caption")[draw(0, "caption")]
    assert [message["role"] for message in row.text] == ["system", "user", "assistant"]
    assert row.text[1]["content"] == "<image>\nWhat is it?"
    generate = rows_of(dataset, "generate")
    assert [generate[draw(0, "generate", seed)].text for seed in range(4)] == ["a", "b", "c", "a"]


@pytest.mark.parametrize(
    "captions",
    [json.dumps({"short": "a", "long": ["b", "c"]}), {"short": "a", "middle": "b", "long": "c"}],
    ids=["json", "object"],
)
def test_captions_in_objects_are_drawn_by_the_seed(captions):
    dataset = Dataset.from_dict({"image": [grey(0)], "captions": [captions]})
    generate = RowDataset({"generate": dataset}, {"generate": Columns("image", "captions")})
    assert [generate[draw(0, "generate", seed)].text for seed in range(4)] == ["a", "b", "c", "a"]


def test_blank_captions_among_several_are_not_drawn_and_others_than_texts_are_errors():
    cells = [json.dumps({"short": " ", "long": "a"}), json.dumps({"short": "a", "score": 3})]
    dataset = Dataset.from_dict({"image": [grey(0)] * 2, "captions": cells})
    generate = RowDataset({"generate": dataset}, {"generate": Columns("image", "captions")})
    assert [generate[draw(0, "generate", seed)].text for seed in range(3)] == ["a", "a", "a"]
    for seed in range(2):
        with pytest.raises(ValueError, match=r"row 1.* 'captions' is int, not text"):
            generate[draw(1, "generate", seed)]


def test_a_caption_may_begin_with_a_brace():
    dataset = Dataset.from_dict({"image": [grey(0)], "text": ["{curly} hair"]})
    assert rows_of(dataset, "generate")[draw(0, "generate")].text == "{curly} hair"


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
    assert (row.text[1]["content"], grey_of(row)) in (("a", 0), ("c", 2))
    assert row.skipped == ("row 1: the conversation is left out: void.",)


def test_conversations_without_an_image_are_left_out_and_counted(caplog):
    images = [encoded(grey(0)), None, encoded(grey(2)), None]
    dataset = conversations(list("abcd"), [image and {"bytes": image, "path": None} for image in images])
    columns = find_columns(dataset)
    with caplog.at_level(logging.WARNING):
        kept = with_images(dataset, columns)
    assert len(kept) == 2 and "Left out 2 of 4 conversations" in caplog.text
    caption = RowDataset({"caption": kept}, {"caption": columns})
    assert [caption[draw(i, "caption")].text[1]["content"] for i in range(2)] == ["a", "c"]
    with pytest.raises(ValueError, match="None of 1 conversations has an image"):
        with_images(dataset.select([1]), columns)
    stream = dataset.to_iterable_dataset()
    rows = [row for [row] in StreamingBatches({"caption": stream}, {"caption": columns}, square)]
    assert sorted(row.text[1]["content"] for row in rows) == ["a", "c"]
    assert sum("no image" in problem for row in rows for problem in row.skipped) >= 1


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
        decoded = [row for [row] in StreamingBatches({"caption": dataset}, {"caption": columns}, square)]
    else:
        assert dataset["id"] == ["a0", "a1", "a2"]
        caption = RowDataset({"caption": dataset}, {"caption": columns})
        decoded = [caption[draw(index, "caption")] for index in range(len(dataset))]
    assert sorted((grey_of(row), row.text[1]["content"]) for row in decoded) == [
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
        each = TaskBatchSampler(
            {"reconstruct": [SQUARE, (16, 32)] * 18 + [SQUARE]}, SamplingPlan({"reconstruct": 1}, 4)
        )
        each.set_epoch(2)
        return DataLoader(rows, batch_sampler=each, num_workers=workers, collate_fn=contents)

    whole = list(loader())
    assert sorted(value for batch in whole for _, value in batch) == list(range(37))
    assert list(accelerate.skip_first_batches(loader(), 5)) == whole[5:]


def contents(rows: list[dict]) -> list[tuple[Draw, int]]:
    return [(row.draw, grey_of(row)) for row in rows]


def test_processes_of_a_machine_read_each_header_once(tmp_path):
    """Those that come later wait for the first, and take what it wrote; `num_proc` divides the work and changes nothing."""
    path = write_parquet(tmp_path / "source")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=log_headers, args=(path, tmp_path / "log")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 6


def log_headers(path, log):
    size = sizes.image_size

    def logged(image, source):
        with open(log, "a") as file:
            print(source, file=file)
        return size(image, source)

    sizes.image_size = logged
    assert row_sizes(load_image_dataset(path), "img") == [(20, 20)] * 6


def test_sizes_read_by_several_processes_are_in_order(monkeypatch):
    monkeypatch.setattr(sizes, "ROWS_PER_PROCESS", 10)
    pictures = [{"bytes": encoded(grey(0, (index + 1, 5))), "path": None} for index in range(40)]
    dataset = Dataset.from_dict({"image": pictures})
    assert row_sizes(dataset, "image", num_proc=2) == [(index + 1, 5) for index in range(40)]
