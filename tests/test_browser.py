"""A learner's first hour in the real JupyterLab, in headless Chromium with a clean profile: lesson, exercise, progress."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    " --disable-sync"
)
PATIENCE = 60_000  # ms: a busy machine starts kernels slowly
SHOWN = ".jp-NotebookPanel:not(.lm-mod-hidden)"
ERRORS = '[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]'

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH"),
]


@pytest.fixture
def course(tmp_path):
    """A copy of the lab with one lesson, cut down to a prediction and a slider: its own cells, but for the one that serves."""
    for folder in ("notebooks", "exercises"):
        shutil.copytree(ROOT / folder, tmp_path / "lab" / folder)
    for lesson in (tmp_path / "lab" / "notebooks").glob("*.ipynb"):
        if lesson.name != "04_pipeline_parallel.ipynb":
            lesson.unlink()
            continue
        nb = nbformat.read(lesson, as_version=4)
        at = next(i for i, cell in enumerate(nb.cells) if cell.source.startswith("knob("))
        begin = next(i for i, cell in enumerate(nb.cells) if "import knob" in cell.source)
        served = nbformat.v4.new_code_cell('guess_bubble = 0.2\ncounted = {"p=4, counted": {3: 0.3}}')
        nb.cells = [*nb.cells[: begin + 1], served, *nb.cells[at - 4 : at + 1]]
        nbformat.write(nb, lesson)
    return tmp_path / "lab"


@pytest.fixture
def server(course, tmp_path):
    """The address that `labkit lab` prints, token and all."""
    keep = {
        k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "LABKIT", "XDG_", "IPYTHON")) and k != "CI"
    }
    env = keep | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "labkit", "lab", "--port=0", "--no-browser"]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=course, env=env, stderr=file, stdout=file, start_new_session=True)
    try:
        address = None
        while not address and process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
            address = re.search(r"http://127\.0\.0\.1:\d+/lab/tree/start\.ipynb\?token=\w{20,}", log.read_text())
        assert address, log.read_text()
        yield address[0]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


@pytest.fixture
def page(server):
    """A page in a browser that has never been here; in the end, nothing went wrong on its console."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        page = browser.new_page(viewport={"width": 1400, "height": 5000})  # cells out of sight wouldn't be there
        page.set_default_timeout(PATIENCE)
        wrong = []
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(server)
        yield page
        if folder := os.environ.get("LABKIT_SCREENSHOTS"):
            page.set_viewport_size({"width": 1400, "height": 1000})
            page.screenshot(path=Path(folder) / "last.png")
        browser.close()
    assert not wrong


def run_all(page):
    page.locator(f"{SHOWN} .jp-Cell").first.click()  # or the menu may still be of the notebook that was shown before
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def cell(page, text):
    return page.locator(f"{SHOWN} .jp-CodeCell", has_text=text).first


def rewrite(page, found, source):
    """Puts `source` into a cell and runs it."""
    found.locator(".cm-content").click()
    page.keyboard.press("Control+A")
    page.keyboard.insert_text(source)
    page.keyboard.press("Control+Enter")


def test_a_learner_in_the_browser(page):
    # The start page says what is next, and leads there.
    page.locator(f"{SHOWN} .jp-OutputArea", has_text="Next: Pipeline parallelism").wait_for()
    page.get_by_role("link", name=re.compile("^Pipeline parallelism")).last.click()

    # A lesson runs; its slider changes the picture and its text.
    page.locator(SHOWN, has_text="How many requests does it take").wait_for()
    run_all(page)
    widget = page.locator(f"{SHOWN} .jupyter-widgets", has=page.locator("img")).last
    widget.wait_for()
    picture, text = widget.locator("img").last, widget.locator("p[role=status]").last
    before = picture.get_attribute("src")
    assert (
        text.inner_text().startswith("4 stage(s), 3 request(s)") and picture.get_attribute("alt") == text.inner_text()
    )
    page.locator(f"{SHOWN} .noUi-handle").nth(1).focus()
    page.keyboard.press("ArrowRight")
    page.locator("p[role=status]", has_text="4 stage(s), 4 request(s)").wait_for()
    assert widget.locator("img").last.get_attribute("src") != before
    static = page.locator(f"{SHOWN} .jp-OutputArea-output > img, {SHOWN} .jp-RenderedHTML > img").first
    assert static.get_attribute("alt").startswith("4 stage(s), 3 request(s)")
    assert "0.67x the measured value" in page.locator(f"{SHOWN} table", has_text="bubble, 4 stages").inner_text()
    assert page.locator(ERRORS).count() == 0

    # An exercise: untouched, wrong, a hint, right.
    page.locator(".lm-TabBar-tab", has_text="start.ipynb").click()
    page.get_by_role("link", name="How much memory does each GPU need?").click()
    page.locator(SHOWN, has_text="def seventy_b").wait_for()
    run_all(page)
    asked = cell(page, 'check("memory.seventy_b"')
    asked.locator("[role=status]", has_text="not attempted").wait_for()
    page.locator(f"{SHOWN} [role=status]", has_text="memory.kv_per_gpu: not attempted").wait_for()
    rewrite(page, cell(page, "def seventy_b"), "def seventy_b(tp):\n    return 140")
    rewrite(page, asked, 'check("memory.seventy_b", seventy_b)')
    found = asked.locator("[role=status]", has_text="the weights are not divided by tp")
    found.wait_for()
    assert "not yet" in found.inner_text() and "Hint 1 of 3" in found.inner_text()
    rewrite(page, asked, 'check("memory.seventy_b", seventy_b, hint=3)')
    asked.locator("[role=status]", has_text="Hint 3 of 3: 140 GB / tp.").wait_for()
    rewrite(page, cell(page, "def seventy_b"), "def seventy_b(tp):\n    return 140 / tp")
    rewrite(page, asked, 'check("memory.seventy_b", seventy_b)')
    asked.locator("[role=status]", has_text="memory.seventy_b: passed").wait_for()
    assert page.locator(ERRORS).count() == 0

    # And the start page knows.
    page.locator(".lm-TabBar-tab", has_text="start.ipynb").click()
    page.locator(f"{SHOWN} .jp-CodeCell").first.locator(".cm-content").click()
    page.keyboard.press("Control+Enter")
    row = page.locator(f"{SHOWN} tr", has_text="How much memory does each GPU need?")
    row.locator("td", has_text="begun").wait_for()
    assert "1 of 3" in row.inner_text()
    assert "done" in page.locator(f"{SHOWN} tr", has_text="Pipeline parallelism").inner_text()


def test_the_server_is_on_loopback_alone_and_wants_its_token(server):
    port = int(re.search(r":(\d+)/", server)[1])
    listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port}
    assert listening == {"127.0.0.1"}
    with socket.create_connection(("127.0.0.1", port)) as link:
        link.sendall(b"GET /api/contents HTTP/1.0\r\n\r\n")
        assert b" 403 " in link.recv(200)
