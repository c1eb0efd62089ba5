"""What a RecA run will need: does it fit, at which batch size, and how long does it take?

A training step is carried out on tensors without contents (`FakeTensorMode`), so nothing is loaded and no accelerator is
needed, while every tensor that lives at the same time is counted, and so is every matrix product. What remains to be
assumed stands in the constants below.
"""

from __future__ import annotations

import argparse
import re
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from reca_trainer import adapters
from reca_trainer.models.auto import FAMILIES, AutoUnifiedProcessor, family, open_lazily
from reca_trainer.models.unified import UnifiedModel

MODES = ("full", "lora", "qlora")
INSTRUCTION = "Describe every detail of the picture."
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight with its doubly quantised scale (QLoRA, section 3)
OPTIMIZER_BYTES = {"adamw_torch_fused": 8.0, "adamw_bnb_8bit": 2.0 + 8 / 256, "sgd": 0.0}  # a trained weight
PROCESS_BYTES = {"cuda": 0.8e9, "cpu": 0.5e9}  # CUDA context, or Python with its libraries
# What an allocator holds, over what tensors take. In main memory that is with MALLOC_MMAP_THRESHOLD_=131072: left to
# itself, glibc keeps up to half as much again for later.
FRAGMENTATION = {"cuda": 1.05, "cpu": 1.05}


def attention_flops(query, key, value, *args, **kwargs) -> int:
    batch_size, heads, queries, head_dim = query.shape
    return 2 * batch_size * heads * queries * key.shape[2] * (head_dim + value.shape[3])


def attention_backward_flops(gradient, query, key, value, *args, **kwargs) -> int:
    """Five products of the size that the forward pass has two of: the fused kernel recomputes the scores."""
    return attention_flops(query, key, value) * 5 // 2


FLOPS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


@dataclass
class Cost:
    """What one optimiser step on one micro-batch needs.

    Args:
        weights, optimizer: bytes held all the time: parameters and buffers, and the optimiser's state.
        step: bytes of everything else at the fullest moment of forward and backward pass, gradients included.
        flops: floating-point operations of its matrix products, recomputed ones included.
        parameters, trained_parameters: their numbers.
    """

    weights: float
    optimizer: float
    step: float
    flops: float
    parameters: int
    trained_parameters: int

    @property
    def peak(self) -> float:
        """Bytes of tensors at the fullest moment."""
        return self.weights + self.optimizer + self.step

    def process(self, device: str = "cuda") -> float:
        """Bytes that a process holds then: reserved on the GPU, or resident in main memory."""
        return self.peak * FRAGMENTATION[device] + PROCESS_BYTES[device]


