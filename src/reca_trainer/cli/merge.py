"""`reca-trainer merge`."""

from __future__ import annotations

import argparse

from reca_trainer.cli.export import add_form, torch_dtype
from reca_trainer.saving.merge import merge_adapter


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("reca-trainer merge", description="Merge an adapter into its base model.")
    parser.add_argument("adapter", help="folder or Hub id")
    parser.add_argument("output_dir")
    parser.add_argument(
        "--base",
        help="folder or Hub id of the base, owner/name/file.pth or owner/name/folder of several (default: the one the adapter names)",
    )
    parser.add_argument(
        "--into",
        choices=("base", "dequantized", "quantized"),
        help="what to merge into (default: base for LoRA, dequantized for QLoRA)",
    )
    add_form(parser, layout="transformers")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    options = {"layout": args.layout, "max_shard_size": args.max_shard_size}
    merge_adapter(args.base, args.adapter, args.output_dir, args.into, torch_dtype(args.dtype), **options)
    print(f"Merged into {args.output_dir}")
