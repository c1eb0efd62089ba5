"""The console script `reca-trainer`. Everything it does is a function of the library, imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

# Commands that live elsewhere: modules whose `main(argv)` reads its own arguments.
ELSEWHERE = {
    "evaluate": ("reca_trainer.evaluation.evaluate", "score a model on a benchmark"),
    "compare": ("reca_trainer.evaluation.compare", "compare models on a benchmark, image by image"),
    "plan": ("reca_trainer.plan", "does a run fit a GPU, which batch, how long"),
}
DTYPES = ("float32", "bfloat16", "float16")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("reca-trainer", description=sys.modules["reca_trainer"].__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    merge = commands.add_parser("merge", help="merge an adapter into its base model")
    merge.add_argument("adapter", help="folder or Hub id")
    merge.add_argument("output_dir")
    merge.add_argument("--base", help="folder or Hub id of the base (default: the one the adapter names)")
    merge.add_argument(
        "--into",
        choices=("base", "dequantized", "quantized"),
        help="what to merge into (default: base for LoRA, dequantized for QLoRA)",
    )
    add_form(merge, layout="transformers")

    export = commands.add_parser("export", help="write a model in another layout, dtype or quantisation")
    export.add_argument("model", help="folder or Hub id")
    export.add_argument("output_dir")
    export.add_argument("--quantize", choices=("nf4", "int8"), help="store the language model in 4 or 8 bits")
    add_form(export, layout="published")

    push = commands.add_parser("push", help="upload an adapter or a model to the Hub")
    push.add_argument("folder")
    push.add_argument("repo_id", help="owner/name")
    push.add_argument("--private", action="store_true", default=None, help="if the repository is created")
    push.add_argument("--revision", help="branch to commit to")
    push.add_argument("--create-pr", action="store_true", help="open a pull request")
    push.add_argument("--message", default="Upload with reca_trainer", help="of the commit")

    info = commands.add_parser("info", help="what a checkpoint or adapter is")
    info.add_argument("model", help="folder or Hub id, which is downloaded")

    for name, (_, summary) in ELSEWHERE.items():
        commands.add_parser(name, help=summary, add_help=False)
    return parser


def add_form(parser: argparse.ArgumentParser, layout: str) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as stored)")
    parser.add_argument(
        "--layout",
        choices=("transformers", "published"),
        default=layout,
        help=f"save_pretrained form, or the family's own for its other tools (default: {layout})",
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", help="of a file, and so of the memory needed (default: 5GB)"
    )


def run_merge(args: argparse.Namespace) -> None:
    from reca_trainer.adapters import merge_adapter

    options = {"layout": args.layout, "max_shard_size": args.max_shard_size}
    merge_adapter(args.base, args.adapter, args.output_dir, args.into, torch_dtype(args.dtype), **options)
    print(f"Merged into {args.output_dir}")


def run_export(args: argparse.Namespace) -> None:
    from transformers import BitsAndBytesConfig

    from reca_trainer.hub import export

    config = {
        None: None,
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }[args.quantize]
    layout = "transformers" if config else args.layout
    options = {"quantization_config": config, "max_shard_size": args.max_shard_size}
    export(args.model, args.output_dir, layout, torch_dtype(args.dtype), **options)
    print(f"Exported to {args.output_dir}")


def run_push(args: argparse.Namespace) -> None:
    from reca_trainer.hub import push

    where = {"private": args.private, "revision": args.revision, "create_pr": args.create_pr}
    commit = push(args.folder, args.repo_id, commit_message=args.message, **where)
    print(commit.pr_url or commit.commit_url)


def run_info(args: argparse.Namespace) -> None:
    from reca_trainer.hub import describe

    for name, value in describe(args.model).items():
        print(f"{name:<20} {value}")


def torch_dtype(name: str | None) -> Any:
    import torch

    return name and getattr(torch, name)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv and argv[0] in ELSEWHERE:
            return importlib.import_module(ELSEWHERE[argv[0]][0]).main(argv[1:]) or 0
        args = make_parser().parse_args(argv)
        {"merge": run_merge, "export": run_export, "push": run_push, "info": run_info}[args.command](args)
    except (ValueError, OSError) as error:  # what users can mend; anything else is a bug and keeps its traceback
        print(f"reca-trainer {argv[0]}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
