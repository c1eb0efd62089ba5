"""Checkpoints of a run that FSDP2 shards: each process writes its part, and any number of processes goes on from them."""

import os
import pickle
from itertools import chain

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load, load_file

from reca_trainer.saving.merge import merge_adapter
from reca_trainer.saving.shards import check_shards
from tests.hub_server import HubServer
from tests.reliability.test_processes import assert_equal_runs, rows, run

OPTIONS = {"sharded": True, "save_strategy": "steps", "save_steps": 2, "rows": 18}


@pytest.mark.slow
@pytest.mark.parametrize("full", [True, False], ids=["full", "lora"])
def test_another_number_of_processes_goes_on_and_the_merged_model_is_pushed(tmp_path, full, record_property):
    whole, parts, options = tmp_path / "whole", tmp_path / "parts", {**OPTIONS, "full": full}
    with HubServer() as server:
        run(whole, 2, max_steps=4, push_merged=[server.url, server.token, "me/merged"], **options)
        server.shutdown()
    run(parts, 2, max_steps=2, **options)
    assert {path.name for path in (parts / "checkpoint-2").glob("*/*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    log = run(parts, 1, max_steps=4, resume=True, expect=1, **{**options, "sharded": False})
    assert "FSDP's state dict: SHARDED_STATE_DICT, now None" in log
    (parts / "rows-1.json").unlink()
    run(parts, 1, max_steps=4, resume=True, **options)
    assert [set(chain(*step)) for step in rows(parts)] == [set(chain(*step)) for step in rows(whole)[2:]]
    pushed = load(server.repos["me/merged"].files()["model.safetensors"])
    if full:
        merged = load_file(whole / "model.safetensors")
        for folder in (whole, parts):
            (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    else:
        merged = load_file(merge_adapter(None, whole, tmp_path / "merged") / "model.safetensors")
    record_property("deviation", assert_equal_runs(whole, parts))
    assert pushed.keys() == merged.keys() and all(torch.equal(pushed[name], merged[name]) for name in merged)


class Harm:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("where", ["index", "value", None])
def test_shards_that_would_run_code_are_refused(tmp_path, where):
    shards, harm = tmp_path / "optimizer_0", Harm(tmp_path / "harmed")
    state = {"moment": torch.arange(3.0), "betas": (0.9, 0.95), "extra": harm if where == "value" else None}
    dcp.save(state, checkpoint_id=shards, no_dist=True)
    if where == "index":
        (shards / ".metadata").write_bytes(pickle.dumps(harm))
    if where is None:
        check_shards(tmp_path)
        return
    with pytest.raises(ValueError, match="optimizer_0 holds more than tensors, and may run code"):
        check_shards(tmp_path)
    assert not harm.file.exists()
