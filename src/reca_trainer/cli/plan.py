"""`reca-trainer plan`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from reca_trainer import plan
from reca_trainer.models.precision import default_precision
from reca_trainer.models.registry import families
from reca_trainer.models.tensor_files import size_of
from reca_trainer.plan import LAUNCHES, MODES, OPTIMIZER_BYTES, Cost, measured_rate, open_model, step_costs
from reca_trainer.recipes import read_recipe

# The options of a recipe that decide what a run needs; this command reads no others.
FROM_RECIPE = (
    "model_name_or_path", "dtype", "bf16", "use_peft", "load_in_4bit", "lora_r", "optim", "ema_decay", "max_image_size",
    "min_image_size", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "save_total_limit",
    "activation_checkpointing", "gradient_checkpointing", "dataloader_num_workers", "llm_int8_skip_modules",
    "freeze_modules",
)  # fmt: skip


def gigabytes(text: str) -> float:
    match = re.fullmatch(r"([\d.]+)\s*(?:gb?|gib)?", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory; write 24GB.")
    return float(match[1])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("reca-trainer plan", description=plan.__doc__.split("\n\n")[0])
    parser.add_argument("--config", help="recipe of the run, by its name or file; options given here come before it")
    parser.add_argument(
        "--model",
        "--model_name_or_path",
        dest="model_name_or_path",
        help=f"folder, Hub id, or a family: {', '.join(families())}",
    )
    parser.add_argument("--mode", choices=MODES, help="what is trained (default: as the recipe says, or lora)")
    parser.add_argument(
        "--max_image_size",
        "--resolution",
        type=int,
        help="longest side of the target images in pixels, assumed square; by default the family's",
    )
    parser.add_argument("--min_image_size", type=int, help="shortest side of the target images in pixels")
    parser.add_argument("--text_length", type=int, default=32, help="tokens of an instruction (default 32)")
    parser.add_argument(
        "--gpu", type=gigabytes, required=True, metavar="MEMORY", help="memory of one GPU, such as 24GB"
    )
    parser.add_argument("--num_processes", type=int, default=1, help="GPUs, on one machine (default 1)")
    parser.add_argument("--launch", choices=LAUNCHES, default="ddp", help="launch file of several GPUs (default ddp)")
    parser.add_argument(
        "--lora_r", "--lora_rank", type=int, help="rank of the adapter (default: 64, as in the recipes)"
    )
    parser.add_argument(
        "--optim", "--optimizer", choices=list(OPTIMIZER_BYTES), help="optimiser (default: adamw_torch_fused)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of the weights, as for train")
    parser.add_argument(
        "--llm_int8_skip_modules", nargs="+", help="layers that qlora leaves unquantised, as for train"
    )
    parser.add_argument("--freeze_modules", nargs="+", help="parts that are not trained, as for train")
    parser.add_argument("--no_checkpointing", action="store_true", help="keep activations instead of recomputing them")
    parser.add_argument("--max_steps", "--steps", type=int, help="steps of the run (default: 1000)")
    parser.add_argument(
        "--images_per_step", type=int, help="by all GPUs (default: the recipe's, or what fits at once)"
    )
    parser.add_argument(
        "--tflops", type=float, help="measured bfloat16 matmul rate of the GPU; measured here if one is present"
    )
    parser.add_argument(
        "--utilisation", type=float, default=0.6, help="share of that rate that a step reaches (default 0.6)"
    )
    return parser


def read_arguments(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The command line, its gaps filled from the recipe, and those that remain from what training assumes."""
    args = parser.parse_args(argv)
    recipe: dict[str, Any] = {} if args.config is None else read_recipe(args.config)
    defaults: dict[str, Any] = {"lora_r": 64, "optim": "adamw_torch_fused", "max_steps": 1000, "ema_decay": 0.0}
    if args.config is None:  # as most recipes
        defaults |= {"bf16": True, "use_peft": True, "activation_checkpointing": True}
    for name in FROM_RECIPE:
        if getattr(args, name, None) is None:
            setattr(args, name, recipe.get(name, defaults.get(name)))
    if args.mode is None:
        args.mode = "full" if not args.use_peft else "qlora" if args.load_in_4bit else "lora"
    args.checkpointing = (
        bool(args.activation_checkpointing or args.gradient_checkpointing) and not args.no_checkpointing
    )
    if args.model_name_or_path is None:
        parser.error(f"--model says which model: a folder, a Hub id, or one of {', '.join(families())}.")
    if args.optim not in OPTIMIZER_BYTES:
        parser.error(f"What optim={args.optim} keeps is not known; known are {', '.join(OPTIMIZER_BYTES)}.")
    if args.num_processes < 1:
        parser.error("--num_processes is 1 or more.")
    if args.mode == "qlora" and args.num_processes > 1 and args.launch == "zero3":
        parser.error("ZeRO-3 takes no weights packed in 4 bits: use --launch ddp or fsdp2.")
    return args


