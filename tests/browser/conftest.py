from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from tests.browser.serve import IMPORTED_ONCE, serve

ROOT = Path(__file__).resolve().parents[2]
# The shell is the same engine without a window's parts; it puts a page together in half the time.
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--in-process-gpu",
    "--process-per-site",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CHROMIUM is None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="there is no Chromium on this machine"))


class Command:
    """`python app.py` as a user starts it."""

    def __init__(self, *words: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(ROOT / "app.py"), *words]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.stdout = self.process.stdout

    def end(self, by: signal.Signals) -> None:
        if self.process.poll() is None:
            self.process.send_signal(by)
            self.process.wait(10)


class Fork:
    """The page with the stand-in for the trainer, from a process that has imported Gradio once for all of them."""

    context = multiprocessing.get_context("forkserver")

    def __init__(self, *words: str) -> None:
        self.context.set_forkserver_preload(IMPORTED_ONCE)
        told, tell = self.context.Pipe(duplex=False)
        self.process = self.context.Process(target=serve, args=(words, tell))
        self.process.start()
        tell.close()
        self.stdout = os.fdopen(os.dup(told.fileno()), encoding="utf-8")

    def end(self, by: signal.Signals) -> None:
        if self.process.is_alive():
            os.kill(self.process.pid, by)
            self.process.join(10)
        self.stdout.close()


REAL, FAKE = Command, Fork


@dataclass
class Server:
    """A page's server in a process of its own."""

    runs: Path
    arguments: tuple[str, ...] = ()
    port: int = 0
    process: Command | Fork | None = field(default=None, repr=False)
    by: type[Command] | type[Fork] = FAKE

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        if not self.port:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
        self.process = self.by("--server_port", str(self.port), "--runs", str(self.runs), *self.arguments)
        for line in self.process.stdout:
            if "Lorawright is at" in line:
                return
        raise RuntimeError("the server ended before it served")

    def stop(self, by: signal.Signals = signal.SIGTERM) -> None:
        if self.process:
            self.process.end(by)

    def end_runs(self) -> None:
        from gui.runs import kill
        from trainer.run import Run

        for folder in self.runs.glob("2*"):
            kill(Run(folder))

    def forget(self) -> None:
        """Back to a form at its defaults; the server keeps no state of its own."""
        patience = time.monotonic() + 20
        while True:
            self.end_runs()
            for item in self.runs.iterdir():
                # A draft that is just being written takes its temporary name away by itself.
                shutil.rmtree(item, ignore_errors=True) if item.is_dir() else item.unlink(missing_ok=True)
            # Into the folder of a run that just ended, its last words may be written meanwhile.
            if not (left := list(self.runs.glob("2*"))):
                break
            assert time.monotonic() < patience, f"still there: {left}"
            time.sleep(0.05)
        (self.runs / "draft.json").write_text("{}")


@contextlib.contextmanager
def serving(runs: Path, by: type[Command] | type[Fork], *arguments: str) -> Iterator[Server]:
    runs.mkdir(parents=True, exist_ok=True)
    server = Server(runs, arguments, by=by)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        server.end_runs()


