"""`reca-trainer generate`, `reconstruct` and `edit`: prompts or pictures in, pictures out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from reca_trainer import toy
from reca_trainer.contact_sheets import contact_sheet, sheet_row
from reca_trainer.data.sources.files import PICTURES
from reca_trainer.evaluation.arguments import parse_sampling
from reca_trainer.evaluation.generation import load_model, processes
from reca_trainer.files import replacing, written_whole
from reca_trainer.images import decode_image
from reca_trainer.models.contract import UnifiedModel, UnifiedProcessor

INSTRUCTION = "Describe the image in detail."


def make_parser(command: str, summary: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"reca-trainer {command}", description=summary)
    parser.add_argument("--model", help="folder or Hub id of a model or adapter (default: the embedded tiny BAGEL)")
    parser.add_argument("--adapter", help="folder or Hub id of an adapter to put on --model")
    if command == "reconstruct":
        parser.add_argument("--instruction", default=INSTRUCTION, help="what the model is asked for (%(default)s)")
    else:
        texts = parser.add_mutually_exclusive_group(required=True)
        texts.add_argument("--prompts", nargs="+", metavar="PROMPT")
        texts.add_argument("--prompts_file", type=Path, help="text file with one prompt a line")
    if command != "generate":
        parser.add_argument("--images", nargs="+", required=True, metavar="FILE", help="pictures, or folders of them")
    parser.add_argument("--output_dir", required=True, type=Path, help="a new folder for the pictures and grid.png")
    parser.add_argument("--samples", type=int, default=1, help="pictures of each prompt or picture (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture; each other takes the next number")
    parser.add_argument("--batch_size", type=int, default=1, help="pictures made at a time (%(default)s)")
    parser.add_argument("--dtype", default=None, help="dtype of the weights (default: bfloat16 on a GPU)")
    parser.add_argument("--load_in_4bit", action="store_true", help="NF4 weights, for small GPUs")
    parser.add_argument(
        "--sampling",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="arguments of generate_images, such as num_inference_steps=25 guidance_scale=4 height=512 width=512",
    )
    return parser


def generate(argv: list[str] | None = None) -> None:
    """`reca-trainer generate`: pictures of prompts."""
    args = make_parser("generate", "Make pictures from prompts.").parse_args(argv)
    prompts = read_prompts(args)
    write(args, "generate", [(prompt, prompt, None) for prompt in prompts])


def reconstruct(argv: list[str] | None = None) -> None:
    """`reca-trainer reconstruct`: pictures again, from the model's own understanding of them."""
    args = make_parser("reconstruct", "Make pictures again from the model's own understanding of them.").parse_args(
        argv
    )
    write(
        args, "reconstruct", [(path.name, args.instruction, decode_image(path)) for path in picture_files(args.images)]
    )


def edit(argv: list[str] | None = None) -> None:
    """`reca-trainer edit`: every picture changed as every prompt says."""
    args = make_parser("edit", "Change pictures as prompts say.").parse_args(argv)
    pictures = [decode_image(path) for path in picture_files(args.images)]
    write(args, "edit", [(prompt, prompt, picture) for prompt in read_prompts(args) for picture in pictures])


def read_prompts(args: argparse.Namespace) -> list[str]:
    if args.prompts:
        return args.prompts
    prompts = [line.strip() for line in args.prompts_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{args.prompts_file} has no prompt: write one a line.")
    return prompts


def picture_files(names: Sequence[str]) -> list[Path]:
    """The named files, and the pictures in the named folders, in order; what else lies there is named on the console.

    Raises:
        FileNotFoundError: nothing at a name, or a folder without pictures.
    """
    files: list[Path] = []
    for name in names:
        path = Path(name)
        inside = sorted(child for child in path.iterdir() if child.is_file()) if path.is_dir() else [path]
        pictures = [child for child in inside if not path.is_dir() or child.suffix.lower() in PICTURES]
        if not pictures or not path.exists():
            raise FileNotFoundError(f"There is no picture at {name}.")
        if len(pictures) < len(inside):
            others = ", ".join(child.name for child in inside if child not in pictures)
            print(f"Left out of {name}, being no pictures: {others}", file=sys.stderr)
        files += pictures
    return files


def load(args: argparse.Namespace) -> tuple[UnifiedModel, UnifiedProcessor]:
    """The model that the arguments name, on this machine's accelerator if it has one."""
    dtype = args.dtype or ("bfloat16" if processes().device.type == "cuda" else "float32")
    return load_model(args.model or str(toy.CHECKPOINT), args.adapter, dtype, args.load_in_4bit)


def write(args: argparse.Namespace, task: str, requests: list[tuple[str, str, Image.Image | None]]) -> None:
    """Make the pictures of all `(title, text, source picture)` and write them, with a grid of all and what made them."""
    if args.samples < 1 or args.batch_size < 1:
        raise ValueError(f"--samples and --batch_size are 1 or more, not {args.samples} and {args.batch_size}.")
    sampling = parse_sampling(args.sampling)
    with written_whole(args.output_dir) as folder:
        model, processor = load(args)
        jobs = [(index, sample) for index in range(len(requests)) for sample in range(args.samples)]
        made: dict[tuple[int, int], Image.Image] = {}
        with tqdm(total=len(jobs), desc=task, unit="picture") as progress:
            for start in range(0, len(jobs), args.batch_size):
                batch = jobs[start : start + args.batch_size]
                sources = [requests[index][2] for index, _ in batch]
                pictures = model.generate_images(
                    processor,
                    text=[requests[index][1] for index, _ in batch],
                    images=None if task == "generate" else sources,
                    task=task,
                    generator=[torch.Generator().manual_seed(args.seed + sample) for _, sample in batch],
                    **sampling,
                )
                made.update(zip(batch, pictures, strict=True))
                progress.update(len(batch))
        for (index, sample), picture in made.items():
            picture.save(folder / f"{index:04d}-{sample}.png")
        rows = [sheet_row("" if task == "reconstruct" else "prompt", [title for title, _, _ in requests])]
        if task != "generate":
            rows.append(sheet_row("input", [source for _, _, source in requests]))
        for sample in range(args.samples):
            pictures = [made[index, sample] for index in range(len(requests))]
            rows.append(sheet_row(f"seed {args.seed + sample}", pictures))
        with replacing(folder / "grid.png") as file:
            contact_sheet(rows).save(file, format="png")
        settings = {
            "task": task,
            "model": args.model or "embedded",
            "adapter": args.adapter,
            "seed": args.seed,
            "sampling": sampling,
            "texts": [text for _, text, _ in requests],
        }
        (folder / "settings.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    print(f"{len(made)} pictures in {args.output_dir.resolve()}; all of them in grid.png")
