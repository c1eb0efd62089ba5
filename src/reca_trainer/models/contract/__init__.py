"""The contract between `RecATrainer` and a model family.

A family is a `UnifiedModel` (a `PreTrainedModel`, so loading, saving, quantisation, PEFT, FSDP and the Hub come with it)
and a `UnifiedProcessor`. The trainer knows these two classes and nothing about any family.

A batch is a plain dict. Its keys mean the same in every family:

| key | shape | meaning |
|---|---|---|
| `task` | str | `"reconstruct"`, `"generate"`, `"caption"` or `"edit"` |
| `condition_pixel_values` | `[B, 3, h, w]` float | image for the understanding encoder, as that encoder wants it normalised; a list of B `[3, h, w]` where sizes differ |
| `pixel_values` | `[B, 3, H, W]` float in [-1, 1] | image to generate |
| `source_pixel_values` | `[B, 3, H, W]` float in [-1, 1] | image that an edit starts from, as `pixel_values` are; `condition_pixel_values` has it too |
| `input_ids`, `attention_mask` | `[B, T]` int64 | instruction (reconstruct, edit), prompt (generate), question and answer (caption) |
| `labels` | `[B, T]` int64 | caption targets, -100 where nothing is supervised |
"""

from reca_trainer.models.contract.model import Generators, UnifiedModel, per_sample
from reca_trainer.models.contract.output import UnifiedOutput, count_answer_tokens, token_cross_entropy
from reca_trainer.models.contract.processor import (
    IMAGE_MARK,
    Conversation,
    Message,
    UnifiedProcessor,
    check_only_size,
    conversations_of,
    one_per_sample,
)

__all__ = [
    "IMAGE_MARK",
    "Conversation",
    "Generators",
    "Message",
    "UnifiedModel",
    "UnifiedOutput",
    "UnifiedProcessor",
    "check_only_size",
    "conversations_of",
    "count_answer_tokens",
    "one_per_sample",
    "per_sample",
    "token_cross_entropy",
]
