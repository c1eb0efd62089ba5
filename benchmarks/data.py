"""How fast images are found and read; prints one JSON line.

python benchmarks/data.py            # everything; about ten minutes on two quiet cores, 2 GB of temporary files
python benchmarks/data.py --rows 20000 --files 2000 --images 512

- `start`: seconds until the first step of a run of the embedded default, imports apart, on a table of a million tiny
  pictures and on a folder of 100,000: with an empty cache, then with what the first run left there.
- `read`: images a second, and bytes read for each, of streams with one reader and more, where every reader has shards of
  its own and where there are fewer shards than readers. Every reader is a process; pictures are 256 px JPEGs.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

import measure
from reca_trainer import RecAConfig, RecATrainer, toy
from reca_trainer.data import SamplingPlan, StreamingBatches, find_columns, load_image_dataset

READERS = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the table")
    parser.add_argument("--files", type=int, default=100_000, help="of the folder")
    parser.add_argument("--images", type=int, default=2048, help="of the streams")
    parser.add_argument("--workers", type=int, default=2, help="dataloader_num_workers of the runs")
    parser.add_argument("--start", nargs=3, help=argparse.SUPPRESS)  # what a process of this script does
    arguments = parser.parse_args()
    if arguments.start:
        print(json.dumps(start(*arguments.start)))
        return
    started = measure.busy_share()
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "benchmark": "data",
            **{name: value for name, value in vars(arguments).items() if name != "start"},
            "start": measure_start(Path(folder), arguments),
            "read": measure_read(Path(folder), arguments),
        }
        # Before the folder is removed, which takes minutes for so many files.
        print(json.dumps({**result, "foreign_cpu": started(), **measure.environment("cpu")}), flush=True)


# --- start ---


def measure_start(folder: Path, arguments: argparse.Namespace) -> dict[str, dict]:
    write_table(folder / "table", arguments.rows)
    write_files(folder / "files", arguments.files)
    results = {}
    for source in ("table", "files"):
        for cache in ("cold", "warm"):
            values = map(str, (folder / source, folder / f"cache-{source}", arguments.workers))
            command = [sys.executable, __file__, "--start", *values]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results[f"{source}, {cache}"] = json.loads(done.stdout.splitlines()[-1])
    return results


def start(source: str, cache: str, workers: str) -> dict[str, float]:
    """Train a step in a fresh process."""
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    began = time.perf_counter()
    model, processor = toy.load()
    args = RecAConfig(
        str(Path(cache) / "output"),
        dataset_name=source,
        dataloader_num_workers=int(workers),
        max_steps=1,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    RecATrainer(model, args, processing_class=processor).train()
    stepped = time.perf_counter()
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "seconds": round(stepped - began, 1),
        "cpu_seconds": round(sum(usage.ru_utime + usage.ru_stime for usage in usages), 1),
        "peak_gb": round(usages[0].ru_maxrss / 1e6, 2),
    }


def pictures(count: int, smallest: int, largest: int, **saving: object) -> list[bytes]:
    rng, contents = np.random.default_rng(0), []
    for _ in range(count):
        width, height = (int(side) for side in rng.integers(smallest, largest + 1, 2))
        pixels = Image.fromarray(rng.integers(0, 256, (max(height // 16, 1), max(width // 16, 1), 3), dtype=np.uint8))
        file = io.BytesIO()
        pixels.resize((width, height), Image.Resampling.BICUBIC).save(file, **saving)
        contents.append(file.getvalue())
    return contents


def write_table(folder: Path, rows: int, shards: int = 10, contents: list[bytes] | None = None) -> None:
    folder.mkdir()
    contents = contents or pictures(1000, 8, 24, format="PNG")
    for shard in range(shards):
        numbers = range(shard, rows, shards)
        data = pa.array([contents[number % len(contents)] for number in numbers], pa.binary())
        names = pa.array([f"{number}.png" for number in numbers])
        table = pa.table({"image": pa.StructArray.from_arrays([data, names], ["bytes", "path"])})
        pq.write_table(table, folder / f"{shard:04d}.parquet", row_group_size=1000)


def write_files(folder: Path, count: int) -> None:
    contents = pictures(1000, 8, 24, format="PNG")
    for number in range(count):
        path = folder / f"{number % 100:02d}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[number % len(contents)])


# --- read ---


def measure_read(folder: Path, arguments: argparse.Namespace) -> dict[str, list[dict]]:
    contents = pictures(64, 256, 256, format="JPEG", quality=90)
    for shards in (16, 2):
        write_table(folder / f"parquet-{shards}", arguments.images, shards, contents)
        write_archives(folder / f"tar-{shards}", arguments.images, shards, contents)
    return {
        source: [read_with(folder / source, readers) for readers in READERS]
        for source in ("parquet-16", "tar-16", "parquet-2", "tar-2")
    }


def read_with(source: Path, readers: int) -> dict[str, float]:
    context = multiprocessing.get_context("fork")  # imports are done
    queue = context.SimpleQueue()
    processes = [context.Process(target=read, args=(source, reader, readers, queue)) for reader in range(readers)]
    for process in processes:
        process.start()
    parts = [queue.get() for _ in processes]
    images, seconds = sum(part["images"] for part in parts), max(part["seconds"] for part in parts)
    return {
        "readers": readers,
        "images": images,
        "images_per_second": round(images / seconds, 1),
        "cpu_ms_per_image": round(1000 * sum(part["cpu_seconds"] for part in parts) / images, 2),
        "bytes_per_image": round(sum(part["bytes"] for part in parts) / images),
        "bytes_stored_per_image": round(sum(path.stat().st_size for path in source.iterdir()) / images),
        "peak_gb_of_a_reader": max(part["peak_gb"] for part in parts),
    }


def read(source: Path, reader: int, readers: int, queue: Any) -> None:
    """One pass of a reader over its share."""
    torch.set_num_threads(1)
    stream = load_image_dataset(source, streaming=True)
    plan = SamplingPlan({"reconstruct": 1}, batch_size=4, num_processes=readers, process_index=reader)
    batches = StreamingBatches(
        {"reconstruct": stream}, {"reconstruct": find_columns(stream)}, lambda width, height: (256, 256), plan
    )
    before, began, worked = bytes_read(), time.perf_counter(), time.process_time()
    images = sum(len(batch) for batch in batches)
    result = {
        "images": images,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - worked,
        "bytes": bytes_read() - before,
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }
    queue.put(result)


def bytes_read() -> int:
    """What this process has read from files and pipes (Linux)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def write_archives(folder: Path, count: int, shards: int, contents: list[bytes]) -> None:
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as archive:
            for number in range(shard, count, shards):
                member = tarfile.TarInfo(f"{number:06d}.jpg")
                member.size = len(contents[number % len(contents)])
                archive.addfile(member, io.BytesIO(contents[number % len(contents)]))


if __name__ == "__main__":
    main()
