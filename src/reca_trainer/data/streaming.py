"""Micro-batches from sources that can only be read in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import get_worker_info

from reca_trainer.data.columns import Columns, check_columns, needed_columns, undecoded
from reca_trainer.data.rows import MAX_BAD_IN_A_ROW, check_on_bad_image, first_good_row, read_source, source_name
from reca_trainer.data.sampling import SamplingPlan, mixed_hash
from reca_trainer.images import ImageError, image_size, list_problems, nearest_bucket
from reca_trainer.tasks import TASKS


class StreamingRows(torch.utils.data.IterableDataset):
    """Micro-batches of rows from sources that can only be read in order; for `DataLoader(…, batch_size=None)`.

    Rows gather in their bucket until it holds a global micro-batch, which is then split over the processes as
    `TaskBatchSampler` does, and micro-batches go round the DataLoader's workers. Every process and worker walks the
    whole stream and decodes only its own share: nothing is lost or used twice, and neither the number of processes nor
    of workers changes what a global micro-batch contains. The price is that each of them reads all encoded bytes.

    An epoch is one pass over the reconstruct stream (without that task: the first one's); the others start over when
    they end. Each pass is reshuffled, with a buffer.

    Args:
        datasets: each task's `IterableDataset` (or `Dataset`).
        columns: each task's `Columns`.
        buckets: the `(height, width)` targets to choose from.
        plan: what is drawn; by default one micro-batch of each task in turn, of one row each.
        endless: go on with the next, reshuffled pass instead of ending the epoch. `Trainer` counts the steps of a source
            without a length from its beginning, so this is what lets a run of several passes resume exactly.
        buffer_size: rows in the shuffle buffer, encoded.
        on_bad_image: `"raise"`, or `"skip"`: rows without a readable header are left out, and a neighbour takes the
            place of one that turns out damaged later.

    Without shuffling, `Draw.row` and the seeds follow the stream's own order.
    """

    def __init__(
        self,
        datasets: Mapping[str, IterableDataset | Dataset],
        columns: Mapping[str, Columns],
        buckets: Sequence[tuple[int, int]],
        plan: SamplingPlan | None = None,
        *,
        endless: bool = False,
        buffer_size: int = 1000,
        on_bad_image: str = "raise",
    ):
        check_on_bad_image(on_bad_image)
        self.plan = plan or SamplingPlan(dict.fromkeys(datasets, 1))
        check_columns({task: columns[task] for task in self.plan.pattern})
        self.columns = dict(columns)
        self.buckets = list(buckets)
        self.endless = endless
        self.buffer_size = buffer_size
        self.on_bad_image = on_bad_image
        self.datasets = {}
        for task in dict.fromkeys(self.plan.pattern):
            if task not in datasets:
                raise ValueError(f"The task {task!r} has weight {self.plan.weights[task]} but no dataset.")
            dataset = undecoded(datasets[task], needed_columns(datasets[task], columns[task]), columns[task].image)
            self.datasets[task] = dataset.to_iterable_dataset() if isinstance(dataset, Dataset) else dataset
        # Shared, because persistent workers keep their own copy of everything else.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        epoch, pattern, anchor = int(self._epoch), self.plan.pattern, self.plan.anchor
        worker = get_worker_info()
        workers, this_worker = (worker.num_workers, worker.id) if worker else (1, 0)
        batches = {task: self._passes(task, epoch) for task in self.datasets}
        if not self.endless:
            batches[anchor] = self._pass(anchor, epoch, 0)
        for step in count():
            batch = next(batches[pattern[step % len(pattern)]], None)
            if batch is None:
                return
            if step % workers == this_worker:
                yield self._decode(pattern[step % len(pattern)], *batch, step, epoch)

    def _passes(self, task: str, epoch: int) -> Iterator[tuple]:
        for number in count():
            yield from self._pass(task, epoch, number)

    def _pass(self, task: str, epoch: int, number: int) -> Iterator[tuple]:
        """Global micro-batches of one pass: `(size, {row: record}, spare rows around them, problems)`."""
        gathering: dict[tuple[int, int], dict[int, dict]] = {size: {} for size in self.buckets}
        ahead: deque[tuple[int, dict, tuple[int, int]]] = deque()
        recent: deque[tuple[int, dict]] = deque(maxlen=2 * self.plan.global_batch_size)
        problems: list[str] = []
        rows, emitted, usable = self._rows_with_headers(task, epoch, number, problems), False, 0
        ahead.extend(islice(rows, 16))
        while ahead:
            row, record, size = ahead.popleft()
            ahead.extend(islice(rows, 1))
            usable += 1
            bucket = gathering[size]
            bucket[row] = record
            recent.append((row, record))
            if len(bucket) == self.plan.global_batch_size:
                emitted = True
                yield size, bucket, [*(item[:2] for item in ahead), *recent], problems[:]
                problems.clear()
                gathering[size] = {}
        for size, bucket in gathering.items():
            if bucket and not self.plan.drop_last:
                emitted = True
                yield size, bucket, list(recent), problems[:]
                problems.clear()
        if not emitted:
            size = (
                f" of {self.plan.global_batch_size} rows of one shape, as drop_last asks"
                if self.plan.drop_last
                else ""
            )
            headline = f"The stream of the task {task!r} gave no micro-batch{size}: it has {usable} usable rows"
            raise ImageError(list_problems(problems, headline))

    def _rows_with_headers(
        self, task: str, epoch: int, number: int, problems: list[str]
    ) -> Iterator[tuple[int, dict, tuple[int, int]]]:
        stream = self.datasets[task]
        if self.plan.shuffle:
            seed = mixed_hash(self.plan.seed, 4, TASKS[task].index, epoch, number)
            # One shard at a time: reading several takes threads, which `datasets` waits seconds for after each pass.
            stream = stream.shuffle(seed=seed % 2**32, buffer_size=self.buffer_size, max_buffer_input_shards=1)
        bad = 0
        # Not `iter(stream)`: inside a worker that would leave out the shards of the other workers.
        for row, batch in enumerate(stream.iter(batch_size=1)):
            record = {name: values[0] for name, values in batch.items()}
            image = record[self.columns[task].image]
            source = source_name(row, image, record.get("__url__"))
            try:
                width, height = image_size(read_source(image, source), source)
            except ImageError as error:
                if self.on_bad_image == "raise":
                    raise
                problems.append(str(error))
                bad += 1
                if bad == MAX_BAD_IN_A_ROW:
                    raise ImageError(list_problems(problems, f"{bad} unreadable images in a row")) from error
                continue
            bad = 0
            yield row, record, nearest_bucket(width, height, self.buckets)

    def _decode(
        self,
        task: str,
        size: tuple[int, int],
        records: dict[int, dict],
        spare: list[tuple[int, dict]],
        problems: list[str],
        step: int,
        epoch: int,
    ) -> list[dict[str, Any]]:
        order = list(records)
        decoded = []
        for draw in self.plan.draws(task, size, order, step, epoch):
            place = order.index(draw.row)
            neighbours = dict([*((row, records[row]) for row in order[place:] + order[:place]), *spare])
            decoded.append(first_good_row(draw, neighbours.items(), self.columns[task], self.on_bad_image))
        if self.plan.process_index == 0:
            decoded[0]["skipped"] = problems + decoded[0]["skipped"]
        return decoded
