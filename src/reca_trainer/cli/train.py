"""`reca-trainer train`, and what all recipes share: one run from arguments to saved weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from reca_trainer import adapters, toy
from reca_trainer.config import RecAConfig
from reca_trainer.data.task_datasets import load_named
from reca_trainer.models.auto import AutoUnifiedModel
from reca_trainer.models.contract import UnifiedModel, UnifiedProcessor
from reca_trainer.recipes import over_base, recipe_file
from reca_trainer.tasks import TASKS
from reca_trainer.toy.score import Score, table
from reca_trainer.toy.score import score as quick_score
from reca_trainer.trainer import RecATrainer


@dataclass
class ModelArguments(ModelConfig):
    """TRL's `ModelConfig`, whose dtype by default is what fits what is trained."""

    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Data type of the weights. Default: float32 for weights that are trained, and with --bf16 bfloat16 for "
            "what is frozen."
        },
    )
    llm_int8_skip_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Layers that stay unquantised with --load_in_4bit or --load_in_8bit, by their names, the ends of them or "
            "regular expressions, such as 'mlp_moe_gen.down_proj' or '.*layers.(0|27)'. `reca-trainer plan` says what they "
            "take."
        },
    )


class RecipeParser(TrlParser):
    """TRL's parser, for files that may have a `base`."""

    def set_defaults_with_config(self, **options: Any) -> list[str]:
        return super().set_defaults_with_config(**over_base(options))


def check_model_arguments(model_args: ModelArguments, args: RecAConfig) -> None:
    """Raises `ValueError` for options that would be ignored."""
    defaults = {option.name: option.default for option in fields(ModelArguments)}
    changed = [name for name, default in defaults.items() if getattr(model_args, name) != default]
    of_adapter = [name for name in changed if name.startswith("lora_") or name in ("use_rslora", "use_dora")]
    if of_adapter and not model_args.use_peft:
        raise ValueError(f"--{of_adapter[0]} is about an adapter: add --use_peft, or leave it out.")
    of_quantization = [name for name in changed if name.startswith(("bnb_", "use_bnb_"))]
    if of_quantization and not model_args.load_in_4bit:
        raise ValueError(f"--{of_quantization[0]} is about a 4-bit base: add --load_in_4bit, or leave it out.")
    if model_args.llm_int8_skip_modules and not (model_args.load_in_4bit or model_args.load_in_8bit):
        raise ValueError("--llm_int8_skip_modules is about a quantised base: add --load_in_4bit, or leave it out.")
    of_loading = [name for name in ("dtype", "attn_implementation", "model_revision") if name in changed]
    of_loading += ["model_init_kwargs"] if args.model_init_kwargs else []
    if of_loading and model_args.model_name_or_path is None:
        raise ValueError(f"--{of_loading[0]} is about loading a model: add --model_name_or_path, or leave it out.")
    if "model_revision" in changed and Path(model_args.model_name_or_path or "").is_dir():
        raise ValueError(f"--model_revision is about a model on the Hub, and {model_args.model_name_or_path} is a folder.")
    if "trust_remote_code" in changed:
        raise ValueError("--trust_remote_code would change nothing: code in a model's folder is never run. Leave it out.")
    if "lora_task_type" in changed:
        raise ValueError("--lora_task_type would change nothing: the model keeps its own forward. Leave it out.")


