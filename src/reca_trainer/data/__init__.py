"""The data flow of a run, in reading order: sources -> columns -> rows -> sampling (or streaming) -> task_datasets ->
collator."""

from reca_trainer.data.columns import Columns, check_columns, find_columns
from reca_trainer.data.rows import RowDataset, check_texts, row_sizes
from reca_trainer.data.sampling import Draw, SamplingPlan, TaskBatchSampler
from reca_trainer.data.sources import load_image_dataset
from reca_trainer.data.streaming import StreamingRows

__all__ = [
    "Columns",
    "Draw",
    "RowDataset",
    "SamplingPlan",
    "StreamingRows",
    "TaskBatchSampler",
    "check_columns",
    "check_texts",
    "find_columns",
    "load_image_dataset",
    "row_sizes",
]
