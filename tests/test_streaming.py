"""Streams: every row once in a pass, by one reader; exact resume that reads little again; damaged shards are named."""

import io
import json
import logging
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from threading import Barrier

import accelerate
import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from PIL import Image

from reca_trainer.data import Columns, SamplingPlan, StreamingBatches, find_columns, load_image_dataset
from reca_trainer.data.stream_reader import shards_of
from reca_trainer.images import ImageError
from tests.hostile_images import encoded
from tests.test_sampling import SIZES, official_sizes

SQUARE = (16, 16)


@pytest.fixture(autouse=True)
def _separate_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def grey(value: int, size: tuple[int, int] = (20, 20)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def square(width: int, height: int) -> tuple[int, int]:
    return SQUARE


def of_its_shape(width: int, height: int) -> tuple[int, int]:
    """Three shapes of targets."""
    return SIZES[(width > height) + 2 * (height > width)]


def contents(rows) -> list:
    """Draws and grey values, as tests compare them."""
    return [(row.draw, row.image.getpixel((0, 0))[0], row.skipped) for row in rows]


def stream_of(values, shards=2, bad=(), cut=(), log=None) -> IterableDataset:
    """Encoded grey images of three shapes; `bad` are junk, `cut` lose their pixels behind the header. Every row that is
    read is a line in the file `log`."""

    def examples(shards):
        for shard in shards:
            for value in shard:
                if log is not None:
                    with open(log, "a") as file:
                        print(value, file=file)
                data = encoded(grey(value, [(20, 20), (40, 20), (20, 40)][value % 3]))
                data = b"junk" if value in bad else data[:45] if value in cut else data
                yield {"image": {"bytes": data, "path": f"{value}.png"}, "text": f"caption {value}"}

    values = list(values)
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    parts = [values[index::shards] for index in range(shards)]
    return IterableDataset.from_generator(examples, gen_kwargs={"shards": parts}, features=features)


def batches_of(stream, tasks=("reconstruct",), target_size=of_its_shape, **options) -> StreamingBatches:
    names = ("endless", "buffer_size", "on_bad_image", "num_workers", "count_processes")
    reading = {name: options.pop(name) for name in names if name in options}
    plan = SamplingPlan(**{"weights": dict.fromkeys(tasks, 1), "seed": 3, **options})
    columns = dict.fromkeys(tasks, Columns("image", "text"))
    reading = {"collate_fn": as_batch, **reading}
    return StreamingBatches(dict.fromkeys(tasks, stream), columns, target_size, plan, **reading)


def as_batch(rows) -> dict:
    return {"rows": contents(rows), "skipped": [problem for row in rows for problem in row.skipped],
            "repeated": rows[0].draw.repeated}  # fmt: skip


def values_of(batches, task="reconstruct") -> list[int]:
    return [
        value for batch in batches if not batch["repeated"] for draw, value, _ in batch["rows"] if draw.task == task
    ]


def of_processes(processes: int, stream, num_workers=0, **options) -> list[list[dict]]:
    """The batches that each of several processes gets. Without workers they are threads that wait for each other, as
    processes do; with workers, each ends with its own rows."""
    barrier, flags = Barrier(processes), [False] * processes

    def run(index):
        def count(present):
            flags[index] = present
            barrier.wait()
            total = sum(flags)
            barrier.wait()
            return total

        layout = {"num_processes": processes, "process_index": index, "num_workers": num_workers}
        try:
            return list(batches_of(stream, count_processes=None if num_workers else count, **layout, **options))
        except BaseException:
            barrier.abort()
            raise

    if num_workers:
        return list(map(run, range(processes)))
    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(run, range(processes)))


