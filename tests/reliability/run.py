"""One training run in a process of its own: `python -m tests.reliability.run OUTPUT_DIR OPTIONS_JSON`, or `start(…)`.

Leaves the saved adapter, `losses.json`, `rows-RANK.json` (what was trained on, step by step), `usage.json` and, while it
runs, checkpoints in OUTPUT_DIR. The options are those of `RecAConfig`, and

- `resume`, `streaming`, `full` (train the generator without an adapter), `quantized` (train an adapter on an NF4 base),
- `sharded`: by FSDP2, as our launch file says, on the CPU,
- `push_merged`: `[address, token, repository]` of a Hub that the merged model is pushed to in the end,
- `family` (whose tiny model is trained, by default BAGEL's), `rows` (of the dataset),
- `bad_rows`: rows whose image is no image,
- `die_at`: kill -9 at the so-manyth file operation below OUTPUT_DIR,
- `nonfinite`: `[process, step]` whose loss is to be NaN,
- `measure`: every so many steps, note memory, open files, threads and time of the process and its workers,
- `hold_at`: the step that begins and never ends; the file `held` says that it has begun,
- `freeze_at`: `[process, step]` in which the process is stopped as by SIGSTOP,
- `file_limit`: bytes a file may have; writing more fails, as on a full disk.
"""

import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import datasets
import huggingface_hub
import numpy as np
import psutil
import torch
import yaml
from accelerate import DistributedType, PartialState
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from peft import LoraConfig
from PIL import Image
from transformers import BitsAndBytesConfig, TrainerCallback

from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor, RecAConfig, RecATrainer, recipes
from tests.hostile_images import encoded

CHECKPOINTS = Path(__file__).parents[1] / "golden"
CHECKPOINT = CHECKPOINTS / "bagel" / "checkpoint"
BAGEL_SIZES = {"generation_size": (64, 32, 16), "condition_size": (42, 42, 14), "understanding_size": (70, 28, 14)}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir"}

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__, "reca_trainer.models.bagel"])


def start(output_dir: Path, **options) -> multiprocessing.Process:
    """Run in a fresh process (from a server that has the imports done); its output goes to OUTPUT_DIR/log.txt."""
    output_dir.mkdir(parents=True, exist_ok=True)
    return fork(run_logged, str(output_dir), options)


