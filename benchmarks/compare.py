"""Run two settings of train_step.py in turn and print their ratio as one JSON line.

python benchmarks/compare.py "--mode full" "--mode full --checkpointing elementwise" --rounds 5
"""

from __future__ import annotations

import argparse
import json

import measure
import train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", help="options of train_step.py, as one argument")
    parser.add_argument("b", help="other options of train_step.py")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1, help="timed steps a turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns")
    args = parser.parse_args()
    settings = {name: vars(train_step.make_parser().parse_args(getattr(args, name).split())) for name in ("a", "b")}
    workloads = {name: (train_step.build, options) for name, options in settings.items()}
    run = measure.run_alternating(workloads, args.warmup, args.steps, args.rounds, args.threads)
    a, b = (run["results"][name] for name in ("a", "b"))
    memory = "peak_allocated_gb" if "peak_allocated_gb" in a else "peak_rss_gb"
    ratio = {
        name: round(b[name] / a[name], 3) for name in ("step_seconds_min", "step_seconds_median", "cpu_seconds_min")
    }
    print(
        json.dumps(
            {
                "benchmark": "compare",
                "settings": {"a": args.a, "b": args.b},
                **run,
                "b_over_a": {**ratio, "peak_memory": round(b[memory] / a[memory], 3)},
                **measure.environment(settings["a"]["device"]),
            }
        )
    )


if __name__ == "__main__":
    main()
