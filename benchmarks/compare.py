"""Run settings of train_step.py in turn; prints one JSON line with the ratio of each to the first.

python benchmarks/compare.py "| --compile | --checkpointing layers" --common "--mode full" --threads 2
"""

from __future__ import annotations

import argparse
import json

import measure
import train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", help="options of train_step.py, a | between settings")
    parser.add_argument("--common", default="", help="options of train_step.py for all of them")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1, help="timed steps a turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns")
    args = parser.parse_args()
    options = {
        setting.strip() or "(none)": vars(train_step.make_parser().parse_args(f"{args.common} {setting}".split()))
        for setting in args.settings.split("|")
    }
    workloads = {name: (train_step.build, values) for name, values in options.items()}
    run = measure.run_alternating(workloads, args.warmup, args.steps, args.rounds, args.threads)
    (_, first), *others = run["results"].items()
    memory = "peak_allocated_gb" if "peak_allocated_gb" in first else "peak_rss_gb"
    names = ("step_seconds_min", "step_seconds_median", "cpu_seconds_min", memory)
    ratios = {name: {key: round(result[key] / first[key], 3) for key in names} for name, result in others}
    print(
        json.dumps(
            {
                "benchmark": "compare",
                "common": args.common,
                **run,
                "over_the_first": ratios,
                **measure.environment(next(iter(options.values()))["device"]),
            }
        )
    )


if __name__ == "__main__":
    main()