def start_together(output_dir: Path, processes: int, **options) -> list[multiprocessing.Process]:
    """Likewise, `processes` of them, talking to each other over gloo; their output goes to `log-RANK.txt`."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    layout = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        fork(run_logged, str(output_dir), options, {**layout, "RANK": rank, "LOCAL_RANK": rank})
        for rank in range(processes)
    ]


def fork(target, *args) -> multiprocessing.Process:
    process = _context.Process(target=target, args=args)
    process.start()
    return process


def run_logged(output_dir: str, options: dict, layout: Mapping[str, object] = MappingProxyType({})) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs in the background
    os.environ.update({name: str(value) for name, value in layout.items()})
    with open(Path(output_dir) / (f"log-{layout['RANK']}.txt" if layout else "log.txt"), "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    main(output_dir, options)


def dataset(rows: int = 23, bad_rows=()) -> Dataset:
    """Random images of three shapes; 23 is prime, so batches come out uneven."""
    rng = np.random.default_rng(0)
    sizes = [(64, 48), (48, 64), (64, 64)]
    images = [
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        for width, height in (sizes[index % 3] for index in range(rows))
    ]
    files = [{"bytes": encoded(image), "path": f"{index}.png"} for index, image in enumerate(images)]
    for row in bad_rows:  # a whole header, so that the damage is found by the process that decodes it
        files[row]["bytes"] = files[row]["bytes"][:200]
    captions = [" ".join(["boat", "kite", "harbour", "stone"][: 1 + index % 4]) for index in range(rows)]
    features = Features({"image": ImageFeature(), "caption": Value("string")})
    return Dataset.from_dict({"image": files, "caption": captions}, features=features)


class Recorder(RecATrainer):
    """Writes down which rows every step trains on."""

    rows = ()

    def get_batch_samples(self, *args):
        batches, count = super().get_batch_samples(*args)
        self.rows = [*self.rows, [batch["sources"] for batch in batches]]
        return batches, count


def trainer(
    output_dir: str,
    streaming: bool,
    full: bool,
    rows: int,
    bad_rows=(),
    quantized: bool = False,
    family: str = "bagel",
    **options,
) -> Recorder:
    checkpoint = CHECKPOINTS / family / "checkpoint"
    processor = AutoUnifiedProcessor.from_pretrained(checkpoint, **(BAGEL_SIZES if family == "bagel" else {}))
    images = dataset(rows, bad_rows)
    images = images.to_iterable_dataset(num_shards=3) if streaming else images
    quantization = BitsAndBytesConfig(**NF4) if quantized else None
    return Recorder(
        AutoUnifiedModel.from_pretrained(checkpoint, quantization_config=quantization),
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
        train_dataset=None if "dataset_name" in options else images,
        processing_class=processor,
        peft_config=None if full else LoraConfig(r=4, init_lora_weights="gaussian"),
    )


def main(output_dir: str, options: dict) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of loading workers, as in a run started by hand
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = Path(output_dir) / "cache"  # empty at first, and in reach of `die_at`
    resume, streaming, full = (options.pop(name, False) for name in ("resume", "streaming", "full"))
    operations = _die_at(options.pop("die_at", 0), output_dir)
    if file_limit := options.pop("file_limit", None):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    nonfinite, measure = options.pop("nonfinite", None), options.pop("measure", 0)
    hold_at, freeze_at = options.pop("hold_at", 0), options.pop("freeze_at", None)
    if options.pop("sharded", False):
        shard_on_cpu()
        options["use_cpu"] = False
    push_merged = options.pop("push_merged", None)
    run = trainer(output_dir, streaming, full, options.pop("rows", 23), **options)
    if nonfinite:
        poison(run, *nonfinite)
    if hold_at:
        run.add_callback(Hold(hold_at))
    if freeze_at:
        run.add_callback(Freeze(*freeze_at))
    measured = Measure(measure)
    if measure:
        run.add_callback(measured)
    run.train(resume_from_checkpoint=resume)
    run.save_model()
    if push_merged:
        endpoint, token, repository = push_merged
        for name, value in {"ENDPOINT": endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            setattr(huggingface_hub.constants, name, value)
        run.push_merged_to_hub(repository, token=token)
    if run.is_world_process_zero():
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        (Path(output_dir) / "losses.json").write_text(json.dumps(losses))
    usage = {"cpu_seconds": time.process_time(), "file_operations": operations[0], "samples": measured.samples}
    (Path(output_dir) / "usage.json").write_text(json.dumps(usage))
    (Path(output_dir) / f"rows-{run.args.process_index}.json").write_text(json.dumps(run.rows))


def shard_on_cpu() -> None:
    """accelerate shards on GPUs alone, and here takes the CPU for one."""
    launch = yaml.safe_load((recipes.FOLDER / "accelerate" / "fsdp2.yaml").read_text())
    os.environ |= {name.upper(): str(value) for name, value in launch["fsdp_config"].items()}
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_TORCH_DEVICE": "cpu"}
    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)


class Measure(TrainerCallback):
    def __init__(self, steps: int):
        self.steps, self.samples = steps, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            process = psutil.Process()
            processes = [process, *process.children()]
            sample = {
                "bytes": sum(process.memory_full_info().uss for process in processes),
                "files": sum(process.num_fds() for process in processes),
                "threads": sum(process.num_threads() for process in processes),
                "seconds": time.monotonic(),
            }
            self.samples.append(sample)


class Hold(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            (Path(args.output_dir) / "held").touch()
            while True:
                signal.pause()


class Freeze(TrainerCallback):
    def __init__(self, process: int, step: int):
        self.where = process, step

    def on_step_begin(self, args, state, control, **kwargs):
        if (args.process_index, state.global_step + 1) == self.where:
            os.kill(os.getpid(), signal.SIGSTOP)


def poison(run: Recorder, process: int, step: int) -> None:
    def spoil(module, args, output):
        if (process, step) == (run.args.process_index, run.state.global_step + 1):
            output.loss = output.loss * float("nan")

    run.model.register_forward_hook(spoil)


def _die_at(number: int, folder: str) -> list[int]:
    seen = [0]

    def count(event: str, args: tuple) -> None:
        if event in FILE_OPERATIONS and isinstance(args[0], (str, os.PathLike)) and folder in os.fspath(args[0]):
            seen[0] += 1
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    return seen


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
