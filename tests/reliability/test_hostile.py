"""More than 200 hostile files through every loader: each is used, or reported by name, and nothing is written beside."""

import io
import json
import os
import re
import stat
import sys
import tarfile
import zipfile

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature

from reca_trainer.data import Draw, RowDataset, SamplingPlan, StreamingBatches, find_columns, load_image_dataset
from reca_trainer.images import ImageError
from tests.hostile_images import encoded, half_written, noise, unusable, usable

SIZE = (32, 32)
IN_ORDER = SamplingPlan({"reconstruct": 1}, shuffle=False)


def target_size(width: int, height: int) -> tuple[int, int]:
    return SIZE


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache" / "downloads")
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", tmp_path / "cache" / "extracted")


def corpus() -> list[tuple[str, bytes, bool | None]]:
    """`(name, contents, usable?)`; `None`: either, as long as it is said. The names start with their number."""
    files = [(name, data, True) for name, (data, _, _) in usable().items()]
    files += [(name, data, False) for name, data in unusable().items()]
    rng = np.random.default_rng(0)
    picture = noise(40, 30)
    originals = {
        "png": encoded(picture),
        "jpg": encoded(picture, "JPEG"),
        "webp": encoded(picture, "WEBP"),
        "gif": encoded(picture, "GIF"),
        "bmp": encoded(picture, "BMP"),
        "tif": encoded(picture, "TIFF", compression="tiff_lzw"),
        "jp2": encoded(picture, "JPEG2000"),
        "ppm": encoded(picture, "PPM"),
    }
    for kind, data in originals.items():
        for percent in (1, 5, 20, 60, 95):
            files.append((f"cut{percent}.{kind}", data[: max(1, len(data) * percent // 100)], None))
        for attempt in range(12):
            damaged = np.frombuffer(data, np.uint8).copy()
            place = rng.integers(0, len(damaged) if attempt % 2 else 64, 1 + attempt)
            damaged[place] = rng.integers(0, 256, len(place))
            files.append((f"flipped{attempt}.{kind}", damaged.tobytes(), None))
        if kind not in ("bmp", "ppm"):
            files.append((f"half_written.{kind}", half_written(data), False))
        files.append((f"trailing.{kind}", data + b"\0" * 999 + b"<script>", True))
        files.append((f"misnamed_{kind}.{'png' if kind == 'jpg' else 'jpg'}", data, True))
        files.append((f"name with spaces, ünïcode & 'quotes' {kind}.{kind}", data, True))
    order = rng.permutation(len(files))  # a stream gives up where too many bad files follow one another
    return [(f"{index:04d}-{files[place][0]}", *files[place][1:]) for index, place in enumerate(order)]


def as_folder(folder, files):
    folder.mkdir()
    for name, data, _ in files:
        (folder / name).write_bytes(data)
    return folder


def as_zip(folder, files):
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for name, data, _ in files:
            archive.writestr(name, data)
    return folder.with_suffix(".zip")


def as_tar(folder, files):
    with tarfile.open(folder.with_suffix(".tar"), "w") as archive:
        for name, data, _ in files:
            member = tarfile.TarInfo(name[:4] + ".png")  # WebDataset makes a column of every suffix
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return folder.with_suffix(".tar")


def as_parquet(folder, files):
    features = Features({"image": ImageFeature(decode=False), "caption": Value("string")})
    images = [{"bytes": data, "path": name} for name, data, _ in files]
    Dataset.from_dict({"image": images, "caption": [""] * len(images)}, features=features).to_parquet(
        folder.with_suffix(".parquet")
    )
    return folder.with_suffix(".parquet")


def as_lines(folder, files):
    as_folder(folder, files)
    lines = "\n".join(json.dumps({"image": str(folder / name)}) for name, _, _ in files)
    folder.with_suffix(".jsonl").write_text(lines)
    return folder.with_suffix(".jsonl")


def as_saved(folder, files):
    dataset = Dataset.from_parquet(str(as_parquet(folder.with_name("temporary"), files)))
    dataset.save_to_disk(folder)
    return folder


LOADERS = [as_folder, as_zip, as_tar, as_parquet, as_lines, as_saved]


def number(text: str) -> int:
    return int(re.search(r"(?<!\d)(\d{4})(?=[-.])", text)[1])


def outcome(source, streaming: bool) -> tuple[set[int], set[int]]:
    """Numbers of the files that were used, and of those that were reported."""
    dataset = load_image_dataset(source, streaming=streaming)
    columns = find_columns(dataset)
    used, reported = set(), set()
    if streaming:
        rows = StreamingBatches(
            {"reconstruct": dataset}, {"reconstruct": columns}, target_size, IN_ORDER, on_bad_image="skip"
        )
        for [row] in rows:
            used.add(number(row.source))
            reported.update(map(number, row.skipped))
        return used - reported, reported
    rows = RowDataset({"reconstruct": dataset}, {"reconstruct": columns})
    for index in range(len(dataset)):
        try:
            row = rows[Draw("reconstruct", index, SIZE, 0, "")]
            assert row.image.mode == "RGB" and min(row.image.size) > 0
            used.add(number(row.source))
        except ImageError as error:
            reported.add(number(str(error)))
    return used, reported


@pytest.fixture
def writes():
    """Paths that this process opens for writing, makes or renames during the test."""
    paths, active = [], True

    def hook(event, args):
        if not active:
            return
        if event == "open" and isinstance(args[0], str) and args[2] is not None:
            if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                paths.append(args[0])
        elif event in ("os.mkdir", "os.rename", "os.symlink", "os.link"):
            paths.extend(path for path in args[:2] if isinstance(path, str))

    sys.addaudithook(hook)
    yield paths
    active = False


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
@pytest.mark.parametrize("write", LOADERS, ids=lambda write: write.__name__.removeprefix("as_"))
def test_every_hostile_file_is_used_or_reported(tmp_path, write, streaming, writes):
    files = corpus()
    assert len(files) >= 200
    source = write(tmp_path / "source", files)
    writes.clear()
    used, reported = outcome(source, streaming)
    assert used | reported == set(range(len(files))) and not used & reported
    wrong = [name for name, _, good in files if good is not None and good != (number(name) in used)]
    assert wrong == []
    outside = [path for path in writes if not path.startswith(str(tmp_path / "cache"))]
    assert [path for path in outside if not path.startswith(("/dev/", "/proc/"))] == []


def test_files_that_are_no_files(tmp_path):
    """Links, loops, pipes, devices and folders with the names of pictures."""
    folder = tmp_path / "photos"
    folder.mkdir()
    (tmp_path / "elsewhere.png").write_bytes(encoded(noise(20, 20)))
    (folder / "0000-good.png").write_bytes(encoded(noise(20, 20)))
    (folder / "0001-linked.png").symlink_to(tmp_path / "elsewhere.png")
    (folder / "0002-secret.png").symlink_to("/etc/passwd")
    (folder / "0003-loop.png").symlink_to(folder / "0003-loop.png")
    (folder / "0004-gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "0005-device.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "0006-pipe.png")
    (folder / "0007-folder.png").mkdir()
    (folder / "0008-forbidden.png").write_bytes(encoded(noise(20, 20)))
    (folder / "0008-forbidden.png").chmod(0)
    for streaming in (False, True):
        used, reported = outcome(folder, streaming)
        assert {0, 1} <= used <= {0, 1, 8}  # root may read what is forbidden
        assert 2 in reported and used | reported <= {0, 1, 2, 8}


TRICKS = [
    "../evil.png",
    "../../evil.png",
    "a/../../../evil.png",
    "/evil.png",
    "//evil.png",
    "..\\evil.png",
    "C:\\evil.png",
    "~/evil.png",
    "$HOME/evil.png",
    "`touch evil`.png",
    "evil.png\n.png",
    "-rf.png",
    "x" * 200 + ".png",
    "con.png",
    "a/b/c/d/e/f/deep.png",
    "good.png",
]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_members_of_archives_stay_inside(tmp_path, kind, streaming, writes):
    place = tmp_path / "a" / "b"
    place.mkdir(parents=True)
    source, data = place / f"tricky.{kind}", encoded(noise(20, 20))
    if kind == "zip":
        with zipfile.ZipFile(source, "w") as archive:
            for name in TRICKS:
                archive.writestr(name, data)
            link = zipfile.ZipInfo("link.png")
            link.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(link, "/etc/passwd")
            archive.writestr("bomb.png", bytes(50_000_000), zipfile.ZIP_DEFLATED)
    else:
        with tarfile.open(source, "w") as archive:
            for name in TRICKS:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            for index, type in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)):
                member = tarfile.TarInfo(f"special{index}.png")
                member.type, member.linkname = type, "/etc/passwd"
                archive.addfile(member)
    before = {path for path in tmp_path.rglob("*") if tmp_path / "cache" not in path.parents}
    writes.clear()
    stream = load_image_dataset(source, streaming=streaming)
    columns = {"reconstruct": find_columns(stream)}
    rows = StreamingBatches({"reconstruct": stream}, columns, target_size, IN_ORDER, on_bad_image="skip")
    assert sum(len(batch) for batch in rows) >= 1
    after = {path for path in tmp_path.rglob("*") if tmp_path / "cache" not in path.parents}
    assert after - before <= {tmp_path / "cache"}
    outside = [path for path in writes if not os.path.realpath(path).startswith(str(tmp_path / "cache"))]
    assert [path for path in outside if not path.startswith(("/dev/", "/proc/"))] == []


@pytest.mark.parametrize("path", ["/etc/passwd", "/dev/zero", "https://example.com/a.png", "s3://bucket/a.png", "\0"])
def test_tables_that_point_elsewhere_are_reported(tmp_path, path):
    (tmp_path / "lines.jsonl").write_text(json.dumps({"image": path}))
    dataset = load_image_dataset(tmp_path / "lines.jsonl")
    with pytest.raises(ImageError, match=re.escape(f"row 0 ({path})")):
        RowDataset({"reconstruct": dataset}, {"reconstruct": find_columns(dataset)})[
            Draw("reconstruct", 0, SIZE, 0, "")
        ]
