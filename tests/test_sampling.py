"""Which rows a step sees: tasks, sizes, processes, epochs, and what is drawn for each row."""

import pickle
from collections import Counter

import numpy as np
import pytest

from reca_trainer.data import SamplingPlan, TaskBatchSampler
from reca_trainer.data.sampling import MicroBatch, into_steps, split_to

SQUARE = (16, 16)
SIZES = [(16, 16), (16, 32), (32, 16)]


def targets_of(rows: int, seed: int = 0) -> list[tuple[int, int]]:
    return [SIZES[index] for index in np.random.default_rng(seed).integers(0, 3, rows)]


TASKS = {"reconstruct": targets_of(37), "caption": targets_of(11, seed=1)}


def sampler(**options) -> TaskBatchSampler:
    options = {"weights": {"reconstruct": 2, "caption": 2}, "batch_size": 4, "instruction_dropout": 0.3, **options}
    return TaskBatchSampler(options.pop("targets", TASKS), SamplingPlan(**options))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("processes", [2, 4])
def test_with_targets_of_one_size_several_processes_draw_exactly_what_one_draws(processes, drop_last, shuffle):
    targets = {"reconstruct": [SQUARE] * 37, "caption": [SQUARE] * 11}
    for epoch in (0, 3):
        options = {"targets": targets, "shuffle": shuffle, "drop_last": drop_last, "seed": 5}
        alone = sampler(**options)
        parts = [
            sampler(batch_size=4 // processes, num_processes=processes, process_index=index, **options)
            for index in range(processes)
        ]
        for each in (alone, *parts):
            each.set_epoch(epoch)
        assert {len(part) for part in parts} == {len(alone)}
        for whole, *shares in zip(alone, *parts, strict=True):
            assert all(shares)
            joined = [drawn for share in shares for drawn in share]
            assert [drawn for drawn in joined if not drawn.repeated] == whole
            assert len(joined) == max(len(whole), processes)
            if len(whole) == 4:
                assert joined == whole


def official_sizes(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """`count` different target sizes of about a megapixel, multiples of 16."""
    sides = [(height, width) for height in range(512, 1040, 16) for width in range(512, 1040, 16)]
    return [sides[index] for index in np.random.default_rng(seed).permutation(len(sides))[:count]]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("rows", [1000, 1203])
def test_eight_processes_and_300_sizes_take_every_row_once(rows, batch_size):
    sizes = official_sizes(300)
    targets = [sizes[index] for index in np.random.default_rng(1).integers(0, 300, rows)]
    options = {"targets": {"reconstruct": targets}, "weights": {"reconstruct": 1}, "batch_size": batch_size}
    parts = [sampler(num_processes=8, process_index=index, **options) for index in range(8)]
    for epoch in (0, 1):
        for each in parts:
            each.set_epoch(epoch)
        steps = list(zip(*parts, strict=True))
        assert len(steps) == len(parts[0])
        taken = Counter(drawn.row for step in steps for share in step for drawn in share)
        repeated = -rows % 8 if batch_size == 1 else 0  # of single rows, there is not one for every process
        assert sum(taken.values()) == rows + repeated and set(taken) == set(range(rows))
        for step in steps:
            for share in step:
                assert 1 <= len(share) <= batch_size and len({drawn.size for drawn in share}) == 1
                for drawn in share:
                    (height, width), (asked_height, asked_width) = drawn.size, targets[drawn.row]
                    area = asked_height * asked_width
                    assert abs(height * width - area) <= (0.03 if batch_size > 1 else 0.0) * area
                    assert abs(height - asked_height) <= 0.03 * asked_height
    if batch_size > 1:  # sharing is what makes batches of many sizes worthwhile
        assert sum(map(len, parts[0])) / len(parts[0]) > 0.75 * batch_size


def test_evaluation_keeps_every_target_at_its_own_size():
    targets = [(512, 1024), (512, 1008), (512, 1024)]
    options = {"targets": {"reconstruct": targets}, "weights": {"reconstruct": 1}, "batch_size": 3}
    assert [[drawn.row for drawn in batch] for batch in sampler(shuffle=False, **options)] == [[0, 2], [1]]
    assert [[drawn.size for drawn in batch] for batch in sampler(**options)] == [[(512, 1024)] * 3]


def test_a_pass_ends_by_splitting_micro_batches_before_it_repeats_any():
    def rows(steps):
        return [[list(part.rows) for part in step] for step in steps]

    parts = [MicroBatch(SQUARE, [0, 1, 2, 3]), MicroBatch(SQUARE, [4, 5]), MicroBatch(SQUARE, [6])]
    assert [list(part.rows) for part in split_to(parts, 4)] == [[0, 1], [2, 3], [4, 5], [6]]
    assert rows(into_steps(parts[:2], 2, True)) == [[[0, 1, 2, 3], [4, 5]]]
    assert rows(into_steps(parts[::-1], 2, True)) == [[[6], [4, 5]], [[0, 1], [2, 3]]]  # within the last step
    assert rows(into_steps(parts, 2, True)) == [[[0, 1], [2, 3]], [[4, 5], [6]]]  # or with the step before
    assert rows(into_steps(parts, 2, False)) == [[[0, 1, 2, 3], [4, 5]], [[6], [6]]]
    assert rows(into_steps(parts[2:], 2, True)) == [[[6], [6]]]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_of_several_sizes_two_processes_draw_what_one_accumulates(batch_size):
    targets = {"reconstruct": targets_of(36)}
    options = {"targets": targets, "weights": {"reconstruct": 1}, "batch_size": batch_size, "seed": 5}
    alone = list(sampler(**options))
    halves = zip(*[list(sampler(num_processes=2, process_index=index, **options)) for index in (0, 1)], strict=True)
    joined = [share for step in halves for share in step]
    assert joined[: len(alone) // 2 * 2 - 2] == alone[: len(alone) // 2 * 2 - 2]


def test_a_micro_batch_has_one_task_and_one_size_and_every_sample_its_own_instruction():
    batches = list(sampler())
    for batch in batches:
        assert len({(drawn.task, drawn.size) for drawn in batch}) == 1
        assert all(TASKS[drawn.task][drawn.row] == drawn.size for drawn in batch)
    assert max(len({drawn.instruction for drawn in batch}) for batch in batches) == 4
    crops = [drawn.crop for batch in batches for drawn in batch]
    assert len(set(crops)) == len(crops) and 0 <= min(crops) < 0.2 and 0.8 < max(crops) < 1


def test_an_epoch_is_every_reconstruct_row_once_in_the_weights_pattern():
    batches = list(sampler())
    rows = Counter(drawn.row for batch in batches for drawn in batch if drawn.task == "reconstruct")
    assert rows == dict.fromkeys(range(37), 1)
    pattern = ["reconstruct", "reconstruct", "caption", "caption"]
    assert [batch[0].task for batch in batches] == (pattern * len(batches))[: len(batches)]
    assert batches[-1][0].task == "reconstruct" or len(batches) % 4 == 0


def test_other_tasks_go_on_where_the_last_epoch_stopped():
    each = sampler(targets={"reconstruct": [SQUARE] * 8, "caption": [SQUARE] * 12}, batch_size=2)
    drawn = []
    for epoch in range(3):
        each.set_epoch(epoch)
        drawn += [sample.row for batch in each for sample in batch if sample.task == "caption"]
    assert len(drawn) == 24
    assert sorted(drawn[:12]) == sorted(drawn[12:]) == list(range(12))
    assert drawn[:12] != drawn[12:]


def test_without_reconstruct_the_longest_task_makes_the_epoch():
    each = sampler(
        targets={"caption": [SQUARE] * 3, "generate": [SQUARE] * 10},
        weights={"caption": 1, "generate": 1},
        batch_size=2,
    )
    rows = Counter(sample.row for batch in each for sample in batch if sample.task == "generate")
    assert rows == dict.fromkeys(range(10), 1)
    assert len(list(each)) == len(each) == 10


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 16, 31])
@pytest.mark.parametrize(
    "weights", [{"reconstruct": 1}, {"reconstruct": 3, "caption": 1}, {"caption": 2, "generate": 1}]
)
def test_the_length_is_exact(rows, weights):
    for drop_last in (False, True):
        targets = {task: targets_of(rows + 6, seed=rows) for task in weights}
        each = sampler(targets=targets, weights=weights, batch_size=2, drop_last=drop_last)
        for epoch in range(3):
            each.set_epoch(epoch)
            batches = list(each)
            assert len(batches) == len(each)
            assert not drop_last or {len(batch) for batch in batches} == {2}


def test_epochs_differ_and_each_is_reproduced():
    def epochs(each, numbers):
        result = []
        for number in numbers:
            each.set_epoch(number)
            result.append(list(each))
        return result

    first, second = epochs(sampler(seed=1), (0, 1))
    assert first != second
    assert epochs(pickle.loads(pickle.dumps(sampler(seed=1))), (1, 0)) == [second, first]
    assert epochs(sampler(seed=2), (0,)) != [first]


def test_seeds_never_repeat():
    seeds = []
    for seed in range(3):
        each = sampler(seed=seed)
        for epoch in range(5):
            each.set_epoch(epoch)
            seeds += [drawn.seed for batch in each for drawn in batch]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)  # a CPU generator looks at these bits only


