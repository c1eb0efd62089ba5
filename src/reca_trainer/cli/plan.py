"""`reca-trainer plan`."""

from __future__ import annotations

import argparse
import re

from reca_trainer import plan
from reca_trainer.models.registry import families
from reca_trainer.plan import MODES, OPTIMIZER_BYTES, Cost, measured_rate, open_model, step_cost


def gigabytes(text: str) -> float:
    match = re.fullmatch(r"([\d.]+)\s*(?:gb?|gib)?", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory; write 24GB.")
    return float(match[1])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("reca-trainer plan", description=plan.__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help=f"folder, Hub id, or a family: {', '.join(families())}")
    parser.add_argument("--mode", default="lora", choices=MODES)
    parser.add_argument(
        "--max_image_size",
        "--resolution",
        type=int,
        help="longest side of the target images in pixels, assumed square; by default the family's",
    )
    parser.add_argument("--min_image_size", type=int, help="shortest side, likewise")
    parser.add_argument("--text_length", type=int, default=32, help="tokens of an instruction (default 32)")
    parser.add_argument(
        "--gpu", type=gigabytes, required=True, metavar="MEMORY", help="memory of one GPU, such as 24GB"
    )
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--optimizer", default="adamw_torch_fused", choices=list(OPTIMIZER_BYTES))
    parser.add_argument("--no_checkpointing", action="store_true", help="keep activations instead of recomputing them")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--images_per_step", type=int, help="default: the largest batch that fits")
    parser.add_argument(
        "--tflops", type=float, help="measured bfloat16 matmul rate of the GPU; measured here if one is present"
    )
    parser.add_argument(
        "--utilisation", type=float, default=0.6, help="share of that rate that a step reaches (default 0.6)"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """`reca-trainer plan`: print what a step takes, the largest batch that fits, and the time of a run."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        cost, cost_of_eight = (plan_cost(args, batch_size) for batch_size in (1, 8))
    except ValueError as error:
        parser.error(str(error))
    # Not from one to two: the gradients of a full model may outweigh the activations of the first few images.
    needed, further = cost.process(), (cost_of_eight.process() - cost.process()) / 7
    largest = int(1 + (args.gpu * 1e9 - needed) // further) if args.gpu * 1e9 >= needed else 0
    print(f"{cost.parameters / 1e9:.2f} B parameters, {cost.trained_parameters / 1e6:,.1f} M of them trained")
    print(
        f"weights {cost.weights / 1e9:.2f} GB, optimiser {cost.optimizer / 1e9:.2f} GB, one image's step {cost.step / 1e9:.2f} GB"
    )
    print(
        f"with process and fragmentation: {needed / 1e9:.1f} GB for a batch of 1, each further image {further / 1e9:.2f} GB"
    )
    if not largest:
        print(f"Does not fit into {args.gpu:g} GB." + _advice(args))
        return
    print(f"Fits into {args.gpu:g} GB with per_device_train_batch_size up to {largest}.")
    rate = args.tflops * 1e12 if args.tflops else measured_rate()
    if rate is None:
        print(f"{cost.flops / 1e12:.1f} TFLOP an image. For the time, give the GPU's measured matmul rate: --tflops.")
        return
    images = args.images_per_step or largest
    seconds = cost.flops * images / (rate * args.utilisation)
    print(
        f"{seconds:.2f} s a step of {images} images at {args.utilisation:.0%} of {rate / 1e12:.0f} TFLOP/s: "
        f"{seconds * args.steps / 3600:.1f} GPU-hours for {args.steps:,} steps."
    )


def plan_cost(args: argparse.Namespace, batch_size: int) -> Cost:
    """The cost of one step.

    Raises:
        ValueError: the model makes no targets of the size asked for.
    """
    model = open_model(args.model)
    return step_cost(
        model,
        model.example_batch(batch_size, args.max_image_size, args.min_image_size, args.text_length),
        args.mode,
        checkpointing=not args.no_checkpointing,
        lora_rank=args.lora_rank,
        optimizer=args.optimizer,
    )


def _advice(args: argparse.Namespace) -> str:
    advice = []
    if args.no_checkpointing:
        advice.append("recompute activations")
    if args.mode != "qlora":
        advice.append("--mode qlora" if args.mode == "lora" else "--mode lora, or --optimizer adamw_bnb_8bit")
    if args.max_image_size is None or args.max_image_size > 512:
        advice.append("where the family has a choice --max_image_size 512")
    return f" Try {', or '.join(advice)}." if advice else ""