class Meter(TorchDispatchMode):
    """Counts `flops` of matrix products, and follows the storages that operations create until they are freed: `peak`
    is the most bytes that lived at once."""

    def __init__(self):
        super().__init__()
        self.flops = self.live = self.peak = 0
        self._seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._follow, result)
        count = FLOPS.get(function._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result

    def ignore(self, tensors) -> None:
        """Leave tensors out that are counted elsewhere."""
        self._seen.update(tensor.untyped_storage() for tensor in tensors)

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen.add(storage)
            size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


def step_cost(
    model: UnifiedModel,
    batch: dict[str, Any],
    mode: str = "full",
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = False,
    lora_rank: int = 16,
    optimizer: str = "adamw_torch_fused",
    device: str = "cpu",
) -> Cost:
    """Carry out a step without contents and add up what it takes.

    Args:
        model: on any device, "meta" for choice; it is left without contents.
        batch: of `model.forward`, its task included.
        mode: `full` (the whole generator), `lora`, or `qlora` (LoRA on a base in NF4).
        optimizer: a name of `OPTIMIZER_BYTES`; foreach implementations need temporary copies besides.
    """
    quantized = quantized_weights(model) if mode == "qlora" else []
    if mode == "full":
        model.freeze_understanding()
        trained = model
    else:
        trained = adapters.attach(model, LoraConfig(r=lora_rank, lora_alpha=lora_rank))
    with FakeTensorMode() as fake:
        empty(model, dtype, device, masters=dtype if mode == "full" else torch.float32)
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        batch = {
            name: fake.from_tensor(value).to(device) if torch.is_tensor(value) else value
            for name, value in batch.items()
        }
        weights = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
        meter = Meter()
        meter.ignore(weights.values())
        with meter:
            trained(corruption=model.sample_corruption(batch), **batch).loss.backward()
    held = sum(tensor.untyped_storage().nbytes() for tensor in weights.values())
    held -= sum(quantized) * (dtype.itemsize - NF4_BYTES)
    numbers = [p.numel() for p in model.parameters() if p.requires_grad]
    return Cost(
        weights=held,
        optimizer=sum(numbers) * OPTIMIZER_BYTES[optimizer],
        step=meter.peak + max(quantized, default=0) * dtype.itemsize,  # one layer at a time is dequantised
        flops=meter.flops,
        parameters=sum(p.numel() for p in model.parameters()),
        trained_parameters=sum(numbers),
    )


def empty(model: UnifiedModel, dtype: torch.dtype, device: str, masters: torch.dtype) -> None:
    """Replace all of `model`'s tensors by ones without contents, on `device`, in the precision they are loaded in:
    `masters` what is trained, float32 what the family keeps so, `dtype` the rest."""
    keep = [name for name in model._keep_in_fp32_modules_strict or () if not name.startswith("(")]
    for prefix, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                exact = any(part in f"{prefix}.{name}" for part in keep) or not tensor.is_floating_point()
                precision = tensor.dtype if exact else masters if tensor.requires_grad else dtype
                new = torch.empty(tensor.shape, dtype=precision, device=device)
                tensors[name] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def quantized_weights(model: UnifiedModel) -> list[int]:
    """Sizes of the weights that QLoRA quantises."""
    pattern = model.quantized_modules or model.lora_target_modules
    return [
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(pattern, name)
    ]


def open_model(name: str) -> tuple[UnifiedModel, Any]:
    """A model without contents and its processor: of a folder or Hub id, or of a family's name, which stands for the
    family's largest published checkpoint (its configuration's defaults)."""
    if name not in FAMILIES:
        return open_lazily(name), AutoUnifiedProcessor.from_pretrained(name)
    from reca_trainer.shapes.tokenizer import make_tokenizer

    package = family(name)
    with torch.device("meta"):
        return package.Model(package.Config()), package.Processor(make_tokenizer())


def gigabytes(text: str) -> float:
    match = re.fullmatch(r"([\d.]+)\s*(?:gb?|gib)?", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory; write 24GB.")
    return float(match[1])


def make_parser(parser: argparse.ArgumentParser | None = None) -> argparse.ArgumentParser:
    """The arguments of `reca-trainer plan`, added to `parser` if given."""
    parser = parser or argparse.ArgumentParser("reca-trainer plan", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help=f"folder, Hub id, or a family: {', '.join(FAMILIES)}")
    parser.add_argument("--mode", default="lora", choices=MODES)
    parser.add_argument(
        "--resolution", type=int, default=512, help="side of the target images in pixels (default 512)"
    )
    parser.add_argument(
        "--gpu", type=gigabytes, required=True, metavar="MEMORY", help="memory of one GPU, such as 24GB"
    )
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--optimizer", default="adamw_torch_fused", choices=list(OPTIMIZER_BYTES))
    parser.add_argument("--no_checkpointing", action="store_true", help="keep activations instead of recomputing them")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--images_per_step", type=int, help="default: the largest batch that fits")
    parser.add_argument(
        "--tflops", type=float, help="measured bfloat16 matmul rate of the GPU; measured here if one is present"
    )
    parser.add_argument(
        "--utilisation", type=float, default=0.6, help="share of that rate that a step reaches (default 0.6)"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """`reca-trainer plan`: print what a step takes, the largest batch that fits, and the time of a run."""
    args = make_parser().parse_args(argv)
    one, two = (plan_cost(args, batch_size) for batch_size in (1, 2))
    needed, further = one.process(), two.process() - one.process()
    largest = int(1 + (args.gpu * 1e9 - needed) // further) if args.gpu * 1e9 >= needed else 0
    print(f"{one.parameters / 1e9:.2f} B parameters, {one.trained_parameters / 1e6:,.1f} M of them trained")
    print(
        f"weights {one.weights / 1e9:.2f} GB, optimiser {one.optimizer / 1e9:.2f} GB, one image's step {one.step / 1e9:.2f} GB"
    )
    print(
        f"with process and fragmentation: {needed / 1e9:.1f} GB for a batch of 1, each further image {further / 1e9:.2f} GB"
    )
    if not largest:
        print(f"Does not fit into {args.gpu:g} GB." + _advice(args))
        return
    print(f"Fits into {args.gpu:g} GB with per_device_train_batch_size up to {largest}.")
    rate = args.tflops * 1e12 if args.tflops else measured_rate()
    if rate is None:
        print(f"{one.flops / 1e12:.1f} TFLOP an image. For the time, give the GPU's measured matmul rate: --tflops.")
        return
    images = args.images_per_step or largest
    seconds = one.flops * images / (rate * args.utilisation)
    print(
        f"{seconds:.2f} s a step of {images} images at {args.utilisation:.0%} of {rate / 1e12:.0f} TFLOP/s: "
        f"{seconds * args.steps / 3600:.1f} GPU-hours for {args.steps:,} steps."
    )


def plan_cost(args: argparse.Namespace, batch_size: int) -> Cost:
    model, processor = open_model(args.model)
    picture = Image.new("RGB", (args.resolution, args.resolution))
    size = (args.resolution, args.resolution)
    batch = processor(images=[picture] * batch_size, instruction=INSTRUCTION, task="reconstruct", size=size)
    return step_cost(
        model,
        batch,
        args.mode,
        checkpointing=not args.no_checkpointing,
        lora_rank=args.lora_rank,
        optimizer=args.optimizer,
    )


def _advice(args: argparse.Namespace) -> str:
    advice = []
    if args.no_checkpointing:
        advice.append("recompute activations")
    if args.mode != "qlora":
        advice.append("--mode qlora" if args.mode == "lora" else "--mode lora, or --optimizer adamw_bnb_8bit")
    if args.resolution > 512:
        advice.append("--resolution 512")
    return f" Try {', or '.join(advice)}." if advice else ""


def measured_rate(side: int = 8192, repetitions: int = 10) -> float | None:
    """bfloat16 FLOP/s of this machine's GPU on square matrix products, or `None` without one."""
    if not torch.cuda.is_available():
        return None
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    a @ b
    start.record()
    for _ in range(repetitions):
        a @ b
    end.record()
    torch.cuda.synchronize()
    return repetitions * 2 * side**3 / (start.elapsed_time(end) / 1e3)


if __name__ == "__main__":
    main()
