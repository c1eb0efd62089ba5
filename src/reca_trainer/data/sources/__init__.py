"""Any source of images as a dataset: `load` decides which reader a folder or file needs; `pictures`, `archives` and
`tables` are the readers."""

from reca_trainer.data.sources.load import load_image_dataset

__all__ = ["load_image_dataset"]
