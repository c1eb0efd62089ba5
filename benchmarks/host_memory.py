"""Main memory of full fine-tuning under FSDP2, from the start of the processes to the end of the first step.

    python benchmarks/host_memory.py --output benchmarks/results/DATE-host-memory.json

Makes a random BAGEL in bfloat16 and trains it for one step on 1, 2 and 4 processes over gloo, on the CPU, where the
shards lie in main memory too. Of each process it samples the anonymous memory, which the kernel cannot drop, less that
of a process that imports the same and does nothing; `copies` is the sum over the processes, in copies of the weights as
training keeps them. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "src" / "reca_trainer" / "recipes" / "accelerate" / "fsdp2.yaml"
SIZES = {"0.2B": (1024, 4096, 6), "0.8B": (2048, 8192, 6)}  # as in adapters.py


def anonymous() -> int:
    """Bytes of this process that no file stands behind."""
    return int(re.search(r"Anonymous:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text())[1]) * 1024


class Sampler(threading.Thread):
    """The most anonymous memory so far, looked at every 20 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0
        self.start()

    def run(self) -> None:
        while True:
            self.look()
            time.sleep(0.02)

    def look(self) -> int:
        self.peak = max(self.peak, anonymous())
        return self.peak


def work(model: str, output: str) -> None:
    """One process of a run."""
    from datasets import Dataset
    from PIL import Image
    from transformers import TrainerCallback

    from reca_trainer import RecAConfig, RecATrainer

    if model == "nothing":
        Path(output).write_text(json.dumps({"imports": anonymous()}))
        return
    sampler, peaks = Sampler(), {}

    class Peaks(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            peaks.setdefault("before_step", sampler.look())

        def on_step_end(self, *args, **kwargs):
            peaks.setdefault("first_step", sampler.look())

    images = [Image.new("RGB", (64, 64), (17 * row, 90, 120)) for row in range(8)]
    args = RecAConfig(
        output_dir=f"{output}.run", max_steps=1, per_device_train_batch_size=1, bf16=True, use_cpu=True,
        report_to="none", save_strategy="no", max_image_size=64, min_image_size=64, disable_tqdm=True, optim="sgd",
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = RecATrainer(model, args, train_dataset=Dataset.from_dict({"image": images}), callbacks=[Peaks()])
    kept = {str(weight.dtype): 0 for weight in trainer.model.parameters()}
    for weight in trainer.model.parameters():
        kept[str(weight.dtype)] += weight.numel() * weight.element_size()
    trainer.train()
    rank = os.environ.get("RANK", "0")
    Path(f"{output}.{rank}").write_text(json.dumps({**peaks, "copy": sum(kept.values()), "kept": kept}))


def measure(model: Path, folder: Path, processes: int, efficient: bool, imports: int) -> dict:
    launch = folder / "launch.yaml"
    text = LAUNCH.read_text()
    launch.write_text(
        re.sub(r"(cpu_ram_efficient_loading:) \w+", rf"\1 {str(efficient).lower()}", text) + "use_cpu: true\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output = folder / f"{processes}-{efficient}"
    command = ["-m", "accelerate.commands.launch", "--config_file", launch, "--num_processes", processes]
    command += ["--main_process_port", port, __file__, "--worker", model, output]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    subprocess.run([sys.executable, *map(str, command)], check=True, env=environment, cwd=folder)
    ranks = [json.loads(Path(f"{output}.{rank}").read_text()) for rank in range(processes)]
    copy = ranks[0]["copy"]
    result = {"processes": processes, "efficient_loading": efficient, "copy_gb": round(copy / 1e9, 3)}
    for moment in ("before_step", "first_step"):
        peaks = [rank[moment] - imports for rank in ranks]
        result[moment] = {"gb": [round(peak / 1e9, 3) for peak in peaks], "copies": round(sum(peaks) / copy, 2)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "OUTPUT"), help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=SIZES, default="0.8B")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument(
        "--efficient", choices=("true", "false", "both"), default="both", help="FSDP's efficient loading"
    )
    parser.add_argument("--output", type=Path, help="also write the line there")
    options = parser.parse_args()
    if options.worker:
        work(*options.worker)
        return
    sys.path.insert(0, str(Path(__file__).parent))
    from adapters import make_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_model(folder / "model", SIZES[options.size], "bfloat16")
        nothing = folder / "nothing"
        subprocess.run([sys.executable, __file__, "--worker", "nothing", str(nothing)], check=True)
        imports = json.loads(nothing.read_text())["imports"]
        runs = [
            measure(folder / "model", folder, processes, efficient, imports)
            for processes in options.processes
            for efficient in {"true": [True], "false": [False], "both": [False, True]}[options.efficient]
        ]
    line = json.dumps({"file_gb": round(size / 1e9, 3), "imports_gb": round(imports / 1e9, 3), "runs": runs})
    if options.output:
        options.output.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