def read_arguments(argv: Sequence[str] | None, tiny_recipe: str, *others: type) -> tuple[Any, ...]:
    """A `RecAConfig`, the `ModelArguments` and those of `others` from the command line; `tiny_recipe` is read where it has
    neither a model nor a `--config`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not {"--model_name_or_path", "--config"} & {word.partition("=")[0] for word in argv}:
        argv = ["--config", tiny_recipe, *argv]
    parser = RecipeParser((RecAConfig, ModelArguments, *others))
    args, model_args, *rest = parser.parse_args_and_config(_with_recipe_file(argv))
    check_model_arguments(model_args, args)
    return args, model_args, *rest


def loading_arguments(model_args: ModelArguments, args: RecAConfig) -> dict[str, Any]:
    """The arguments of `from_pretrained` for the model that is named."""
    init = {name: getattr(model_args, name) for name in ("dtype", "attn_implementation")}
    init = {name: value for name, value in init.items() if value is not None}
    return {"revision": model_args.model_revision, **init, **(args.model_init_kwargs or {})}


def run(
    tiny: Callable[[], tuple[UnifiedModel, UnifiedProcessor]],
    tiny_recipe: str,
    argv: Sequence[str] | None = None,
    score: Callable[[UnifiedModel, UnifiedProcessor], dict[str, Score]] | None = None,
) -> RecATrainer:
    """Train from the command line.

    The options are those of `RecAConfig` and of TRL's `ModelConfig` (`--model_name_or_path`, `--use_peft`, `--lora_r`,
    `--load_in_4bit`, …); `--config` names a packaged recipe or a YAML file with
    defaults for them.

    Args:
        tiny: makes the model and processor to train where no `--model_name_or_path` is given.
        tiny_recipe: the name of that run's recipe, used where neither a model nor a `--config` is given.
        score: measures that run's model before and after, unless it is given other images; the table is printed and
            written to `score.md`.
    """
    args, model_args = read_arguments(argv, tiny_recipe)

    dataset, eval_dataset, processor, before = None, None, None, None
    quantization = get_quantization_config(model_args)
    if quantization is not None:
        quantization.llm_int8_skip_modules = model_args.llm_int8_skip_modules
    if model_args.model_name_or_path is None:
        model, processor = tiny()
        dataset = toy.dataset("train", 4000, seed=1)
        if args.dataset_name is None:
            eval_dataset = toy.dataset("validation", 32, seed=1)
            if score is not None and PartialState().is_main_process:
                before = score(model, processor)
        else:  # the model's own scenes have the captions that the other terms need
            dataset = dict.fromkeys(TASKS, dataset) | {"reconstruct": load_named(args.dataset_name, args)}
        if quantization is not None:
            model = model.name_or_path  # a model is quantised while it is loaded
    else:
        model = model_args.model_name_or_path
        args.model_init_kwargs = loading_arguments(model_args, args)

    judge = None
    if eval_dataset is not None and args.preview_steps:
        args.preview_prompts = args.preview_prompts or toy.prompts()
        judge = toy.judge
    trainer = RecATrainer(
        model,
        args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=get_peft_config(model_args),
        quantization_config=quantization,
        judge=judge,
    )
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model()
    trainer.save_state()
    if before is not None:
        # What was saved, and not the model at hand: other processes may hold parts of that, and do not score.
        options = {"dtype": adapters.unwrap(trainer.model).dtype, "quantization_config": quantization}
        saved = AutoUnifiedModel.from_pretrained(args.output_dir, **options)
        rows = table(before=before, after=score(saved.eval(), processor))
        (Path(args.output_dir) / "score.md").write_text(f"{rows}\n")
        print(rows)
    trainer.create_model_card()
    if args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        print(f"Saved to {Path(args.output_dir).resolve()}")
    return trainer


def main(argv: Sequence[str] | None = None) -> None:
    """`reca-trainer train`: the run of `--config` on `--model_name_or_path`, or without either the embedded default."""
    run(toy.load, "bagel_lora_tiny", argv, score=partial(quick_score, quick=True, sampling=toy.SAMPLING))


def _with_recipe_file(argv: list[str]) -> list[str]:
    """`--config NAME` and `--config=NAME` with the recipe's path, as `TrlParser` reads it."""
    words = list(argv)
    for place, word in enumerate(argv):
        if word.startswith("--config="):
            words[place : place + 1] = ["--config", word.removeprefix("--config=")]
    if "--config" in words[:-1]:
        value = words.index("--config") + 1
        words[value] = str(recipe_file(words[value]))
    return words
