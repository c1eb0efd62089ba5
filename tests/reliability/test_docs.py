"""Every code block of README, CONTRIBUTING and `docs/` as a reader runs it, and the site as a reader sees it."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from reca_trainer import toy
from reca_trainer.cli import plan
from reca_trainer.cli.recipes import GPUS
from tests.documentation import IN_A_CLONE, PAGES, ROOT, Block, blocks
from tests.reliability.run import fork
from tests.test_docs import TABLES, build_site, name, stale

pytestmark = pytest.mark.slow

COMMANDS = {"reca-trainer": "reca_trainer", "accelerate": "accelerate.commands.accelerate_cli", "python": None}


def copy_of_the_working_tree(folder: Path) -> None:
    """What a clone would have: tracked files and new ones, nothing that was installed or built."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for file in filter(None, files):
        if (ROOT / file).is_file():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / file)


def environment(folder: Path, in_a_clone: bool) -> dict[str, str]:
    """No GPU, no Hub; the commands are those of this interpreter, but in a clone, which makes its own."""
    programs = folder / ".programs"
    programs.mkdir(exist_ok=True)
    for program, module in COMMANDS.items():
        start = f'exec {sys.executable} {f"-m {module} " if module else ""}"$@"\n'
        (programs / program).write_text(f"#!/bin/sh\n{start}")
        (programs / program).chmod(0o755)
    changed = {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    if in_a_clone:
        return os.environ | changed
    return os.environ | changed | {"PATH": f"{programs}:{os.environ['PATH']}", "HF_HOME": str(folder / ".cache")}


def run_page(page: Path, folder: Path) -> None:
    """In a process of its own: the blocks one after the other, Python ones in one namespace."""
    os.chdir(folder)
    os.makedirs("path/to/pictures")  # what pages call the reader's own
    for number, row in enumerate(toy.dataset(size=16)):
        row["image"].save(f"path/to/pictures/{number}.png")
    namespace: dict = {"__name__": "__main__"}
    with open(folder / ".log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        for block in blocks(page):
            if not block.runs:
                continue
            print(f"=== {block.place}", flush=True)
            if block.language == "bash":
                _run_shell(block, folder)
            else:
                try:
                    exec(compile(block.text, block.place, "exec"), namespace)
                except BaseException:
                    traceback.print_exc()
                    raise SystemExit(1) from None
        print("=== end", flush=True)


def _run_shell(block: Block, folder: Path) -> None:
    place, in_a_clone = folder, block.mark == IN_A_CLONE
    if in_a_clone:
        place = folder / f"clone-{block.line}"
        place.mkdir()
        copy_of_the_working_tree(place)
    command = ["bash", "-euo", "pipefail", "-c", block.text]
    done = subprocess.run(command, cwd=place, env=environment(folder, in_a_clone), stdin=subprocess.DEVNULL)
    if in_a_clone:
        shutil.rmtree(place)
    if done.returncode:
        raise SystemExit(done.returncode)


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.runs for block in blocks(page))], ids=name)
def test_every_block_of_a_page_runs(page, tmp_path):
    process = fork(run_page, page, tmp_path)
    process.join()
    log = (tmp_path / ".log").read_text()
    assert process.exitcode == 0 and log.endswith("=== end\n"), log[-4000:]


@pytest.mark.parametrize("family", TABLES.families())
def test_memory_is_what_plan_says(family):
    table = f"memory of {family}"
    [content] = TABLES.written(table).values()
    assert content == TABLES.tables()[table](), stale(table)


@pytest.mark.parametrize("recipe", GPUS)
def test_a_recipe_is_told_with_the_smallest_gpu_that_plan_says(recipe, capsys):
    family = next(name for name in TABLES.families() if recipe.startswith(name.replace("-", "_")))
    for count in (1, 8):
        spread = ["--num_processes", str(count), "--launch", "fsdp2"]
        plan.main(["--config", recipe, "--model", family, "--gpu", "80GB", *spread])
        needed = re.search(r"The recipe's \d+: ([\d.]+) GB", capsys.readouterr().out)  # only where it fits
        if needed:
            break
    size = next(size for size in (24, 48, 80) if size >= float(needed[1]))
    assert GPUS[recipe] == f"{'' if count == 1 else '8 × '}{size} GB"


def test_the_site_is_whole_on_a_desktop_and_on_a_phone(tmp_path):
    """Nothing fails, sticks out or is asked of another machine, and every link leads to a place on the site."""
    pytest.importorskip("zensical", reason='needs pip install "reca-trainer[docs]"')
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    pages, site = build_site(tmp_path), tmp_path / "site"
    problems, links, places = [], set(), set()
    with served(site) as address, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for width in (1280, 390):
            view = browser.new_page(viewport={"width": width, "height": 844})
            view.on("request", lambda sent: sent.url.startswith((address, "data:")) or problems.append(sent.url))
            view.on("response", lambda given: given.status < 400 or problems.append(f"{given.url}: {given.status}"))
            view.on("console", lambda message: message.type == "error" and problems.append(message.text))
            view.on("pageerror", lambda error: problems.append(str(error)))
            for page in pages:
                url = f"{address}/{page.relative_to(site)}".removesuffix("index.html")
                view.goto(url, wait_until="networkidle")
                if (needed := view.evaluate("document.documentElement.scrollWidth")) > width:
                    problems.append(f"{url} is {needed} pixels wide on a screen of {width}")
                names = view.evaluate("[...document.querySelectorAll('[id]')].map(element => element.id)")
                places |= {url, *(f"{url}#{name}" for name in names)}
                links |= set(view.evaluate("[...document.links].map(link => decodeURI(link.href))"))
        browser.close()
    pictures = {f"{address}/{file.relative_to(site)}" for file in site.rglob("*.*") if file.suffix != ".html"}
    lost = {link.removesuffix("#") for link in links if link.startswith(f"{address}/")} - places - pictures
    assert not problems and not lost, (problems, lost)


@contextlib.contextmanager
def served(folder: Path):
    """The address of a web server on a folder."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
    server = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield server.stdout.readline().partition("(")[2].partition("/)")[0]  # Serving HTTP on … (http://…:port/) ...
    finally:
        server.terminate()
        server.wait()
