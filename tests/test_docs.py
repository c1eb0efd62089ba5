"""README and `docs/`: every link leads somewhere, every block parses, every table is current.

`tests/reliability/test_docs.py` runs the blocks.
"""

import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest

from tests.documentation import (
    BY_CI,
    IN_A_CLONE,
    NEEDS,
    PAGES,
    ROOT,
    anchors,
    blocks,
    check,
    links,
    load_tables,
    undefined_names,
)


def name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page):
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)} links to {path}, which is not there"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), (
                f"{name(page)} links to {path}#{anchor}; there are {sorted(anchors(target))}"
            )


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_parses_and_its_arguments_exist(page):
    for block in blocks(page):
        assert block.language, f"{block.place}: a block names its language, `text` if it has none"
        check(block)
    assert undefined_names(page) == ""


def test_blocks_are_left_out_only_for_what_they_need(capsys):
    everything = [block for page in PAGES for block in blocks(page) if block.language in ("bash", "python")]
    assert {block.mark for block in everything} <= {None, IN_A_CLONE, BY_CI, *NEEDS}
    needs = Counter(block.mark for block in everything if block.mark in NEEDS)
    with capsys.disabled():
        print(f"\n{len(everything) - needs.total()} code blocks run; marked as not run: {dict(needs)}")
    assert len(everything) > 2 * needs.total()


TABLES = load_tables()


def stale(table):
    return f"Tables have changed: python docs/tables.py {table!r}"


@pytest.mark.parametrize("table", ["commands", "experiments", "options", "protocols", "recipes"])
def test_tables_are_what_the_code_says(table):
    pages = TABLES.written(table)
    assert pages, f"no page has the table {table}"
    for content in pages.values():
        assert content == TABLES.tables()[table](), stale(table)


def test_memory_is_told_for_every_family_and_every_way_to_train():
    def rows(table):
        [content] = TABLES.written(table).values()
        return [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in content.splitlines()[2:]]

    everything = rows("memory")
    told = {(row[0], row[2]) for row in everything}
    assert told >= {(f"`{family}`", mode) for family in TABLES.families() for mode in TABLES.MODES}
    for family in TABLES.families():
        assert rows(f"memory of {family}") == [row[1:] for row in everything if row[0] == f"`{family}`"]


def build_site(folder):
    """The pages of the site, built in `folder`; any warning is an error."""
    for name in ("docs", "src"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", folder)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted((folder / "site").rglob("*.html"))


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("zensical", reason='needs pip install "reca-trainer[docs]"')
    titles = {re.search(r"<title>(.*?)</title>", page.read_text(encoding="utf-8"))[1] for page in build_site(tmp_path)}
    assert len(titles) > 20 and "Python API - reca_trainer" in titles
