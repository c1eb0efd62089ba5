"""Which rows a training step sees, and in which order.

Order and randomness are pure functions of (seed, epoch): nothing here remembers a position, so skipping the first
micro-batches of an epoch resumes a run exactly, and the number of processes only decides who gets which part of a
global micro-batch (`batch_size * num_processes` rows of one task and one aspect-ratio bucket).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from reca_trainer.data.instructions import CAPTION_QUESTIONS, INSTRUCTIONS
from reca_trainer.tasks import TASKS


class Draw(NamedTuple):
    """One sample of one micro-batch.

    Attributes:
        task: one of `TASKS`.
        row: index into that task's dataset (in a stream: position in the epoch's order).
        size: `(height, width)` in pixels of the target.
        seed: seeds this sample's corruption; differs for every (seed, epoch, position in the epoch), 63 bits.
        instruction: the micro-batch's reconstruction instruction or caption question; empty where it was dropped.
    """

    task: str
    row: int
    size: tuple[int, int]
    seed: int
    instruction: str


@dataclass(frozen=True)
class SamplingPlan:
    """What a micro-batch's draws depend on besides its rows; the same on all processes but for `process_index`.

    Args:
        weights: micro-batches of each task per turn of the pattern, in the order they come.
        batch_size: rows per micro-batch and process.
        num_processes, process_index: the process layout; only `batch_size * num_processes` decides what is drawn.
        seed: of everything drawn.
        shuffle: `False` for evaluation: rows in order, the task's first instruction, no dropout, and seeds that depend
            on the row alone, so that losses compare between checkpoints, runs and batch sizes.
        drop_last: leave out a bucket's last rows where they do not fill a global micro-batch.
        instructions: for each task, what to choose from; by default `INSTRUCTIONS` and `CAPTION_QUESTIONS`.
        instruction_dropout: probability that a reconstruct micro-batch gets the empty instruction.

    Raises:
        ValueError: arguments out of range.
    """

    weights: Mapping[str, int]
    batch_size: int = 1
    num_processes: int = 1
    process_index: int = 0
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    instructions: Mapping[str, Sequence[str]] | None = None
    instruction_dropout: float = 0.0
    pattern: tuple[str, ...] = field(init=False)

    def __post_init__(self):
        for task, weight in self.weights.items():
            if task not in TASKS or weight != int(weight) or weight < 0:
                raise ValueError(f"Task weights are whole numbers for {', '.join(TASKS)}; got {task!r}: {weight}.")
        pattern = tuple(task for task, weight in self.weights.items() for _ in range(int(weight)))
        if not pattern:
            raise ValueError("No task has a positive weight.")
        if self.batch_size < 1 or not 0 <= self.process_index < self.num_processes:
            raise ValueError(
                f"batch_size {self.batch_size} and process {self.process_index} of {self.num_processes} do not fit."
            )
        if not 0 <= self.instruction_dropout <= 1:
            raise ValueError(f"instruction_dropout is a probability, got {self.instruction_dropout}.")
        default = {"reconstruct": INSTRUCTIONS, "caption": CAPTION_QUESTIONS}
        object.__setattr__(self, "instructions", {**default, **(self.instructions or {})})
        object.__setattr__(self, "pattern", pattern)

    @property
    def anchor(self) -> str:
        """The task whose rows make an epoch, where sizes do not decide."""
        return "reconstruct" if "reconstruct" in self.pattern else self.pattern[0]

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.num_processes

    def draws(self, task: str, size: tuple[int, int], rows: Sequence[int] | np.ndarray, step: int, epoch: int) -> list[Draw]:
        """This process's contiguous share of the global micro-batch `step`.

        A short micro-batch is split as evenly as it goes; with fewer rows than processes some draw the same sample.
        """
        start = self.process_index * len(rows) // self.num_processes
        stop = max((self.process_index + 1) * len(rows) // self.num_processes, start + 1)
        instruction = self._instruction(task, step, epoch)
        draws = []
        for offset in range(start, stop):
            row = int(rows[offset])
            if self.shuffle:
                seed = mixed_hash(self.seed, 0, epoch, step * self.global_batch_size + offset)
            else:
                seed = mixed_hash(self.seed, 1, TASKS[task].index, row)
            draws.append(Draw(task, row, size, seed, instruction))
        return draws

    def _instruction(self, task: str, step: int, epoch: int) -> str:
        choices = (self.instructions or {}).get(task) or [""]
        if not self.shuffle:
            return choices[0]
        dropped = mixed_hash(self.seed, 2, epoch, step) < self.instruction_dropout * 2**63
        return (
            "" if dropped and task == "reconstruct" else choices[mixed_hash(self.seed, 3, epoch, step) % len(choices)]
        )


class TaskBatchSampler(Sampler[list[Draw]]):
    """Micro-batches of `Draw`s for one process: each of one task, one bucket, one instruction.

    Tasks follow each other in a fixed pattern, `weights["reconstruct"]` micro-batches of the first, and so on, so that
    all processes always work on the same task. An epoch is one pass over the reconstruct rows (without that task: over
    the task with most micro-batches); other tasks go round their own rows, reshuffled each time, and go on in the next
    epoch where they stopped.

    Give it to a `DataLoader(RowDataset(…), batch_sampler=…)`; `accelerate.skip_first_batches` then resumes exactly and
    reads no image for it.

    Args:
        buckets: for each task, the `(height, width)` target of every row.
        plan: what is drawn; by default one micro-batch of each task in turn, of one row each.

    Raises:
        ValueError: a task without rows, or fewer rows than a global micro-batch with `drop_last`.
    """

    def __init__(self, buckets: Mapping[str, Sequence[tuple[int, int]]], plan: SamplingPlan | None = None):
        self.plan = plan or SamplingPlan(dict.fromkeys(buckets, 1))
        self.batch_size, self.drop_last = self.plan.batch_size, self.plan.drop_last  # read by accelerate
        self.epoch = 0
        self._sizes, self._bucket_of_row, self._batches_per_pass = {}, {}, {}
        for task in dict.fromkeys(self.plan.pattern):
            if not len(buckets.get(task, ())):
                raise ValueError(f"The task {task!r} has weight {self.plan.weights[task]} but no rows.")
            sizes, bucket_of_row, rows = np.unique(
                np.asarray(buckets[task], dtype=np.int64), axis=0, return_inverse=True, return_counts=True
            )
            self._sizes[task] = [(int(height), int(width)) for height, width in sizes]
            self._bucket_of_row[task] = bucket_of_row.reshape(-1)
            full, rest = np.divmod(rows, self.plan.global_batch_size)
            self._batches_per_pass[task] = int(full.sum() + (0 if self.drop_last else (rest > 0).sum()))
            if not self._batches_per_pass[task]:
                raise ValueError(
                    f"With drop_last, no bucket of the task {task!r} ({rows.sum()} rows in {len(rows)} buckets) "
                    f"fills a micro-batch of {self.batch_size} rows on each of {self.plan.num_processes} processes."
                )
        self._batches_per_epoch = self._count_batches_per_epoch()

    def _count_batches_per_epoch(self) -> dict[str, int]:
        pattern, per_pass = self.plan.pattern, self._batches_per_pass
        anchor = "reconstruct" if "reconstruct" in per_pass else max(per_pass, key=per_pass.__getitem__)
        turns, rest = divmod(per_pass[anchor], pattern.count(anchor))
        places = [place for place, task in enumerate(pattern) if task == anchor]
        last_turn = pattern[: places[rest - 1] + 1] if rest else ()
        return {task: turns * pattern.count(task) + last_turn.count(task) for task in per_pass}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-batches per epoch, the same in every epoch and on every process."""
        return sum(self._batches_per_epoch.values())

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, pattern = self.epoch, self.plan.pattern
        batches = {task: self._batches(task, epoch if self.plan.shuffle else 0) for task in self._batches_per_pass}
        for step in range(len(self)):
            task = pattern[step % len(pattern)]
            size, rows = next(batches[task])
            yield self.plan.draws(task, size, rows, step, epoch)

    def _batches(self, task: str, epoch: int) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
        """The task's global micro-batches from where `epoch` begins, pass after pass without end."""
        number, start = divmod(epoch * self._batches_per_epoch[task], self._batches_per_pass[task])
        while True:
            yield from self._pass(task, number)[start:]
            number, start = number + 1, 0

    def _pass(self, task: str, number: int) -> list[tuple[tuple[int, int], np.ndarray]]:
        bucket_of_row, batch_size = self._bucket_of_row[task], self.plan.global_batch_size
        rows = np.arange(len(bucket_of_row))
        if self.plan.shuffle:
            rng = np.random.default_rng(mixed_hash(self.plan.seed, 4, TASKS[task].index, number))
            rng.shuffle(rows)
        batches = []
        for bucket, size in enumerate(self._sizes[task]):
            members = rows[bucket_of_row[rows] == bucket]
            stop = len(members) // batch_size * batch_size if self.drop_last else len(members)
            batches += [(size, members[start : start + batch_size]) for start in range(0, stop, batch_size)]
        if self.plan.shuffle:
            return [batches[index] for index in rng.permutation(len(batches))]
        return sorted(batches, key=lambda batch: batch[1][0])


def mixed_hash(*numbers: int) -> int:
    """63 well-mixed bits of a few integers (splitmix64): one-to-one in the last of them but for the bit dropped."""
    mask, state = 2**64 - 1, 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & mask
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state >> 1
