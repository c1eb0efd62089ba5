"""`reca-trainer compare`."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import HfArgumentParser

from reca_trainer.evaluation.arguments import ComparisonArguments
from reca_trainer.evaluation.compare import compare

DESCRIPTION = """Run one benchmark on several models with the same seeds and compare them, image by image, with the first.
Each of them is a model, an adapter of the first one, or the output folder of `reca-trainer evaluate`."""


def make_parser() -> HfArgumentParser:
    parser = HfArgumentParser(ComparisonArguments, prog="reca-trainer compare", description=DESCRIPTION)
    parser.add_argument(
        "models", nargs="+", metavar="model", help="model, adapter or folder of results; first the base"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """`reca-trainer compare`: print the table."""
    args, positional = make_parser().parse_args_into_dataclasses(argv, look_for_args_file=False)
    print(compare(positional.models, args), end="")
