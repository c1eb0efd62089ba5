"""`reca-trainer precompute`: what a model's frozen encoders make of a data set's images, as a data set to train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trl import get_peft_config

from reca_trainer import toy
from reca_trainer.cli.train import loading_arguments, read_arguments
from reca_trainer.config import RecAConfig
from reca_trainer.data import encoded_shards
from reca_trainer.data.task_datasets import target_rule
from reca_trainer.trainer import RecATrainer

SOURCE = ("dataset_name", "dataset_config_name", "dataset_split", "dataset_streaming", "data_files", "image_root")
COLUMNS = ("image_column", "caption_column", "conversation_column")
READING = ("on_bad_image", "max_bad_share", "dataloader_num_workers")
FRAMING = ("max_image_size", "min_image_size", "processor_kwargs")
COMPUTATION = ("bf16", "fp16", "tf32", "use_cpu")


@dataclass
class ShardArguments:
    """Where the shards go."""

    shards_dir: str = field(
        metadata={"help": "Folder to write; train with it as --dataset_name and --cache_latents true."}
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Encode the images of a run, whose options these are; all processes of `accelerate launch` take part."""
    asked, model_args, shards = read_arguments(argv, "bagel_lora_tiny", ShardArguments)
    if asked.dataset_name is None:
        raise ValueError("There are no images to encode: set --dataset_name.")
    folder = Path(shards.shards_dir).expanduser().absolute()
    unfinished = encoded_shards.unfinished_folder(folder)
    model, processor = model_args.model_name_or_path, None
    if model is None:
        model, processor = toy.load()
    else:
        asked.model_init_kwargs = loading_arguments(model_args, asked)
    # What decides over images and encoders; the other tasks, which may have images of their own, are left out.
    names = (*SOURCE, *COLUMNS, *READING, *FRAMING, *COMPUTATION, "model_init_kwargs")
    args = RecAConfig(
        str(unfinished),
        **{name: getattr(asked, name) for name in names},
        image_to_text_weight=0.0,
        cache_latents=True,
        max_steps=1,
        report_to="none",
    )
    trainer = RecATrainer(model, args, processing_class=processor, peft_config=get_peft_config(model_args))
    processor, column = trainer.processing_class, trainer.encoded_column()
    dataset, columns = trainer.images.datasets["reconstruct"], trainer.images.columns["reconstruct"]
    source = {name: getattr(args, name) for name in (*SOURCE, *COLUMNS, "on_bad_image")}
    encoded_shards.check_source(unfinished, {"encoders and framing": column, **source})
    encoded_shards.write_shards(
        dataset,
        columns,
        column,
        processor,
        trainer.encode_batch,
        target_rule(processor, args),
        unfinished,
        on_bad_image=args.on_bad_image,
        max_bad_share=args.max_bad_share,
        process_index=args.process_index,
        num_processes=args.world_size,
    )
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        rows = encoded_shards.finish(unfinished, folder)
        print(f"Encoded {rows:,} images: {folder}")
