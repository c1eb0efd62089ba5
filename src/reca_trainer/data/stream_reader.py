"""Which rows of a stream each loading worker reads, and how it goes on where it was.

A stream consists of shards. Its readers are the loading workers of all processes. Every shard is read by a single
reader; where there are fewer shards than readers, several read a shard and take its rows in turn. A pass so gives every
row once, to one reader.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import get_worker_info

from reca_trainer.data.columns import Columns, needed_columns, undecoded
from reca_trainer.data.rows import (
    MAX_BAD_IN_A_ROW,
    ConversationProblem,
    Row,
    UnusableConversation,
    has_no_image,
    read_row,
    read_source,
    source_name,
)
from reca_trainer.data.sampling import SamplingPlan, Size, mixed_hash
from reca_trainer.data.sources.request import as_stream
from reca_trainer.images import ImageError, image_size, list_problems
from reca_trainer.tasks import TASKS

Record = dict[str, Any]
State = dict[str, Any]  # of numbers, texts, lists and dictionaries: it can be written as JSON

SHARD_STRIDE = 2**40  # rows that a shard may have
MARK_EVERY = 64  # rows between the places from which a reader can start again


class Candidate(NamedTuple):
    """A row that waits in a reader's window."""

    row: int  # as in `Draw.row`
    source: str
    record: Record
    size: Size  # (height, width) of its target


class Reading(NamedTuple):
    """What a reader hands over: rows or, collated, a batch; what was left out since; where the reader stands."""

    batch: Any  # `None` where only the rest is new
    problems: list[str]
    lost_rows: int  # about how many rows the damaged shards among the problems have
    worker: int
    state: State


class StreamReader(torch.utils.data.IterableDataset[Reading]):
    """The share of one task's rows that each worker of a process reads, one pass at a time.

    A window of `buffer_size` rows moves over the share. A micro-batch is a row drawn from the window and others in it of
    about the same size (see `SamplingPlan.size_tolerance`). A row that has waited for twice the window goes first.
    Without shuffling the longest waiting row always goes first.

    The state of a reader names the rows in its window. A reader that starts from a state reads these again, so at most
    about two windows of rows, and none of the shards before. `datasets` passes over what comes before them in their shard:
    quickly in a data set or table, by reading it in an archive.
    """

    def __init__(
        self,
        task: str,
        dataset: IterableDataset | Dataset,
        columns: Columns,
        target_size: Callable[[int, int], Size],
        plan: SamplingPlan,
        buffer_size: int,
        on_bad_image: str,
        conversation_problem: ConversationProblem | None,
    ):
        self.task, self.columns, self.target_size, self.plan = task, columns, target_size, plan
        self.buffer_size, self.on_bad_image = buffer_size, on_bad_image
        self.conversation_problem = conversation_problem
        if isinstance(dataset, Dataset):
            dataset = as_stream(dataset)
        self.dataset = undecoded(dataset, needed_columns(dataset, columns), *columns.images)
        self.resumed_pass: list[int] | None = None  # the pass in which a resumed run goes on
        self.states: dict[str, State] = {}  # of the workers then
        self.first_worker = 0  # whose turn it is then
        # Shared, because workers keep their own copy of everything else.
        self.pass_key = torch.zeros(2, dtype=torch.int64).share_memory_()  # epoch, and pass in it

    def __iter__(self) -> Iterator[Reading]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        epoch, number = self.pass_key.tolist()
        state = None
        if self.resumed_pass == [epoch, number]:
            worker = (worker + self.first_worker) % workers
            state = self.states.get(str(worker))
        reader, readers = self.plan.process_index * workers + worker, self.plan.num_processes * workers
        order = np.arange(self.dataset.num_shards)
        if self.plan.shuffle:
            seed = mixed_hash(self.plan.seed, 4, TASKS[self.task].index, epoch, number)
            order = np.random.default_rng(seed).permutation(order)
        yield from Pass(self, shards_of(reader, readers, order.tolist()), worker, mixed_hash(epoch, number), state)

    def read_shard(self, shard: int, start: int = 0) -> Pass:
        """The rows of one shard from its number `start` on: `candidates` of what this returns, whose `problems` grow by
        what is left out meanwhile."""
        reading = Pass(self, [Share(shard)], 0, 0, None)
        reading.candidates = reading._candidates({"read": 0, "place": 0, "number": start, "dataset": None}, set())
        return reading


class Share(NamedTuple):
    """What a reader reads of a shard: the rows whose number, divided by `parts`, has the remainder `part`."""

    shard: int
    part: int = 0
    parts: int = 1


