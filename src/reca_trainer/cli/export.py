"""`reca-trainer export`, and the options about the form of what is written."""

from __future__ import annotations

import argparse

import torch
from transformers import BitsAndBytesConfig

from reca_trainer.saving.export import export

DTYPES = ("float32", "bfloat16", "float16")


def add_form(parser: argparse.ArgumentParser, layout: str) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: as stored)")
    parser.add_argument(
        "--layout",
        choices=("transformers", "published"),
        default=layout,
        help=f"save_pretrained form, or the family's own for its other tools (default: {layout})",
    )
    parser.add_argument(
        "--max_shard_size",
        metavar="SIZE",
        help="largest size of a file, such as 2GB (default: 5GB; in a published layout, as published)",
    )


def torch_dtype(name: str | None) -> torch.dtype | None:
    return getattr(torch, name) if name else None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "reca-trainer export",
        description="Write a model in another layout, dtype or quantisation, or an adapter for the family's other tools.",
    )
    parser.add_argument("model", help="folder or Hub id; owner/name/file.pth or owner/name/folder of several")
    parser.add_argument("output_dir")
    parser.add_argument("--quantize", choices=("nf4", "int8"), help="store the language model in 4 or 8 bits")
    parser.add_argument(
        "--llm_int8_skip_modules",
        nargs="+",
        metavar="LAYER",
        help="layers of it that stay in bfloat16: names or patterns",
    )
    add_form(parser, layout="published")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.llm_int8_skip_modules and not args.quantize:
        raise ValueError("--llm_int8_skip_modules is about quantised layers: add --quantize, or leave it out.")
    config = {
        None: None,
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }[args.quantize]
    if config is not None:
        config.llm_int8_skip_modules = args.llm_int8_skip_modules
    layout = "transformers" if config else args.layout
    options = {"quantization_config": config, "max_shard_size": args.max_shard_size}
    export(args.model, args.output_dir, layout, torch_dtype(args.dtype), **options)
    print(f"Exported to {args.output_dir}")
