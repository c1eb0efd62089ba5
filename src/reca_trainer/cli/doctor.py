"""`reca-trainer doctor`."""

from __future__ import annotations

import argparse

import torch

from reca_trainer import doctor
from reca_trainer.saving.card import public_name


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("reca-trainer doctor", description=doctor.__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="folder or Hub id of a model to examine as well")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="dtype of its weights (default: bfloat16 on a GPU)"
    )
    parser.add_argument("--max_image_size", type=int, help="longest side of a target, for families with a choice")
    parser.add_argument("--num_inference_steps", type=int, default=4, help="steps of a picture (default: %(default)s)")
    parser.add_argument("--lora_r", type=int, default=64, help="rank of the adapter that is tried (%(default)s)")
    parser.add_argument("--load_in_4bit", action="store_true", help="compute its loss in NF4 as well")
    parser.add_argument("--llm_int8_skip_modules", nargs="+", help="layers that stay unquantised there, as for train")
    parser.add_argument("--files_only", action="store_true", help="read files, keys and digests, and load nothing")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.llm_int8_skip_modules and not args.load_in_4bit:
        parser.error("--llm_int8_skip_modules is about a 4-bit base: add --load_in_4bit, or leave it out.")
    show("machine", doctor.examine_machine())
    if args.model is None:
        return
    show(f"files of {public_name(args.model)}", doctor.examine_files(args.model))
    if args.files_only:
        return
    dtype = getattr(torch, args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32"))
    options = (args.max_image_size, args.num_inference_steps, args.lora_r, args.load_in_4bit, args.llm_int8_skip_modules)
    show("what it does", doctor.examine_model(args.model, dtype, *options))


def show(title: str, findings: doctor.Findings) -> None:
    """Print each finding when it is there: loading a model takes minutes."""
    print(f"## {title}", flush=True)
    for name, value in findings:
        print(f"{name:<22} {value}", flush=True)
