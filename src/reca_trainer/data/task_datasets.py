"""Which rows each task of a run learns from, checked before anything is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeAlias, cast

from datasets import Dataset, IterableDataset
from transformers.utils import logging

from reca_trainer.config import RecAConfig
from reca_trainer.data.columns import (
    SOME_CAPTIONS,
    Columns,
    find_columns,
    find_edit_columns,
    under_root,
    with_images,
)
from reca_trainer.data.encoded_shards import encoded_column
from reca_trainer.data.sampling import SamplingPlan, Size, TaskBatchSampler
from reca_trainer.data.sizes import row_sizes
from reca_trainer.data.sources import load_image_dataset
from reca_trainer.data.texts import check_texts, has_text, rows_without_text
from reca_trainer.models.contract import UnifiedProcessor
from reca_trainer.tasks import TASKS

logger = logging.get_logger(__name__)

Images: TypeAlias = Dataset | IterableDataset


def load_named(name: str, args: RecAConfig) -> Images:
    """The dataset of that name, read as `args` say."""
    return load_image_dataset(
        name,
        args.dataset_split,
        args.dataset_config_name,
        args.dataset_streaming,
        data_files=args.data_files,
        image_root=args.image_root,
    )


class TaskDatasets:
    """The datasets of a run: for every task the rows it can use, and their columns."""

    def __init__(self, datasets: Mapping[str, Images], columns: dict[str, Any]):
        self.datasets, self.columns = dict(datasets), columns
        self._whole: dict[str, Dataset] = {}  # the datasets some of whose rows a task leaves out
        self._sizes: dict[tuple[int, str], list[tuple[int, int]]] = {}  # of each dataset's images in a column
        self._checked: set[str] = set()  # tasks whose rows all have their text

    @classmethod
    def open(
        cls, source: Images | Mapping[str, Images] | None, args: RecAConfig, training: bool = True
    ) -> TaskDatasets:
        """From what the user passed, or from the names in `args`, which are those of the training set.

        Raises:
            ValueError: a dataset is none, has no rows, or, for training, lacks what a task learns from.
        """
        if isinstance(source, TaskDatasets):
            return source
        if source is None:
            if args.dataset_name is None:
                raise ValueError(
                    "There is nothing to train on: pass train_dataset, or set dataset_name in the arguments."
                )
            source = load_named(args.dataset_name, args)
        names_of_tasks = {"caption": args.caption_dataset_name, "edit": args.edit_dataset_name} if training else {}
        given_by_task = isinstance(source, Mapping)
        source = dict(source) if isinstance(source, Mapping) else dict.fromkeys(TASKS, source)
        for task, name in names_of_tasks.items():
            if name is None:
                continue
            if given_by_task and task in source:
                raise ValueError(
                    f"train_dataset and {task}_dataset_name both give a dataset for the task {task!r}; leave one out."
                )
            source[task] = load_image_dataset(name, streaming=args.dataset_streaming, image_root=args.image_root)
        if unknown := set(source) - set(TASKS):
            raise ValueError(
                f"Datasets are given for {', '.join(TASKS)}; not for {', '.join(sorted(map(str, unknown)))}. Of several "
                "splits, pass one."
            )
        names = (args.image_column, args.caption_column, args.conversation_column)
        columns: dict[str, Columns] = {}
        of_dataset: dict[int, Columns] = {}
        for task, dataset in source.items():
            if not isinstance(dataset, Dataset | IterableDataset):
                raise ValueError(
                    f"Images come as a `datasets` dataset, not as {type(dataset).__name__}: make one with "
                    "datasets.Dataset.from_list(rows), or name a folder or file in dataset_name."
                )
            if isinstance(dataset, Dataset) and not len(dataset):
                raise ValueError("The dataset has no rows.")
            if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
                raise ValueError(
                    "The dataset has a transform (with_transform or set_transform), which would never be called: rows are read "
                    "as they are stored. Write its results with dataset.map, or pass a data_collator."
                )
            if task == "edit":  # whose columns are others, also in a dataset that serves all tasks
                if args.edit_weight:
                    may_lack = not (training or given_by_task)
                    with contextlib.suppress(ValueError) if may_lack else contextlib.nullcontext():
                        columns[task] = find_edit_columns(dataset)
                continue
            if id(dataset) not in of_dataset:
                known = [name if name in (dataset.features or {name: None}) else None for name in names[1:]]
                of_dataset[id(dataset)] = find_columns(dataset, names[0], *known)
            columns[task] = of_dataset[id(dataset)]
        for name in names[1:]:
            if name is not None and not any(name in in_use.texts for in_use in of_dataset.values()):
                raise ValueError(f"No dataset has a column {name!r}. Columns in use: {list(of_dataset.values())}.")
        usable: dict[tuple[int, Columns], Images] = {}
        for task, in_use in columns.items():
            if (key := (id(source[task]), in_use)) not in usable:
                usable[key] = with_images(under_root(source[task], in_use, args.image_root), in_use)
        images = cls({task: usable[id(source[task]), in_use] for task, in_use in columns.items()}, columns)
        if training:
            images.check([name for name, task in TASKS.items() if task.columns and getattr(args, task.weight_option)])
        return images

    @property
    def is_streaming(self) -> bool:
        return any(isinstance(dataset, IterableDataset) for dataset in self.datasets.values())

    def __len__(self) -> int:
        return len(cast(Dataset, next(iter(self.datasets.values()))))

    def serves(self, task: str) -> bool:
        return task in self.columns and self.columns[task].serve(task)

    def check(self, tasks: Iterable[str]) -> None:
        """Raises `ValueError` if one of `tasks` finds no rows it can learn from. Rows without captions are such an error
        too, except among the pictures of a folder or archive: there a task leaves them out, and the log counts them."""
        for task in tasks:
            if not self.serves(task):
                wanted = " or ".join(reversed(TASKS[task].columns))
                raise ValueError(
                    f"The task {task!r} needs {'an' if task == 'edit' else 'a'} {wanted} column, and the dataset has none. "
                    f"{'P' if task == 'edit' else 'Name it with caption_column, p'}ass a dataset for the task "
                    f"({{'reconstruct': …, {task!r}: …}}), or set {TASKS[task].weight_option}=0."
                )
            if task in self._checked:
                continue
            self._checked.add(task)
            dataset, columns = self.datasets[task], self.columns[task]
            some_captions = dataset.info.description == SOME_CAPTIONS or encoded_column(dataset)
            if TASKS[task].columns and some_captions:
                self.datasets[task] = self._with_texts(task, columns)
            elif isinstance(dataset, Dataset):
                check_texts(dataset, task, columns)

    def _with_texts(self, task: str, columns: Columns) -> Images:
        """The rows of a task's dataset that have a text."""
        dataset = self.datasets[task]
        if isinstance(dataset, IterableDataset):
            logger.warning(f"The task {task!r} leaves out rows of its stream that have no caption.")
            names = columns.texts

            def keeps(*cells: Any) -> bool:
                return has_text(dict(zip(names, cells, strict=True)), task, columns)

            return dataset.filter(keeps, input_columns=names)
        missing = set(rows_without_text(dataset, task, columns))
        if not missing:
            return dataset
        if len(missing) == len(dataset):
            raise ValueError(
                f"None of {len(dataset)} images has a caption, which the task {task!r} learns from; set "
                f"{TASKS[task].weight_option}=0 to train without it."
            )
        logger.warning(
            f"The task {task!r} leaves out {len(missing):,} of {len(dataset):,} images: they have no caption."
        )
        self._whole[task] = dataset
        return dataset.select([row for row in range(len(dataset)) if row not in missing])

    def check_batches(self, processor: UnifiedProcessor, args: RecAConfig) -> None:
        """Raises `ValueError` for images that cannot be used, or too few with `drop_last`; warns of a batch that is
        never filled."""
        self.check_sizes(processor, args)
        images, per_step = self.datasets.get("reconstruct"), args.train_batch_size * args.world_size
        if args.reca_weight and isinstance(images, Dataset):
            plan = SamplingPlan(
                {"reconstruct": 1},
                batch_size=args.train_batch_size,
                num_processes=args.world_size,
                drop_last=args.dataloader_drop_last,
            )
            TaskBatchSampler({"reconstruct": self.targets("reconstruct", processor, args)}, plan)
            if len(images) < per_step:
                logger.warning(f"There are {len(images)} images, fewer than the {per_step} of a full batch.")

    def check_sizes(self, processor: UnifiedProcessor, args: RecAConfig) -> None:
        """Raises `ImageError` for images whose header cannot be read, where headers decide the target size."""
        for task, dataset in self.datasets.items():
            if isinstance(dataset, Dataset):
                self.targets(task, processor, args)

    def split(self, eval_size: int, seed: int) -> tuple[TaskDatasets, TaskDatasets]:
        """Hold `eval_size` rows of every dataset out: training and evaluation images."""
        if self.is_streaming:
            raise ValueError(
                "eval_size cannot hold rows out of a stream. Pass an eval_dataset, or do without evaluation: "
                "eval_size=0 and eval_strategy='no' (--eval_size 0 --eval_strategy no)."
            )
        parts: dict[int, tuple[Dataset, Dataset]] = {}
        whole = {**self.datasets, **self._whole}  # so that no image is in both halves, for another task
        for dataset in whole.values():
            if isinstance(dataset, Dataset) and id(dataset) not in parts:
                if len(dataset) <= eval_size:
                    raise ValueError(
                        f"eval_size={eval_size} leaves nothing to train on: the dataset has {len(dataset)} rows."
                    )
                halves = dataset.train_test_split(test_size=eval_size, seed=seed)
                parts[id(dataset)] = (halves["train"], halves["test"])
        train, test = (
            TaskDatasets({task: parts[id(dataset)][half] for task, dataset in whole.items()}, dict(self.columns))
            for half in (0, 1)
        )
        train.check(self._whole)
        for task in self._whole:
            if len(rows_without_text(cast(Dataset, test.datasets[task]), task, test.columns[task])) == eval_size:
                del test.datasets[task], test.columns[task]  # a run is not refused for what it happens to hold out
        test.check(self._whole.keys() & test.columns.keys())
        return train, test

    def targets(self, task: str, processor: UnifiedProcessor, args: RecAConfig) -> list[Size]:
        """The `(height, width)` target of every row of a task, whose dataset is no stream."""
        dataset, target_size = cast(Dataset, self.datasets[task]), target_rule(processor, args)
        if processor.fixed_size is not None:
            return [target_size(*processor.fixed_size)] * len(dataset)
        column = self.columns[task].image
        if (key := (id(dataset), column)) not in self._sizes:
            self._sizes[key] = row_sizes(dataset, column, args.on_bad_image, args.dataloader_num_workers)
        sizes = self._sizes[key]
        targets = {size: target_size(*size) for size in set(sizes)}  # far fewer than rows
        return [targets[size] for size in sizes]


def target_rule(processor: UnifiedProcessor, args: RecAConfig) -> Callable[[int, int], Size]:
    """`(width, height)` of an image to the `(height, width)` of its target in this run."""
    return partial(processor.target_size, max_image_size=args.max_image_size, min_image_size=args.min_image_size)
