"""Every kind of adapter that PEFT has, and every option of LoRA: through its whole life, or refused before the first step."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import config as lora
from peft.tuners.tuners_utils import BaseTuner
from PIL import Image

from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor, RecAConfig, RecATrainer
from reca_trainer.adapters import KINDS, attach, prepare
from reca_trainer.saving.describe import describe
from reca_trainer.saving.merge import merge_adapter
from reca_trainer.toy.tokenizer import make_tokenizer
from tests.conftest import GOLDEN
from tests.models import sketch_family
from tests.test_adapters import velocity as bagel_velocity

BAGEL = GOLDEN / "bagel" / "checkpoint"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Layers of 256 → 64 → 192 features: widths that every kind can divide into blocks."""
    folder = tmp_path_factory.mktemp("sketch")
    torch.manual_seed(0)
    sketch_family.Model(sketch_family.Config(hidden_size=63)).save_pretrained(folder)
    sketch_family.Processor(make_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(8)]
    return Dataset.from_dict({"image": pictures})


def run(model, folder, dataset, peft_config=None, processing_class=None, **options):
    settings = {"max_steps": 3, "save_steps": 2, "learning_rate": 0.02, "per_device_train_batch_size": 4}
    settings |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "lr_scheduler_type": "constant"}
    args = RecAConfig(output_dir=str(folder), **{**settings, **options})
    return RecATrainer(model, args, train_dataset=dataset, peft_config=peft_config, processing_class=processing_class)


def velocity(model):
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if base.config.model_type != "sketch":
        return bagel_velocity(model)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 8, 8, generator=generator)
    batch = {"condition_pixel_values": pixels, "pixel_values": pixels, "input_ids": torch.tensor([[1, 5], [1, 6]])}
    batch["attention_mask"] = torch.ones(2, 2)
    corruption = base.sample_corruption(batch, generator)
    with torch.no_grad():
        return model.eval()(task="reconstruct", corruption=corruption, **batch).prediction


def distance(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def live(checkpoint, folder, dataset, peft_config=None, load=str, **options):
    """Train three steps, save, reload, resume, merge, and do as PEFT alone does: the same outputs everywhere."""
    trainer = run(load(checkpoint), folder / "run", dataset, peft_config, **options)
    trainer.train()
    trainer.save_model()
    expected = velocity(trainer.model)
    assert distance(velocity(AutoUnifiedModel.from_pretrained(checkpoint)), expected) > 1e-4
    assert distance(velocity(AutoUnifiedModel.from_pretrained(folder / "run")), expected) < 1e-6
    resumed = run(load(checkpoint), folder / "run", dataset, peft_config, **options)
    resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    assert torch.equal(velocity(resumed.model), expected)
    merge_adapter(None, folder / "run", folder / "merged")
    merged = AutoUnifiedModel.from_pretrained(folder / "merged")
    assert distance(velocity(merged), expected) < 1e-5
    plain = PeftModel.from_pretrained(AutoUnifiedModel.from_pretrained(checkpoint), folder / "run")
    plain = plain.merge_and_unload(safe_merge=True)
    assert distance(velocity(plain), expected) < 1e-5
    weights = plain.state_dict()
    assert all(torch.allclose(weight, weights[name], atol=1e-6) for name, weight in merged.state_dict().items())
    return trainer


# --- kinds --- of which older releases of PEFT have not all

# Of each kind the options without which it does not fit this model, or is no adapter of one of its layers.
WORKING_KINDS = {
    **{kind: {} for kind in KINDS},
    "C3A": {"block_size": 64},
    "IA3": {"feedforward_modules": ["generator.2"]},
    "LN_TUNING": {"target_modules": ["generator.2"]},
    "TRAINABLE_TOKENS": {"target_modules": ["embedding"], "token_indices": [1, 5, 6]},
    "VBLORA": {"vector_length": 64},
}
PROMPT = {"num_virtual_tokens": 4}
REFUSED_KINDS = {
    "ADALORA": ({"total_step": 3}, "has to be told of every step"),
    "ADAMSS": ({}, "has to be told of every step"),
    "ADAPTION_PROMPT": ({}, "what a language model reads before its prompt"),
    "CARTRIDGE": (PROMPT, "what a language model reads before its prompt"),
    "CPT": ({"task_type": "CAUSAL_LM"}, "what a language model reads before its prompt"),
    "FROD": ({}, "rests on a decomposition of the base's weights"),
    "LILY": ({}, "PEFT cannot merge it"),
    "MULTITASK_PROMPT_TUNING": (PROMPT, "what a language model reads before its prompt"),
    "OSF": ({}, "rests on a decomposition of the base's weights"),
    "POLY": ({}, "depends on the input, so it cannot be merged"),
    "PREFIX_TUNING": (PROMPT, "what a language model reads before its prompt"),
    "PROMPT_TUNING": (PROMPT, "what a language model reads before its prompt"),
    "PSOFT": ({}, "rests on a decomposition of the base's weights"),
    "P_TUNING": (PROMPT, "what a language model reads before its prompt"),
    "SHADOW": ({}, "a second model beside the first"),
    "XLORA": ({"hidden_size": 64, "adapters": {}}, "depends on the input, so it cannot be merged"),
}


def test_every_kind_is_decided():
    assert {kind.value for kind in PeftType} - {
        "BONE"
    } <= KINDS | REFUSED_KINDS.keys()  # that is MISS by an older name


@pytest.mark.parametrize("kind", sorted(kind for kind in WORKING_KINDS if hasattr(PeftType, kind)))
def test_kind_works_from_the_first_step_to_the_merged_model(checkpoint, tmp_path, dataset, kind):
    live(checkpoint, tmp_path, dataset, CONFIGS[PeftType(kind)](**WORKING_KINDS[kind]))


@pytest.mark.parametrize("kind", [kind for kind in REFUSED_KINDS if hasattr(PeftType, kind)])
def test_kind_is_refused_before_the_first_step(checkpoint, tmp_path, dataset, kind):
    if kind == "ADAMSS":
        pytest.importorskip("sklearn")  # its configuration cannot even be written down without
    options, why = REFUSED_KINDS[kind]
    config = CONFIGS[PeftType(kind)](**options)
    with pytest.raises(ValueError, match=rf"{type(config).__name__} \({kind}\) is not supported: .*{why}"):
        run(str(checkpoint), tmp_path, dataset, config)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PVERA", {"sample_at_inference": True}),
        ("SUPERTUNING", {"save_precomputed_indices": False}),
        ("VBLORA", {"save_only_topk_weights": True}),
    ],
)
def test_option_of_another_kind_is_refused(checkpoint, kind, options):
    if not hasattr(PeftType, kind):
        pytest.skip(f"this release of PEFT has no {kind}")
    with pytest.raises(ValueError, match=rf"Config\({next(iter(options))}=\w+\) is not supported"):
        attach(AutoUnifiedModel.from_pretrained(checkpoint), CONFIGS[PeftType(kind)](**options))


