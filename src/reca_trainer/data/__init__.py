"""The data flow of a run, in reading order: sources -> columns -> rows -> sampling (or streaming) -> task_datasets ->
collator."""

from reca_trainer.data.columns import Columns, check_columns, find_columns
from reca_trainer.data.rows import Row, RowDataset
from reca_trainer.data.sampling import Draw, SamplingPlan, TaskBatchSampler
from reca_trainer.data.sizes import row_sizes
from reca_trainer.data.sources import load_image_dataset
from reca_trainer.data.streaming import StreamingBatches
from reca_trainer.data.texts import check_texts

__all__ = [
    "Columns",
    "Draw",
    "Row",
    "RowDataset",
    "SamplingPlan",
    "StreamingBatches",
    "TaskBatchSampler",
    "check_columns",
    "check_texts",
    "find_columns",
    "load_image_dataset",
    "row_sizes",
]
