"""`reca-trainer plan`."""

from __future__ import annotations

import argparse
import re

from PIL import Image

from reca_trainer import plan
from reca_trainer.models.auto import AutoUnifiedProcessor
from reca_trainer.models.contract import UnifiedProcessor
from reca_trainer.models.registry import families, family
from reca_trainer.plan import MODES, OPTIMIZER_BYTES, Cost, measured_rate, open_model, step_cost
from reca_trainer.toy.tokenizer import make_tokenizer

INSTRUCTION = "Describe every detail of the picture."


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
        "--resolution", type=int, default=512, help="side of the target images in pixels (default 512)"
    )
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
    args = make_parser().parse_args(argv)
    cost, cost_of_two = (plan_cost(args, batch_size) for batch_size in (1, 2))
    needed, further = cost.process(), cost_of_two.process() - cost.process()
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
    model, processor = open_model(args.model), open_processor(args.model)
    picture = Image.new("RGB", (args.resolution, args.resolution))
    size = (args.resolution, args.resolution)
    batch = processor(images=[picture] * batch_size, instruction=INSTRUCTION, task="reconstruct", size=size)
    return step_cost(
        model,
        batch,
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
    if args.resolution > 512:
        advice.append("--resolution 512")
    return f" Try {', or '.join(advice)}." if advice else ""


def open_processor(name: str) -> UnifiedProcessor:
    """The processor of `open_model(name)`. By a family's name there is no tokenizer: any gives texts of about the length."""
    if name in families():
        return family(name).Processor(make_tokenizer())
    return AutoUnifiedProcessor.from_pretrained(name)
