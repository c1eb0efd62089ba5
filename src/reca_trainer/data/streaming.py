"""Micro-batches from sources that can only be read in order.

Which rows meet in a micro-batch depends on the layout: the number of processes and of their loading workers. What is
drawn for a row does not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import count
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers.utils import logging

from reca_trainer.data.columns import Columns, check_columns
from reca_trainer.data.rows import ConversationProblem, Row, check_on_bad_image
from reca_trainer.data.sampling import SamplingPlan, Size
from reca_trainer.data.stream_reader import Reading, State, StreamReader
from reca_trainer.images import ImageError, list_problems

logger = logging.get_logger(__name__)


class StreamingBatches(torch.utils.data.IterableDataset[Any]):
    """The micro-batches of one process: of tasks that follow each other in the plan's pattern, as in `TaskBatchSampler`.

    An epoch is one pass over the reconstruct stream (without that task: the first one's); the others start over when they
    end. Each pass is reshuffled. A pass ends when the readers of all processes are through; a process that is through
    earlier takes the first row of the stream again and again, marked as `repeated`, so that its loss does not count.

    With `on_bad_image="skip"` a row that cannot be read or decoded is left out, and so is the rest of a shard that cannot
    be read on. The next batch lists them in `skipped`.

    After `load_state_dict` the batches that were given before stand as `None`, and nothing is read for them: whoever
    resumes skips them, as `accelerate.skip_first_batches` does.

    Args:
        datasets: each task's `IterableDataset` (or `Dataset`).
        columns: each task's `Columns`.
        target_size: `(width, height)` of an image to `(height, width)` of its target.
        plan: what is drawn; by default one micro-batch of each task in turn, of one row each.
        collate_fn: rows to batch, called by the workers; by default a batch is a list of `Row`s.
        endless: go on with the next, reshuffled pass instead of ending the epoch.
        buffer_size: rows in the window of each reader, encoded.
        on_bad_image: `"raise"` or `"skip"`.
        conversation_problem: see `RowDataset`; such rows are left out.
        count_processes: how many processes call it with `True`; all call it for every micro-batch. Needed where there
            are several.
        loading: arguments of the `DataLoader` of each task, such as `num_workers`.
    """

    def __init__(
        self,
        datasets: Mapping[str, IterableDataset | Dataset],
        columns: Mapping[str, Columns],
        target_size: Callable[[int, int], Size],
        plan: SamplingPlan | None = None,
        *,
        collate_fn: Callable[[list[Row]], Any] | None = None,
        endless: bool = False,
        buffer_size: int = 1000,
        on_bad_image: str = "raise",
        conversation_problem: ConversationProblem | None = None,
        count_processes: Callable[[bool], int] | None = None,
        **loading: Any,
    ):
        check_on_bad_image(on_bad_image)
        self.plan = plan or SamplingPlan(dict.fromkeys(datasets, 1))
        tasks = list(dict.fromkeys(self.plan.pattern))
        check_columns({task: columns[task] for task in tasks})
        for task in tasks:
            if task not in datasets:
                raise ValueError(f"The task {task!r} has weight {self.plan.weights[task]} but no dataset.")
        if not loading.get("in_order", True):
            raise ValueError("dataloader_in_order=False would make the order of a stream's batches a matter of luck.")
        reading = (target_size, self.plan, buffer_size, on_bad_image, conversation_problem)
        self.readers = {task: StreamReader(task, datasets[task], columns[task], *reading) for task in tasks}
        self.collate_fn, self.endless, self.loading = collate_fn, endless, loading
        self.count_processes = count_processes or (lambda present: self.plan.num_processes * present)
        self._epoch = 0
        self._given = 0  # batches of the epoch
        self._passes: dict[str, _TaskBatches] = {}
        self._resumed: State | None = None
        if self.plan.shuffle and self.plan.process_index == 0:
            self._report_layout()

    def _report_layout(self) -> None:
        workers = max(self.loading.get("num_workers", 0), 1)
        readers = self.plan.num_processes * workers
        layout = f"{readers} readers ({self.plan.num_processes} processes x {workers} workers)"
        for task, reader in self.readers.items():
            shards = reader.dataset.num_shards
            if shards < readers:
                logger.warning(
                    f"The stream of the task {task!r} has {shards} shards for {layout}: a shard is read by several of them, "
                    f"which take its rows in turn. Write {readers} shards or more, so that nothing is read twice."
                )
            elif shards % readers:
                logger.info(f"The stream of the task {task!r} has {shards} shards for {layout}: some read one more.")

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def state_dict(self) -> State:
        """Where the iteration stands, behind the batch that was given last; can be written as JSON."""
        tasks = {task: batches.state() for task, batches in self._passes.items()}
        return {"epoch": self._epoch, "batches": self._given, "tasks": tasks}

    def load_state_dict(self, state: State) -> None:
        """Go on behind the batches that were given when the state was taken, in the same layout."""
        self._resumed = state

    def __iter__(self) -> Iterator[Any]:
        resumed = self._resumed if self._resumed and self._resumed["epoch"] == self._epoch else None
        self._given = resumed["batches"] if resumed else 0
        passes = {task: _TaskBatches(self, task, resumed["tasks"][task] if resumed else None) for task in self.readers}
        self._passes = passes
        try:
            yield from [None] * self._given
            for position in count(self._given):
                batch = passes[self.plan.pattern[position % len(self.plan.pattern)]].next()
                if batch is None:
                    return
                self._given = position + 1
                yield batch
        finally:
            for batches in passes.values():
                batches.close()


class _TaskBatches:
    """The batches of one task in one process, pass after pass."""

    def __init__(self, stream: StreamingBatches, task: str, state: State | None):
        self.stream, self.task, self.reader = stream, task, stream.readers[task]
        self.goes_on = stream.endless or task != stream.plan.anchor
        workers = stream.loading.get("num_workers", 0)
        self.loader = DataLoader(
            self.reader,
            batch_size=None,
            collate_fn=cast(Any, _Collate(stream.collate_fn)),  # without batch_size it gets items, not lists of them
            **{**stream.loading, "persistent_workers": workers > 0},
        )
        self.number = 0  # of the pass
        self.worker = -1  # whose batch was given last
        self.states: dict[str, State] = {}  # of the workers, in this pass
        self.given = 0  # batches, in this pass
        self.problems: list[str] = []
        self.lost_rows = 0
        self.spare: Any = None
        if state is not None:
            self.number, self.worker, self.given, self.states = (
                state[name] for name in ("pass", "worker", "given", "workers")
            )
        self._start()

    def state(self) -> State:
        return {"pass": self.number, "worker": self.worker, "given": self.given, "workers": dict(self.states)}

    def _start(self) -> None:
        """Begin the pass, or go on in it."""
        key = [self.stream._epoch, self.number]
        self.reader.pass_key.copy_(torch.tensor(key))
        if self.states:
            self.reader.resumed_pass, self.reader.states = key, dict(self.states)
            self.reader.first_worker = self.worker + 1
        self.readings = iter(self.loader)

    def close(self) -> None:
        """End the workers now: whoever forks while they wait to be collected would inherit them."""
        del self.readings, self.loader

    def next(self) -> Any:
        """The next batch; `None` if the epoch has ended, for all processes at once."""
        plan = self.stream.plan
        while True:
            reading = self._read()
            present = self.stream.count_processes(reading is not None)
            if present == plan.num_processes or (present and not plan.drop_last):
                self.given += 1
                return self._spare() if reading is None else self._noted(reading.batch)
            if not self.given:
                raise ImageError(list_problems(self.problems, self._nothing()))
            if not self.goes_on:
                for problem in self.problems:
                    logger.warning(f"Left out: {problem}")
                return None
            self.number, self.worker, self.given, self.states = self.number + 1, -1, 0, {}
            self._start()

    def _read(self) -> Reading | None:
        for reading in self.readings:
            self.problems += reading.problems
            self.lost_rows += reading.lost_rows
            self.states[str(reading.worker)] = reading.state
            self.worker = reading.worker
            if reading.batch is not None:
                return reading
        return None

    def _noted(self, batch: Any) -> Any:
        """The batch with what was left out since the last one."""
        problems, lost_rows = self.problems, self.lost_rows
        self.problems, self.lost_rows = [], 0
        if isinstance(batch, Mapping):
            return {**batch, "skipped": [*problems, *batch.get("skipped", [])], "lost_rows": lost_rows}
        return [replace(batch[0], skipped=(*problems, *batch[0].skipped)), *batch[1:]] if problems else batch

    def _spare(self) -> Any:
        """The first row of the stream, for a process that has none left in this step."""
        if self.spare is None:
            reader = copy.copy(self.reader)
            reader.plan = replace(
                self.reader.plan, num_processes=1, process_index=0, batch_size=1, shuffle=False, drop_last=False
            )
            reader.resumed_pass = None
            rows = next(reading.batch for reading in reader if reading.batch)
            rows = [replace(row, draw=row.draw._replace(repeated=True)) for row in rows]
            self.spare = _Collate(self.stream.collate_fn)(Reading(rows, [], 0, 0, {})).batch
        return self._noted(self.spare)

    def _nothing(self) -> str:
        plan = self.stream.plan
        wanted = (
            f" of {plan.batch_size} rows of one size on each of {plan.num_processes} processes, as drop_last asks"
            if plan.drop_last
            else ""
        )
        return f"The stream of the task {self.task!r} gave no micro-batch{wanted}"


class _Collate:
    """Collates the rows that a reader hands over, in the worker."""

    def __init__(self, collate_fn: Callable[[list[Row]], Any] | None):
        self.collate_fn = collate_fn

    def __call__(self, reading: Reading) -> Reading:
        if self.collate_fn is None or reading.batch is None:
            return reading
        return reading._replace(batch=self.collate_fn(reading.batch))
