"""Which rows a training step sees, and in which order.

Order and randomness are pure functions of (seed, epoch): nothing here remembers a position, so skipping the first
micro-batches of an epoch resumes a run exactly. In one step every process works on the same task. All targets of a
process's micro-batch have one size; different processes may have different sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from reca_trainer.data.instructions import CAPTION_QUESTIONS, INSTRUCTIONS
from reca_trainer.tasks import TASKS

Size = tuple[int, int]  # (height, width) in pixels


class Draw(NamedTuple):
    """One sample of one micro-batch.

    Attributes:
        task: one of `TASKS`.
        row: index into that task's dataset; in a stream, its number in its shard + 2^40 x the number of the shard.
        size: `(height, width)` in pixels of the target.
        seed: seeds all that is drawn for this sample; differs for every seed of the run, task, pass and row, and depends on
            no batch size and no number of processes. 63 bits.
        instruction: the sample's reconstruction instruction, or the question to a caption that comes without one.
        crop: place in [0, 1) of a random crop; `None` is the centre.
        dropped: whether the sample's text is dropped for classifier-free guidance.
        dropped_sources: likewise whether the source of an edit is dropped as latents, and as embeddings.
        repeated: whether another process works on the same sample in this step, whose loss then counts.
    """

    task: str
    row: int
    size: Size
    seed: int
    instruction: str
    crop: float | None = None
    dropped: bool = False
    dropped_sources: tuple[bool, bool] = (False, False)
    repeated: bool = False


class MicroBatch(NamedTuple):
    """What one process works on in one step.

    Attributes:
        size: `(height, width)` of all its targets.
        rows: indices of rows, or records of a stream.
    """

    size: Size
    rows: Sequence[Any] | np.ndarray


@dataclass(frozen=True)
class SamplingPlan:
    """What a micro-batch's draws depend on besides its rows; the same on all processes but for `process_index`.

    Args:
        weights: micro-batches of each task per turn of the pattern, in the order they come.
        batch_size: rows per micro-batch and process.
        num_processes, process_index: the process layout.
        seed: of everything drawn.
        shuffle: `False` for evaluation: rows in order and at their own sizes, the task's first instruction, the centre
            crop, no dropout, and seeds that depend on the row alone, so that losses compare between checkpoints, runs
            and batch sizes.
        drop_last: leave out the last rows of a size where they do not fill a micro-batch, and the last micro-batches
            where there is not one for every process.
        instructions: for each task, what to choose from; by default `INSTRUCTIONS` and `CAPTION_QUESTIONS`.
        instruction_dropout: probability that a `reconstruct` or `edit` sample goes without its instruction.
        caption_dropout: probability that a `generate` sample goes without its caption.
        edit_source_dropout: probability that an `edit` sample goes without its source's latents, and, drawn apart, without
            its embeddings.
        size_tolerance: share by which a target's sides and area may change so that rows of about one shape can share a
            micro-batch of more than one row.

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
    caption_dropout: float = 0.0
    edit_source_dropout: float = 0.0
    size_tolerance: float = 0.03
    pattern: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
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
        for name in ("instruction_dropout", "caption_dropout", "edit_source_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, got {getattr(self, name)}.")
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

    def may_share(self, size: Size, other: Size) -> bool:
        """Whether a target of `size` may be made at size `other` to share a micro-batch."""
        tolerance = self.size_tolerance if self.shuffle and self.batch_size > 1 else 0.0
        (height, width), (other_height, other_width) = size, other
        return (
            abs(other_height - height) <= tolerance * height
            and abs(other_width - width) <= tolerance * width
            and abs(other_height * other_width - height * width) <= tolerance * height * width
        )

    def draws(self, task: str, step: Sequence[MicroBatch], pass_number: int) -> list[Draw]:
        """The samples of this process.

        Args:
            step: the micro-batches of all processes, of row indices.
            pass_number: which pass over the task's rows this is.
        """
        micro_batch = step[self.process_index]
        repeated = any(other is micro_batch for other in step[: self.process_index])
        draws = (self.draw(task, int(row), micro_batch.size, pass_number) for row in micro_batch.rows)
        return [draw._replace(repeated=repeated) for draw in draws]

    def draw(self, task: str, row: int, size: Size, pass_number: int) -> Draw:
        """What is drawn for a row in a pass over its task's rows; neither its batch nor its process has a say."""
        choices = (self.instructions or {}).get(task) or [""]
        if not self.shuffle:
            return Draw(task, row, size, mixed_hash(self.seed, 1, TASKS[task].index, row), choices[0])
        seed = mixed_hash(self.seed, 0, TASKS[task].index, pass_number, row)
        of_text = {
            "reconstruct": self.instruction_dropout,
            "generate": self.caption_dropout,
            "edit": self.instruction_dropout,
        }.get(task, 0.0)
        of_source = self.edit_source_dropout if task == "edit" else 0.0
        return Draw(
            task,
            row,
            size,
            seed,
            instruction=choices[mixed_hash(seed, 1) % len(choices)],
            crop=(mixed_hash(seed, 2) >> 10) / 2**53,
            dropped=mixed_hash(seed, 3) < of_text * 2**63,
            dropped_sources=(mixed_hash(seed, 4) < of_source * 2**63, mixed_hash(seed, 5) < of_source * 2**63),
        )


