"""RecA on BAGEL with a LoRA adapter on the generator.

The whole job on the embedded default, in minutes on a laptop's CPU:

    accelerate launch recipes/bagel_lora.py

The real run on your own images, a folder or a dataset id:

    accelerate launch recipes/bagel_lora.py --config recipes/bagel_lora.yaml \
        --model_name_or_path ByteDance-Seed/BAGEL-7B-MoT --dataset_name path/to/images
"""

from functools import partial
from pathlib import Path

from reca_trainer import shapes
from reca_trainer.recipe import run
from reca_trainer.shapes.score import score

if __name__ == "__main__":
    quick = partial(score, quick=True, sampling=shapes.SAMPLING)
    run(shapes.load, Path(__file__).with_name("bagel_lora_tiny.yaml"), score=quick)
