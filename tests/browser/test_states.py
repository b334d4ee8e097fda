"""States that are hard to come by: a full disk under the page's server, and a page without a mouse."""

import contextlib

from tests.browser.conftest import FAKE, eventually, serving, set_text, wait_ready, wait_state


def fill(place):
    """Use the disk up to its last page."""
    with (place / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass


def test_a_full_disk_is_told_and_once_there_is_room_all_goes_on(small_disk, visit):
    with serving(small_disk / "runs", FAKE) as server:
        page = visit(server)
        fill(small_disk)
        set_text(page, "training_comment", "steps=2000 pause=0.01")
        page.get_by_role("button", name="Start training").click()
        page.wait_for_selector("#lw-banner >> text=No space left on device")
        (small_disk / "filler").unlink()
        page.get_by_role("button", name="Start training").click()
        wait_state(page, "running")
        fill(small_disk)
        wait_state(page, "crashed")
        assert "No space left on device" in page.inner_text("#lw-crash") + page.inner_text("#lw-log")
        (small_disk / "filler").unlink()


def test_everything_can_be_done_without_a_mouse(page):
    page.reload()
    wait_ready(page)
    page.keyboard.press("Control+k")
    page.keyboard.type("training comment")
    page.keyboard.press("Enter")
    page.wait_for_function("document.activeElement.closest('.field')?.id === 'field-training_comment'")
    page.keyboard.type("steps=3000 pause=0.01")
    page.keyboard.press("Control+Enter")
    wait_state(page, "running")

    def press_until(focused, key="Tab", most=150):
        """Press a key until what has the focus fits."""
        for _ in range(most):
            page.keyboard.press(key)
            if page.evaluate(f"() => {{ const at = document.activeElement; return Boolean({focused}); }}"):
                return
        raise AssertionError(f"{focused} was not reached with {most} times {key}")

    page.evaluate("document.activeElement.blur(); window.getSelection().removeAllRanges(); window.scrollTo(0, 0)")
    for control in ("lw-preset", "lw-load", "lw-save", "lw-find", "lw-check", "lw-start"):
        press_until(f"at.id === '{control}'")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", control
    press_until("at.getAttribute('role') === 'tab' && at.textContent.trim() === 'Source model'")
    press_until("at.id === 'lw-stop-now'")
    page.keyboard.press("Enter")
    wait_state(page, "stopped")
    eventually(lambda: page.locator("#lw-saved button").count() > 0)
    page.locator("#lw-saved button").first.focus()
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert download.value.suggested_filename == "last.safetensors"
