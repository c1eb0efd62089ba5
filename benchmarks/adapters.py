"""What adapters cost: the error of each merge target, peak memory of loading, training and merging, and what training
the small projections in full beside the adapters buys.

    python benchmarks/adapters.py errors --output benchmarks/results/DATE-merge-errors.json
    python benchmarks/adapters.py memory --output benchmarks/results/DATE-adapter-memory.json
    python benchmarks/adapters.py modules --output benchmarks/results/DATE-modules-to-save.json

`errors` compares velocities with those of base and adapter as trained, on a random BAGEL. `memory` makes random BAGELs of
two sizes and runs each step in a process of its own. `modules` trains the embedded default with `modules_to_save` and
without, from the same seeds on the same rows. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MIB = 2**20
SIZES = {  # hidden size, intermediate size, layers; BAGEL-7B-MoT is 3584, 18944, 28
    "0.2B": (1024, 4096, 6),
    "0.8B": (2048, 8192, 6),
}
STEPS = ("load-bf16", "load-nf4", "train-lora", "train-qlora", "merge-lora", "merge-qlora", "export-published")


def peak_memory() -> dict[str, int]:
    """Of this process so far, in MiB: `anonymous` is what the kernel cannot drop, `resident` counts mapped files too."""
    status = Path("/proc/self/status").read_text()
    return {"resident": int(re.search(r"VmHWM:\s+(\d+)", status)[1]) // 1024}


class AnonymousPeak(threading.Thread):
    """Highest anonymous resident memory, sampled every 5 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.done = 0, False
        self.start()

    def run(self) -> None:
        while not self.done:
            self.peak = max(self.peak, int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]))
            time.sleep(0.005)


def make_model(folder: Path, size: tuple[int, int, int], dtype: str) -> int:
    """A random BAGEL in `save_pretrained` form, written tensor by tensor; returns the size of its files in bytes."""
    import torch

    from reca_trainer import AutoUnifiedProcessor
    from reca_trainer.models.auto import open_lazily
    from reca_trainer.models.bagel import Config, Model
    from reca_trainer.models.weights import LazyTensor, write_weights

    checkpoint = Path(__file__).parents[1] / "tests" / "golden" / "bagel" / "checkpoint"
    hidden, intermediate, layers = size
    values = open_lazily(checkpoint).config.to_dict()
    heads = hidden // 128
    values["text_config"] |= {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers, "layer_types": None,
        "num_attention_heads": heads, "num_key_value_heads": max(heads // 4, 1), "head_dim": 128, "vocab_size": 4096,
        "max_window_layers": layers,
    }  # fmt: skip
    with torch.device("meta"):
        model = Model(Config.from_dict(values))

    class Random:
        def __init__(self, name, shape):
            self.name, self.shape, self.dtype = name, shape, torch.float32

        def __getitem__(self, index):
            generator = torch.Generator().manual_seed(hash(self.name) % 2**31)
            if len(self.shape) < 2:
                return (
                    torch.ones(self.shape)
                    if "norm" in self.name and "bias" not in self.name
                    else torch.zeros(self.shape)
                )
            fan_in = self.shape[1:].numel()
            return torch.randn(self.shape, generator=generator) / fan_in**0.5

    model.lazy_weights = {name: LazyTensor(Random(name, tensor.shape)) for name, tensor in model.state_dict().items()}
    folder.mkdir(parents=True)
    write_weights(model, folder, getattr(torch, dtype), max_shard_size="200MB")
    processor = AutoUnifiedProcessor.from_pretrained(
        checkpoint, generation_size=(64, 32, 16), condition_size=(42, 42, 14)
    )
    processor.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def quantization(name: str = "nf4"):
    from transformers import BitsAndBytesConfig

    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def velocity(model):
    import torch

    from reca_trainer.adapters import unwrap

    base = unwrap(model)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "condition_pixel_values": torch.rand(2, 3, 42, 42, generator=generator).to(base.dtype),
        "pixel_values": torch.rand(2, 3, 64, 64, generator=generator),
        "input_ids": torch.tensor([[5, 6, 7]]),
    }
    corruption = base.sample_corruption(batch, generator)
    with torch.no_grad():
        return model.eval()(task="reconstruct", corruption=corruption, **batch).prediction.float()


def measure_errors(folder: Path) -> dict:
    """Relative difference of the velocity after merging, by kind of base, target and dtype."""
    import torch
    from peft import LoraConfig

    from reca_trainer import AutoUnifiedModel
    from reca_trainer.adapters import attach
    from reca_trainer.saving.merge import merge_adapter

    make_model(folder / "base", SIZES["0.2B"], "bfloat16")
    table = []
    for kind in (None, "nf4", "int8"):
        config = kind and quantization(kind)
        model = AutoUnifiedModel.from_pretrained(folder / "base", dtype=torch.float32, quantization_config=config)
        model = attach(model, LoraConfig(r=16))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.01 * torch.randn(parameter.shape, generator=generator)
        adapter = folder / f"adapter-{kind}"
        model.save_pretrained(adapter)
        expected = velocity(model)
        with model.disable_adapter():
            effect = ((velocity(model) - expected).norm() / expected.norm()).item()
        del model
        for into in ("base", "dequantized", "quantized"):
            if kind is None and into == "dequantized":
                continue
            for dtype in (torch.float32, torch.bfloat16) if into != "quantized" else (torch.bfloat16,):
                target = folder / f"{kind}-{into}-{dtype}"
                started = time.perf_counter()
                merge_adapter(folder / "base", adapter, target, into, dtype)
                seconds = time.perf_counter() - started
                merged = AutoUnifiedModel.from_pretrained(target, dtype=None if into == "quantized" else torch.float32)
                output = velocity(merged)
                table.append({
                    "trained_on": kind or "unquantised", "into": into, "dtype": str(dtype).removeprefix("torch."),
                    "relative_error": round(((output - expected).norm() / expected.norm()).item(), 7),
                    "adapter_effect": round(effect, 4), "seconds": round(seconds, 1),
                })  # fmt: skip
                print(table[-1], file=sys.stderr, flush=True)
    return {"model": "random BAGEL 0.2B", "table": table}