def shards_of(reader: int, readers: int, order: Sequence[int]) -> list[Share]:
    """What one of `readers` reads of the shards in `order`."""
    if len(order) >= readers:
        return [Share(shard) for shard in order[reader::readers]]
    place = reader % max(len(order), 1)
    return [Share(shard, reader // len(order), len(range(place, readers, len(order)))) for shard in order[place:][:1]]


class Pass:
    """One pass of one reader over its share. Rows are counted in the order of reading, those left out included."""

    def __init__(self, reader: StreamReader, shares: list[Share], worker: int, key: int, state: State | None):
        self.reader, self.shares, self.worker, self.key = reader, shares, worker, key
        self.length = reader.buffer_size if reader.plan.shuffle or reader.plan.batch_size > 1 else 1
        self.window: dict[int, Candidate] = {}  # the longest waiting first
        self.read = self.read_before = 0  # rows, and rows at the moment that the state is of
        self.emitted = 0  # micro-batches
        self.bad_in_a_row = 0
        self.whole_shards, self.rows_of_whole_shards = 0, 0
        self.exhausted = False
        self.problems: list[str] = []
        self.lost_rows = 0
        self.marks: deque[State] = deque([{"read": 0, "place": 0, "number": 0, "dataset": None}])
        if state is None:
            self.candidates = self._candidates(self.marks[0], set())
        else:
            self._restore(state)

    def __iter__(self) -> Iterator[Reading]:
        self._fill(self.length)
        while places := self._choose():
            rows = self._decode([self.window.pop(place) for place in places])
            self.emitted += 1
            self._fill(self.length)  # before the rows are handed over: what is left out at the end goes with the last
            if rows:
                yield self._reading(rows)
        if self.problems:
            yield self._reading(None)

    def _reading(self, rows: list[Row] | None) -> Reading:
        problems, lost_rows = self.problems, self.lost_rows
        self.problems, self.lost_rows = [], 0
        return Reading(rows, problems, lost_rows, self.worker, self._state())

    # --- the window ---

    def _fill(self, length: int) -> None:
        while len(self.window) < length and not self.exhausted:
            candidate = next(self.candidates, None)
            if candidate is None:
                self.exhausted = True
            else:
                self.window[self.read - 1] = candidate

    def _choose(self) -> list[int]:
        """The places of the next micro-batch's rows; none at the end of the pass."""
        plan = self.reader.plan
        while self.window:
            anchor = next(iter(self.window))
            if plan.shuffle and self.read - anchor <= 2 * self.reader.buffer_size:
                anchor = list(self.window)[mixed_hash(plan.seed, 6, self.key, self.emitted) % len(self.window)]
            members = self._around(anchor)
            if not plan.drop_last or len(members) == plan.batch_size:
                return members
            of_each_size = {candidate.size: place for place, candidate in self.window.items()}
            members = max(map(self._around, of_each_size.values()), key=len)
            if len(members) == plan.batch_size:
                return members
            if self.exhausted:
                return []
            self._fill(len(self.window) + 1)
        return []

    def _around(self, anchor: int) -> list[int]:
        """A row and others that its micro-batch may have."""
        plan, size = self.reader.plan, self.window[anchor].size
        if plan.batch_size == 1:
            return [anchor]
        others = [p for p, other in self.window.items() if p != anchor and plan.may_share(other.size, size)]
        if plan.shuffle:
            rng = np.random.default_rng(mixed_hash(plan.seed, 7, self.key, self.emitted))
            others = [others[index] for index in rng.permutation(len(others))]
        return [anchor, *others[: plan.batch_size - 1]]

    def _decode(self, candidates: list[Candidate]) -> list[Row]:
        reader, rows = self.reader, []
        for candidate in candidates:
            draw = reader.plan.draw(reader.task, candidate.row, candidates[0].size, self.key)
            try:
                rows.append(
                    read_row(draw, candidate.record, reader.columns, candidate.source, reader.conversation_problem)
                )
            except UnusableConversation as error:
                self.problems.append(str(error))
            except ImageError as error:
                if reader.on_bad_image == "raise":
                    raise
                self.problems.append(str(error))
        return rows

    # --- the share ---

    def _candidates(self, mark: State, kept: set[int]) -> Iterator[Candidate]:
        """The rows of the share from a mark on. Those that were read before the state was taken are passed over, if not
        kept."""
        for place in range(mark["place"], len(self.shares)):
            share = self.shares[place]
            for number, record in self._records(place, mark if place == mark["place"] else None):
                self.read += 1
                if self.read <= self.read_before and self.read - 1 not in kept:
                    continue
                candidate = self._candidate(share.shard, number, record)
                if candidate is not None:
                    yield candidate

    def _records(self, place: int, mark: State | None) -> Iterator[tuple[int, Record]]:
        """The numbers and records of the share's rows of a shard; leaves marks from which they can be read again."""
        share, dataset = self.shares[place], self.reader.dataset
        stream = dataset.shard(dataset.num_shards, share.shard)
        start, number = (mark["number"] if mark else 0), 0
        if mark and mark["dataset"] is not None:
            stream.load_state_dict(mark["dataset"])
            number = start
        elif place:
            self.marks.append({"read": self.read, "place": place, "number": 0, "dataset": None})
        # Not `iter(stream)`: inside a worker that would leave out the shards of the other workers.
        batches = stream.iter(batch_size=1)
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:  # each format has its own for a damaged file
                self._leave_out_shard(share, number, error)
                return
            if batch is None:
                break
            if number >= start and number % share.parts == share.part:
                yield number, {name: values[0] for name, values in batch.items()}
            number += 1
            if self.read >= self.marks[-1]["read"] + MARK_EVERY:
                self._mark(place, number, stream)
        if self.read >= self.read_before:
            self.whole_shards += 1
            self.rows_of_whole_shards += number

    def _mark(self, place: int, number: int, stream: IterableDataset) -> None:
        state = stream.state_dict()
        # `datasets` loses the rows in a shuffle buffer of the user's own; counting rows from the shard's start does not.
        lossy = "BufferShuffled" in json.dumps(state)
        self.marks.append({"read": self.read, "place": place, "number": number, "dataset": None if lossy else state})

    def _candidate(self, shard: int, number: int, record: Record) -> Candidate | None:
        """A row with its target size; `None` where it has to be left out."""
        reader = self.reader
        image = record[reader.columns.image]
        source = source_name(number, image, record.get("__url__"))
        if reader.dataset.num_shards > 1:
            source = f"shard {shard}, {source}"
        conversation = reader.columns.conversation
        if reader.task == "caption" and conversation and record[conversation] and has_no_image(image):
            self.problems.append(f"{source}: the conversation is left out: no image.")
            return None
        try:
            width, height = image_size(read_source(image, source), source)
        except ImageError as error:
            if reader.on_bad_image == "raise":
                raise
            self.problems.append(str(error))
            self.bad_in_a_row += 1
            if self.bad_in_a_row == MAX_BAD_IN_A_ROW:
                headline = f"{self.bad_in_a_row} unreadable images in a row"
                raise ImageError(list_problems(self.problems, headline)) from error
            return None
        self.bad_in_a_row = 0
        return Candidate(shard * SHARD_STRIDE + number, source, record, reader.target_size(width, height))

    def _leave_out_shard(self, share: Share, number: int, error: Exception) -> None:
        """Raises `ImageError` unless bad images are skipped."""
        shards = self.reader.dataset.num_shards
        name = ", ".join(file for file in files_of(self.reader.dataset, share.shard) if file not in str(error))
        where = f"shard {share.shard} of {shards}" + (f" ({name})" if name else "")
        problem = f"{where} cannot be read behind its first {number} rows: {error or type(error).__name__}"
        if self.reader.on_bad_image == "raise":
            raise ImageError(f"{problem} on_bad_image='skip' leaves out the rest of it.") from error
        if self.read < self.read_before:
            return
        self.problems.append(f"{problem} The rest of it is left out.")
        expected = self.rows_of_whole_shards / max(self.whole_shards, 1)
        self.lost_rows += max(1, round((expected - number) / share.parts))

    # --- the state ---

    def _state(self) -> State:
        oldest = next(iter(self.window), self.read)
        while len(self.marks) > 1 and self.marks[1]["read"] <= oldest:
            self.marks.popleft()
        counts = {name: getattr(self, name) for name in self.COUNTS}
        return {"window": list(self.window), "mark": self.marks[0], **counts}

    COUNTS = ("read", "emitted", "bad_in_a_row", "whole_shards", "rows_of_whole_shards", "exhausted")

    def _restore(self, state: State) -> None:
        kept, exhausted = state["window"], state["exhausted"]
        self.read, self.read_before = state["mark"]["read"], state["read"]
        self.marks = deque([state["mark"]])
        self.candidates = self._candidates(state["mark"], set(kept))
        for place in kept:
            candidate = next(self.candidates, None)
            if candidate is None or self.read - 1 != place:
                raise ValueError(
                    f"The stream of the task {self.reader.task!r} has other rows than when the checkpoint was written; it "
                    "cannot be resumed."
                )
            self.window[place] = candidate
        self.problems, self.lost_rows = [], 0
        for name in self.COUNTS:
            if name != "read":
                setattr(self, name, state[name])
        if exhausted:
            self.read, self.candidates = self.read_before, iter(())


def files_of(dataset: IterableDataset, shard: int) -> list[str]:
    """The files that a shard consists of, as far as `datasets` knows them."""
    iterable = dataset.shard(dataset.num_shards, shard)._ex_iterable
    while hasattr(iterable, "ex_iterable"):
        iterable = iterable.ex_iterable
    lists = [value for value in getattr(iterable, "kwargs", {}).values() if isinstance(value, list)]
    names = [name for value in lists for name in value if isinstance(name, str)]
    return [os.path.realpath(name) if os.path.exists(name) else name for name in names if "/" in name]
