"""Time of generating images from text with random weights; prints one JSON line.

python benchmarks/sample.py --preset mid --resolution 256 --num_inference_steps 10
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch

import measure
import presets
import train_step
from reca_trainer.models.bagel import Processor
from reca_trainer.plan import Meter
from reca_trainer.toy.tokenizer import make_tokenizer


def build(options: dict[str, Any]) -> Callable[[], float]:
    model = presets.build_model(options["preset"], train_step.DTYPES[options["dtype"]], options["device"]).eval()
    processor = Processor(make_tokenizer())
    prompts = ["a red circle above two blue squares"] * options["batch_size"]

    def step() -> float:
        side = options["resolution"]
        images = model.generate_images(
            processor,
            prompts,
            height=side,
            width=side,
            num_inference_steps=options["num_inference_steps"],
            guidance_scale=options["guidance_scale"],
            generator=torch.Generator().manual_seed(0),
        )
        return float(len(images))

    meter = Meter()
    with meter:
        step()
    step.notes = lambda: {"model_tflop": round(meter.flops / 1e12, 4)}
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mid", choices=list(presets.PRESETS))
    parser.add_argument("--dtype", default="float32", choices=list(train_step.DTYPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--guidance_scale", type=float, default=4.0)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    options = vars(parser.parse_args())
    run = measure.run_alternating(
        {"sample": (build, options)}, options["warmup"], options["steps"], rounds=1, threads=options["threads"]
    )
    result = run["results"]["sample"]
    del result["losses"]
    result["images_per_second"] = round(options["batch_size"] / result["step_seconds_median"], 4)
    peak = measure.matmul_rate(options["device"], train_step.DTYPES[options["dtype"]], options["threads"])
    utilisation = result["model_tflop"] * 1e12 / result["step_seconds_median"] / peak
    result |= {"matmul_gflops": round(peak / 1e9, 1), "model_flops_utilisation": round(utilisation, 3)}
    print(json.dumps({"benchmark": "sample", **options, **result, "foreign_cpu": run["foreign_cpu"],
                      **measure.environment(options["device"])}))  # fmt: skip


if __name__ == "__main__":
    main()