# --- options of LoRA ---

SAVES_BIASES = hasattr(BaseTuner, "_get_learnable_bias_state_dict")  # PEFT does from 0.21 on
WORKING_OPTIONS = {
    "alpha_pattern": [{"generator.2": 2}],
    "bias": ["lora_only"] if SAVES_BIASES else [],
    "exclude_modules": [["generator.0"], r"generator\.0"],
    "init_lora_weights": [False, "gaussian", "orthogonal"],
    "lora_alpha": [32],
    "lora_bias": [True],
    "lora_dropout": [0.5],
    "modules_to_save": [["embedding"]],
    "r": [2],
    "rank_pattern": [{"generator.2": 2}],
    "target_modules": [["generator.2"], r"generator\.2"],
    "target_parameters": [["generator.2.weight"]],
    "trainable_token_indices": [{"embedding": [1, 5, 6]}],
    "use_dora": [True],
    "use_rslora": [True],
}
LAYER_OPTIONS = {  # of a model that has numbered layers
    "layers_pattern": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "layers_to_transform": {"layers_to_transform": [0]},
}
WRITTEN_OPTIONS = {  # PEFT writes them itself, whatever is given
    "auto_mapping": {"base_model_class": "Other"},
    "peft_type": "LOHA",
    "peft_version": "0.1",
}


def option(name, **options):
    """The value of an option of that class, in the releases of PEFT that have it."""
    return getattr(lora, name)(**options) if hasattr(lora, name) else None


REFUSED_OPTIONS = {
    "alora_invocation_tokens": ([1], "depends on the prompt"),
    "arrow_config": (lora.ArrowConfig(), "depends on the input"),
    "base_model_name_or_path": ("elsewhere", "is not the model's"),
    "corda_config": (lora.CordaConfig(), "changes the base's own weights"),
    "ensure_weight_tying": (True, "no generator ties its weights"),
    "eva_config": (lora.EvaConfig(), "needs a pass over the data"),
    "fan_in_fan_out": (True, "no generator stores its weights transposed"),
    "inference_mode": (True, "nothing would be trained"),
    "kasa_config": (option("KasaConfig"), "changes the base's own weights"),
    "layer_replication": ([(0, 1), (0, 2)], "more layers"),
    "loftq_config": ({"loftq_bits": 4}, "changes the base's own weights"),
    "lora_ga_config": (option("LoraGAConfig"), "changes the base's own weights"),
    "megatron_config": ({"a": 1}, "Megatron"),
    "megatron_core": ("other", "Megatron"),
    "monteclora_config": (option("MontecloraConfig"), "term of its own in the loss"),
    "qalora_group_size": (8, "GPTQ"),
    "revision": ("v2", "is not the model's"),
    "runtime_config": (lora.LoraRuntimeConfig(ephemeral_gpu_offload=True), "file does not hold it"),
    "use_bdlora": (option("BdLoraConfig"), "serving on several GPUs"),
    "use_qalora": (True, "GPTQ"),
    "velora_config": (option("VeloraConfig"), "not those of the loss"),
}


