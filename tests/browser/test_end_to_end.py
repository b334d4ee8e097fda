"""The main job, clicked through with the real trainer: load, start, watch, stop, start again, fetch the LoRA."""

import json
import struct

from tests.browser.conftest import REAL, eventually, open_tab, serving, set_text, shown, wait_ready, wait_state
from tests.browser.test_live import loss_is_drawn


def metadata_and_names(path):
    """A safetensors file's metadata and the names of its tensors."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return header.pop("__metadata__"), set(header)


def shorten(page, steps):
    """The shipped preset, small enough for a test."""
    open_tab(page, "Folders")
    set_text(page, "output_name", "short run ü")
    open_tab(page, "Samples")
    set_text(page, "sample_every_n_steps", "4")
    set_text(page, "sample_prompts", "a cat --w 64 --h 64 --s 2 --d 1")
    open_tab(page, "Parameters")
    for key, text in (("max_train_steps", steps), ("train_batch_size", "1"), ("max_resolution", "64,64")):
        set_text(page, key, text)


def test_load_start_watch_reload_stop_and_start_again_to_the_end(tmp_path, visit):
    with serving(tmp_path / "rüns here", REAL) as server:
        page = visit(server)
        page.select_option("#lw-preset", "shipped/first-steps")
        page.get_by_role("button", name="Load", exact=True).click()
        page.wait_for_selector("#lw-banner >> text=Loaded")
        shorten(page, "500")
        page.get_by_role("button", name="Check", exact=True).click()
        page.wait_for_selector("#lw-banner >> text=Ready to start", timeout=60000)
        assert "500 steps" in page.inner_text("#lw-banner")
        page.get_by_role("button", name="Start training").click()
        wait_state(page, "starting", patience_s=60)
        wait_state(page, "running", patience_s=120)
        eventually(lambda: loss_is_drawn(page), 30)
        page.wait_for_selector("#lw-samples img", timeout=60000)
        eventually(
            lambda: page.evaluate("[...document.querySelectorAll('#lw-samples img')].every(i => i.naturalWidth)")
        )

        page.reload()
        wait_ready(page)
        wait_state(page, "running")
        open_tab(page, "Parameters")
        assert shown(page, "max_train_steps") == "500"
        page.get_by_role("button", name="Stop", exact=True).click()
        assert "at step" in wait_state(page, "stopped", patience_s=60)

        set_text(page, "max_train_steps", "3")
        page.get_by_role("button", name="Start training").click()
        wait_state(page, "starting", patience_s=60)
        assert "3 steps" in wait_state(page, "done", patience_s=120)
        with page.expect_download() as download:
            page.get_by_role("button", name="short run ü.safetensors").click()
        described, names = metadata_and_names(download.value.path())
        assert described["ss_output_name"] == "short run ü" and described["ss_network_module"] == "networks.lora"
        assert any(name.startswith("lora_unet_") for name in names)