@pytest.fixture(scope="session")
def _shared(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("with a blank ü")
    (folder / "files" / "10_cat").mkdir(parents=True)
    (folder / "files" / "10_cat" / "a.png").write_bytes(b"")
    (folder / "files" / "models").mkdir()
    (folder / "files" / "models" / "toy.safetensors").write_bytes(b"")
    with serving(folder / "runs", FAKE, "--root", str(folder / "files")) as server:
        yield server


@pytest.fixture
def server(_shared) -> Server:
    """A page with the stand-in for the trainer, unused."""
    _shared.forget()
    return _shared


@pytest.fixture(scope="session")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


HASTE = """{
    const later = window.setTimeout;
    window.setTimeout = (call, ms = 0, ...rest) => later(call, ms < 300 || window.unhurried ? ms : ms / 6, ...rest);
}"""
"""Between its questions to the server the page waits a sixth as long."""


class Visits:
    """Pages opened in Chromium. Errors in them and requests to other hosts are gathered.

    They are tabs of one visitor, whose browser keeps the scripts once fetched, unless `alone` is asked for.
    """

    def __init__(self, browser, visitor) -> None:
        self.browser = browser
        self.visitor = visitor
        self.pages: list = []
        self.found: list[str] = []
        self.failures = 0
        """Of the session's tests, when a shared page was last known to be sound."""

    def __call__(
        self,
        server: Server,
        path: str = "",
        width: int = 1440,
        height: int = 900,
        dark: bool = False,
        ready: bool = True,
        alone: bool = False,
    ):
        """Open a page and wait until it is usable."""
        page = (self.browser.new_context(reduced_motion="reduce") if alone else self.visitor).new_page()
        self.pages.append(page)
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(color_scheme="dark" if dark else "light")
        page.set_default_timeout(15000)
        page.add_init_script(HASTE)
        page.on("pageerror", lambda error: self.found.append(f"error in the page: {error}"))
        page.on(
            "console",
            lambda m: (
                self.found.append(f"console: {m.text}") if "js_on_load" in m.text or "Uncaught" in m.text else None
            ),
        )
        page.on(
            "request",
            lambda r: (
                None
                if r.url.startswith((server.url, "data:", "blob:"))
                else self.found.append(f"foreign request: {r.url}")
            ),
        )
        page.wait_for_selector = partial(wait_for_selector, page)
        # Asked for each frame, as is Playwright's way, Chromium would draw frames without end.
        page.wait_for_function = partial(page.wait_for_function, polling=50)
        page.goto(server.url + path)
        if ready:
            wait_ready(page)
        return page

    def check(self) -> None:
        """Fail if anything was found since the last time."""
        found, self.found = self.found, []
        assert not found, "\n".join(found)

    def close(self) -> None:
        """Leave the pages; what they kept in the browser goes, but for what it fetched."""
        for page in self.pages:
            page.evaluate("location.protocol === 'http:' && localStorage.clear()")
            page.context.clear_cookies()
            page.close() if page.context is self.visitor else page.context.close()
        self.pages.clear()


@pytest.fixture(scope="session")
def _visitor(chromium):
    return chromium.new_context(reduced_motion="reduce")


@pytest.fixture(scope="session")
def _left_open(chromium, _visitor) -> Iterator[Visits]:
    visits = Visits(chromium, _visitor)
    yield visits
    visits.close()


@pytest.fixture
def visit(chromium, _visitor, _left_open) -> Iterator[Visits]:
    """Open pages, whose errors and requests to other hosts fail the test."""
    for page in _left_open.pages:
        page.evaluate("window.unhurried = true")  # what is left open leaves the processor to them
    visits = Visits(chromium, _visitor)
    yield visits
    visits.close()
    visits.check()
    for page in _left_open.pages:
        page.evaluate("window.unhurried = false")


@pytest.fixture
def _sound(request, _left_open) -> None:
    """Leave a page in which a test failed, before the server forgets it: a page that is left sends its last change."""
    if _left_open.failures != request.session.testsfailed:
        _left_open.close()


@pytest.fixture
def page(request, _sound, server, _left_open):
    """A page at its defaults, on its first tab.

    Chromium takes a second of one core to put a page together. The tests that need no page of their own share one,
    which goes back by its own means; after a test that failed, the next one gets a new page.
    """
    if not _left_open.pages:
        page = _left_open(server)
    else:
        page = _left_open.pages[0]
        put_back(page)
    _left_open.failures = request.session.testsfailed
    yield page
    _left_open.check()


PUT_BACK = """async () => {
    const by = id => document.getElementById(id);
    const until = async (told, there) => {
        for (const patience = performance.now() + 15000; !there(); await new Promise(requestAnimationFrame))
            if (performance.now() > patience) throw new Error(`put back, but never ${told}`);
    };
    const built = BUILT;
    const open = async id => {
        await until(`with ${id}`, () => by(id));
        if (by(id).ariaSelected !== "true") { by(id).click(); await built(by(id)); }
    };

    for (const dialog of document.querySelectorAll("dialog")) dialog.close();
    await until("without a dialog", () => !document.querySelector("dialog"));
    if (by("lw-changed").textContent !== "all default") {
        by("lw-reset").click();
        const back = "All parameters are back at their defaults";
        await until(back, () => by("lw-banner").textContent.includes(back));
        await until("all default", () => by("lw-changed").textContent === "all default");
    }
    [...by("lw-banner").querySelectorAll("button")].find(button => button.ariaLabel === "Dismiss")?.click();
    if (by("tab-advanced-button")?.ariaSelected === "true") { await open("tab-parameters-button"); await open("tab-basic-button"); }
    await open("tab-source-model-button");
    by("lw-latest").click();  // what was pinned is gone
    await until("idle", () => by("lw-pill").dataset.state === "idle");
    document.activeElement.blur();
    scrollTo(0, 0);
    localStorage.clear();
}"""


def put_back(page) -> None:
    """A page in use goes back to the defaults and the first tab."""
    wait_ready(page)  # it may just have been loaded anew
    if page.viewport_size != {"width": 1440, "height": 900}:
        page.set_viewport_size({"width": 1440, "height": 900})
    page.mouse.move(0, 0)
    page.evaluate(PUT_BACK.replace("BUILT", BUILT))


THERE = """([selector, visible]) => [...document.querySelectorAll(selector)].some(
    (element) => !visible || element.checkVisibility({ visibilityProperty: true }) && element.getClientRects().length)"""


def wait_for_selector(page, selector: str, state: str = "visible", timeout: float = 15000) -> None:
    """As Playwright's own, which looks ever more seldom, up to twice a second.

    What CSS can say is looked for in the page: a question from outside takes 10 ms of a core that others wait for.
    """
    if ">>" not in selector and not selector.startswith("text="):
        page.wait_for_function(THERE, arg=[selector, state == "visible"], timeout=timeout)
        return
    found, pause_s = page.locator(selector).first, 0.0
    there = {"visible": found.is_visible, "attached": lambda: page.locator(selector).count() > 0}[state]
    until = time.monotonic() + timeout / 1000
    while not there():
        assert time.monotonic() < until, f"{selector} is not {state}"
        page.wait_for_timeout(1000 * (pause_s := min(0.15, pause_s + 0.02)))


def wait_ready(page) -> None:
    page.wait_for_selector("html[data-lorawright=ready]", state="attached")


def wait_state(page, *states: str, patience_s: float = 30) -> str:
    """Wait until the pill shows one of the states. Returns its text."""
    page.wait_for_function(
        "states => states.includes(document.getElementById('lw-pill').dataset.state)",
        arg=list(states),
        timeout=patience_s * 1000,
    )
    return page.inner_text("#lw-pill")


BUILT = """tab => new Promise(resolve => {
    let frames = 0;
    (function look() {
        const shown = [...document.querySelectorAll("#form .field")].filter(field => field.offsetParent);
        const built = tab.ariaSelected === "true" && shown.every(field => "dressed" in field.dataset);
        frames = built ? frames + 1 : 0;
        if (frames > 2) resolve(); else requestAnimationFrame(look);
    })();
})"""
"""A tab is built when it is first opened; a moment later Gradio gives its fields what they hold, over what is typed."""


def open_tab(page, *names: str) -> None:
    for name in names:
        page.get_by_role("tab", name=name, exact=True).evaluate(f"tab => {{ tab.click(); return ({BUILT})(tab); }}")


def set_text(page, key: str, text: str) -> None:
    page.locator(f"#field-{key}").locator("input, textarea").fill(text)


def shown(page, key: str) -> str:
    return page.locator(f"#field-{key}").locator("input, textarea").input_value()


def drafted(server: Server) -> dict:
    """The form as the server keeps it for the next visit."""
    return json.loads((server.runs / "draft.json").read_text())


def eventually(check: Callable[[], bool], patience_s: float = 15) -> None:
    until = time.monotonic() + patience_s
    while not check():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.05)
