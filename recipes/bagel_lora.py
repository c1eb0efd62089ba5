"""RecA on BAGEL with a LoRA adapter on the generator.

The whole job on the embedded default, in minutes on a laptop's CPU:

    accelerate launch recipes/bagel_lora.py

The real run on your own images, a folder or a dataset id:

    accelerate launch recipes/bagel_lora.py --config bagel_lora \
        --model_name_or_path ByteDance-Seed/BAGEL-7B-MoT --dataset_name path/to/images

Without a clone `reca-trainer train` takes the same options.
"""

from reca_trainer.cli.train import main

if __name__ == "__main__":
    main()