OPTIONS = {field.name for field in dataclasses.fields(LoraConfig)}


def test_every_option_is_decided():
    decided = [*WORKING_OPTIONS, *LAYER_OPTIONS, *WRITTEN_OPTIONS, *REFUSED_OPTIONS, "task_type"]
    assert len(decided) == len(set(decided)) and set(decided) >= OPTIONS


@pytest.mark.parametrize(
    ("option", "value"),
    [(name, value) for name, values in WORKING_OPTIONS.items() for value in values if name in OPTIONS],
)
def test_option_works_from_the_first_step_to_the_merged_model(checkpoint, tmp_path, dataset, option, value):
    trainer = live(checkpoint, tmp_path, dataset, LoraConfig(**{option: value}))
    torch.manual_seed(trainer.args.seed)
    default = attach(AutoUnifiedModel.from_pretrained(checkpoint), LoraConfig())
    assert describe_layers(trainer.model) != describe_layers(default)


def describe_layers(model):
    """What an option of LoRA can change of an adapter: its weights, how they start and how they are applied."""
    modules = dict(model.named_modules())
    weights = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    scaling = {name: module.scaling for name, module in modules.items() if isinstance(module, LoraLayer)}
    dropout = [name for name, module in modules.items() if isinstance(module, torch.nn.Dropout)]
    return weights, scaling, dropout, str(model.active_peft_config.init_lora_weights)


@pytest.mark.parametrize("option", LAYER_OPTIONS)
def test_option_about_layers_works_from_the_first_step_to_the_merged_model(tmp_path, dataset, option):
    trainer = live(BAGEL, tmp_path, dataset, LoraConfig(**LAYER_OPTIONS[option]), processing_class=bagel_processor())
    layer = LAYER_OPTIONS[option]["layers_to_transform"][0]
    adapted = {name for name, _ in trainer.model.named_parameters() if ".lora_A." in name}
    assert len(adapted) == 7 and all(f".layers.{layer}." in name for name in adapted)


@pytest.mark.parametrize("option", WRITTEN_OPTIONS)
def test_option_that_peft_writes_is_what_peft_writes(checkpoint, tmp_path, option):
    for name, options in (("given", {option: WRITTEN_OPTIONS[option]}), ("left", {})):
        model = attach(AutoUnifiedModel.from_pretrained(checkpoint), LoraConfig(**options))
        model.save_pretrained(tmp_path / name)
    given, left = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("given", "left"))
    assert given == left


def test_task_type_makes_no_difference(checkpoint):
    outputs = []
    for task_type in (None, "CAUSAL_LM"):
        torch.manual_seed(0)
        config = LoraConfig(init_lora_weights=False, task_type=task_type)
        outputs.append(velocity(attach(AutoUnifiedModel.from_pretrained(checkpoint), config)))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("option", [name for name in REFUSED_OPTIONS if name in OPTIONS])
def test_option_is_refused_before_the_first_step(checkpoint, tmp_path, dataset, option):
    value, why = REFUSED_OPTIONS[option]
    start = {"init_lora_weights": "loftq"} if option == "loftq_config" else {}
    with pytest.raises(ValueError, match=rf"{'init_lora_weights' if start else option}=.*{why}"):
        run(str(checkpoint), tmp_path, dataset, LoraConfig(**start, **{option: value}))


STARTS = {"corda": "changes", "eva": "needs a pass", "lora_ga": "changes", "mica": "rests on", "olora": "changes"}
STARTS |= {"pissa": "changes", "pissa_niter_4": "changes"}


@pytest.mark.parametrize("start", STARTS)
def test_start_that_is_not_in_the_file_is_refused(checkpoint, tmp_path, dataset, start):
    config = LoraConfig(init_lora_weights=start)
    with pytest.raises(
        ValueError, match=rf"LoraConfig\(init_lora_weights='{start}'\) is not supported: it {STARTS[start]}"
    ):
        run(str(checkpoint), tmp_path, dataset, config)


