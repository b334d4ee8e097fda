"""The README's pictures of the page, from a real training: python -m tests.browser.screenshots docs/images."""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from tests.browser.conftest import CHROMIUM, FLAGS, REAL, open_tab, serving, wait_ready, wait_state

TABS = ("Source model", "Folders", "Samples", "Dataset", "Config (JSON)", "Runs", "Tools")
SIZE = (1440, 900)


def take(page: Page, folder: Path, name: str) -> None:
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.save(folder / f"{name}.webp", quality=80, method=6)


def start(page: Page, rate: str) -> None:
    open_tab(page, "Parameters")
    page.locator("#field-unet_lr input").fill(rate)
    page.get_by_role("button", name="Start training").click()
    wait_state(page, "running", patience_s=120)


def main(folder: Path) -> None:
    with (
        tempfile.TemporaryDirectory() as runs,
        serving(Path(runs) / "runs", REAL) as server,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport=dict(zip(("width", "height"), SIZE, strict=True)))
        page.goto(server.url)
        wait_ready(page)
        start(page, "0.006")
        wait_state(page, "done", patience_s=600)
        start(page, "0.003")
        page.get_by_role("button", name="Dismiss").click()  # the note on the two rates
        page.wait_for_function(
            "Number(document.getElementById('lw-progress').getAttribute('aria-valuenow')) > 180", timeout=600_000
        )
        open_tab(page, "Parameters")
        take(page, folder, "page")
        open_tab(page, "Advanced")
        take(page, folder, "tab-advanced")
        wait_state(page, "done", patience_s=600)
        for tab in TABS:
            open_tab(page, tab)
            page.wait_for_timeout(4000)
            take(page, folder, "tab-" + tab.split()[0].lower())
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
