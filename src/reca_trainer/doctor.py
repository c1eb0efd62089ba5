"""What a machine has, and whether a model does on it what it should: a report to paste.

It holds no tokens, no user names and no paths but the names of a checkpoint's own files.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import resource
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_token
from peft import LoraConfig
from PIL import Image, ImageDraw
from torch.utils._pytree import tree_map_only
from transformers import BitsAndBytesConfig
from transformers.utils import logging

from reca_trainer import adapters
from reca_trainer.models.auto import AutoUnifiedModel, AutoUnifiedProcessor, open_lazily, resolve
from reca_trainer.models.contract import UnifiedModel, UnifiedProcessor
from reca_trainer.models.tensor_files import size_of
from reca_trainer.plan import step_cost

Findings = Iterator[tuple[str, str]]

PACKAGES = (
    "reca-trainer", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "diffusers", "huggingface_hub",
    "safetensors", "bitsandbytes", "pillow", "numpy",
)  # fmt: skip
# Packages that only some uses need, and these uses.
OPTIONAL = {
    "deepspeed": "the launch files zero2 and zero3",
    "torchvision": "LPIPS in evaluations",
    "scipy": "FID in evaluations",
    "lmms_eval": "understanding benchmarks",
    "flash_attn": "--attn_implementation flash_attention_2",
    "kernels": "kernels of the Hub",
}
PROMPT = "a red circle above a blue square on a white wall"
INSTRUCTION = "Describe the image in detail."
SEED = 0
CHUNK = 1 << 24  # bytes of a file that are in memory at a time


def examine_machine() -> Findings:
    """Versions, devices, kernels, memory and what is missing, as names and values."""
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.release()}, {platform.machine()}"
    for package in PACKAGES:
        yield package, _version(package)
    yield "processor", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in torch"
    yield "main memory", _memory()
    yield "room on disk", f"{_free(Path.cwd())} here, {_free(Path(constants.HF_HUB_CACHE))} for downloads from the Hub"
    yield "accelerators", _accelerators()
    yield "attention", _attention()
    yield "4 bits", _four_bits()
    yield (
        "Hub",
        ("offline" if constants.HF_HUB_OFFLINE else "online") + (", logged in" if get_token() else ", not logged in"),
    )
    absent = {name: use for name, use in OPTIONAL.items() if importlib.util.find_spec(name) is None}
    yield "not installed", "; ".join(f"{name}: {use}" for name, use in absent.items()) or "nothing"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _memory() -> str:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return "this system does not say"
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    limit = "" if soft == resource.RLIM_INFINITY else f", limited to {soft / 1e9:.1f} GB of addresses (ulimit -v)"
    return (
        f"{sizes['MemTotal'] / 1e9:.1f} GB, {sizes['MemAvailable'] / 1e9:.1f} GB free, "
        f"{sizes['SwapTotal'] / 1e9:.1f} GB of swap{limit}"
    )


def _free(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 1e9:,.0f} GB"


def _accelerators() -> str:
    if not torch.cuda.is_available():
        kind = torch.accelerator.current_accelerator()
        return "none" if kind is None else str(kind)
    devices = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        devices.append(f"{name} ({major}.{minor}) with {total / 1e9:.1f} GB, {free / 1e9:.1f} GB free")
    return f"{'; '.join(devices)}; CUDA {torch.version.cuda or torch.version.hip}"


def _attention() -> str:
    enabled = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
    }
    if not torch.cuda.is_available():
        return "PyTorch's own for the CPU"
    return "PyTorch's own: " + (", ".join(name for name, is_on in enabled.items() if is_on) or "math alone")


def _four_bits() -> str:
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # takes seconds to import

        device = "cuda" if torch.cuda.is_available() else "cpu"
        weight = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
        error = (dequantize_4bit(*quantize_4bit(weight, quant_type="nf4")) - weight).abs().max().item()
    except Exception as error:  # whatever a broken installation does
        return f"bitsandbytes does not work: {type(error).__name__}: {error}"
    return f"bitsandbytes works on {device} (greatest error {error:.3f} of 1)"


def examine_files(name: str | Path) -> Findings:
    """A checkpoint's files with their digests as the Hub shows them, its keys, shapes and dtypes.

    Raises:
        CheckpointError: it is no checkpoint, or its keys or shapes are not those of its family.
    """
    folder = resolve(name)
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        yield path.relative_to(folder).as_posix(), f"{path.stat().st_size:,} bytes, sha256 {_sha256(path)}"
    model = open_lazily(name)
    weights = model.lazy_weights
    yield "class", type(model).__name__
    yield "keys", f"{len(weights)}, as the model expects them"
    yield "weights", f"{sum(map(size_of, weights.values())) / 1e9:.3f} GB"
    counts: Counter[torch.dtype] = Counter()
    parts: Counter[str] = Counter()
    for key, tensor in weights.items():
        counts[tensor.dtype] += tensor.shape.numel()
        parts[key.split(".")[0]] += tensor.shape.numel()
    yield "dtypes", ", ".join(f"{_name(dtype)}: {count:,}" for dtype, count in counts.most_common())
    yield "parts", ", ".join(f"{part}: {count:,}" for part, count in parts.most_common())


def _sha256(path: Path) -> str:
    digest, size = hashlib.sha256(), path.stat().st_size
    bar = logging.tqdm(total=size, desc=f"Reading {path.name}", unit="B", unit_scale=True, delay=2)
    with open(path, "rb", buffering=0) as file, bar:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def picture(side: int = 512) -> Image.Image:
    """The same picture everywhere: a gradient, a circle, a square and a line."""
    image = Image.linear_gradient("L").resize((side, side)).convert("RGB")
    draw, unit = ImageDraw.Draw(image), side // 8
    draw.ellipse((unit, unit, 4 * unit, 4 * unit), fill=(200, 30, 30))
    draw.rectangle((4 * unit, 4 * unit, 7 * unit, 7 * unit), fill=(30, 60, 200))
    draw.line((0, side - 1, side - 1, 0), fill=(20, 160, 60), width=max(1, unit // 4))
    return image


def examine_model(
    name: str | Path,
    dtype: torch.dtype,
    max_image_size: int | None = None,
    num_inference_steps: int = 4,
    lora_r: int = 64,
    quantize: bool = False,
    skipped: Sequence[str] | None = None,
) -> Findings:
    """What a model makes of one picture and one prompt with fixed noise, and one step of LoRA, beside what was planned.

    Args:
        dtype: of the weights.
        max_image_size: of the picture's target, for families whose targets keep the picture's shape.
        quantize: also the reconstruction loss with the base in NF4, as QLoRA trains it.
        skipped: `llm_int8_skip_modules`, layers that this base has unquantised.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = AutoUnifiedProcessor.from_pretrained(name)
    started = time.perf_counter()
    model = AutoUnifiedModel.from_pretrained(name, dtype=dtype).to(device).eval()
    yield "loading", f"{time.perf_counter() - started:.1f} s, {_name(dtype)} on {device.type}"
    image = picture()
    batch = _batch(processor, image, max_image_size)
    shapes = {key: tuple(value.shape) for key, value in batch.items() if torch.is_tensor(value)}
    yield "batch", ", ".join(f"{key} {shape}" for key, shape in shapes.items())
    draws = model.sample_corruption(batch, [torch.Generator().manual_seed(SEED)])
    yield "reconstruction loss", f"{_loss(model, batch, draws, device):.5f}, with noise of seed {SEED}"
    for task, inputs in (("reconstruct", {"images": image}), ("generate", {"text": PROMPT})):
        started = time.perf_counter()
        sampling: dict[str, Any] = {"num_inference_steps": num_inference_steps, **_side(model, max_image_size)}
        made = model.generate_images(
            processor, task=task, generator=torch.Generator().manual_seed(SEED), **inputs, **sampling
        )[0]
        yield task, f"{_described(made)}, {num_inference_steps} steps in {time.perf_counter() - started:.1f} s"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.random.fork_rng():
        torch.manual_seed(SEED)  # an adapter starts from random weights
        trained = adapters.attach(model, LoraConfig(r=lora_r, lora_alpha=lora_r))
    model.activation_checkpointing_enable()
    trained.train()
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = trained(corruption=_moved(draws, device), **_moved(batch, device)).loss
    loss.backward()
    norms = [p.grad.float().norm() for p in trained.parameters() if p.grad is not None]
    norm = math.sqrt(sum(value.item() ** 2 for value in norms))
    yield "a step of LoRA", f"rank {lora_r}: loss {loss.item():.5f}, norm of its gradient {norm:.5f}"
    if device.type == "cuda":
        used = torch.cuda.max_memory_reserved()
    else:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    del model, trained, loss
    lazy = open_lazily(name)
    cost = step_cost(
        lazy, batch, "lora", dtype=dtype, autocast=dtype == torch.bfloat16, checkpointing=True, lora_r=lora_r, optim="sgd",
        corruption=draws,
    )  # fmt: skip
    yield "memory", f"{used / 1e9:.2f} GB at most, planned {cost.process(device.type) / 1e9:.2f} GB"
    if quantize:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skipped,
        )  # fmt: skip
        packed = AutoUnifiedModel.from_pretrained(name, dtype=dtype, quantization_config=config).eval()
        yield "reconstruction loss", f"{_loss(packed, batch, draws, packed.device):.5f} in NF4, with the same noise"


def _batch(processor: UnifiedProcessor, image: Image.Image, max_image_size: int | None) -> dict[str, Any]:
    bounds = (None, None) if processor.fixed_size is not None else (max_image_size, max_image_size)
    size = processor.target_size(*image.size, *bounds)
    return processor(images=[image], instruction=INSTRUCTION, task="reconstruct", size=size)


def _side(model: UnifiedModel, max_image_size: int | None) -> dict[str, int]:
    if max_image_size is None or model.image_sides is None:
        return {}
    return {"height": max_image_size, "width": max_image_size}


def _moved(values: Any, device: torch.device) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), values)


def _loss(model: UnifiedModel, batch: dict[str, Any], draws: dict[str, torch.Tensor], device: torch.device) -> float:
    with torch.no_grad():
        return model(corruption=_moved(draws, device), **_moved(batch, device)).loss.item()


def _described(image: Image.Image) -> str:
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).reshape(-1, 3).float()
    colour = ", ".join(f"{value:.1f}" for value in pixels.mean(0).tolist())
    return f"{image.width} x {image.height} pixels, mean colour ({colour}), deviation {pixels.std():.1f}"
