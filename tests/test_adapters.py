"""Adapters: which layers, quantised how, merged how exactly."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor, RecAConfig, RecATrainer, toy
from reca_trainer.adapters import attach, check_trainable, load_adapter
from reca_trainer.models.weights import CheckpointError
from reca_trainer.saving.export import export
from reca_trainer.saving.merge import merge_adapter

CHECKPOINT = Path(__file__).parent / "golden" / "bagel" / "checkpoint"
HARMON = Path(__file__).parent / "golden" / "harmon" / "checkpoint"
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
NF4_PLAIN = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
INT8 = BitsAndBytesConfig(load_in_8bit=True)


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)
    return Dataset.from_dict(
        {"image": [Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)) for _ in range(8)]}
    )


def with_adapter(quantization=None, seed=3, dtype=None, **lora):
    """The tiny BAGEL with an adapter that has visibly learnt something."""
    model = AutoUnifiedModel.from_pretrained(CHECKPOINT, quantization_config=quantization, dtype=dtype)
    model = attach(model, LoraConfig(r=4, **{"modules_to_save": ["vae2llm", "llm2vae", "time_embedder"], **lora}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.1 * noise * (parameter.abs() if "magnitude" in name else 1)
    return model


def velocity(model):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    generator = torch.Generator().manual_seed(0)
    batch = {
        "condition_pixel_values": torch.rand(2, 3, 42, 42, generator=generator, dtype=torch.float32).to(base.dtype),
        "pixel_values": torch.rand(2, 3, 64, 48, generator=generator),
        "input_ids": torch.tensor([[5, 6, 7]]),
    }
    corruption = base.sample_corruption(batch, generator)
    with torch.no_grad():
        return model.eval()(task="reconstruct", corruption=corruption, **batch).prediction.float()


def distance(output, expected):
    return ((output - expected).norm() / expected.norm()).item()


def tensors(folder, pattern="*.safetensors"):
    return {name: tensor for path in sorted(Path(folder).glob(pattern)) for name, tensor in load_file(path).items()}


def assert_same_bytes(weights, expected):
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


# --- quantising while loading ---


@pytest.mark.parametrize(("quantization", "kind"), [(NF4, Linear4bit), (INT8, Linear8bitLt)])
def test_quantisation_covers_both_experts_and_nothing_else(quantization, kind):
    plain = AutoUnifiedModel.from_pretrained(CHECKPOINT, dtype=torch.bfloat16)
    model = AutoUnifiedModel.from_pretrained(CHECKPOINT, dtype=torch.bfloat16, quantization_config=quantization)
    quantized = {name for name, module in model.named_modules() if isinstance(module, kind)}
    assert quantized == {
        f"language_model.model.layers.{layer}.{name}"
        for layer in range(plain.config.text_config.num_hidden_layers)
        for expert in ("", "_moe_gen")
        for name in [f"self_attn.{p}_proj{expert}" for p in "qkvo"]
        + [f"mlp{expert}.{p}_proj" for p in ("gate", "up", "down")]
    }
    others = model.state_dict()
    for name, tensor in plain.state_dict().items():
        if name.removesuffix(".weight") not in quantized:
            assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name


def test_quantised_weights_train_after_an_evaluation():
    model = with_adapter(NF4)
    before = velocity(model)
    model.train()
    batch = {"condition_pixel_values": torch.rand(1, 3, 42, 42), "pixel_values": torch.rand(1, 3, 64, 48)}
    model(task="reconstruct", **batch).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert torch.equal(velocity(model), before)


def run(folder, dataset, quantization, **options):
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        **options,
    }
    return RecATrainer(
        str(CHECKPOINT),
        RecAConfig(output_dir=str(folder), **settings),
        train_dataset=dataset,
        processing_class=AutoUnifiedProcessor.from_pretrained(
            CHECKPOINT, generation_size=(64, 32, 16), condition_size=(42, 42, 14)
        ),
        peft_config=LoraConfig(r=4),
        quantization_config=quantization,
    )


@pytest.mark.parametrize(
    ("quantization", "options"),
    [
        (NF4, {"optim": "adamw_bnb_8bit"}),
        (NF4, {"activation_checkpointing": True, "bf16": True}),
        (INT8, {}),
    ],
    ids=["nf4-adamw8bit", "nf4-bf16-checkpointing", "int8"],
)
def test_qlora_trains_saves_and_resumes(tmp_path, dataset, quantization, options):
    whole = run(tmp_path / "whole", dataset, quantization, **options)
    before = {name: tensor.clone() for name, tensor in whole.model.state_dict().items() if "base_layer" in name}
    masters = {name: p.detach().clone() for name, p in whole.model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in masters.values())
    whole.train()
    after = whole.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(not torch.equal(p, masters[name]) for name, p in whole.model.named_parameters() if name in masters)

    options |= {"save_strategy": "steps", "save_steps": 2}
    run(tmp_path / "parts", dataset, quantization, **{**options, "max_steps": 2}).train()
    parts = run(tmp_path / "parts", dataset, quantization, **options)
    parts.train(resume_from_checkpoint=True)
    resumed = dict(parts.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        if name in masters:
            assert torch.equal(parameter, resumed[name]), name


# --- which layers ---


@pytest.mark.parametrize("layers", [1, [1]])
def test_layers_to_transform_picks_layers_of_the_generator(layers):
    model = AutoUnifiedModel.from_pretrained(CHECKPOINT)
    model = attach(model, LoraConfig(layers_to_transform=layers))
    check_trainable(model)
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert len(adapted) == 7 and all(".layers.1." in name and "_moe_gen" in name for name in adapted)


def test_wrong_targets_are_named():
    model = AutoUnifiedModel.from_pretrained(CHECKPOINT)
    with pytest.raises(
        ValueError, match=r"no_such_layer.* linear layers are language_model\.model\.layers\.0\..*_moe_gen"
    ):
        attach(model, LoraConfig(target_modules=["no_such_layer"]))
    with pytest.raises(
        ValueError, match=r"layers_to_transform=\[9\] names no layer of the generator; it has \[0, 1\]"
    ):
        attach(model, LoraConfig(layers_to_transform=9))
    for target, name in (
        ("o_proj", r"language_model\.model\.layers\.0\.self_attn\.o_proj"),
        ("to_q", r"vae\.decoder"),
    ):
        with pytest.raises(ValueError, match=f"4 weights outside of it would be trained too: {name}"):
            check_trainable(attach(AutoUnifiedModel.from_pretrained(CHECKPOINT), LoraConfig(target_modules=[target])))


# --- merging ---


@pytest.mark.parametrize("quantization", [None, NF4, NF4_PLAIN], ids=["lora", "qlora-double", "qlora"])
@pytest.mark.parametrize(
    "lora", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True, "modules_to_save": []}], ids=str
)
def test_merged_model_equals_the_adapter(tmp_path, quantization, lora):
    if lora.get("lora_bias"):
        lora = {**lora, "target_modules": r".*self_attn\.[qkv]_proj_moe_gen"}  # PEFT needs a bias to add it to
    model = with_adapter(quantization, **lora)
    model.save_pretrained(tmp_path / "adapter")
    expected = velocity(model)
    unmerged = velocity(AutoUnifiedModel.from_pretrained(CHECKPOINT))
    merge_adapter(None, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoUnifiedModel.from_pretrained(tmp_path / "merged")
    assert distance(velocity(merged), expected) < 3e-6
    assert distance(unmerged, expected) > 0.05
    assert not hasattr(merged.config, "quantization_config")
    AutoUnifiedProcessor.from_pretrained(tmp_path / "merged")


def test_merging_rounds_once(tmp_path):
    export(CHECKPOINT, tmp_path / "base", "transformers", torch.bfloat16)
    model = load_bf16_adapter(tmp_path)
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", max_shard_size="100KB")
    exact = AutoUnifiedModel.from_pretrained(tmp_path / "base", dtype=torch.float32)
    exact = load_adapter(exact, tmp_path / "adapter").merge_and_unload().state_dict()
    merged = tensors(tmp_path / "merged")
    assert merged.keys() == exact.keys() and len(list((tmp_path / "merged").glob("*.safetensors"))) > 3
    for name, tensor in merged.items():
        assert tensor.dtype == (torch.float32 if name.startswith("vae.") else torch.bfloat16)
        assert torch.equal(tensor, exact[name].to(tensor.dtype)), name
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "float32", dtype=torch.float32)
    assert_same_bytes(tensors(tmp_path / "float32"), {name: tensor.contiguous() for name, tensor in exact.items()})
    assert distance(velocity(AutoUnifiedModel.from_pretrained(tmp_path / "merged")), velocity(model)) < 0.02


def load_bf16_adapter(tmp_path):
    model = with_adapter()
    model.save_pretrained(tmp_path / "adapter")
    base = AutoUnifiedModel.from_pretrained(tmp_path / "base", dtype=torch.float32)
    return load_adapter(base, tmp_path / "adapter")


def test_merge_into_the_original_base_is_off_by_the_quantisation_error(tmp_path):
    model = with_adapter(NF4)
    model.save_pretrained(tmp_path / "adapter")
    expected = velocity(model)
    errors = {}
    for into in ("dequantized", "quantized", "base"):
        merge_adapter(CHECKPOINT, tmp_path / "adapter", tmp_path / into, into, torch.float32)
        errors[into] = distance(velocity(AutoUnifiedModel.from_pretrained(tmp_path / into)), expected)
    assert errors["dequantized"] < 1e-5 < 0.01 < min(errors["quantized"], errors["base"])


def test_a_base_stored_quantised_is_merged_as_it_was_trained(tmp_path):
    export(CHECKPOINT, tmp_path / "nf4", "transformers", torch.float32, NF4)
    base = AutoUnifiedModel.from_pretrained(tmp_path / "nf4")
    model = attach(base, LoraConfig(r=4, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(None, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    assert distance(velocity(AutoUnifiedModel.from_pretrained(tmp_path / "merged")), velocity(model)) < 3e-6
    with pytest.raises(ValueError, match='is itself stored quantised: use into="dequantized"'):
        merge_adapter(None, tmp_path / "adapter", tmp_path / "other", into="base")


def test_merging_quantises_what_was_quantised_in_training(tmp_path):
    quantized = AutoUnifiedModel.from_pretrained(HARMON, quantization_config=NF4)  # but for its diffusion head
    attach(quantized, LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")  # has learnt nothing
    merge_adapter(None, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    merged = AutoUnifiedModel.from_pretrained(tmp_path / "merged").state_dict()
    expected = AutoUnifiedModel.from_pretrained(HARMON, quantization_config=NF4).dequantize()
    assert_same_bytes(merged, expected.state_dict())


def test_contradictory_merges_are_refused(tmp_path):
    with_adapter().save_pretrained(tmp_path / "adapter")
    merge = (CHECKPOINT, tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(ValueError, match=r'trained on an unquantised base .*: use into="base"'):
        merge_adapter(*merge, into="dequantized")
    with pytest.raises(ValueError, match=r"into is .* not 'nf4'"):
        merge_adapter(*merge, into="nf4")
    with pytest.raises(ValueError, match="Quantised weights have no published layout"):
        merge_adapter(*merge, into="quantized", layout="published")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="merged exists and is not empty"):
        merge_adapter(*merge)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]


FORMS = {"transformers": {}, "published": {"layout": "published"}, "quantized": {"into": "quantized"}}


def test_killed_merge_leaves_no_model(tmp_path):
    with_adapter().save_pretrained(tmp_path / "adapter")
    program = f"""
