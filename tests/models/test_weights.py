"""Weights that bitsandbytes packed, with parts that do not belong together."""

import pytest
import torch

from reca_trainer.models.weights import CheckpointError, LazyTensor, dequantized


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["layer.weight", "layer.weight.stray"], r"layer\.weight is packed in parts .*stray"),
        (["layer.weight.absmax"], r"layer\.weight\.absmax is there without layer\.weight"),
        (["layer.SCB"], r"layer\.weight\.SCB is there without layer\.weight"),
    ],
)
def test_parts_that_do_not_fit_are_named(keys, message):
    with pytest.raises(CheckpointError, match=message):
        dequantized({key: LazyTensor(torch.zeros(2, 2)) for key in keys})
