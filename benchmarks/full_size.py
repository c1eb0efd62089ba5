"""BAGEL at its full size with made-up weights, from a published folder to a merged model.

    python benchmarks/full_size.py --folder SCRATCH --output benchmarks/results/DATE-full-size.json

Writes 29 GB in BAGEL's published layout (14.66 B parameters in bfloat16), then, each in a process of its own: opens the
folder, exports it in NF4, takes one QLoRA step on the export at a small resolution, merges the adapter into the dequantised
base, and opens the result. Prints a table: wall and processor time, the most anonymous and resident memory, and bytes
written. Everything it makes is deleted as soon as nothing needs it; at the fullest moment 40 GB lie on the disk.
`--layers` makes a smaller model, to try the script.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

CHECKPOINT = Path(__file__).parents[1] / "tests" / "golden" / "bagel" / "checkpoint"  # for its tokenizer
STEPS = ("make", "info", "export-nf4", "qlora-step", "merge", "check")
ROOM = 45e9  # bytes, for all 28 layers
SIZE = 64  # pixels of the pictures of the step


def status(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def make(folder: Path, layers: int | None) -> None:
    import torch
    from transformers import Qwen2TokenizerFast

    from reca_trainer.models.bagel import Config, Model, Processor, write_published
    from reca_trainer.models.weights import LazyTensor

    class MadeUp:
        """Values of about the size that a linear layer's have, from a table: drawing 15 billion would take an hour."""

        table = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))

        def __init__(self, name: str, shape: torch.Size, dtype: torch.dtype):
            self.name, self.shape, self.dtype = name, shape, dtype

        def __getitem__(self, index):
            if len(self.shape) < 2:
                fill = float("norm" in self.name and "bias" not in self.name)
                return torch.full(self.shape, fill, dtype=self.dtype)[index]
            scale = self.shape[1:].numel() ** -0.5
            count = self.shape.numel()
            repeated = (self.table * scale).to(self.dtype).repeat(-(-count // len(self.table)))
            return repeated[:count].reshape(self.shape)[index]

    config = Config()
    tokenizer = Qwen2TokenizerFast.from_pretrained(CHECKPOINT)
    if layers is not None:
        config.text_config.num_hidden_layers = layers
        config.text_config.layer_types = config.text_config.layer_types[:layers]
    with torch.device("meta"):
        model = Model(config)
    model.lazy_weights = {
        name: LazyTensor(MadeUp(name, tensor.shape, torch.float32 if name.startswith("vae.") else torch.bfloat16))
        for name, tensor in model.state_dict().items()
    }
    folder.mkdir()
    write_published(model, Processor(tokenizer), folder)


def info(folder: Path) -> None:
    from reca_trainer.saving.describe import describe

    print(describe(folder), file=sys.stderr)


def export_nf4(folder: Path, output: Path) -> None:
    from reca_trainer.cli.export import main

    main([str(folder), str(output), "--quantize", "nf4"])


def qlora_step(folder: Path, output: Path) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from PIL import Image

    from reca_trainer import RecAConfig, RecATrainer

    args = RecAConfig(
        output_dir=str(output), max_steps=1, per_device_train_batch_size=1, bf16=True, use_cpu=True, report_to="none",
        save_strategy="no", max_image_size=SIZE, min_image_size=SIZE, activation_checkpointing=True, disable_tqdm=True,
        dataloader_pin_memory=False, warmup_steps=0, logging_steps=1,
    )  # fmt: skip
    images = [Image.linear_gradient("L").convert("RGB").resize((SIZE, SIZE))] * 2
    trainer = RecATrainer(
        str(folder),
        args,
        train_dataset=Dataset.from_dict({"image": images}),
        peft_config=LoraConfig(r=64, lora_alpha=128),
    )
    trainer.train()
    trainer.save_model()


def merge(adapter: Path, output: Path) -> None:
    from reca_trainer.cli.merge import main

    main([str(adapter), str(output)])


def check(folder: Path) -> None:
    from reca_trainer.models.auto import open_lazily
    from reca_trainer.models.tensor_files import size_of

    weights = open_lazily(folder).lazy_weights
    print(f"{len(weights)} tensors, {sum(map(size_of, weights.values())) / 1e9:.2f} GB", file=sys.stderr)


def work(step: str, scratch: Path, layers: int | None) -> None:
    """One step, in this process; prints what it took."""
    peak = 0

    def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, status("RssAnon"))
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()
    published, packed, adapter, merged = (scratch / name for name in ("published", "nf4", "adapter", "merged"))
    started = time.perf_counter()
    {
        "make": lambda: make(published, layers),
        "info": lambda: info(published),
        "export-nf4": lambda: export_nf4(published, packed),
        "qlora-step": lambda: qlora_step(packed, adapter),
        "merge": lambda: merge(adapter, merged),
        "check": lambda: check(merged),
    }[step]()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "step": step,
                "wall_s": round(time.perf_counter() - started, 1),
                "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
                "anonymous_gb": round(max(peak, status("RssAnon")) / 1e9, 2),
                "resident_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
            }
        )
    )


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="a new folder on a disk with 45 GB to spare")
    parser.add_argument("--layers", type=int, help="of the language model (default: BAGEL's 28)")
    parser.add_argument("--output", type=Path, help="also write the lines there")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        work(options.step, options.folder, options.layers)
        return
    options.folder.mkdir(parents=True)
    free = shutil.disk_usage(options.folder).free
    if options.layers is None and free < ROOM:
        raise SystemExit(f"{free / 1e9:.0f} GB are free at {options.folder}, and {ROOM / 1e9:.0f} GB are needed.")
    rows = []
    try:
        for step in STEPS:
            before = bytes_in(options.folder)
            command = [sys.executable, __file__, "--folder", str(options.folder), "--step", step]
            command += ["--layers", str(options.layers)] if options.layers else []
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.strip().splitlines()[-1])
            rows.append({**row, "written_gb": round((bytes_in(options.folder) - before) / 1e9, 2)})
            print(rows[-1], file=sys.stderr, flush=True)
            if step == "export-nf4":  # the adapter's base is the export
                shutil.rmtree(options.folder / "published")
    finally:
        shutil.rmtree(options.folder)
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    if options.output:
        options.output.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
