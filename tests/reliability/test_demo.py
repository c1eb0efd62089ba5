"""The page of `reca-trainer demo`, asked over HTTP and in a real browser: Debian's Chromium, driven by Playwright."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from PIL import Image

from reca_trainer import toy
from reca_trainer.cli import demo
from tests.test_demo import save_adapter

client = pytest.importorskip("gradio_client", reason='needs pip install "reca-trainer[demo]"')
playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")

pytestmark = pytest.mark.slow

QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SIZES = {"desktop": (1280, 860), "phone": (390, 844)}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page of the embedded default and an adapter, served as a Space serves it: by the command's file alone."""
    folder = tmp_path_factory.mktemp("demo")
    adapter = os.environ.get("RECA_DEMO_ADAPTER") or save_adapter(folder / "bagel-reca", 0)
    sampling = [f"{name}={value}".replace("(", "[").replace(")", "]") for name, value in toy.SAMPLING.items()]
    shutil.copy(demo.__file__, folder / "app.py")
    arguments = shlex.join([str(toy.CHECKPOINT), adapter, "--sampling", *sampling])
    environment = {"RECA_DEMO": arguments, "HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": str(folder / "files")}
    command, environment = [sys.executable, "app.py"], os.environ | environment
    with open(folder / "log.txt", "w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 180
        while (where := re.search(r"http://\S+", (folder / "log.txt").read_text())) is None:
            assert server.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()
            time.sleep(0.2)
        assert where[0].startswith("http://127.0.0.1:")  # nobody else's machine reaches it by default
        yield where[0]
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def browser():
    if (program := shutil.which("chromium")) is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    playwright.expect.set_options(timeout=120_000)
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=program, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture(params=SIZES)
def page(request, browser, address):
    """The page at one width; in the end nothing was wrong on it, and nothing was asked of another machine."""
    width, height = SIZES[request.param]
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(120_000)
    errors, elsewhere = [], []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "request", lambda sent: None if sent.url.startswith((address, "data:", "blob:")) else elsewhere.append(sent)
    )
    page.goto(address)
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
    page.close()
    assert not errors and not elsewhere, (errors, elsewhere)


def visible_pictures(page):
    return page.locator(".drawn img[src*='/file=']:visible")


def shown(page, count=2):
    """Sources of the pictures, once there are so many."""
    playwright.expect(visible_pictures(page)).to_have_count(count)
    return [picture.get_attribute("src") for picture in visible_pictures(page).all()]


def tab(page, name):
    page.get_by_role("tab", name=name).click()
    return page.get_by_role("tabpanel").filter(visible=True)


def test_the_file_alone_answers_as_a_space(address, tmp_path):
    space = client.Client(address, verbose=False, download_files=tmp_path)
    drawn = [space.predict("a red circle", seed, api_name="/handler") for seed in (0, 0, 1)]
    pixels = [[Image.open(file).convert("RGB").tobytes() for file in pair] for pair in drawn]
    assert pixels[0] == pixels[1] != pixels[2] and pixels[0][0] != pixels[0][1]


def test_a_prompt_gives_both_pictures_and_the_seed_the_same_ones(page, request, tmp_path):
    panel = tab(page, "Text to image")
    panel.get_by_label("prompt").fill("a red circle")
    panel.get_by_role("button", name="Draw").click()
    before, after = shown(page)
    assert before != after
    labels = panel.locator(".drawn label").all_inner_texts()
    assert [label.strip() for label in labels] == ["before: checkpoint", "after: bagel-reca"]
    folder = os.environ.get("RECA_SCREENSHOTS", tmp_path)
    page.screenshot(path=f"{folder}/demo-{request.node.callspec.id}.png", full_page=True)


def test_a_picture_is_reconstructed_edited_and_asked_about(page, tmp_path):
    row = toy.dataset("validation", 1)[0]
    row["image"].save(tmp_path / "scene.png")
    for name in ("Reconstruct", "Edit"):
        panel = tab(page, name)
        panel.locator("input[type=file]").set_input_files(tmp_path / "scene.png")
        if name == "Edit":
            panel.get_by_label("prompt").fill("a red circle")
        panel.get_by_role("button", name="Draw").click()
        assert len(shown(page)) == 2
    panel = tab(page, "Ask")
    panel.locator("input[type=file]").set_input_files(tmp_path / "scene.png")
    panel.get_by_label("question").fill(row["question"])
    panel.get_by_role("button", name="Ask").click()
    model, processor = toy.load()
    [answer] = model.generate_text(processor, row["question"], row["image"])
    for label in ("before", "after"):
        playwright.expect(panel.get_by_label(label)).to_have_value(answer)


def test_what_is_missing_is_said_on_the_page(page):
    panel = tab(page, "Edit")
    panel.get_by_label("prompt").fill("a red circle")
    panel.get_by_role("button", name="Draw").click()
    playwright.expect(page.get_by_text("needs images")).to_be_visible()