def split_to(micro_batches: Sequence[MicroBatch], count: int) -> list[MicroBatch]:
    """Halve the largest until there are `count`, or none has more than one row; the order of rows stays."""
    parts = list(micro_batches)
    while len(parts) < count:
        largest = max(range(len(parts)), key=lambda index: len(parts[index].rows))
        size, rows = parts[largest]
        if len(rows) == 1:
            break
        middle = (len(rows) + 1) // 2
        parts[largest : largest + 1] = [MicroBatch(size, rows[:middle]), MicroBatch(size, rows[middle:])]
    return parts


def into_steps(micro_batches: Sequence[MicroBatch], num_processes: int, sizes_matter: bool) -> list[list[MicroBatch]]:
    """The steps of a pass. At its end micro-batches are split, so that there is one for every process.

    Args:
        sizes_matter: whether micro-batches may be small because few rows have their size. As many steps before the last
            one as it takes then give up rows to it. Otherwise, with fewer rows left than processes, some draw the same.
    """
    last = len(micro_batches) // num_processes * num_processes
    tail = list(micro_batches[last:])
    count = num_processes if tail else 0
    parts = split_to(tail, count) if tail else []
    while len(parts) < count and sizes_matter and last:
        last, count = last - num_processes, count + num_processes
        parts = split_to(micro_batches[last:], count)
    parts += [parts[place % len(parts)] for place in range(count - len(parts))]
    parts = [*micro_batches[:last], *parts]
    return [list(parts[start : start + num_processes]) for start in range(0, len(parts), num_processes)]


