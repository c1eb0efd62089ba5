"""Time and peak memory of loading a checkpoint in a fresh process; prints one JSON line.

python benchmarks/load.py --model ByteDance-Seed/BAGEL-7B-MoT --dtype bfloat16
python benchmarks/load.py --preset mid        # writes random weights to a temporary folder first
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from typing import Any

import torch

import measure
import presets
import train_step
from reca_trainer import AutoUnifiedModel


def build(options: dict[str, Any]) -> Callable[[], float]:
    def step() -> float:
        dtype = train_step.DTYPES[options["dtype"]]
        model = AutoUnifiedModel.from_pretrained(options["folder"], dtype=dtype, device_map=options["device"])
        return float(sum(parameter.numel() for parameter in model.parameters()))

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; by default random weights of --preset")
    parser.add_argument("--preset", default="mid", choices=list(presets.PRESETS))
    parser.add_argument("--dtype", default="bfloat16", choices=list(train_step.DTYPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=3)
    options = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as folder:
        if options["model"] is None:
            presets.build_model(options["preset"], torch.bfloat16, "cpu").save_pretrained(folder)
        options["folder"] = options["model"] or folder
        run = measure.run_alternating({"load": (build, options)}, 0, options["steps"], rounds=1, threads=0)
    result = run["results"]["load"]
    result["parameters"] = int(result.pop("losses")[0])
    print(json.dumps({"benchmark": "load", **options, **result, "foreign_cpu": run["foreign_cpu"],
                      **measure.environment(options["device"])}))  # fmt: skip


if __name__ == "__main__":
    main()
