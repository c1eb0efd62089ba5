"""Runs on every kind of source, as a data set and as a stream, are killed again and again and end as if they were not."""

import io
import json
import tarfile
import zipfile

import datasets
import pytest

from tests.reliability.run import dataset
from tests.reliability.test_kills import survive


def encoded_rows():
    """Names, encoded images and captions of the runs' usual rows."""
    rows = dataset(23).cast_column("image", datasets.Image(decode=False))
    return [(f"{index:03d}", row["image"]["bytes"], row["caption"]) for index, row in enumerate(rows)]


def as_folder(folder):
    for name, data, caption in encoded_rows():
        (folder / f"{name}.png").write_bytes(data)
        (folder / f"{name}.txt").write_text(caption)


def as_tar(folder, shards=4):
    for shard in range(shards):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for name, data, caption in encoded_rows()[shard::shards]:
                for suffix, contents in (("png", data), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{name}.{suffix}")
                    member.size = len(contents)
                    archive.addfile(member, io.BytesIO(contents))


def as_zip(folder):
    with zipfile.ZipFile(folder / "all.zip", "w") as archive:
        for name, data, caption in encoded_rows():
            archive.writestr(f"{name}.png", data)
            archive.writestr(f"{name}.txt", caption)


def as_parquet(folder, shards=4):
    for shard in range(shards):
        dataset(23).shard(shards, shard).to_parquet(folder / f"{shard}.parquet", batch_size=2)


def as_lines(folder):
    (folder / "images").mkdir()
    lines = []
    for name, data, caption in encoded_rows():
        (folder / "images" / f"{name}.png").write_bytes(data)
        lines.append(json.dumps({"image": f"{name}.png", "text": caption}))
    (folder / "rows.jsonl").write_text("\n".join(lines))


def as_saved(folder):
    dataset(23).save_to_disk(folder)


SOURCES = [as_folder, as_tar, as_zip, as_parquet, as_lines, as_saved]


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("write", SOURCES, ids=lambda write: write.__name__.removeprefix("as_"))
def test_random_kills_are_survived(tmp_path, write, streaming, record_property):
    folder = tmp_path / "source"
    folder.mkdir()
    write(folder)
    options = {"dataset_name": str(folder), "dataset_streaming": streaming, "dataloader_num_workers": 2}
    options |= {"text_to_image_weight": 0.5, "max_steps": 16}
    killed_at = survive(tmp_path, options, kills=12, seed=len(write.__name__) + streaming)
    record_property("kills", killed_at)
    assert {step for step, _ in killed_at} > {0}, "no kill fell behind the first checkpoint"
