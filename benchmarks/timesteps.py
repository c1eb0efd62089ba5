"""What several timesteps behind one condition buy: variance of the gradient per second; prints one JSON line.

python benchmarks/timesteps.py --threads 2

The embedded default's generator on rendered scenes. A step's gradient is an estimate; its variance (the trace of its
covariance over random images, timesteps and noises) times its seconds is what a given precision costs: half the value
gives the same gradient in half the time. Settings of equal `images · timesteps` see as many noisy images a step.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

import measure
from reca_trainer import toy
from reca_trainer.toy import World
from reca_trainer.toy.score import INSTRUCTION, held_out_scenes

SETTINGS = [(4, 1), (8, 1), (16, 1), (4, 2), (8, 2), (4, 4)]  # images, timesteps of each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=48, help="gradients of every setting")
    parser.add_argument("--scenes", type=int, default=512, help="to draw images from")
    parser.add_argument("--threads", type=int, default=0)
    options = vars(parser.parse_args())
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    model, processor = toy.load()
    model.freeze_understanding()
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    world = World()
    scenes = [world.render(scene) for scene in held_out_scenes(world, options["scenes"])]
    generator = torch.Generator().manual_seed(0)

    def gradient(images: int, timesteps: int) -> tuple[torch.Tensor, float]:
        chosen = torch.randperm(len(scenes), generator=generator)[:images].tolist()
        batch = processor(images=[scenes[index] for index in chosen], instruction=INSTRUCTION, task="reconstruct")
        started = time.perf_counter()
        corruption = model.sample_corruption({**batch, "timesteps_per_image": timesteps}, generator)
        model(corruption=corruption, **batch).loss.backward()
        seconds = time.perf_counter() - started
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
        model.zero_grad(set_to_none=True)
        return flat, seconds

    for setting in SETTINGS:  # warm up
        gradient(*setting)
    foreign = measure.busy_share()
    sums = {setting: [0.0, 0.0] for setting in SETTINGS}
    seconds: dict[tuple[int, int], list[float]] = {setting: [] for setting in SETTINGS}
    for _ in range(options["rounds"]):
        for setting in SETTINGS:
            flat, took = gradient(*setting)
            sums[setting][0] += flat.double()
            sums[setting][1] += flat.double().square()
            seconds[setting].append(took)
    rounds, results = options["rounds"], []
    for (images, timesteps), (total, squares) in sums.items():
        variance = float((squares - total.square() / rounds).sum() / (rounds - 1))
        median = sorted(seconds[images, timesteps])[rounds // 2]
        results.append({"images": images, "timesteps_per_image": timesteps, "step_seconds_median": round(median, 4),
                        "gradient_variance": variance, "variance_seconds": variance * median})  # fmt: skip
    for result in results:
        result["over_the_first"] = round(result["variance_seconds"] / results[0]["variance_seconds"], 3)
    print(json.dumps({"benchmark": "timesteps", **options, "results": results, "foreign_cpu": foreign(),
                      **measure.environment("cpu")}))  # fmt: skip


if __name__ == "__main__":
    main()
