"""`reca-trainer evaluate`."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import HfArgumentParser

from reca_trainer.evaluation.arguments import EvaluationArguments
from reca_trainer.evaluation.evaluate import evaluate

DESCRIPTION = """Score a model on a benchmark. An interrupted run of geneval or dpg continues where it stopped when started
again. On several GPUs: accelerate launch -m reca_trainer evaluate ..."""


def make_parser() -> HfArgumentParser:
    return HfArgumentParser(EvaluationArguments, prog="reca-trainer evaluate", description=DESCRIPTION)


def main(argv: Sequence[str] | None = None) -> None:
    """`reca-trainer evaluate`: print the report."""
    [args] = make_parser().parse_args_into_dataclasses(argv, look_for_args_file=False)
    print(evaluate(args), end="")