# --- who reads what ---


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 8, 20])
@pytest.mark.parametrize("readers", [1, 2, 4, 7])
def test_every_shard_has_one_reader_or_is_divided_by_row(shards, readers):
    parts = [part for reader in range(readers) for part in shards_of(reader, readers, range(shards))]
    if shards >= readers:
        assert sorted(part.shard for part in parts) == list(range(shards)) and {part.parts for part in parts} == {1}
    rows = Counter((p.shard, row) for p in parts for row in range(24) if row % p.parts == p.part)
    assert rows == {(shard, row): 1 for shard in range(shards) for row in range(24)}
    assert max(Counter(part.shard for part in parts).values()) <= -(-readers // shards)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shards", [1, 3, 7])
@pytest.mark.parametrize("processes", [1, 3])
def test_a_pass_is_every_row_once_in_any_layout(processes, workers, shards):
    """The union of all readers; all processes take as many steps."""
    stream = stream_of(range(37), shards)
    layouts = ({}, {"batch_size": 4, "buffer_size": 16}, {"batch_size": 3, "shuffle": False})
    for options in layouts[1 : 2 if workers else 3]:
        parts = of_processes(processes, stream, num_workers=workers, **options)
        assert workers or len({len(part) for part in parts}) == 1
        assert Counter(value for part in parts for value in values_of(part)) == dict.fromkeys(range(37), 1)
        for batch in (batch for part in parts for batch in part):
            assert len({(draw.task, draw.size) for draw, _, _ in batch["rows"]}) == 1


def test_every_shard_is_opened_by_one_reader(tmp_path):
    stream = stream_of(range(40), shards=8, log=tmp_path / "log")
    of_processes(2, stream, num_workers=2)
    assert Counter((tmp_path / "log").read_text().split()) == dict.fromkeys(map(str, range(40)), 1)


def test_fewer_shards_than_readers_are_named_at_the_start(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("reca_trainer"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        batches_of(stream_of(range(9), shards=3), num_workers=2)
        assert not caplog.text
        batches_of(stream_of(range(9), shards=3), num_workers=2, num_processes=4)
    assert "has 3 shards for 8 readers (4 processes x 2 workers)" in caplog.text


def test_draws_belong_to_the_row_whatever_the_layout():
    stream = stream_of(range(37), shards=5)

    def draws(processes, **options):
        parts = of_processes(processes, stream, target_size=square, **options)
        rows = (row for part in parts for batch in part if not batch["repeated"] for row in batch["rows"])
        return {value: draw for draw, value, _ in rows}

    alone = draws(1, batch_size=4, buffer_size=8)
    assert alone == draws(2, num_workers=2) == draws(3, batch_size=2)
    assert len({draw.seed for draw in alone.values()}) == 37


def test_processes_take_turns_with_the_tasks_together():
    stream = stream_of(range(11), shards=4)
    parts = of_processes(2, stream, tasks=("reconstruct", "caption"), batch_size=2)
    tasks = [[batch["rows"][0][0].task for batch in part] for part in parts]
    assert tasks[0] == tasks[1] == (["reconstruct", "caption"] * len(tasks[0]))[: len(tasks[0])]
    assert sorted(value for part in parts for value in values_of(part)) == list(range(11))


def test_batches_in_no_order_are_refused():
    with pytest.raises(ValueError, match="dataloader_in_order=False"):
        StreamingBatches({"reconstruct": stream_of([1])}, {"reconstruct": Columns("image")}, square, in_order=False)


def test_a_process_without_rows_repeats_one_that_does_not_count():
    parts = of_processes(3, stream_of([5], shards=1))
    assert sorted(batch["repeated"] for [batch] in parts) == [False, True, True]
    assert {batch["rows"][0][1] for [batch] in parts} == {5}


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("processes", [1, 8])
def test_rows_of_300_sizes_meet_in_micro_batches(processes, batch_size):
    sizes = official_sizes(300)

    def target_size(width, height):
        return sizes[width - 1]  # widths stand for shapes

    def examples(shards):
        for shard in shards:
            for width in np.random.default_rng(shard).integers(0, 300, 100):
                yield {"image": {"bytes": encoded(grey(int(width) % 256, (int(width) + 1, 8))), "path": None}, "text": ""}

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    stream = IterableDataset.from_generator(examples, gen_kwargs={"shards": list(range(8))}, features=features)
    widths = {
        shard * 2**40 + row: int(width) + 1
        for shard in range(8)
        for row, width in enumerate(np.random.default_rng(shard).integers(0, 300, 100))
    }
    parts = of_processes(processes, stream, target_size=target_size, batch_size=batch_size, buffer_size=1000)
    assert len({len(part) for part in parts}) == 1
    batches = [batch["rows"] for part in parts for batch in part if not batch["repeated"]]
    assert {len({draw.size for draw, _, _ in rows}) for rows in batches} == {1}
    draws = [draw for rows in batches for draw, _, _ in rows]
    assert Counter(draw.row for draw in draws) == dict.fromkeys(widths, 1)
    for draw in draws:
        (height, width), (asked_height, asked_width) = draw.size, target_size(widths[draw.row], 8)
        area = asked_height * asked_width
        assert abs(height * width - area) <= (0.03 if batch_size > 1 else 0.0) * area
    assert batch_size == 1 or processes > 1 or 800 / len(batches) > 0.75 * batch_size


def test_drop_last_gives_full_micro_batches_to_all_processes_or_none():
    parts = of_processes(2, stream_of(range(40), shards=4), batch_size=3, drop_last=True, buffer_size=4)
    assert len(parts[0]) == len(parts[1]) >= 4
    assert {len(batch["rows"]) for part in parts for batch in part} == {3}
    with pytest.raises(ImageError, match="no micro-batch of 9 rows of one size on each of 1 processes"):
        list(batches_of(stream_of(range(20)), batch_size=9, drop_last=True))


# --- order ---


@pytest.mark.parametrize("workers", [0, 2])
def test_each_epoch_is_reshuffled_and_reproducible(workers):
    batches, epochs = batches_of(stream_of(range(20)), batch_size=2, num_workers=workers), []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        epochs.append(list(batches))
    assert epochs[0] == epochs[2] != epochs[1]
    assert all(sorted(values_of(epoch)) == list(range(20)) for epoch in epochs)


def test_a_shuffled_stream_is_out_of_order_and_an_unshuffled_one_is_not():
    stream = stream_of(range(60), shards=1)
    assert values_of(batches_of(stream, shuffle=False)) == list(range(60))
    shuffled = values_of(batches_of(stream, buffer_size=30))
    assert sum(abs(value - place) for place, value in enumerate(shuffled)) / 60 > 5
    assert (
        max(place - value for place, value in enumerate(shuffled)) <= 60
    )  # nobody waits much longer than two windows


def test_an_unshuffled_stream_keeps_its_seeds():
    def draws(epoch, batch_size):
        batches = batches_of(stream_of(range(20)), shuffle=False, batch_size=batch_size)
        batches.set_epoch(epoch)
        return {value: draw.seed for batch in batches for draw, value, _ in batch["rows"]}

    assert draws(0, 2) == draws(4, 3)
    assert len(set(draws(0, 2).values())) == 20


# --- resume ---

LAYOUTS = [{}, {"batch_size": 3, "buffer_size": 8}, {"num_workers": 2, "batch_size": 3}]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_resume_is_bit_exact_in_any_pass(options, shards):
    options = {"endless": True, "tasks": ("reconstruct", "caption"), "buffer_size": 5, **options}
    stream = stream_of(range(23), shards)
    batches, states, whole = batches_of(stream, **options), [], []
    for batch in islice(batches, 80):
        whole.append(batch)
        states.append(json.loads(json.dumps(batches.state_dict())))
    for given in (7, 41) if options.get("num_workers") else (1, 7, 22, 23, 41, 60):
        resumed = batches_of(stream, **options)
        resumed.load_state_dict(states[given - 1])
        assert list(islice(resumed, 80)) == [None] * given + whole[given:]


def test_accelerate_skips_what_was_given_before():
    batches = batches_of(stream_of(range(23)), endless=True)
    whole = list(islice(batches, 30))
    again = batches_of(stream_of(range(23)), endless=True)
    list(islice(again, 11))
    state = again.state_dict()
    resumed = batches_of(stream_of(range(23)), endless=True)
    resumed.load_state_dict(state)
    loader = torch.utils.data.DataLoader(resumed, batch_size=None, collate_fn=lambda batch: batch)
    assert list(islice(accelerate.skip_first_batches(loader, 11), 19)) == whole[11:]


@pytest.mark.parametrize("make", ["generator", "parquet", "tar", "map"])
def test_resume_reads_at_most_two_windows_again(tmp_path, make, monkeypatch):
    """Counted in images whose header is looked at; whole shards before are not opened."""
    values = range(400)
    if make == "generator":
        stream = stream_of(values, shards=10, log=tmp_path / "log")
    elif make == "map":
        stream = Dataset.from_dict({"image": [{"bytes": encoded(grey(v % 200)), "path": None} for v in values]})
        stream = stream.cast_column("image", datasets.Image())
    else:
        for shard in range(10):
            part = [value for value in values if value % 10 == shard]
            if make == "parquet":
                images = [{"bytes": encoded(grey(v % 200)), "path": None} for v in part]
                Dataset.from_dict({"image": images}).to_parquet(tmp_path / "data" / f"{shard}.parquet")
            else:
                write_tar(tmp_path / "data" / f"{shard}.tar", part)
        stream = load_image_dataset(tmp_path / "data", streaming=True)
    from reca_trainer.data import stream_reader

    looked_at = []
    size = stream_reader.image_size
    monkeypatch.setattr(stream_reader, "image_size", lambda *args: looked_at.append(args) or size(*args))
    columns = {"reconstruct": Columns("image")}
    plan = SamplingPlan({"reconstruct": 1}, batch_size=2, seed=1)

    def make_batches():
        return StreamingBatches({"reconstruct": stream}, columns, square, plan, buffer_size=20, collate_fn=as_batch)

    batches = make_batches()
    iterator = iter(batches)
    list(islice(iterator, 150))
    state, before = batches.state_dict(), len(looked_at)
    rest = list(iterator)
    assert before == 320 and len(looked_at) == 400
    looked_at.clear()
    (tmp_path / "log").write_text("")
    resumed = make_batches()
    resumed.load_state_dict(state)
    assert list(resumed)[150:] == rest
    assert len(looked_at) == 100  # the window's twenty rows and those that come
    if make == "generator":  # of the shard that was being read, `datasets` generates the beginning again
        assert len((tmp_path / "log").read_text().split()) <= 80 + 2 * 20 + 64 + 40


def test_a_stream_with_other_rows_is_not_resumed():
    batches = batches_of(stream_of(range(30)), buffer_size=4)
    list(islice(batches, 10))
    state = batches.state_dict()
    other = batches_of(stream_of(range(6)), buffer_size=4)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="has other rows than when the checkpoint was written"):
        list(other)


def test_a_shuffle_buffer_of_the_users_own_is_resumed_too():
    stream = stream_of(range(40)).shuffle(seed=1, buffer_size=7)
    batches = batches_of(stream, buffer_size=4)
    whole = list(batches)
    list(islice(batches, 25))
    state = batches.state_dict()
    resumed = batches_of(stream, buffer_size=4)
    resumed.load_state_dict(state)
    assert list(resumed)[25:] == whole[25:]


# --- what cannot be read ---


def test_bad_images_are_named():
    for options in ({"bad": {7}}, {"cut": {7}}):
        with pytest.raises(ImageError, match=r"shard 1, row 3 \(7\.png\)"):
            list(batches_of(stream_of(range(12), **options)))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_left_out_and_listed(batch_size, workers):
    stream = stream_of(range(12), bad={0, 7}, cut={1, 5, 11})
    batches = list(batches_of(stream, batch_size=batch_size, on_bad_image="skip", num_workers=workers))
    assert sorted(values_of(batches)) == [2, 3, 4, 6, 8, 9, 10]
    problems = [problem for batch in batches for problem in batch["skipped"]]
    listed = sorted(int(problem.partition(".png")[0].rpartition("(")[2]) for problem in problems)
    assert set(listed) <= {0, 1, 5, 7, 11} and len(listed) == len(set(listed))
    assert workers or batch_size > 1 or len(listed) >= 4


@pytest.mark.parametrize("options", [{"bad": set(range(9))}, {"cut": set(range(9))}])
def test_a_stream_of_bad_images_stops(options):
    with pytest.raises(ImageError, match=r"\d\.png"):
        list(batches_of(stream_of(range(9), **options), on_bad_image="skip"))


def test_an_empty_stream_stops():
    with pytest.raises(ImageError, match="no micro-batch"):
        list(batches_of(stream_of([])))


def write_tar(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for value in values:
            data = encoded(grey(value % 200))
            member = tarfile.TarInfo(f"{value:03d}.png")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def write_parquet(path, values):
    images = [{"bytes": encoded(grey(value)), "path": f"{value}.png"} for value in values]
    Dataset.from_dict({"image": images}).to_parquet(path, batch_size=2)


def damage(path, kind):
    data = bytearray(path.read_bytes())
    if kind == "cut":
        del data[len(data) // 4 + 600 :]
    elif path.suffix == ".tar":
        with tarfile.open(path) as archive:
            header = archive.getmembers()[3].offset
        data[header : header + 512] = b"x" * 512
    else:
        data[len(data) // 2 : -400] = bytes(len(data) - len(data) // 2 - 400)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("shard", [0, 2])
@pytest.mark.parametrize("kind", ["cut", "damaged"])
@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_a_damaged_shard_is_named_and_its_rest_left_out(tmp_path, suffix, kind, shard):
    folder = tmp_path / "data"
    folder.mkdir()
    for index in range(4):
        write = write_tar if suffix == "tar" else write_parquet
        write(folder / f"{index}.{suffix}", range(10 * index, 10 * index + 10))
    damage(folder / f"{shard}.{suffix}", kind)
    stream = load_image_dataset(folder, streaming=True)
    columns = {"reconstruct": find_columns(stream)}
    sources = {"reconstruct": stream}, columns, square
    with pytest.raises(ImageError, match=rf"shard {shard} of 4.*{shard}\.{suffix}"):
        list(StreamingBatches(*sources))
    for workers in (0, 2):
        options = {"on_bad_image": "skip", "collate_fn": as_batch, "num_workers": workers, "buffer_size": 6}
        batches = list(StreamingBatches(*sources, SamplingPlan({"reconstruct": 1}), **options))
        taken = Counter(values_of(batches))
        assert set(taken.values()) == {1} and {v for v in range(40) if v // 10 != shard} <= set(taken)
        assert not {v for v in taken if v // 10 == shard} >= set(range(10 * shard, 10 * shard + 10))
        [problem] = [problem for batch in batches for problem in batch["skipped"]]
        assert f"{shard}.{suffix}" in problem and "The rest of it is left out" in problem
        lost = sum(batch["lost_rows"] for batch in batches)
        assert lost in (1, 10 - sum(v // 10 == shard for v in taken))  # 1 where no whole shard was read before