class TaskBatchSampler(Sampler[list[Draw]]):
    """Micro-batches of `Draw`s for one process: each of one task and one target size.

    Tasks follow each other in a fixed pattern, `weights["reconstruct"]` micro-batches of the first, and so on, so that
    all processes always work on the same task. An epoch is one pass over the reconstruct rows (without that task: over
    the task with most micro-batches); other tasks go round their own rows, reshuffled each time, and go on in the next
    epoch where they stopped.

    A micro-batch of one row has the row's own target size. Larger ones gather rows of about one size (see
    `SamplingPlan.size_tolerance`); rows whose size is rare make a smaller micro-batch, so none is repeated or left out.

    Give it to a `DataLoader(RowDataset(…), batch_sampler=…)`; `accelerate.skip_first_batches` then resumes exactly and
    reads no image for it.

    Args:
        targets: for each task, the `(height, width)` target of every row.
        plan: what is drawn; by default one micro-batch of each task in turn, of one row each.

    Raises:
        ValueError: a task without rows, or fewer rows than a step takes with `drop_last`.
    """

    def __init__(self, targets: Mapping[str, Sequence[Size]], plan: SamplingPlan | None = None):
        self.plan = plan or SamplingPlan(dict.fromkeys(targets, 1))
        self.batch_size, self.drop_last = self.plan.batch_size, self.plan.drop_last  # read by accelerate
        self.epoch = 0
        self._sizes, self._size_of_row, self._group_of_row, self._steps_per_pass = {}, {}, {}, {}
        for task in dict.fromkeys(self.plan.pattern):
            if not len(targets.get(task, ())):
                raise ValueError(f"The task {task!r} has weight {self.plan.weights[task]} but no rows.")
            sizes, size_of_row, counts = np.unique(
                np.asarray(targets[task], dtype=np.int64), axis=0, return_inverse=True, return_counts=True
            )
            self._sizes[task] = [(int(height), int(width)) for height, width in sizes]
            group_of_size = self._group(self._sizes[task], counts)
            self._size_of_row[task] = size_of_row.reshape(-1)
            self._group_of_row[task] = group_of_size[self._size_of_row[task]]
            rows_of_group = np.bincount(self._group_of_row[task])
            full, rest = np.divmod(rows_of_group, self.batch_size)
            micro_batches = int(full.sum() + (0 if self.drop_last else (rest > 0).sum()))
            processes = self.plan.num_processes
            self._steps_per_pass[task] = (
                micro_batches // processes if self.drop_last else -(-micro_batches // processes)
            )
            if not self._steps_per_pass[task]:
                raise ValueError(
                    f"With drop_last, the rows of the task {task!r} ({counts.sum()} of {len(counts)} sizes) do not fill "
                    f"a micro-batch of {self.batch_size} rows on each of {processes} processes."
                )
        self._batches_per_epoch = self._count_batches_per_epoch()

    def _group(self, sizes: list[Size], counts: np.ndarray) -> np.ndarray:
        """For every size the index of the size its rows are made at: the most frequent one that they may share."""
        groups = np.zeros(len(sizes), dtype=np.int64)
        leaders: list[int] = []
        for index in np.argsort(-counts, kind="stable"):
            shared = [leader for leader in leaders if self.plan.may_share(sizes[index], sizes[leader])]
            groups[index] = shared[0] if shared else index
            if not shared:
                leaders.append(index)
        return groups

    def _count_batches_per_epoch(self) -> dict[str, int]:
        pattern, per_pass = self.plan.pattern, self._steps_per_pass
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
        steps = {task: self._steps(task, epoch if self.plan.shuffle else 0) for task in self._steps_per_pass}
        for position in range(len(self)):
            task = pattern[position % len(pattern)]
            yield self.plan.draws(task, *next(steps[task]))

    def _steps(self, task: str, epoch: int) -> Iterator[tuple[list[MicroBatch], int]]:
        """The task's steps and the number of their pass, from where `epoch` begins, pass after pass without end."""
        number, start = divmod(epoch * self._batches_per_epoch[task], self._steps_per_pass[task])
        while True:
            yield from ((step, number) for step in self._pass(task, number)[start:])
            number, start = number + 1, 0

    def _pass(self, task: str, number: int) -> list[list[MicroBatch]]:
        group_of_row, processes = self._group_of_row[task], self.plan.num_processes
        rows = np.arange(len(group_of_row))
        rng = np.random.default_rng(mixed_hash(self.plan.seed, 4, TASKS[task].index, number))
        if self.plan.shuffle:
            rng.shuffle(rows)
        if self.batch_size == 1:
            micro_batches = [MicroBatch(self._sizes[task][self._size_of_row[task][row]], [row]) for row in rows]
        else:
            micro_batches = self._micro_batches(task, rows)
            if not self.plan.shuffle:
                micro_batches.sort(key=lambda micro_batch: micro_batch.rows[0])
            elif len(self._sizes[task]) > 1:
                micro_batches = [micro_batches[index] for index in rng.permutation(len(micro_batches))]
        if self.drop_last:
            micro_batches = micro_batches[: len(micro_batches) // processes * processes]
        return into_steps(micro_batches, processes, self.batch_size > 1 and len(self._sizes[task]) > 1)

    def _micro_batches(self, task: str, rows: np.ndarray) -> list[MicroBatch]:
        order = np.argsort(self._group_of_row[task][rows], kind="stable")
        groups, starts = np.unique(self._group_of_row[task][rows][order], return_index=True)
        micro_batches = []
        for group, members in zip(groups, np.split(rows[order], starts[1:]), strict=True):
            stop = len(members) // self.batch_size * self.batch_size if self.drop_last else len(members)
            micro_batches += [
                MicroBatch(self._sizes[task][group], members[start : start + self.batch_size])
                for start in range(0, stop, self.batch_size)
            ]
        return micro_batches


def mixed_hash(*numbers: int) -> int:
    """63 well-mixed bits of a few integers (splitmix64): one-to-one in the last of them but for the bit dropped."""
    mask, state = 2**64 - 1, 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & mask
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state >> 1
