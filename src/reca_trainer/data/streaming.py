"""Micro-batches from sources that can only be read in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import get_worker_info

from reca_trainer.data.columns import Columns, check_columns, needed_columns, undecoded
from reca_trainer.data.rows import (
    MAX_BAD_IN_A_ROW,
    ConversationProblem,
    check_on_bad_image,
    first_good_row,
    has_no_image,
    read_source,
    source_name,
)
from reca_trainer.data.sampling import MicroBatch, SamplingPlan, Size, into_steps, mixed_hash
from reca_trainer.images import ImageError, image_size, list_problems
from reca_trainer.tasks import TASKS

Record = dict[str, Any]
# The number of its pass, micro-batches of all processes, {row: record}, spare rows, problems.
Step = tuple[int, list[MicroBatch], dict[int, Record], list[tuple[int, Record]], list[str]]


class StreamingRows(torch.utils.data.IterableDataset[list[dict[str, Any]]]):
    """Micro-batches of rows from sources that can only be read in order; for `DataLoader(…, batch_size=None)`.

    Rows of about one target size gather until they fill a micro-batch (see `SamplingPlan.size_tolerance`), and
    micro-batches until there is one for every process; steps go round the DataLoader's workers. A row waits for others of
    its size for at most `buffer_size` rows; then what has gathered is a smaller micro-batch. Every process and worker
    walks the whole stream and decodes only its own share: nothing is lost or used twice, and the number of workers does
    not change what a step contains. The price is that each of them reads all encoded bytes.

    An epoch is one pass over the reconstruct stream (without that task: the first one's); the others start over when
    they end. Each pass is reshuffled, with a buffer.

    Args:
        datasets: each task's `IterableDataset` (or `Dataset`).
        columns: each task's `Columns`.
        target_size: `(width, height)` of an image to `(height, width)` of its target.
        plan: what is drawn; by default one micro-batch of each task in turn, of one row each.
        endless: go on with the next, reshuffled pass instead of ending the epoch. `Trainer` counts the steps of a source
            without a length from its beginning, so this is what lets a run of several passes resume exactly.
        buffer_size: rows in the shuffle buffer, encoded.
        on_bad_image: `"raise"`, or `"skip"`: rows without a readable header are left out, and a neighbour takes the
            place of one that turns out damaged later.
        conversation_problem: see `RowDataset`.

    Without shuffling, `Draw.row` and the seeds follow the stream's own order.
    """

    def __init__(
        self,
        datasets: Mapping[str, IterableDataset | Dataset],
        columns: Mapping[str, Columns],
        target_size: Callable[[int, int], Size],
        plan: SamplingPlan | None = None,
        *,
        endless: bool = False,
        buffer_size: int = 1000,
        on_bad_image: str = "raise",
        conversation_problem: ConversationProblem | None = None,
    ):
        check_on_bad_image(on_bad_image)
        self.plan = plan or SamplingPlan(dict.fromkeys(datasets, 1))
        check_columns({task: columns[task] for task in self.plan.pattern})
        self.columns = dict(columns)
        self.target_size = target_size
        self.endless = endless
        self.buffer_size = buffer_size
        self.on_bad_image = on_bad_image
        self.conversation_problem = conversation_problem
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
        steps = {task: self._passes(task, epoch) for task in self.datasets}
        if not self.endless:
            steps[anchor] = self._pass(anchor, epoch, 0)
        for position in count():
            task = pattern[position % len(pattern)]
            step = next(steps[task], None)
            if step is None:
                return
            if position % workers == this_worker:
                yield self._decode(task, *step)

    def _passes(self, task: str, epoch: int) -> Iterator[Step]:
        for number in count():
            yield from self._pass(task, epoch, number)

    def _pass(self, task: str, epoch: int, number: int) -> Iterator[Step]:
        """The steps of one pass."""
        plan, pass_number = self.plan, mixed_hash(epoch, number)
        problems: list[str] = []
        waiting: dict[Size, tuple[int, list[int]]] = {}  # since which row, and the rows; the longest waiting first
        ready: list[MicroBatch] = []
        records: dict[int, Record] = {}
        sizes: set[Size] = set()
        ahead: deque[tuple[int, Record, Size]] = deque()
        recent: deque[tuple[int, Record]] = deque(maxlen=2 * plan.global_batch_size)
        rows, emitted, usable = self._rows_with_headers(task, epoch, number, problems), False, 0

        def emit(step: list[MicroBatch]) -> Step:
            nonlocal emitted
            emitted = True
            contents = {row: records[row] for micro_batch in step for row in micro_batch.rows}
            for row in contents:
                del records[row]
            listed = problems[:]
            problems.clear()
            return pass_number, step, contents, [*(item[:2] for item in ahead), *recent], listed

        ahead.extend(islice(rows, 16))
        while ahead:
            row, record, size = ahead.popleft()
            ahead.extend(islice(rows, 1))
            usable += 1
            records[row] = record
            recent.append((row, record))
            sizes.add(size)
            size = next((other for other in waiting if plan.may_share(size, other)), size)
            gathered = waiting.setdefault(size, (usable, []))[1]
            gathered.append(row)
            if len(gathered) == plan.batch_size:
                ready.append(MicroBatch(size, waiting.pop(size)[1]))
            elif not plan.drop_last:
                oldest = next(iter(waiting))
                if usable - waiting[oldest][0] >= self.buffer_size:
                    ready.append(MicroBatch(oldest, waiting.pop(oldest)[1]))
            if self._may_go(ready, one_size=len(sizes) == 1):
                yield emit(ready[: plan.num_processes])
                ready = ready[plan.num_processes :]
        if not plan.drop_last:
            ready += [MicroBatch(size, gathered) for size, (_, gathered) in waiting.items()]
            for step in into_steps(ready, plan.num_processes, plan.batch_size > 1 and len(sizes) > 1):
                yield emit(step)
        while plan.drop_last and len(ready) >= plan.num_processes:
            yield emit(ready[: plan.num_processes])
            ready = ready[plan.num_processes :]
        if not emitted:
            wanted = (
                f" of {plan.batch_size} rows of one size on each of {plan.num_processes} processes, as drop_last asks"
                if plan.drop_last
                else ""
            )
            headline = f"The stream of the task {task!r} gave no micro-batch{wanted}: it has {usable} usable rows"
            raise ImageError(list_problems(problems, headline))

    def _may_go(self, ready: list[MicroBatch], one_size: bool) -> bool:
        """Whether there is a step, and enough behind it that the pass can end with a micro-batch for every process."""
        processes = self.plan.num_processes
        if len(ready) < processes:
            return False
        if one_size or self.plan.batch_size == 1 or len(ready) >= 8 * processes:
            return True
        return sum(len(micro_batch.rows) - 1 for micro_batch in ready[processes:]) >= processes - 1

    def _rows_with_headers(
        self, task: str, epoch: int, number: int, problems: list[str]
    ) -> Iterator[tuple[int, Record, Size]]:
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
            conversation = self.columns[task].conversation
            if task == "caption" and conversation and record[conversation] and has_no_image(image):
                problems.append(f"{source}: the conversation is left out: no image.")
                continue
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
            yield row, record, self.target_size(width, height)

    def _decode(
        self,
        task: str,
        pass_number: int,
        step: Sequence[MicroBatch],
        records: dict[int, Record],
        spare: list[tuple[int, Record]],
        problems: list[str],
    ) -> list[dict[str, Any]]:
        rows = list(step[self.plan.process_index].rows)
        decoded = []
        for draw in self.plan.draws(task, step, pass_number):
            place = rows.index(draw.row)
            neighbours = dict([*((row, records[row]) for row in rows[place:] + rows[:place]), *spare])
            columns, problem = self.columns[task], self.conversation_problem
            decoded.append(first_good_row(draw, neighbours.items(), columns, self.on_bad_image, problem))
        if self.plan.process_index == 0:
            decoded[0]["skipped"] = problems + decoded[0]["skipped"]
        return decoded
