"""Main memory of full fine-tuning under FSDP2, from the start of the processes to the end of the first step, with
accelerate's efficient loading and without.

    python benchmarks/host_memory.py --output benchmarks/results/DATE-host-memory.json

Makes a random BAGEL in bfloat16 and trains it for one step on 1, 2 and 4 processes over gloo, on the CPU, where the
shards lie in main memory too. Of each process it samples the anonymous memory, which the kernel cannot drop, less that
of a process that imports the same and does nothing; `copies` is the sum over the processes, in copies of the weights as
training keeps them (bfloat16 where frozen, else float32). The shards are one of them, which on GPUs does not lie in main
memory. Prints one JSON line.
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
from types import SimpleNamespace

SIZES = {"0.2B": (1024, 4096, 6), "0.8B": (2048, 8192, 6)}  # as in adapters.py


def anonymous() -> int:
    """Bytes of this process that no file stands behind."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


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


def work(model_folder: str, output: str, efficient: bool) -> None:
    """One process of a run: load, shard, one step of SGD."""
    import torch
    import torch.distributed as dist
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    from reca_trainer import AutoUnifiedModel
    from reca_trainer.models.precision import autocast_frozen, default_precision

    if model_folder == "nothing":
        Path(output).write_text(json.dumps({"imports": anonymous()}))
        return
    sampler = Sampler()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    options = {"device_map": "meta"} if efficient and rank else {}
    precision = default_precision(bf16=True, has_adapter=False)
    model = AutoUnifiedModel.from_pretrained(model_folder, **precision, **options)
    copy = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    model.freeze_understanding()
    batch = model.example_batch(1, 64, 64)
    draws = model.sample_corruption(batch, [torch.Generator().manual_seed(rank)])
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=efficient,
        state_dict_type="FULL_STATE_DICT",
    )  # fmt: skip
    # accelerate shards on GPUs alone; this is the part of it that does, over gloo.
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), device=torch.device("cpu"), mixed_precision="no",
        is_main_process=rank == 0, process_index=rank, num_processes=dist.get_world_size(), torch_device_mesh=None,
        parallelism_config=None,
    )  # fmt: skip
    model = fsdp2_prepare_model(accelerator, model)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1e-5)
    peaks = {"before_step": sampler.look()}
    with autocast_frozen(model):
        loss = model(corruption=draws, **batch).loss
    loss.backward()
    optimizer.step()
    peaks["first_step"] = sampler.look()
    Path(f"{output}.{rank}").write_text(json.dumps({**peaks, "copy": copy}))
    dist.destroy_process_group()


def measure(model: Path, folder: Path, processes: int, efficient: bool, imports: int) -> dict:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output = folder / f"{processes}-{efficient}"
    layout = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    layout |= {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "ACCELERATE_USE_FSDP": "true"}
    layout |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": str(efficient).lower()}
    command = [sys.executable, __file__, "--worker", str(model), str(output), str(efficient)]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **layout, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    if any(process.wait() for process in ranks):
        raise SystemExit("A process failed; see above.")
    results = [json.loads(Path(f"{output}.{rank}").read_text()) for rank in range(processes)]
    copy = results[0]["copy"]
    result = {"processes": processes, "efficient_loading": efficient, "copy_gb": round(copy / 1e9, 3)}
    for moment in ("before_step", "first_step"):
        peaks = [rank[moment] - imports for rank in results]
        result[moment] = {"gb": [round(peak / 1e9, 3) for peak in peaks], "copies": round(sum(peaks) / copy, 2)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--worker", nargs=3, metavar=("MODEL", "OUTPUT", "EFFICIENT"), help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=SIZES, default="0.8B")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument(
        "--efficient", choices=("true", "false", "both"), default="both", help="FSDP's efficient loading"
    )
    parser.add_argument("--output", type=Path, help="also write the line there")
    options = parser.parse_args()
    if options.worker:
        work(*options.worker[:2], efficient=options.worker[2] == "True")
        return
    sys.path.insert(0, str(Path(__file__).parent))
    from adapters import make_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_model(folder / "model", SIZES[options.size], "bfloat16")
        nothing = folder / "nothing"
        subprocess.run([sys.executable, __file__, "--worker", "nothing", str(nothing), "False"], check=True)
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
