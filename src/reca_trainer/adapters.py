"""LoRA on a generator: which layers, in which precision, and the check that it is those and no others."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from transformers import BitsAndBytesConfig

from reca_trainer.models.contract import UnifiedModel
from reca_trainer.models.weights import CheckpointError

QUANTIZATION_FILE = "quantization_config.json"  # beside an adapter: how the base it was trained on was quantised


# Kinds of adapter that work from the first step to the merged model. Whoever adds one adds it to the tests.
KINDS = {
    "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING",
    "LOHA", "LOKR", "LORA", "MISS", "OFT", "PEANUT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING",
    "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT",
}  # fmt: skip
WHOLE_TARGETS = ("LN_TUNING", "TRAINABLE_TOKENS")  # they adapt no linear layers, which are the default

LEARNT_PROMPTS = "it learns what a language model reads before its prompt, and RecA trains the layers of a generator"
SCHEDULED = "it has to be told of every step, and without that it never adapts"
ROUTED = "what it adds depends on the input, so it cannot be merged"
CHANGES_BASE = "it changes the base's own weights at the start, and its file does not hold that"
DECOMPOSES_BASE = "it rests on a decomposition of the base's weights, and its file does not hold all of that"
MEGATRON = "no generator is made of Megatron's layers"
REFUSED_KINDS = {
    **dict.fromkeys(("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"), LEARNT_PROMPTS),
    **dict.fromkeys(("CPT", "CARTRIDGE", "ADAPTION_PROMPT"), LEARNT_PROMPTS),
    **dict.fromkeys(("ADALORA", "ADAMSS"), SCHEDULED),
    **dict.fromkeys(("POLY", "XLORA"), ROUTED),
    **dict.fromkeys(("FROD", "OSF", "PSOFT"), DECOMPOSES_BASE),
    "LILY": "PEFT cannot merge it",
    "SHADOW": "it is a second model beside the first, so it cannot be merged",
}

# Options of LoRA that work with every value. Whoever adds one adds it to the tests.
LORA_OPTIONS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "modules_to_save",
    "peft_type", "peft_version", "r", "rank_pattern", "revision", "target_modules", "target_parameters",
    "task_type", "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip
LORA_INITIALISATIONS = (True, False, "gaussian", "orthogonal")
LORA_STARTS = {
    "eva": "it needs a pass over the data before the first step, and without that it never adapts",
    "mica": DECOMPOSES_BASE,
}
REFUSED_LORA_OPTIONS = {
    "alora_invocation_tokens": "what it adapts depends on the prompt, so it cannot be merged",
    "arrow_config": ROUTED,
    "corda_config": CHANGES_BASE,
    "ensure_weight_tying": "no generator ties its weights",
    "eva_config": LORA_STARTS["eva"],
    "fan_in_fan_out": "no generator stores its weights transposed",
    "kasa_config": CHANGES_BASE,
    "layer_replication": "it gives the base more layers, and its file does not hold them",
    "loftq_config": CHANGES_BASE,
    "lora_ga_config": CHANGES_BASE,
    "megatron_config": MEGATRON,
    "megatron_core": MEGATRON,
    "monteclora_config": "it needs a term of its own in the loss",
    "qalora_group_size": "it needs a base quantised by GPTQ",
    "runtime_config": "an adapter's file does not hold it",
    "use_bdlora": "it lays weights out for serving on several GPUs",
    "use_qalora": "it needs a base quantised by GPTQ",
    "velora_config": "its gradients are not those of the loss",
}
# Values of other kinds' options.
REFUSED_VALUES: dict[tuple[str, str], dict[Any, str]] = {
    ("PVERA", "sample_at_inference"): {True: "what it adds is drawn at random, so it cannot be merged"},
    ("SUPERTUNING", "save_precomputed_indices"): {False: DECOMPOSES_BASE},
    ("VBLORA", "save_only_topk_weights"): {True: "what it saves cannot be trained further"},
}
PATTERNS = ("rank_pattern", "alpha_pattern", "block_size_pattern", "n_frequency_pattern", "lambda_pattern")
UNTRIED = "whether it survives saving, resuming and merging has not been tried"


def check_kind(peft_config: PeftConfig) -> None:
    """Make sure that an adapter works from the first step to the merged model.

    Raises:
        ValueError: its kind or one of its options does not; the message names it and says why.
    """
    config: Any = peft_config
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in KINDS:
        why = REFUSED_KINDS.get(kind, UNTRIED)
        raise ValueError(f"{type(config).__name__} ({kind}) is not supported: {why}. Use LoraConfig.")
    for option in dataclasses.fields(config):
        value, why = getattr(config, option.name), ""
        if kind == "LORA" and option.name == "init_lora_weights":
            why = "" if value in LORA_INITIALISATIONS else LORA_STARTS.get(value, CHANGES_BASE)
        elif kind == "LORA" and option.name not in LORA_OPTIONS and value != _default(option):
            why = REFUSED_LORA_OPTIONS.get(option.name, UNTRIED)
        elif value in REFUSED_VALUES.get((kind, option.name), ()):
            why = REFUSED_VALUES[kind, option.name][value]
        if why:
            raise ValueError(f"{type(config).__name__}({option.name}={value!r}) is not supported: {why}.")


def _default(option: dataclasses.Field[Any]) -> Any:
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


def attach(model: UnifiedModel, peft_config: PeftConfig) -> PeftModel:
    """Put a new adapter on `model`'s generator.

    Where `peft_config` leaves `target_modules` open, they become `model.lora_target_modules`; `layers_to_transform` then
    picks layers among those. `task_type` is about language models, and makes no difference. Trainable weights are float32
    whatever the base is in: bfloat16 masters lose updates of about 1e-4.

    `modules_to_save` is left as it is, so that by default nothing but the adapter is trained. Training BAGEL's `vae2llm`,
    `llm2vae` and `time_embedder` in full beside it brought nothing on the embedded default: after 200 steps the held-out
    reconstruction loss was 0.344 with and 0.337 without them at a learning rate of 1e-3, and 0.398 and 0.399 at 1e-4
    (`benchmarks/adapters.py modules`); and PEFT does not combine adapters that have such modules.

    Raises:
        ValueError: an adapter of this kind, or one of its options, does not work through to the merged model; a name
            matches nothing, and the message says what could have; or `base_model_name_or_path` or `revision` is not the
            model's.
    """
    check_kind(peft_config)
    config: Any = copy.deepcopy(peft_config)  # every PEFT method has fields of its own
    if config.inference_mode:
        raise ValueError(f"{type(config).__name__}(inference_mode=True) is not supported: nothing would be trained.")
    config.task_type = None  # PEFT's task classes expect a language model's forward
    config.peft_version = PeftConfig().peft_version
    layers = getattr(config, "layers_to_transform", None)
    if getattr(config, "target_modules", None) is None:
        if config.peft_type in WHOLE_TARGETS:
            raise ValueError(
                f"{type(config).__name__} needs target_modules: the modules of the generator that it trains."
            )
        config.target_modules = model.lora_target_modules
        if getattr(config, "target_parameters", None):
            config.target_modules = set()
        elif layers is not None:  # PEFT takes it for lists of names only
            config.target_modules = set(_targets_in_layers(model, config))
            config.layers_to_transform = config.layers_pattern = None
    origin = {"base_model_name_or_path": model.name_or_path, "revision": getattr(model.config, "_commit_hash", None)}
    for name, value in origin.items():
        given = getattr(config, name)
        if given not in (None, value):
            raise ValueError(
                f"{name}={given!r} is not the model's, which is {value!r}. Leave it out: the model says it."
            )
        setattr(config, name, value or None)
    _check_names(model, config)
    before = _samples(model)
    try:
        peft_model = get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(
            f"target_modules={config.target_modules!r}: {error} The generator's linear layers are "
            f"{_some(_generator_linears(model))}."
        ) from error
    after = _samples(model)
    if changed := [name for name, values in before.items() if not _same(values, after[name])]:
        raise ValueError(
            f"{type(config).__name__} is not supported with these options: {CHANGES_BASE} ({_some(changed)})."
        )
    biases = [
        name for name, p in peft_model.named_parameters() if p.requires_grad and name.endswith(".base_layer.bias")
    ]
    if biases and set(biases) - get_peft_model_state_dict(peft_model, save_embedding_layers=False).keys():
        raise ValueError(
            f"This release of PEFT trains biases ({_some(biases)}) and does not save them: upgrade PEFT to 0.21."
        )
    targets = peft_model.targeted_module_names + peft_model.base_model.targeted_parameter_names
    for name in PATTERNS:
        for pattern in getattr(config, name, None) or ():
            if not any(re.fullmatch(rf"(.*\.)?({pattern})", target) for target in targets):
                raise ValueError(f"{name} has {pattern!r}, which is none of the adapted layers: {_some(targets)}.")
    layers = [] if layers is None else [layers] if isinstance(layers, int) else layers
    if absent := [layer for layer in layers if not any(f".{layer}." in target for target in targets)]:
        raise ValueError(f"layers_to_transform={absent} names no adapted layer; these are: {_some(targets)}.")
    return _in_float32(prepare(peft_model))


def _check_names(model: UnifiedModel, peft_config: Any) -> None:
    """PEFT is content with one match among several names."""
    modules = [name for name, _ in model.named_modules()]
    names = {
        "target_modules": modules,
        "exclude_modules": modules,
        "feedforward_modules": modules,
        "target_parameters": [name for name, _ in model.named_parameters()],
        "modules_to_save": modules,
        "trainable_token_indices": modules,
    }
    for option in names:
        entries = getattr(peft_config, option, None)
        if isinstance(entries, str):
            if option == "target_modules" or any(re.fullmatch(entries, name) for name in modules):
                continue
            entries = [entries]
        elif option == "trainable_token_indices" and isinstance(entries, list):  # of the input embeddings
            continue
        for entry in entries or ():
            # PEFT takes any ending for `modules_to_save`, and for the others whole names between dots.
            end = entry if option == "modules_to_save" else f".{entry}"
            if not any(name == entry or name.endswith(end) for name in names[option]):
                raise ValueError(
                    f"{option} has {entry!r}, which the model has not. The generator is {_some(model.generation_modules)}; "
                    f"its linear layers are {_some(_generator_linears(model))}."
                )


def _samples(model: nn.Module, count: int = 64) -> dict[str, torch.Tensor]:
    """Some values of every weight, by its name in the base; those of an earlier adapter, which PEFT overwrites, left out."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    parts = [getattr(layer, name, None) for layer in layers for name in layer.adapter_layer_names]
    of_adapter = {id(weight) for part in parts if isinstance(part, nn.Module) for weight in part.parameters()}
    return {
        name_in_base(name): weight.detach().reshape(-1)[:: max(1, weight.numel() // count)].cpu().clone()
        for name, weight in model.named_parameters()
        if not weight.is_meta and id(weight) not in of_adapter
    }


def _same(values: torch.Tensor, others: torch.Tensor) -> bool:
    if not values.is_floating_point():
        return torch.equal(values, others)
    return bool(torch.allclose(values, others, rtol=0, atol=0, equal_nan=True))


def name_in_base(name: str) -> str:
    """The name that a module or parameter of an adapted model had before PEFT wrapped it."""
    return re.sub(r"\.(base_layer|token_adapter|original_module)(?=\.|$)", "", name.removeprefix("base_model.model."))


def base_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a model under the names they have without an adapter, and without the adapter's own."""
    parts = {
        name: {*module.adapter_layer_names, *module.other_param_names}
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }

    def is_of_adapter(name: str) -> bool:
        words = name.split(".")
        of_layer = (words[depth] in parts.get(".".join(words[:depth]), ()) for depth in range(1, len(words)))
        return "modules_to_save" in words or any(of_layer)

    return {name_in_base(name): weight for name, weight in model.state_dict().items() if not is_of_adapter(name)}


def load_adapter(model: UnifiedModel, folder: str | os.PathLike[str], is_trainable: bool = False) -> PeftModel:
    """Put the adapter saved in `folder` on `model`. Further ones are loaded, weighted and switched with PEFT's own
    `load_adapter`, `add_weighted_adapter` and `set_adapter`.

    Raises:
        CheckpointError: `folder` has no safetensors, or was trained on another model or another revision of it.
    """
    folder = Path(folder)
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        raise CheckpointError(
            f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}"
            + (
                f"; {', '.join(others)} is a pickle, which can run code when it is read, and is refused."
                if others
                else "."
            )
        )
    config = PeftConfig.from_pretrained(str(folder))
    commit = getattr(model.config, "_commit_hash", None)
    if (
        config.revision
        and commit
        and config.revision != commit
        and config.base_model_name_or_path == model.name_or_path
    ):
        raise CheckpointError(
            f"The adapter in {folder} was trained on revision {config.revision} of {model.name_or_path}, and the model "
            f"given is revision {commit}. Load the former: AutoUnifiedModel.from_pretrained({str(folder)!r})."
        )
    misfit = f"The adapter in {folder} does not fit {model.name_or_path or type(model).__name__}: "
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
            stored = set(file.keys())
        peft_model = PeftModel.from_pretrained(model, folder, is_trainable=is_trainable)
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(misfit + str(error)) from error
    expected = set(get_peft_model_state_dict(peft_model, save_embedding_layers=False))
    if stored != expected:
        raise CheckpointError(
            misfit + f"it lacks {_some(expected - stored)}, and has {_some(stored - expected)} besides."
        )
    if is_trainable:
        peft_model = _in_float32(prepare(peft_model))
        set_peft_model_state_dict(peft_model, load_file(folder / SAFETENSORS_WEIGHTS_NAME))  # again, now unrounded
    return peft_model


def _in_float32(model: PeftModel) -> PeftModel:
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model


def prepare(model: PeftModel) -> PeftModel:
    """Make an adapted model save, and train with checkpointed activations, as a run needs it. A second call changes nothing.

    `save_pretrained` then writes the active adapter to the folder itself, whatever its name, with how its base is
    quantised; `selected_adapters` chooses others, which PEFT puts in folders of their names.
    """
    # Embeddings are never resized here; left to decide that itself, PEFT asks the Hub for the base's config.
    save = functools.partial(type(model).save_pretrained, model, save_embedding_layers=False)

    def save_pretrained(save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        folder, active = Path(save_directory), model.active_adapter
        is_writer = kwargs.get("is_main_process", True)
        selected = kwargs.pop("selected_adapters", None) or [active]
        save(str(folder), selected_adapters=selected, **kwargs)
        if selected == [active] and active != "default" and is_writer:
            for path in (folder / active).iterdir():
                path.replace(folder / path.name)
            (folder / active).rmdir()
        base = unwrap(model)
        quantization = getattr(base.config, "quantization_config", None)
        if quantization is not None and is_writer:
            settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
            settings = {**settings, "dtype": str(base.config.dtype or base.dtype).removeprefix("torch.")}
            (folder / QUANTIZATION_FILE).write_text(json.dumps(settings, indent=2) + "\n")

    def activation_checkpointing_enable(activation_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        base = unwrap(model)
        base.activation_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)
        if not (activation_checkpointing_kwargs or {}).get("use_reentrant"):
            return
        layer: Any
        for layer in base.modules():
            if getattr(layer, "gradient_checkpointing", False):
                layer._gradient_checkpointing_func = functools.partial(_anchored, layer._gradient_checkpointing_func)

    def gradient_checkpointing_enable(gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        # Its name in transformers before 5.23.
        activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    vars(model).update(
        save_pretrained=save_pretrained,
        create_or_update_model_card=lambda output_dir: None,  # PEFT's card shows the base's path
        activation_checkpointing_enable=activation_checkpointing_enable,
        gradient_checkpointing_enable=gradient_checkpointing_enable,
    )
    return model


def _anchored(checkpoint: Callable[..., Any], layer: Callable[..., Any], *inputs: Any) -> Any:
    """Call a reentrant `checkpoint` with a further input, a 0 that requires a gradient and is added to all outputs. Such a
    checkpoint passes gradients on only where one of its inputs requires one, and the inputs of a generator's layers come
    from frozen weights. It finds tensors among its arguments, but not in tuples or keywords; so those are flattened."""
    call = functools.partial(layer, *inputs)
    leaves, structure = tree_flatten((call.args, call.keywords))

    def anchored(anchor: torch.Tensor, *leaves: Any) -> Any:
        inputs, keywords = tree_unflatten(leaves, structure)
        return tree_map_only(torch.Tensor, lambda output: output + anchor.to(output), call.func(*inputs, **keywords))

    return checkpoint(anchored, torch.zeros((), requires_grad=True), *leaves)


def _generator_linears(model: UnifiedModel) -> list[str]:
    return [name for name, _ in model.named_modules() if re.fullmatch(model.lora_target_modules, name)]


def _targets_in_layers(model: UnifiedModel, peft_config: Any) -> list[str]:
    layers = peft_config.layers_to_transform
    layers = {layers} if isinstance(layers, int) else set(layers)
    pattern = rf"(?:^|\.){peft_config.layers_pattern or r'[^.]*'}\.(\d+)\."
    indices = {name: re.search(pattern, name) for name in _generator_linears(model)}
    known = {int(match[1]) for match in indices.values() if match}
    if layers - known:
        absent = sorted(layers - known)
        raise ValueError(f"layers_to_transform={absent} names no layer of the generator; it has {sorted(known)}.")
    return [name for name, match in indices.items() if match and int(match[1]) in layers]


def _some(names: Any, count: int = 5) -> str:
    names = sorted(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if names[count:] else "") or "nothing"


def unwrap(model: nn.Module) -> UnifiedModel:
    """The family's model behind a `PeftModel`, or `model` itself."""
    return cast(UnifiedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def freeze(model: nn.Module, names: Sequence[str]) -> None:
    """Freeze parts of what a run would train.

    Args:
        names: names of modules or parameters of the model without an adapter, whole or up to a dot. `transformer` stands for
            all weights in it and the adapters of its layers.

    Raises:
        ValueError: no weight that would be trained has such a name, or nothing is left to train.
    """
    trained = {name_in_base(name): p for name, p in model.named_parameters() if p.requires_grad}
    for entry in names:
        chosen = [name for name in trained if name == entry or name.startswith(f"{entry}.")]
        if not chosen:
            parts = {".".join(name.split(".")[:2]) for name in trained}
            raise ValueError(
                f"freeze_modules has {entry!r}, and nothing of that name is trained. What is trained begins with "
                f"{_some(parts, 10)}."
            )
        for name in chosen:
            trained[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in trained.values()):
        raise ValueError(f"freeze_modules={list(names)} leaves nothing to train; leave some of it out.")


def check_trainable(model: nn.Module) -> tuple[int, int]:
    """Make sure that a run trains the generator and only it.

    Returns:
        Number of trainable parameters and of all parameters.

    Raises:
        ValueError: nothing is trainable, or something outside the generator is; the message names it. Or several
            adapters are active, or the active one does not work through to the merged model.
    """
    base = unwrap(model)
    if isinstance(model, PeftModel):
        if len(model.active_adapters) != 1:
            raise ValueError(
                f"{len(model.active_adapters)} adapters are active ({_some(model.active_adapters)}), and a run trains one. "
                "Choose it: model.set_adapter(name)."
            )
        check_kind(model.active_peft_config)
    trainable = [
        (name.removeprefix("base_model.model."), p) for name, p in model.named_parameters() if p.requires_grad
    ]
    if not trainable:
        raise ValueError(
            "Nothing would be trained: no parameter requires a gradient. Give a peft_config whose target_modules match "
            f"the generator ({base.lora_target_modules!r} does), or no peft_config to train all of it."
        )
    generator = tuple(f"{name}." for name in base.generation_modules)
    if wrong := {name for name, _ in trainable if not f"{name}.".startswith(generator)}:
        raise ValueError(
            f"RecA trains the generator, but {len(wrong)} weights outside of it would be trained too: {_some(wrong)}. "
            f"Use target_modules={base.lora_target_modules!r}."
        )
    return sum(p.numel() for _, p in trainable), sum(p.numel() for p in model.parameters())


def read_quantization(adapter: Path) -> tuple[BitsAndBytesConfig | None, torch.dtype | None]:
    """How the base of an adapter was quantised in training, and what dtype it had before; `None` if it was not."""
    path = adapter / QUANTIZATION_FILE
    if not path.is_file():
        return None, None
    settings = json.loads(path.read_text())
    dtype = getattr(torch, settings.pop("dtype", "float32"))
    return BitsAndBytesConfig.from_dict(settings), dtype
