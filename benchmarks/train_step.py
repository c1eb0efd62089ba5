"""Time one optimiser step of RecA training on random weights; prints one JSON line.

python benchmarks/train_step.py --preset mid --mode lora --resolution 512 --batch_size 2
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import measure
import presets
from reca_trainer import adapters
from reca_trainer.plan import step_cost

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def keep_matrix_products() -> dict[str, Any]:
    """`activation_checkpointing_kwargs` under which the results of matrix products and attention are kept, and only
    what is cheap is recomputed: norms, activation functions, rotations."""
    names = ("mm", "addmm", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
             "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")  # fmt: skip
    kept = [getattr(torch.ops.aten, name).default for name in names]
    return {"use_reentrant": False, "context_fn": functools.partial(create_selective_checkpoint_contexts, kept)}


CHECKPOINTING = {
    "layers": lambda: {"activation_checkpointing_kwargs": {"use_reentrant": False}},
    "every_second": lambda: {"activation_checkpointing_kwargs": {"use_reentrant": False}, "every_n_layers": 2},
    "elementwise": lambda: {"activation_checkpointing_kwargs": keep_matrix_products()},
}


def build(options: dict[str, Any]) -> Callable[[], float]:
    """A RecA training step of `options` (those of `make_parser`): forward, backward, clipping, optimiser."""
    device, dtype = options["device"], DTYPES[options["dtype"]]
    model = presets.build_model(options["preset"], dtype, device)
    if options["mode"] == "qlora":
        quantise(model)
    if options["mode"] == "full":
        model.freeze_understanding()
        trained = model
    else:
        trained = adapters.attach(model, LoraConfig(r=options["lora_rank"], lora_alpha=options["lora_rank"]))
    if options["checkpointing"] != "none":
        model.activation_checkpointing_enable(**CHECKPOINTING[options["checkpointing"]]())
    model.train()
    if options["compile"]:
        from reca_trainer.trainer import compile_layers  # 0.1 GB of libraries that others need not hold

        compile_layers(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(options["optimizer"], parameters)
    batches = [make_batch(model, options, length) for length in options["instruction_lengths"]]
    generator, turns, compiled = torch.Generator().manual_seed(1), itertools.cycle(batches), []

    def step() -> float:
        batch = next(turns)
        draws = {**batch, "timesteps_per_image": options["timesteps_per_image"]}
        corruption = model.sample_corruption(draws, generator)
        loss = trained(corruption=corruption, **batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def notes() -> dict[str, Any]:
        counted = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "trained_parameters": sum(parameter.numel() for parameter in parameters),
        }
        if options["compile"]:
            counted |= {"graphs": compiled[0], "recompiles": graphs() - compiled[0]}
            assert not counted["recompiles"], "something was compiled after the warm-up"
        return counted

    step.warmed_up = lambda: compiled.append(graphs())
    step.notes = notes
    return step


def make_batch(model: presets.Model, options: dict[str, Any], instruction_length: int) -> dict[str, Any]:
    sizes = (options["batch_size"], options["resolution"], options["images"], instruction_length)
    batch = presets.reconstruction_batch(model, *sizes)
    return {name: value.to(options["device"]) if torch.is_tensor(value) else value for name, value in batch.items()}


def make_optimizer(name: str, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=1e-5)
    return torch.optim.AdamW(parameters, lr=1e-5, fused=name == "adamw_fused", foreach=name == "adamw_foreach")


def quantise(model: torch.nn.Module) -> None:
    """Replace the layers that QLoRA quantises by NF4 ones of the same, random, weights."""
    import re

    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and re.fullmatch(model.quantized_modules, name):
            weight, device = module.weight.data, module.weight.device
            layer = Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=weight.dtype,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            layer.weight = Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True)
            layer.bias = module.bias
            layer.support_avx512bf16_for_cpu = False  # as `UnifiedModel.from_pretrained`
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.to(device))


def graphs() -> int:
    """How many graphs were compiled since the process started."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="bagel", choices=["bagel"])
    parser.add_argument("--preset", default="mid", choices=list(presets.PRESETS))
    parser.add_argument("--mode", default="full", choices=["full", "lora", "qlora"], help="what is trained")
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--resolution", type=int, default=512, help="side of the target images in pixels")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument(
        "--checkpointing",
        default="none",
        choices=["none", *CHECKPOINTING],
        help="what the backward pass recomputes: whole layers, or all but matrix products and attention",
    )
    parser.add_argument("--timesteps_per_image", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="as --torch_compile of a run: layer by layer")
    parser.add_argument(
        "--instruction_lengths",
        type=int,
        nargs="+",
        default=[presets.INSTRUCTION_LENGTH],
        help="tokens, step by step; of several, none may compile anything after the warm-up",
    )
    parser.add_argument("--optimizer", default="adamw_fused", choices=["adamw_fused", "adamw_foreach", "adamw_8bit"])
    parser.add_argument(
        "--images",
        default="latents",
        choices=["pixels", "latents", "encoded"],
        help="what a batch holds: encoded as cache_latents keeps it, or with the autoencoder's part done",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch decides")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    return parser


def finish(result: dict[str, Any], options: dict[str, Any], peak: float) -> dict[str, Any]:
    """Add what follows from the step time: throughput and the share of the matmul rate that the model's FLOPs reach."""
    with torch.device("meta"):
        model = presets.Model(presets.PRESETS[options["preset"]]())
    batch_size = options["batch_size"]
    images = batch_size * options["timesteps_per_image"]
    tokens = images * (options["resolution"] // model.config.latent_token_stride) ** 2
    batch = make_batch(model, {**options, "device": "cpu"}, options["instruction_lengths"][0])
    draws = {**batch, "timesteps_per_image": options["timesteps_per_image"]}
    device = options["device"].partition(":")[0]
    cost = step_cost(
        model,
        batch,
        options["mode"],
        dtype=DTYPES[options["dtype"]],
        masters=DTYPES[options["dtype"]] if options["mode"] == "full" else torch.float32,
        checkpointing=options["checkpointing"] == "layers",
        lora_r=options["lora_rank"],
        device=device,
        corruption=model.sample_corruption(draws, torch.Generator().manual_seed(0)),
    )
    measured = result.get("peak_reserved_gb", result["peak_rss_gb"])
    seconds = result["step_seconds_median"]
    return {
        **result,
        "images_per_second": round(batch_size / seconds, 4),
        "generator_tokens_per_second": round(tokens / seconds, 1),
        "model_tflop_per_step": round(cost.flops / 1e12, 4),
        "model_flops_utilisation": round(cost.flops / seconds / peak, 3),
        "model_flops_utilisation_best": round(cost.flops / result["step_seconds_min"] / peak, 3),
        "planned_gb": round(cost.process(device) / 1e9, 3),
        "planned_over_measured": round(cost.process(device) / 1e9 / measured, 3),
    }


def main() -> None:
    options = vars(make_parser().parse_args())
    peak = measure.matmul_rate(options["device"], DTYPES[options["dtype"]], options["threads"])
    run = measure.run_alternating(
        {"step": (build, options)}, options["warmup"], options["steps"], rounds=1, threads=options["threads"]
    )
    peak = max(peak, measure.matmul_rate(options["device"], DTYPES[options["dtype"]], options["threads"]))
    result = finish(run["results"]["step"], options, peak)
    print(
        json.dumps(
            {
                "benchmark": "train_step",
                **options,
                **result,
                "foreign_cpu": run["foreign_cpu"],
                "matmul_gflops": round(peak / 1e9, 1),
                **measure.environment(options["device"]),
            }
        )
    )


if __name__ == "__main__":
    main()