def test_kinds_and_starts_are_refused_wherever_an_adapter_is_from(checkpoint, tmp_path, dataset):
    model = get_peft_model(
        AutoUnifiedModel.from_pretrained(checkpoint),
        LoraConfig(target_modules=["generator.2"], init_lora_weights="pissa"),
    )
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        run(model, tmp_path / "run", dataset)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        merge_adapter(str(checkpoint), tmp_path / "adapter", tmp_path / "merged")


def test_changed_base_is_refused_whatever_changes_it(checkpoint, monkeypatch):
    monkeypatch.setattr("reca_trainer.adapters.LORA_INITIALISATIONS", ("olora",))
    with pytest.raises(
        ValueError, match=r"changes the base's own weights.*generator\.0\.weight, generator\.2\.weight"
    ):
        attach(AutoUnifiedModel.from_pretrained(checkpoint), LoraConfig(init_lora_weights="olora"))


# --- names that match nothing ---


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["generator.2", "foo"]},
        {"exclude_modules": ["generator.0", "foo"]},
        {"exclude_modules": "foo"},
        {"modules_to_save": ["foo"]},
        {"modules_to_save": ["embedding", "foo"]},
        {"target_parameters": ["generator.2.weight", "foo.weight"]},
        {"trainable_token_indices": {"foo": [1]}},
        {"rank_pattern": {"foo": 2}},
        {"alpha_pattern": {"generator.2": 2, "foo": 2}},
    ],
    ids=str,
)
def test_name_that_matches_nothing_is_refused(checkpoint, options):
    with pytest.raises(ValueError, match="foo"):
        attach(AutoUnifiedModel.from_pretrained(checkpoint), LoraConfig(**options))


@pytest.mark.parametrize("targets", [None, ["q_proj_moe_gen"]])
def test_layer_that_is_not_there_is_refused(targets):
    with pytest.raises(ValueError, match=r"layers_to_transform=\[9\] names no"):
        attach(AutoUnifiedModel.from_pretrained(BAGEL), LoraConfig(target_modules=targets, layers_to_transform=[1, 9]))


@pytest.mark.skipif(SAVES_BIASES, reason="this release of PEFT saves them")
def test_biases_that_would_not_be_saved_are_refused(checkpoint):
    with pytest.raises(ValueError, match=r"generator\.0\.base_layer\.bias.* does not save them"):
        attach(AutoUnifiedModel.from_pretrained(checkpoint), LoraConfig(bias="lora_only"))


def test_biases_outside_the_generator_are_refused(checkpoint, tmp_path, dataset):
    with pytest.raises(ValueError, match=r"outside of it would be trained too: encoder\.bias"):
        run(str(checkpoint), tmp_path, dataset, LoraConfig(bias="all"))


# --- several adapters ---


def two_adapters(checkpoint):
    torch.manual_seed(0)
    base = AutoUnifiedModel.from_pretrained(checkpoint)
    model = get_peft_model(base, LoraConfig(target_modules=["generator.0"]), adapter_name="one")
    model.add_adapter("two", LoraConfig(target_modules=["generator.2"], r=4))
    model.set_adapter("two")
    return prepare(model)


def test_the_active_one_of_two_adapters_is_saved_found_resumed_and_merged(checkpoint, tmp_path, dataset):
    trainer = live(checkpoint, tmp_path, dataset, load=two_adapters)
    assert all("generator.2" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    assert not [path for path in (tmp_path / "run").iterdir() if path.name in ("one", "two")]


def test_several_active_adapters_are_refused(checkpoint, tmp_path, dataset):
    model = two_adapters(checkpoint)
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match=r"2 adapters are active \(one, two\), and a run trains one"):
        run(model, tmp_path, dataset)


# --- a model with layers ---


def bagel_processor():
    return AutoUnifiedProcessor.from_pretrained(BAGEL, generation_size=(64, 32, 16), condition_size=(42, 42, 14))


@pytest.mark.parametrize("kind", ["LOKR", "OFT", "VERA"])
def test_kind_works_on_bagel(tmp_path, dataset, kind):
    live(BAGEL, tmp_path, dataset, CONFIGS[PeftType(kind)](), processing_class=bagel_processor())
    assert describe(tmp_path / "run")["layers"].startswith("14: mlp_moe_gen.down_proj, ")


def test_reentrant_checkpoints_give_the_same_gradients(tmp_path, dataset):
    weights = []
    for name, reentrant in (("plain", None), ("reentrant", True)):
        options = {"activation_checkpointing": reentrant is not None, "save_strategy": "no"}
        if reentrant:
            options["activation_checkpointing_kwargs"] = {"use_reentrant": True}
        trainer = run(str(BAGEL), tmp_path / name, dataset, LoraConfig(), bagel_processor(), **options)
        trainer.train()
        weights.append({key: p for key, p in trainer.model.named_parameters() if p.requires_grad})
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], atol=1e-6), name
