"""One copy of a model on a machine: under FSDP2 the first process reads it, the others start empty.

accelerate shards on GPUs alone, so its own preparation of a model is called here, over gloo.
"""

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import LoraConfig

from reca_trainer import AutoUnifiedModel, adapters
from reca_trainer.models.registry import families, family
from reca_trainer.plan import open_model
from reca_trainer.toy import CHECKPOINT
from tests.reliability.run import fork


def prepare(rank: int, port: int, processes: int, trained: torch.nn.Module) -> torch.nn.Module:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=True,
        state_dict_type="FULL_STATE_DICT",
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), device=torch.device("cpu"), mixed_precision="no",
        is_main_process=rank == 0, process_index=rank, num_processes=processes, torch_device_mesh=None,
        parallelism_config=None,
    )  # fmt: skip
    return fsdp2_prepare_model(accelerator, trained)


def load_and_step(rank: int, port: int, folder: str, with_adapter: bool) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_RANK": str(rank), "ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    dist.init_process_group("gloo")
    try:
        model = AutoUnifiedModel.from_pretrained(CHECKPOINT, **({"device_map": "meta"} if rank else {}))
        if with_adapter:
            torch.manual_seed(0)
            trained = adapters.attach(model, LoraConfig(r=4))
        else:
            model.freeze_understanding()
            trained = model
        assert {parameter.is_meta for parameter in trained.parameters()} == {rank != 0}
        sharded = prepare(rank, port, 2, trained)
        whole = AutoUnifiedModel.from_pretrained(CHECKPOINT)
        weights = whole.state_dict()
        for name, tensor in sharded.state_dict().items():
            if "lora_" not in name:
                assert torch.equal(tensor.full_tensor(), weights.pop(adapters.name_in_base(name))), name
        assert not weights
        for (name, buffer), (_, other) in zip(whole.named_buffers(), model.named_buffers(), strict=True):
            assert torch.equal(buffer, other), name
        batch = whole.example_batch(1)
        draws = whole.sample_corruption(batch, [torch.Generator().manual_seed(0)])
        loss = sharded(corruption=draws, **batch).loss
        loss.backward()
        assert loss.item() == whole(corruption=draws, **batch).loss.item()
        assert any(parameter.grad is not None for parameter in sharded.parameters())
        Path(folder, str(rank)).write_text("done")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("with_adapter", [False, True], ids=["full", "lora"])
def test_the_other_processes_get_the_weights_that_the_first_has_read(tmp_path, with_adapter):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [fork(load_and_step, rank, port, str(tmp_path), with_adapter) for rank in range(2)]
    for process in processes:
        process.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


@pytest.mark.parametrize("name", families())
def test_the_layers_to_wrap_are_those_that_a_model_has(name):
    model = open_model(name)
    assert model._no_split_modules <= {type(module).__name__ for module in model.modules()}
    named = set(family(name).Model._no_split_modules or ())
    assert bool(named) == bool(named & model._no_split_modules)
