"""What a RecA run will need: does it fit, at which batch size, and how long does it take?

A training step is carried out on numbers without contents (`FakeTensorMode`), so nothing is loaded and no accelerator is
needed, while every tensor that lives at the same time is counted, and so is every matrix product. Only token ids and
masks are what they would be, because shapes depend on them. Three layers of a stack of equal ones are carried out: the first,
one that counts for all in the middle, and the last. What remains to be assumed stands in the constants below.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
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
from reca_trainer.models.precision import weights_cast_by_autocast
from reca_trainer.models.registry import families, family

MODES = ("full", "lora", "qlora")
LAUNCHES = ("ddp", "fsdp2", "zero2", "zero3")  # the launch files in recipes/accelerate
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight with its doubly quantised scale (QLoRA, section 3)
# Bytes of an optimiser's state per trained weight, by its name in `--optim`. States of 8 bits have a scale every 256.
OPTIMIZER_BYTES = {
    **dict.fromkeys(("adamw_torch_fused", "adamw_torch", "paged_adamw_32bit", "stable_adamw"), 8.0),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), 2 * (1 + 4 / 256)),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "rmsprop", "adagrad", "schedule_free_sgd"), 4.0),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), 1 + 4 / 256),
    **dict.fromkeys(("schedule_free_adamw", "schedule_free_radam"), 8.0),
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit"), 12.0),
    **dict.fromkeys(("sgd", "adafactor"), 0.0),
}
PROCESS_BYTES = {"cuda": 0.8e9, "cpu": 0.5e9}  # CUDA context, or Python with its libraries
HOST_PROCESS_BYTES = 3e9  # main memory of a process with a CUDA context, and of a batch on its way
WORKER_BYTES = 0.8e9  # main memory of a worker that loads pictures
# What an allocator holds, over what tensors take. In main memory that is with MALLOC_MMAP_THRESHOLD_=131072: left to
# itself, glibc keeps up to half as much again for later.
FRAGMENTATION = {"cuda": 1.05, "cpu": 1.05}
KEPT = 3  # layers of a stack that are carried out


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
        gradients: bytes of all gradients together.
        activations: bytes of everything but gradients at the fullest moment of forward and backward pass.
        step: bytes of both at the fullest moment, which may be another one.
        flops: floating-point operations of its matrix products, recomputed ones included.
        parameters, trained_parameters: their numbers.
        unsharded: bytes of `weights` that every process keeps whatever the launch: packed in 4 bits.
        gathered: bytes that sharded processes put together to compute with them: two layers, as the next arrives while one
            computes, and all that is in no layer.
        has_adapter: whether an adapter is trained.
    """

    weights: float
    optimizer: float
    gradients: float
    activations: float
    step: float
    flops: float
    parameters: int
    trained_parameters: int
    unsharded: float
    gathered: float
    has_adapter: bool

    @property
    def peak(self) -> float:
        """Bytes of tensors at the fullest moment of a process that has the model to itself."""
        return self.weights + self.optimizer + self.step

    @property
    def model_on_disk(self) -> float:
        """Bytes of a checkpoint's weights: of an adapter alone, or of the whole model."""
        return self.gradients if self.has_adapter else self.weights

    def process(self, device: str = "cuda", launch: str | None = None, processes: int = 1) -> float:
        """Bytes that one of several processes holds then: reserved on its GPU, or resident in main memory."""
        if launch is None or processes == 1:
            peak = self.peak
        elif launch == "ddp":  # beside its gradients a process has those it sends
            peak = self.peak + self.gradients
        elif launch == "zero2":  # float32 masters beside the bfloat16 weights
            sharded = (self.optimizer + self.gradients + 4 * self.trained_parameters) / processes
            peak = self.weights + sharded + self.activations + min(self.gradients, 2e9)  # a bucket of DeepSpeed's
        else:
            masters = 4 * self.trained_parameters if launch == "zero3" else 0  # beside the bfloat16 weights
            sharded = (self.weights - self.unsharded + self.optimizer + self.gradients + masters) / processes
            peak = self.unsharded + sharded + self.activations + self.gathered
        return peak * FRAGMENTATION[device] + PROCESS_BYTES[device]