def main(argv: list[str] | None = None) -> None:
    """`reca-trainer plan`: print what a step takes, the largest batch that fits, what lies on disk, and the time."""
    args = read_arguments(make_parser(), argv)
    cost, cost_of_eight = plan_costs(args, (1, 8))
    averaged = cost.trained_parameters * 4 if args.ema_decay else 0.0
    averaged /= args.num_processes if args.launch == "fsdp2" else 1
    layout = {"launch": args.launch, "processes": args.num_processes}
    needed = cost.process(**layout) + averaged
    # Not from one to two: the gradients of a full model may outweigh the activations of the first few images.
    further = (cost_of_eight.process(**layout) + averaged - needed) / 7
    largest = int(1 + (args.gpu * 1e9 - needed) // further) if args.gpu * 1e9 >= needed else 0
    frozen, masters = dtypes(args)
    rank = "" if args.mode == "full" else f", an adapter of rank {args.lora_r}"
    kept = "4 bits where quantised, else " if args.mode == "qlora" else ""
    precision = f"frozen in {kept}{_name(frozen)}, trained in {_name(masters)}"
    if args.num_processes > 1 and args.launch.startswith("zero") and args.bf16:
        precision = "all in bfloat16; what is trained has float32 masters besides"
    print(f"{cost.parameters / 1e9:.2f} B parameters, {cost.trained_parameters / 1e6:,.1f} M of them trained{rank}")
    print(
        f"weights {cost.weights / 1e9:.2f} GB ({precision}), "
        f"optimiser {cost.optimizer / 1e9:.2f} GB ({args.optim}), gradients {cost.gradients / 1e9:.2f} GB, "
        + (f"average {averaged / 1e9:.2f} GB, " if averaged else "")
        + f"one image's step {cost.step / 1e9:.2f} GB"
    )
    spread = f" on each of {args.num_processes} GPUs ({args.launch})" if args.num_processes > 1 else ""
    print(
        f"with process and fragmentation: {needed / 1e9:.1f} GB for a batch of 1{spread}, each further image "
        f"{further / 1e9:.2f} GB"
    )
    if largest:
        print(f"Fits into {args.gpu:g} GB with per_device_train_batch_size up to {largest}.")
    else:
        print(f"Does not fit into {args.gpu:g} GB." + _advice(args))
    if largest and args.config and args.per_device_train_batch_size:
        batch = args.per_device_train_batch_size
        print(f"The recipe's {batch}: {(needed + (batch - 1) * further) / 1e9:.1f} GB.")
    print(f"main memory of the machine: up to {host_bytes(cost, args) / 1e9:.0f} GB while the model is loaded")
    print(disk(cost, args))
    if largest:
        print(duration(cost, args, largest))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtypes(args: argparse.Namespace) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of frozen and of trained weights, as training loads them."""
    adapted = args.mode != "full"
    if args.dtype:
        frozen = getattr(torch, args.dtype)
        return frozen, torch.float32 if adapted else frozen
    precision = default_precision(bool(args.bf16), adapted)
    return precision.get("frozen_dtype", precision["dtype"]), torch.float32


def plan_costs(args: argparse.Namespace, batch_sizes: Sequence[int]) -> list[Cost]:
    """The cost of one step at each batch size.

    Raises:
        ValueError: the model makes no targets of the size asked for.
    """
    model = open_model(args.model_name_or_path)
    args.stored = sum(map(size_of, getattr(model, "lazy_weights", {}).values()))
    sizes = (args.max_image_size, args.min_image_size, args.text_length)
    batches = [model.example_batch(batch_size, *sizes) for batch_size in batch_sizes]
    frozen, masters = dtypes(args)
    options: dict[str, Any] = {name: getattr(args, name) for name in ("checkpointing", "lora_r", "optim")}
    options["skipped"] = args.llm_int8_skip_modules or ()
    options["freeze_modules"] = args.freeze_modules or ()
    # Only a process with whole float32 weights keeps bfloat16 copies of them for the length of a forward pass: FSDP2
    # casts its shards while it gathers them, and DeepSpeed's weights are bfloat16 all the time.
    if not args.bf16 or args.num_processes == 1 or args.launch == "ddp":
        options["autocast"] = bool(args.bf16)
    elif args.launch == "fsdp2":
        options["cast_weights"] = True
    else:
        frozen = masters = torch.bfloat16
    return step_costs(model, batches, args.mode, frozen, masters, **options)


def host_bytes(cost: Cost, args: argparse.Namespace) -> float:
    """Main memory that all processes of one machine take together while they load the model."""
    copies = 1 if args.launch == "fsdp2" else args.num_processes
    copies = 0 if args.mode == "qlora" else copies  # what is quantised goes to the GPU layer by layer
    each = plan.HOST_PROCESS_BYTES + (args.dataloader_num_workers or 0) * plan.WORKER_BYTES
    return copies * cost.weights + args.num_processes * each


def disk(cost: Cost, args: argparse.Namespace) -> str:
    """What checkpoints and the model that comes of them take up."""
    copies = 2 if args.launch == "fsdp2" and args.num_processes > 1 else 1  # the weights as shards, and as a model
    size = copies * cost.model_on_disk + cost.optimizer + (cost.trained_parameters * 4 if args.ema_decay else 0.0)
    line = (
        f"disk: a checkpoint {size / 1e9:.2f} GB, of which the optimiser has {cost.optimizer / 1e9:.2f} GB, without which "
        "(save_only_model) a run cannot be resumed"
    )
    if args.save_total_limit:
        count = args.save_total_limit + 1  # the new one is whole before the oldest goes
        line += f"; {count * size / 1e9:.1f} GB for save_total_limit {args.save_total_limit} and one being written"
    if cost.has_adapter:
        merged = args.stored or (cost.parameters - cost.trained_parameters) * 2
        line += f"; merged {merged / 1e9:.1f} GB"
    return line


def duration(cost: Cost, args: argparse.Namespace, largest: int) -> str:
    rate = args.tflops * 1e12 if args.tflops else measured_rate()
    if rate is None:
        return f"{cost.flops / 1e12:.1f} TFLOP an image. For the time, give the GPU's measured matmul rate: --tflops."
    images = args.images_per_step
    if images is None and args.config and args.per_device_train_batch_size:
        each = args.per_device_train_batch_size * (args.gradient_accumulation_steps or 1)
        images = each * args.num_processes
    images = images or largest * args.num_processes
    seconds = cost.flops * images / args.num_processes / (rate * args.utilisation)
    return (
        f"{seconds:.2f} s a step of {images} images at {args.utilisation:.0%} of {rate / 1e12:.0f} TFLOP/s: "
        f"{seconds * args.num_processes * args.max_steps / 3600:.1f} GPU-hours for {args.max_steps:,} steps."
    )


def _advice(args: argparse.Namespace) -> str:
    choices: list[tuple[Callable[[], bool], str]] = [
        (lambda: not args.checkpointing, "recompute activations"),
        (lambda: args.mode == "lora", "--mode qlora"),
        (lambda: args.mode == "full", "--mode lora, or --optim adamw_bnb_8bit"),
        (lambda: args.mode == "full" and args.launch in ("ddp", "zero2"), "several GPUs and --launch fsdp2"),
        (
            lambda: args.max_image_size is None or args.max_image_size > 512,
            "where the family has a choice --max_image_size 512",
        ),
    ]
    advice = [text for applies, text in choices if applies()]
    return f" Try {', or '.join(advice)}." if advice else ""
