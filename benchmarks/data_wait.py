"""How long a real run waits for its data; prints one JSON line.

python benchmarks/data_wait.py --dataloader_num_workers 1

Trains the embedded default's adapter on a folder of PNGs, rendered first, as `recipes/bagel_lora.py --dataset_name` would.
Further words are options of `RecAConfig`. Waiting is the share of the time between log lines that the trainer's
`data_wait` reports; the first line, with the start of the workers and the first batches, is given apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import HfArgumentParser, PrinterCallback

import measure
from reca_trainer import RecAConfig, RecATrainer, toy
from reca_trainer.data import load_image_dataset
from reca_trainer.toy import World
from reca_trainer.toy.score import held_out_scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="in the folder")
    parser.add_argument("--side", type=int, default=512, help="of their pixels; the run makes them smaller")
    parser.add_argument("--threads", type=int, default=0)
    arguments, rest = parser.parse_known_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        world, images = World(), Path(folder, "images")
        images.mkdir()
        for index, scene in enumerate(held_out_scenes(world, arguments.images)):
            world.render(scene).resize((arguments.side, arguments.side)).save(images / f"{index}.png")
        options = {"max_steps": "40", "per_device_train_batch_size": "16", "logging_steps": "10", "report_to": "none",
                   "save_strategy": "no", "disable_tqdm": "true", "use_cpu": str(not torch.cuda.is_available())}  # fmt: skip
        defaults = [word for name, value in options.items() for word in (f"--{name}", value)]
        (config,) = HfArgumentParser(RecAConfig).parse_args_into_dataclasses(
            [*defaults, "--output_dir", folder, *rest]
        )
        model, processor = toy.load()
        trainer = RecATrainer(
            model,
            config,
            train_dataset=load_image_dataset(images),
            processing_class=processor,
            peft_config=LoraConfig(r=64, lora_alpha=128),
        )
        trainer.remove_callback(PrinterCallback)  # standard output is for the one line
        started = measure.busy_share()
        trainer.train()
        foreign = started()
    first, *later = [entry["data_wait"] for entry in trainer.state.log_history if "data_wait" in entry]
    speed = [entry["images_per_second"] for entry in trainer.state.log_history if "images_per_second" in entry]
    print(
        json.dumps(
            {
                "benchmark": "data_wait",
                **vars(arguments),
                "options": rest,
                "data_wait": round(statistics.mean(later), 4),
                "data_wait_at_the_start": first,
                "images_per_second": statistics.median(speed[1:]),
                "foreign_cpu": foreign,
                **measure.environment(str(config.device.type)),
            }
        )
    )


if __name__ == "__main__":
    main()
