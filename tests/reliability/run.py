"""One training run in a process of its own: `python -m tests.reliability.run OUTPUT_DIR OPTIONS_JSON`.

Leaves the saved adapter, `losses.json` and, while it runs, checkpoints in OUTPUT_DIR. The options are those of
`RecAConfig`, and `resume`, `streaming`, `full` (train the generator without an adapter).
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from peft import LoraConfig
from PIL import Image

from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor, RecAConfig, RecATrainer

CHECKPOINT = Path(__file__).parents[1] / "golden" / "bagel" / "checkpoint"


def dataset(rows: int = 23) -> Dataset:
    """Random images of three shapes; `rows` is prime, so batches come out uneven."""
    rng = np.random.default_rng(0)
    sizes = [(64, 48), (48, 64), (64, 64)]
    images = [
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        for width, height in (sizes[index % 3] for index in range(rows))
    ]
    captions = [" ".join(["boat", "kite", "harbour", "stone"][: 1 + index % 4]) for index in range(rows)]
    features = Features({"image": ImageFeature(), "caption": Value("string")})
    return Dataset.from_dict({"image": images, "caption": captions}, features=features)


def main(output_dir: str, options: dict) -> None:
    torch.set_num_threads(1)
    resume, streaming, full = (options.pop(name, False) for name in ("resume", "streaming", "full"))
    processor = AutoUnifiedProcessor.from_pretrained(
        CHECKPOINT, generation_size=(64, 32, 16), condition_size=(42, 42, 14), understanding_size=(70, 28, 14)
    )
    images = dataset()
    trainer = RecATrainer(
        AutoUnifiedModel.from_pretrained(CHECKPOINT),
        RecAConfig(
            output_dir=output_dir,
            **{
                "learning_rate": 1e-3,
                "adam_epsilon": 1e-6,
                "logging_steps": 1,
                "save_strategy": "no",
                "use_cpu": True,
                "report_to": "none",
                "disable_tqdm": True,
                **options,
            },
        ),
        train_dataset=images.to_iterable_dataset(num_shards=3) if streaming else images,
        processing_class=processor,
        peft_config=None if full else LoraConfig(r=4, init_lora_weights="gaussian"),
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (Path(output_dir) / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
