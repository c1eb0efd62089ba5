"""The code blocks, links and commands of README and `docs/`.

A block runs where its page says nothing else. A comment on the line above its fence says that it does not:

- `<!-- not run: GPU -->`, `<!-- not run: Hub -->`, `<!-- not run: weights -->`: what it would need;
- `<!-- run in a clone -->`: it installs the package, so it gets a copy of the working tree and no installed package;
- `<!-- run by .ci/run -->`: that script has the same line.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import yaml

from reca_trainer.cli import COMMANDS, with_underscores
from reca_trainer.recipes import EXPERIMENTS, RECIPES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS = ("GPU", "Hub", "weights")
IN_A_CLONE, BY_CI = "run in a clone", "run by .ci/run"
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (?:not run: (\w+)|(run .*)) -->$")


@dataclass(frozen=True)
class Block:
    """A fenced block: `mark` is what it needs and is not run for, or how else it is run, or `None`."""

    page: Path
    line: int
    language: str
    text: str
    mark: str | None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.language in ("bash", "python") and self.mark in (None, IN_A_CLONE)


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    fenced = []
    for match in FENCE.finditer(text):
        before = text[: match.start()].rstrip().rpartition("\n")[2].strip()
        mark = MARK.search(before)
        indent = len(match[1])
        body = "".join(line[indent:] if line.strip() else "\n" for line in match[3].splitlines(keepends=True))
        line = text.count("\n", 0, match.start()) + 1
        fenced.append(Block(page, line, match[2], body, mark and (mark[1] or mark[2])))
    return fenced


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Path and anchor of every link and picture that is not on another host."""
    prose = re.sub(r"`[^`\n]+`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    for target in re.findall(r"\]\(<?([^)\s>]+)>?[^)]*\)|(?:src|href)=\"([^\"]+)\"", prose):
        target = target[0] or target[1]
        if not re.match(r"[a-z]+:", target):
            yield target.partition("#")[::2]


def anchors(page: Path) -> set[str]:
    """What headings and marked places of a page are called in links."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    named = set(re.findall(r"\{ *#([\w.-]+) *\}|\bid=\"([\w.-]+)\"", prose))
    names = {name for pair in named for name in pair if name}
    for heading in re.findall(r"^#+ +(.*?)(?: *\{.*\})?$", prose, re.MULTILINE):
        plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        names.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return names


def check(block: Block) -> None:
    """Find out what can be known of a block without running it.

    Raises:
        AssertionError: it does not parse, imports what does not exist, or gives an argument that is not taken.
    """
    if block.language == "python":
        _check_python(block)
    elif block.language == "bash":
        if block.mark == BY_CI:
            assert block.text.strip() in (ROOT / ".ci" / "run").read_text(), f"{block.place}: .ci/run has another line"
        done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
        assert done.returncode == 0, f"{block.place}: {done.stderr}"
        for words in commands(block.text):
            if arguments := of_the_console_script(words):
                check_arguments(arguments, block.place)
    elif block.language in ("yaml", "json"):
        (yaml.safe_load if block.language == "yaml" else json.loads)(block.text)


def _check_python(block: Block) -> None:
    tree = ast.parse(block.text, block.place)
    known = {}
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        for alias in node.names:
            module = node.module if isinstance(node, ast.ImportFrom) else alias.name
            if block.mark in NEEDS and importlib.util.find_spec(module.partition(".")[0]) is None:
                continue  # another tool's package, which only that block needs
            value = importlib.import_module(module)
            if isinstance(node, ast.ImportFrom):
                if not hasattr(value, alias.name) and hasattr(value, "__path__"):
                    importlib.import_module(f"{module}.{alias.name}")
                assert hasattr(value, alias.name), f"{block.place}: {module} has no {alias.name}"
                known[alias.asname or alias.name] = getattr(value, alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
            taken = inspect.signature(known[node.func.id]).parameters
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
                unknown = {keyword.arg for keyword in node.keywords} - {*taken, None}
                assert not unknown, f"{block.place}: {node.func.id} takes no {', '.join(sorted(unknown))}"


def commands(text: str) -> Iterator[list[str]]:
    """The words of each simple command of a shell script."""
    text = re.sub(r"(?m)(^|\s)#.*$", "", text.replace("\\\n", " "))
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|<>()\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words: list[str] = []
    for word in lexer:
        if not set(word) <= set(";&|<>()\n"):
            words.append(word)
        elif words:
            yield words
            words = []
    if words:
        yield words


def of_the_console_script(words: list[str]) -> list[str] | None:
    """What a command line tells `reca-trainer`, called by name, as a module, or through a launcher of `recipes/`."""
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    program = Path(words[0]).name if words else ""
    if program == "reca-trainer":
        return words[1:]
    if program in ("accelerate", "python", "python3", "torchrun"):
        for place, word in enumerate(words):
            if word == "reca_trainer" and words[place - 1] == "-m":
                return words[place + 1 :]
            if word == "recipes/bagel_lora.py" or (word.startswith("recipes/") and "--config" in words):
                return ["train", *words[place + 1 :]]
    return None


class Parsed(Exception):
    """Ends a command once its arguments are read."""


def check_arguments(argv: list[str], place: str) -> None:
    """Let a command read its arguments, and no more.

    Raises:
        AssertionError: there is no such command or argument; the message says where.
    """
    if argv[0].startswith("-"):
        return
    assert argv[0] in COMMANDS, f"{place}: there is no command {argv[0]}"
    module, _, function = COMMANDS[argv[0]][0].partition(":")
    arguments = with_underscores(argv[1:])
    if argv[0] == "train" and "--config" in arguments:
        value = arguments.index("--config") + 1
        if Path(arguments[value]).stem not in RECIPES | EXPERIMENTS:
            del arguments[value - 1 : value + 1]  # a file that an earlier block of the page writes
        else:
            arguments[value] = Path(arguments[value]).stem
    parse = argparse.ArgumentParser.parse_known_args

    def read(parser, args=None, namespace=None):
        _, rest = parse(parser, args, namespace)
        assert not rest, f"{place}: {argv[0]} takes no {' '.join(rest)}"
        raise Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", read):
        try:
            getattr(importlib.import_module(module), function or "main")(arguments)
        except Parsed:
            return
        except SystemExit as error:
            raise AssertionError(f"{place}: {argv[0]} refuses {shlex.join(argv[1:])}") from error
    raise AssertionError(f"{place}: {argv[0]} read no arguments")


def load_tables() -> ModuleType:
    """`docs/tables.py`, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def undefined_names(page: Path) -> str:
    """What `ruff` finds in the Python blocks of a page, in their order, that is not defined; "" if nothing."""
    code = "\n".join(block.text for block in blocks(page) if block.language == "python")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--quiet", "--select", "E9,F821", "-"]
    done = subprocess.run(command, input=code, capture_output=True, text=True)
    return done.stdout + done.stderr