class _Storage:
    """What the meter knows of a storage: bytes, for how many it stands, which number it was, whether it is a gradient."""

    def __init__(self, size: int, number: int):
        self.size, self.number, self.count, self.is_gradient = size, number, 1, False


class Meter(TorchDispatchMode):
    """Counts `flops` of matrix products, and follows the storages that operations create until they are freed: `peak`
    is the most bytes that lived at once, `activations` the most without gradients."""

    def __init__(self):
        super().__init__()
        self._seen: weakref.WeakKeyDictionary[Any, _Storage | None] = weakref.WeakKeyDictionary()
        self._number = 0  # of storages so far
        self.restart()

    def restart(self) -> None:
        """Count from zero again; what is ignored stays so."""
        self.flops = self.live = self.peak = self.gradients = self.activations = 0
        self._factor = 1  # of the flops of what is being computed
        self._alive: dict[int, _Storage] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.prim.device.default:  # no tensor, and half of all calls
            return result
        self.follow(result)
        count = FLOPS.get(function._overloadpacket)
        if count is not None:
            self.flops += self._factor * count(*args, **(kwargs or {}), out_val=result)
        return result

    def ignore(self, tensors) -> None:
        """Leave tensors out that are counted elsewhere."""
        for tensor in tensors:
            self._seen[tensor.untyped_storage()] = None

    def follow(self, values: Any) -> None:
        """Count the tensors of a tree as long as they live."""
        tree_map_only(torch.Tensor, self._follow, values)

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._number = number = self._number + 1
            self._seen[storage] = self._alive[number] = entry = _Storage(storage.nbytes(), number)
            self._grow(entry.size)
            weakref.finalize(storage, self._free, number)

    def _grow(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)
        self.activations = max(self.activations, self.live - self.gradients)

    def _free(self, number: int) -> None:
        entry = self._alive.pop(number, None)
        if entry is None:  # of before the restart
            return
        self.live -= entry.size * entry.count
        if entry.is_gradient:
            self.gradients -= entry.size * entry.count

    def _multiply(self, entry: _Storage, count: int) -> None:
        growth = entry.size * entry.count * (count - 1)
        entry.count *= count
        if entry.is_gradient:
            self.gradients += growth
        self._grow(growth)

    def watch_gradients(self, model: nn.Module) -> None:
        """Tell gradients of trained parameters from other tensors."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._note_gradient)

    def _note_gradient(self, parameter: torch.Tensor) -> None:
        entry = self._seen.get(parameter.grad.untyped_storage())
        if entry is not None and not entry.is_gradient:
            entry.is_gradient = True
            self.gradients += entry.size * entry.count

    def stand_for(self, layer: nn.Module, count: int) -> None:
        """Count a layer as often as it stands for equal ones: its products, its gradients, and what its forward pass
        leaves for the backward pass."""
        starts: list[int] = []

        def enter(layer, args, kwargs) -> None:
            starts.append(self._number)
            if not _in_backward():
                self._factor *= count

        def leave(layer, args, kwargs, output) -> None:
            start = starts.pop()
            if _in_backward():  # computed once more; nothing of it stays
                return
            self._factor //= count
            outputs = [leaf for leaf in tree_leaves(output) if torch.is_tensor(leaf) and leaf.requires_grad]
            if not outputs:
                return
            for entry in [entry for entry in self._alive.values() if entry.number > start]:
                self._multiply(entry, count)
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf) and leaf.requires_grad]
            inputs = [leaf for leaf in inputs if leaf.shape == outputs[0].shape]
            if inputs:
                outputs[0].register_hook(lambda gradient: self._scale(count, 1))
                inputs[0].register_hook(lambda gradient: self._scale(1, count))

        layer.register_forward_pre_hook(enter, with_kwargs=True)
        layer.register_forward_hook(leave, with_kwargs=True)
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda parameter: self._multiply(self._seen[parameter.grad.untyped_storage()], count)
                )

    def _scale(self, up: int, down: int) -> None:
        self._factor = self._factor * up // down


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def shorten(model: nn.Module) -> dict[nn.Module, int]:
    """Cut every stack of more than three equal layers down to three.

    Returns:
        The middle layer of each stack, and how many layers it stands for.
    """
    middles = {}
    for stack in list(model.modules()):
        if isinstance(stack, nn.ModuleList) and len(stack) > KEPT:
            kinds = {
                (type(layer), *((tuple(weight.shape), weight.requires_grad) for weight in layer.parameters()))
                for layer in stack
            }
            if len(kinds) == 1:
                middles[stack[1]] = len(stack) - KEPT + 1
                del stack[KEPT:]
    return middles


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


def step_cost(model: UnifiedModel, batch: dict[str, Any], mode: str = "full", **options: Any) -> Cost:
    """The cost of one batch; arguments as for `step_costs`."""
    (cost,) = step_costs(model, [batch], mode, **options)
    return cost


def step_costs(
    model: UnifiedModel,
    batches: Sequence[dict[str, Any]],
    mode: str = "full",
    dtype: torch.dtype = torch.bfloat16,
    masters: torch.dtype = torch.float32,
    autocast: bool = False,
    checkpointing: bool = False,
    lora_r: int = 64,
    optim: str = "adamw_torch_fused",
    device: str = "cpu",
    corruption: dict[str, torch.Tensor] | None = None,
    skipped: Sequence[str] = (),
    freeze_modules: Sequence[str] = (),
    cast_weights: bool = False,
    whole: bool = False,
) -> list[Cost]:
    """Carry out a step without contents for each of several batches, and add up what it takes.

    Args:
        model: on any device, "meta" for choice; it is left shortened and without contents.
        batches: of `model.forward`, task included; numbers in them may be any, ids and masks must be valid.
        mode: `full` (the whole generator), `lora`, or `qlora` (LoRA on a base in NF4).
        dtype, masters: of weights that are frozen (in `full` mode those of `models.precision`), and of those that are
            trained.
        autocast: whether matrix products are in bfloat16 whatever the weights are in, as with `--bf16`.
        optim: a name of `OPTIMIZER_BYTES`; foreach implementations need temporary copies besides.
        corruption: the draws of the loss, from `model.sample_corruption`; by default each sample has the same.
        skipped: `llm_int8_skip_modules`, layers that `qlora` leaves in `dtype`.
        freeze_modules: parts of the generator that are not trained, as in `adapters.freeze`.
        cast_weights: whether weights are bfloat16 while they are computed with, as FSDP2 gathers them.
        whole: carry out every layer.
    """
    drawn = [_draws(model, batch) if corruption is None else corruption for batch in batches]
    quantized = quantized_weights(model, skipped) if mode == "qlora" else []
    largest = max(quantized, default=0) * dtype.itemsize  # one layer at a time is dequantised
    blocks = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    layers = [sum(p.numel() for p in block.parameters()) for block in blocks]
    inside = {id(p) for block in blocks for p in block.parameters()}
    in_no_layer = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    gathered = 2 * (in_no_layer + 2 * max(layers, default=0))  # bytes, in bfloat16
    trained: nn.Module = model
    middles: dict[nn.Module, int] = {}
    if mode == "full":
        model.freeze_understanding()
        adapters.freeze(model, freeze_modules)
        middles = {} if whole else shorten(model)
    else:
        middles = {} if whole or freeze_modules else shorten(model)
        trained = adapters.attach(model, LoraConfig(r=lora_r, lora_alpha=lora_r))
        adapters.freeze(trained, freeze_modules)
    counts = _counts(model, middles)
    meter = Meter()
    with FakeTensorMode() as fake, KnownIntegers(fake) as integers:
        stored = precisions(model, mode, dtype, masters)
        held = sum(
            tensor.numel() * stored[id(tensor)].itemsize * counts[name] for name, tensor in _named_tensors(model)
        )
        computing = precisions(model, mode, torch.bfloat16, torch.bfloat16) if cast_weights else stored
        empty(model, computing, device)
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        meter.ignore(tensor for _, tensor in _named_tensors(model))
        meter.watch_gradients(model)
        for layer, count in middles.items():
            meter.stand_for(layer, count)
        packed = sum(quantized) * NF4_BYTES
        numbers = {id(p): (p, counts[name]) for name, p in model.named_parameters()}.values()
        trained_numbers = [(p, count) for p, count in numbers if p.requires_grad]
        trained_parameters = sum(p.numel() * count for p, count in trained_numbers)
        costs = []
        for batch, corruption in zip(batches, drawn, strict=True):
            meter.restart()
            inputs = integers.without_numbers((batch, corruption))
            inputs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), inputs)
            meter.follow(inputs)
            with meter:
                with torch.autocast(device, torch.bfloat16) if autocast else contextlib.nullcontext():
                    loss = trained(corruption=inputs[1], **inputs[0]).loss
                loss.backward()
            model.zero_grad()
            cost = Cost(
                weights=held - sum(quantized) * dtype.itemsize + packed,
                optimizer=trained_parameters * OPTIMIZER_BYTES[optim],
                gradients=trained_parameters * masters.itemsize,
                activations=meter.activations + largest,
                step=meter.peak + largest,
                flops=meter.flops,
                parameters=sum(p.numel() * count for p, count in numbers),
                trained_parameters=trained_parameters,
                unsharded=packed,
                gathered=gathered,
                has_adapter=mode != "full",
            )
            costs.append(cost)
    return costs


def _draws(model: UnifiedModel, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    batch_size = max(len(value) for value in batch.values() if torch.is_tensor(value))
    return model.sample_corruption(batch, [torch.Generator().manual_seed(0) for _ in range(batch_size)])


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _counts(model: nn.Module, middles: dict[nn.Module, int]) -> dict[str, int]:
    """How many tensors of the whole model each tensor of a shortened one stands for, by its name."""
    counts = {name: 1 for name, _ in _named_tensors(model)}
    for prefix, module in model.named_modules():
        if module in middles:
            for name, _ in _named_tensors(module):
                if f"{prefix}.{name}" in counts:  # tied weights have one name
                    counts[f"{prefix}.{name}"] *= middles[module]
    return counts


def precisions(model: UnifiedModel, mode: str, dtype: torch.dtype, masters: torch.dtype) -> dict[int, torch.dtype]:
    """The precision that each of `model`'s tensors, by its id, is loaded in: `masters` what is trained, float32 what the
    family keeps so, `dtype` what is frozen, and without an adapter only the part of it that `models.precision` names."""
    keep = [name for name in model._keep_in_fp32_modules_strict or () if not name.startswith("(")]
    narrow = set(weights_cast_by_autocast(model)) if mode == "full" else None
    result: dict[int, torch.dtype] = {}
    for name, tensor in _named_tensors(model):
        if not tensor.is_floating_point() or any(part in name for part in keep):
            result[id(tensor)] = tensor.dtype
        elif tensor.requires_grad or (narrow is not None and name not in narrow):
            result[id(tensor)] = masters
        else:
            result[id(tensor)] = dtype
    return result


def empty(model: UnifiedModel, precision: dict[int, torch.dtype], device: str) -> None:
    """Replace all of `model`'s tensors by ones without contents, on `device`, in the `precisions` given."""
    emptied: dict[int, torch.Tensor] = {}  # tied weights stay one tensor
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in emptied:
                    new = torch.empty(tensor.shape, dtype=precision[id(tensor)], device=device)
                    parameter = isinstance(tensor, nn.Parameter)
                    emptied[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if parameter else new
                tensors[name] = emptied[id(tensor)]


def quantized_weights(model: UnifiedModel, skipped: Sequence[str] = ()) -> list[int]:
    """Sizes of the weights that QLoRA quantises, with these `llm_int8_skip_modules`."""
    model.check_skipped(skipped)
    return [
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and model.quantizes(name, skipped)
    ]


def open_model(name: str) -> UnifiedModel:
    """A model without contents, by its folder or Hub id, or by a family's name, which stands for the checkpoint of
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
