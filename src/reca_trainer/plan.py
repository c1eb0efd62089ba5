"""What a RecA run will need: does it fit, at which batch size, and how long does it take?

A training step is carried out on numbers without contents (`FakeTensorMode`), so nothing is loaded and no accelerator is
needed, while every tensor that lives at the same time is counted, and so is every matrix product. Only token ids and
masks are what they would be, because shapes depend on them. What remains to be assumed stands in the constants below.
"""

from __future__ import annotations

import re
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from reca_trainer import adapters
from reca_trainer.models.auto import open_lazily
from reca_trainer.models.contract import UnifiedModel
from reca_trainer.models.registry import families, family

MODES = ("full", "lora", "qlora")
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

INDEXING = {
    getattr(torch.ops.aten, name)
    for name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
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
        if function is torch.ops.prim.device.default:  # no tensor, and half of all calls
            return result
        self.follow(result)
        count = FLOPS.get(function._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result

    def ignore(self, tensors) -> None:
        """Leave tensors out that are counted elsewhere."""
        self._seen.update(tensor.untyped_storage() for tensor in tensors)

    def follow(self, values: Any) -> None:
        """Count the tensors of a tree as long as they live."""
        tree_map_only(torch.Tensor, self._follow, values)

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


class KnownIntegers(TorchDispatchMode):
    """Inside a `FakeTensorMode`, gives integers and booleans contents as long as they depend on nothing else, so that
    masks and ids still decide on shapes. Floating-point numbers have none."""

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        known = [tensor for tensor in inputs if not isinstance(tensor, FakeTensor)]
        if len(known) == len(inputs):
            if inputs:
                return self._with_contents(function, args, kwargs)
            result = function(*args, **kwargs)
            made_integers = torch.is_tensor(result) and not result.is_floating_point()
            return self._with_contents(function, args, kwargs) if made_integers else result
        if not known:
            return function(*args, **kwargs)
        if function._overloadpacket is torch.ops.aten.masked_select:
            function, args = torch.ops.aten.index.Tensor, (args[0].expand(args[1].shape), [args[1]])
        if function._overloadpacket in INDEXING:
            args = (args[0], self._places(args[1]), *args[2:])
        args, kwargs = tree_map_only(torch.Tensor, self._empty, (args, kwargs))
        return function(*args, **kwargs)

    def without_numbers(self, values: Any) -> Any:
        """A tree in which floating-point tensors have no contents."""
        return tree_map_only(lambda leaf: torch.is_tensor(leaf) and leaf.is_floating_point(), self._empty, values)

    def _with_contents(self, function, args, kwargs):
        with unset_fake_temporarily():
            result = function(*args, **kwargs)
        return self.without_numbers(result)

    def _empty(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def _places(self, indices: list) -> list:
        """Masks as indices, one list a dimension, which is how PyTorch itself reads them."""
        places = []
        for index in indices:
            known_mask = torch.is_tensor(index) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
            with unset_fake_temporarily():
                places += index.nonzero(as_tuple=True) if known_mask else [index]
        return places


def step_cost(
    model: UnifiedModel,
    batch: dict[str, Any],
    mode: str = "full",
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = False,
    lora_rank: int = 16,
    optimizer: str = "adamw_torch_fused",
    device: str = "cpu",
    corruption: dict[str, torch.Tensor] | None = None,
) -> Cost:
    """Carry out a step without contents and add up what it takes.

    Args:
        model: on any device, "meta" for choice; it is left without contents.
        batch: of `model.forward`, its task included; numbers in it may be any, ids and masks must be valid.
        mode: `full` (the whole generator), `lora`, or `qlora` (LoRA on a base in NF4).
        optimizer: a name of `OPTIMIZER_BYTES`; foreach implementations need temporary copies besides.
        corruption: the draws of the loss, from `model.sample_corruption`; by default each sample has the same.
    """
    if corruption is None:
        batch_size = max(len(value) for value in batch.values() if torch.is_tensor(value))
        corruption = model.sample_corruption(batch, [torch.Generator().manual_seed(0) for _ in range(batch_size)])
    quantized = quantized_weights(model) if mode == "qlora" else []
    if mode == "full":
        model.freeze_understanding()
        trained = model
    else:
        trained = adapters.attach(model, LoraConfig(r=lora_rank, lora_alpha=lora_rank))
    with FakeTensorMode() as fake, KnownIntegers(fake) as integers:
        empty(model, dtype, device, masters=dtype if mode == "full" else torch.float32)
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        weights = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
        meter = Meter()
        meter.ignore(weights.values())
        inputs = integers.without_numbers((batch, corruption))
        batch, corruption = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), inputs)
        meter.follow((batch, corruption))
        with meter:
            trained(corruption=corruption, **batch).loss.backward()
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
    emptied: dict[int, torch.Tensor] = {}  # tied weights stay one tensor
    for prefix, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                exact = any(part in f"{prefix}.{name}" for part in keep) or not tensor.is_floating_point()
                precision = tensor.dtype if exact else masters if tensor.requires_grad else dtype
                if id(tensor) not in emptied:
                    new = torch.empty(tensor.shape, dtype=precision, device=device)
                    parameter = isinstance(tensor, nn.Parameter)
                    emptied[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if parameter else new
                tensors[name] = emptied[id(tensor)]


def quantized_weights(model: UnifiedModel) -> list[int]:
    """Sizes of the weights that QLoRA quantises."""
    pattern = model.quantized_modules or model.lora_target_modules
    return [
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(pattern, name)
    ]


def open_model(name: str) -> UnifiedModel:
    """A model without contents: of a folder or Hub id, or of a family's name, which stands for the checkpoint of
    `UnifiedModel.published_config`."""
    if name not in families():
        return open_lazily(name)
    model_class = family(name).Model
    with torch.device("meta"):
        return model_class(model_class.published_config())


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