import os, signal, sys
from pathlib import Path
from reca_trainer.saving.merge import merge_adapter
opened = set()
def die(event, args):  # at the second file of weights that is written
    if event == "open" and str(args[0]).endswith(".safetensors") and ".partial" in str(args[0]):
        opened.add(args[0])
        if len(opened) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
folder = Path({str(tmp_path)!r})
for name, form in {FORMS!r}.items():
    if not (child := os.fork()):
        sys.addaudithook(die)
        merge_adapter({str(CHECKPOINT)!r}, str(folder / "adapter"), str(folder / name), max_shard_size="100KB", **form)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, name
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, form in FORMS.items():
        assert (tmp_path / f".{name}.partial").is_dir() and not (tmp_path / name).exists()
        merge_adapter(CHECKPOINT, tmp_path / "adapter", tmp_path / name, **form)
        assert not (tmp_path / f".{name}.partial").exists()
        AutoUnifiedModel.from_pretrained(tmp_path / name)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_full_disk_is_an_error_and_leaves_nothing(tmp_path, form):
    with_adapter().save_pretrained(tmp_path / "adapter")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, before[1]))  # a file may not grow further
    try:
        with pytest.raises(OSError, match=r"merged was not written: .*too large"):
            merge_adapter(CHECKPOINT, tmp_path / "adapter", tmp_path / "merged", **form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_broken_adapter_leaves_nothing(tmp_path):
    with_adapter().save_pretrained(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = next(name for name in weights if "layers.1" in name and "lora_A" in name)
    weights[name][0, 0] = float("nan")
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        merge_adapter(CHECKPOINT, tmp_path / "adapter", tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


# --- exporting ---


@pytest.mark.parametrize(
    ("checkpoint", "files"),
    [
        (CHECKPOINT, ["ema.safetensors", "ae.safetensors", "vocab.json", "merges.txt"]),
        (HARMON, ["model.safetensors", "merges.txt"]),  # with an autoencoder stored in bfloat16, loaded in float32
    ],
    ids=["bagel", "harmon"],
)
def test_export_round_trip_is_byte_equal(tmp_path, checkpoint, files):
    export(checkpoint, tmp_path / "own", "transformers", max_shard_size="100KB")
    assert (tmp_path / "own" / "model.safetensors.index.json").is_file()
    export(tmp_path / "own", tmp_path / "published")
    for file in files:
        assert (tmp_path / "published" / file).read_bytes() == (checkpoint / file).read_bytes(), file
    tokenizers = [json.loads((folder / "tokenizer_config.json").read_text())
                  for folder in (checkpoint, tmp_path / "published")]  # fmt: skip
    for name in ("added_tokens_decoder", "additional_special_tokens"):  # what transformers 4 reads
        assert tokenizers[0][name] == tokenizers[1][name]
    export(tmp_path / "published", tmp_path / "again", "transformers", max_shard_size="100KB")
    assert folder_bytes(tmp_path / "own") == folder_bytes(tmp_path / "again")


def folder_bytes(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_published_index_lists_every_tensor(tmp_path):
    export(CHECKPOINT, tmp_path / "published")
    index = json.loads((tmp_path / "published" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(CHECKPOINT, "ema.safetensors").keys()
    assert not (tmp_path / "published" / "copy").exists()


def test_what_a_published_layout_cannot_hold_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no autoencoder but FLUX'.*another \(\{'norm_num_groups': 8"):
        export(toy.CHECKPOINT, tmp_path / "published")
    assert not list(tmp_path.iterdir())


def test_merged_export_differs_only_where_something_was_trained(tmp_path):
    with_adapter().save_pretrained(tmp_path / "adapter")
    merge_adapter(None, tmp_path / "adapter", tmp_path / "published", dtype=torch.bfloat16, layout="published")
    export(CHECKPOINT, tmp_path / "base", dtype=torch.bfloat16)
    trained = re.compile(r".*(_proj_moe_gen\.weight|mlp_moe_gen\..*weight)|(vae2llm|llm2vae|time_embedder)\..*")
    before, after = (tensors(tmp_path / name, "ema.safetensors") for name in ("base", "published"))
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name]) != bool(trained.fullmatch(name)), name
    assert_same_bytes(tensors(tmp_path / "published", "ae.safetensors"), tensors(CHECKPOINT, "ae.safetensors"))


@pytest.mark.parametrize("quantization", [NF4, INT8], ids=["nf4", "int8"])
def test_quantised_export_loads_as_it_is(tmp_path, quantization):
    export(CHECKPOINT, tmp_path / "small", "transformers", torch.float32, quantization)
    expected = AutoUnifiedModel.from_pretrained(CHECKPOINT, quantization_config=quantization)
    loaded = AutoUnifiedModel.from_pretrained(tmp_path / "small")
    assert torch.equal(velocity(loaded), velocity(expected))
    assert_same_bytes(loaded.state_dict(), expected.state_dict())


def test_loaded_model_is_exported_without_its_adapter(tmp_path):
    model = with_adapter()
    processor = AutoUnifiedProcessor.from_pretrained(CHECKPOINT)
    export(model.get_base_model(), tmp_path / "base", "transformers", processor=processor)
    export(CHECKPOINT, tmp_path / "same", "transformers")
    assert_same_bytes(tensors(tmp_path / "base"), tensors(tmp_path / "same"))


# --- loading ---


def test_adapters_are_loaded_weighted_and_switched(tmp_path):
    outputs = {}
    for name, seed in (("one", 1), ("two", 2)):
        model = with_adapter(seed=seed, modules_to_save=[])
        model.save_pretrained(tmp_path / name)
        outputs[name] = velocity(model)
    model = AutoUnifiedModel.from_pretrained(tmp_path / "one")
    model.load_adapter(str(tmp_path / "two"), "two")
    assert torch.equal(velocity(model), outputs["one"])
    model.set_adapter("two")
    assert torch.equal(velocity(model), outputs["two"])
    model.add_weighted_adapter(["default", "two"], [1.0, 0.0], "mixed", combination_type="cat")
    model.set_adapter("mixed")
    assert distance(velocity(model), outputs["one"]) < 1e-5


def test_training_goes_on_from_an_adapter_by_name(tmp_path, dataset):
    model = with_adapter(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoUnifiedModel.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16, is_trainable=True)
    trainable = {name: p for name, p in loaded.named_parameters() if p.requires_grad}
    expected = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable.keys() == expected.keys()
    for name, parameter in expected.items():
        assert trainable[name].dtype == torch.float32 and torch.equal(trainable[name], parameter), name


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    with_adapter().save_pretrained(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())

    def variant(name, weights=weights, **changes):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "adapter_model.safetensors")
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        return tmp_path / name

    first = next(iter(weights))
    fewer = {name: tensor for name, tensor in weights.items() if name != first}
    wider = {name: torch.zeros(4, 99) if name == first else tensor for name, tensor in weights.items()}
    with pytest.raises(CheckpointError, match=f"does not fit .*: it lacks {re.escape(first)}"):
        AutoUnifiedModel.from_pretrained(variant("fewer", fewer))
    with pytest.raises(CheckpointError, match=r"does not fit [\s\S]*size mismatch"):
        AutoUnifiedModel.from_pretrained(variant("wider", wider))
    with pytest.raises(CheckpointError, match=r"does not fit .* not found in the base model"):
        AutoUnifiedModel.from_pretrained(variant("other", target_modules=["q"], modules_to_save=None))
    with pytest.raises(CheckpointError, match="names no base model"):
        AutoUnifiedModel.from_pretrained(variant("orphan", base_model_name_or_path=None))
    pickled = variant("pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle.* refused"):
        AutoUnifiedModel.from_pretrained(pickled)


def test_adapter_of_another_revision_is_refused(tmp_path):
    model = AutoUnifiedModel.from_pretrained(CHECKPOINT)
    model.config._commit_hash = "a" * 40
    attach(model, LoraConfig(r=2)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["revision"] == "a" * 40
    model = AutoUnifiedModel.from_pretrained(CHECKPOINT)
    model.config._commit_hash = "b" * 40
    with pytest.raises(CheckpointError, match=r"was trained on revision aaa.*and the model given is revision bbb"):
        load_adapter(model, tmp_path)
