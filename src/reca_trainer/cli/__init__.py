"""The console script `reca-trainer`: one module a command, imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence

# Functions (by default `main`) that take `argv` and read the command's own arguments.
COMMANDS = {
    "train": ("reca_trainer.cli.train", "train: a packaged recipe, your own, or the embedded default"),
    "recipes": ("reca_trainer.cli.recipes:list_recipes", "list the settings that come with the package"),
    "init": ("reca_trainer.cli.recipes:init", "write a packaged recipe to edit"),
    "generate": ("reca_trainer.cli.pictures:generate", "make pictures from prompts"),
    "reconstruct": ("reca_trainer.cli.pictures:reconstruct", "make pictures again from the model's understanding"),
    "edit": ("reca_trainer.cli.pictures:edit", "change pictures as prompts say"),
    "demo": ("reca_trainer.cli.demo", "a page to click: a model beside its adapters"),
    "precompute": ("reca_trainer.cli.precompute", "encode a data set's images once, to train on"),
    "merge": ("reca_trainer.cli.merge", "merge an adapter into its base model"),
    "export": ("reca_trainer.cli.export", "write a model in another layout, dtype or quantisation"),
    "push": ("reca_trainer.cli.push", "upload an adapter or a model to the Hub"),
    "info": ("reca_trainer.cli.info", "what a checkpoint or adapter is"),
    "evaluate": ("reca_trainer.cli.evaluate", "score a model on a benchmark"),
    "compare": ("reca_trainer.cli.compare", "compare models on a benchmark, image by image"),
    "doctor": ("reca_trainer.cli.doctor", "what this machine has, and what a model does on it: a report"),
    "plan": ("reca_trainer.cli.plan", "does a run fit a GPU, which batch, how long"),
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("reca-trainer", description=sys.modules["reca_trainer"].__doc__)
    parser.add_argument(
        "--version", action="version", version=f"reca-trainer {sys.modules['reca_trainer'].__version__}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    return parser


def with_underscores(argv: Sequence[str]) -> list[str]:
    """Options are spelled as in TRL and `Trainer`, `--max_shard_size`; dashes are accepted."""
    return [re.sub(r"^--[^=]+", lambda option: "--" + option[0][2:].replace("-", "_"), word) for word in argv]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in COMMANDS:
        make_parser().parse_args(argv)
    try:
        module, _, function = COMMANDS[argv[0]][0].partition(":")
        getattr(importlib.import_module(module), function or "main")(with_underscores(argv[1:]))
        return 0
    # What users can mend, by a value, a file or an installation; anything else is a bug and keeps its traceback.
    except (ValueError, OSError, ImportError) as error:
        print(f"reca-trainer {argv[0]}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"reca-trainer {argv[0]}: {interrupt or 'interrupted'}", file=sys.stderr)
        return 130