def run_step(step: str, base: Path, work: Path) -> dict:
    """One step in this process: seconds and peak memory."""
    import torch

    import reca_trainer.trainer  # noqa: F401 (so that imports are not part of what is measured)

    before = AnonymousPeak()
    time.sleep(0.05)
    imports, started = before.peak, time.perf_counter()
    from peft import LoraConfig

    from reca_trainer import AutoUnifiedModel, RecAConfig, RecATrainer
    from reca_trainer.saving.export import export
    from reca_trainer.saving.merge import merge_adapter

    if step.startswith("load"):
        config = quantization() if step == "load-nf4" else None
        AutoUnifiedModel.from_pretrained(base, dtype=torch.bfloat16, quantization_config=config)
    elif step.startswith("train"):
        import numpy as np
        from datasets import Dataset
        from PIL import Image

        rng = np.random.default_rng(0)
        images = [Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(4)]
        options = {
            "max_steps": 2,
            "per_device_train_batch_size": 1,
            "use_cpu": True,
            "report_to": "none",
            "bf16": True,
        }
        options |= {"save_strategy": "no", "activation_checkpointing": True, "disable_tqdm": True}
        trainer = RecATrainer(
            str(base),
            RecAConfig(output_dir=str(work / step), **options),
            train_dataset=Dataset.from_dict({"image": images}),
            peft_config=LoraConfig(r=16),
            quantization_config=quantization() if step == "train-qlora" else None,
        )
        trainer.train()
        trainer.save_model()
    elif step.startswith("merge"):
        adapter = work / step.replace("merge", "train")
        merge_adapter(base, adapter, work / step, max_shard_size="200MB")
    else:
        export(work / "merge-lora", work / step, max_shard_size="200MB")
    before.done = True
    return {
        "step": step,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_anonymous_mib": before.peak // 1024 - imports // 1024,
        "peak_resident_mib": peak_memory()["resident"],
        "imports_mib": imports // 1024,
    }


def measure_memory(folder: Path) -> dict:
    table = []
    for name, size in SIZES.items():
        base = folder / name / "base"
        stored = make_model(base, size, "bfloat16")
        for step in STEPS:
            command = [sys.executable, __file__, "step", "--step", step, "--base", str(base)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{step} failed:\n{done.stderr[-3000:]}")
            row = {"model": name, "checkpoint_mib": stored // MIB, **json.loads(done.stdout.splitlines()[-1])}
            table.append(row)
            print(row, file=sys.stderr, flush=True)
    return {"shard": "200MB", "table": table}


def measure_modules(folder: Path, steps: int = 200, seeds: int = 2) -> dict:
    """Held-out reconstruction loss of the embedded default after a short run, with and without `modules_to_save`."""
    from peft import LoraConfig

    from reca_trainer import RecAConfig, RecATrainer, toy

    train, held_out = toy.dataset("train", 2000), toy.dataset("validation", 128)
    table = []
    for learning_rate in (1e-3, 1e-4):
        for seed in range(seeds):
            for modules in (["vae2llm", "llm2vae", "time_embedder"], None):
                model, processor = toy.load()
                settings = {
                    "max_steps": steps,
                    "learning_rate": learning_rate,
                    "per_device_train_batch_size": 16,
                    "per_device_eval_batch_size": 32,
                    "eval_strategy": "steps",
                    "eval_steps": steps // 4,
                    "save_strategy": "no",
                    "report_to": "none",
                    "disable_tqdm": True,
                    "use_cpu": True,
                }
                trainer = RecATrainer(
                    model,
                    RecAConfig(output_dir=str(folder), seed=seed, **settings),
                    train_dataset=train,
                    eval_dataset=held_out,
                    processing_class=processor,
                    peft_config=LoraConfig(r=64, lora_alpha=128, modules_to_save=modules),
                )
                before = trainer.evaluate()["eval_loss"]
                started = time.perf_counter()
                trainer.train()
                seconds = time.perf_counter() - started
                evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
                table.append({
                    "learning_rate": learning_rate, "seed": seed,
                    "modules_to_save": trainer.model.active_peft_config.modules_to_save or [],
                    "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
                    "eval_loss": [round(loss, 5) for loss in (before, *evaluations[-4:])], "seconds": round(seconds, 1),
                })  # fmt: skip
                print(table[-1], file=sys.stderr, flush=True)
    return {"model": "embedded default", "steps": steps, "evaluated": "before, then every quarter", "table": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("errors", "memory", "modules", "step"))
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "step":
        print(json.dumps(run_step(args.step, args.base, args.base.parent)))
        return
    with tempfile.TemporaryDirectory() as folder:
        measure = {"errors": measure_errors, "memory": measure_memory, "modules": measure_modules}[args.what]
        result = measure(Path(folder))
    import torch

    result = {"date": time.strftime("%Y-%m-%d"), "device": "cpu", "threads": torch.get_num_threads(), **result}
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