def test_evaluation_draws_depend_on_the_row_alone():
    def draws(**options):
        each = sampler(shuffle=False, weights={"reconstruct": 1}, **options)
        each.set_epoch(options.get("batch_size", 0))
        return {drawn.row: drawn for batch in each for drawn in batch}

    assert draws() == draws(batch_size=1) == draws(batch_size=3, instruction_dropout=1.0)
    assert len(draws()) == 37
    assert len({drawn.seed for drawn in draws().values()}) == 37
    assert {(drawn.crop, drawn.dropped) for drawn in draws().values()} == {(None, False)}


def test_instructions_vary_and_texts_are_dropped_with_their_probability():
    targets = dict.fromkeys(("reconstruct", "caption", "generate"), [SQUARE] * 600)

    def drawn(task, **options):
        each = sampler(targets=targets, weights=dict.fromkeys(targets, 1), batch_size=5, **options)
        return [sample for batch in each for sample in batch if sample.task == task]

    def dropped(task, **options):
        return sum(sample.dropped for sample in drawn(task, **options))

    assert len({sample.instruction for sample in drawn("reconstruct")}) > 150
    assert len({sample.instruction for sample in drawn("caption")}) > 10
    assert all(sample.instruction for task in ("reconstruct", "caption") for sample in drawn(task))
    options = {"instruction_dropout": 0.25, "caption_dropout": 0.1}
    assert 110 < dropped("reconstruct", **options) < 190 and 35 < dropped("generate", **options) < 90
    assert dropped("caption", **options) == 0
    assert dropped("reconstruct", instruction_dropout=0.0) == 0 == dropped("generate", caption_dropout=0.0)
    assert dropped("reconstruct", instruction_dropout=1.0) == 600 == dropped("generate", caption_dropout=1.0)
    mixed = [{s.dropped for s in batch} for batch in sampler(targets=targets, weights={"reconstruct": 1}, **options)]
    assert {True, False} in mixed
    choices = {"reconstruct": ["Draw it."], "caption": ["What?"]}
    for task, text in (("reconstruct", "Draw it."), ("caption", "What?")):
        assert {sample.instruction for sample in drawn(task, instructions=choices)} == {text}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"generate": 1}}, "'generate' has weight 1 but no rows"),
        ({"weights": {"paint": 1}}, "paint"),
        ({"weights": {"reconstruct": 0.5}}, "whole numbers"),
        ({"weights": {"reconstruct": 0}}, "positive weight"),
        ({"batch_size": 64, "drop_last": True}, "drop_last"),
        ({"num_processes": 2, "process_index": 2}, "process 2 of 2"),
        ({"instruction_dropout": 1.5}, "probability"),
        ({"caption_dropout": -0.5}, "caption_dropout is a probability"),
    ],
)
def test_impossible_samplers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sampler(**options)
