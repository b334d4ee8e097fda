import pytest
from safetensors.torch import load_file

from tests.browser.conftest import shown
from tests.tools import loras
from trainer.events import EventLog, Saved
from trainer.run import Run


def open_tools(page):
    """The Tools tab; on a narrow page it stands in the overflow menu."""
    page.evaluate(
        "() => [...document.querySelectorAll('#form [role=tab], #form .overflow-dropdown button')]"
        ".find((tab) => tab.textContent.trim() === 'Tools').click()"
    )
    page.wait_for_selector("#lw-tool-inspect", state="attached")


def ran(page):
    page.wait_for_function("!document.getElementById('lw-tool-run').disabled", timeout=60000)
    return page.inner_text("#lw-tool-result")


@pytest.fixture
def lora(server):
    said = {"ss_network_dim": "4", "ss_learning_rate": "0.0003", "ss_seed": "77", "ss_base_model_version": "sd_v1"}
    return loras.write(server.runs.parent / "files" / "style.safetensors", metadata=said)


def test_a_lora_is_inspected_and_fills_the_form(server, page, lora):
    page.get_by_label("Find a parameter").fill("trained lora tell")
    page.get_by_role("option", name="Inspect").wait_for()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Browse for LoRA").click()
    page.get_by_role("listbox", name="Folders and files").get_by_text("files").click()
    page.get_by_role("option", name=lora.name).click()
    assert page.get_by_label("LoRA", exact=True).input_value() == str(lora)
    page.get_by_label("LoRA", exact=True).focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#lw-tool-result table", timeout=60000)
    assert "Stable Diffusion 1.x" in ran(page)
    page.get_by_role("button", name="Train again from this LoRA").click()
    page.wait_for_selector("#lw-banner >> text=The form holds what this LoRA says")
    page.evaluate(
        "lorawright.opened = [...document.querySelectorAll('[role=tab]')].find((t) => t.textContent.trim() === 'Parameters').click()"
    )
    page.wait_for_selector("#field-seed input")
    assert shown(page, "seed") == "77"


def test_a_resize_names_its_output_reports_and_is_found_again_on_a_phone_too(server, page, lora):
    open_tools(page)
    page.get_by_role("tab", name="Resize").click()
    page.get_by_label("LoRA", exact=True).fill(str(lora))
    page.get_by_label("Rank", exact=True).fill("2")
    out = lora.with_name("style-resized.safetensors")
    assert page.get_by_label("Output", exact=True).input_value() == str(out)
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_selector("#lw-tool-result table", timeout=60000)
    assert len(load_file(out)[f"{loras.TO_Q}.lora_down.weight"]) == 2
    page.set_viewport_size({"width": 390, "height": 800})
    page.reload()
    page.wait_for_selector("html[data-lorawright=ready]", state="attached")
    open_tools(page)
    page.wait_for_selector("#lw-tool-result >> text=Written")
    assert page.get_by_label("Tool", exact=True).input_value() == "resize"
    page.get_by_label("Tool", exact=True).select_option("Extract")
    page.get_by_label("Tool", exact=True).select_option("Resize")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_what_cannot_work_is_told_at_its_field_and_nothing_is_started(server, page, lora):
    open_tools(page)
    page.get_by_role("tab", name="Inspect").click()
    page.keyboard.press("ArrowLeft")
    assert page.get_by_role("tab", name="Check this machine").get_attribute("aria-selected") == "true"
    page.get_by_role("tab", name="Merge LoRAs").click()
    page.get_by_role("button", name="Add a LoRA").click()
    page.get_by_label("LoRA 1", exact=True).fill(str(lora))
    page.get_by_label("LoRA 2", exact=True).fill("/etc/passwd")
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_selector("#lw-wrong-loras >> text=outside the folders")
    page.get_by_label("LoRA 2", exact=True).fill(str(lora))
    page.get_by_label("Strength of LoRA 2").fill("half")
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_selector("#lw-wrong-strengths >> text=“half” cannot be a strength")
    assert page.locator("#lw-tool-form [aria-invalid]").get_attribute("id") == "lw-strength-1"
    page.get_by_label("Strength of LoRA 1").fill("0,8")
    page.get_by_label("Strength of LoRA 2").fill(" -1 ")
    page.get_by_label("Rank", exact=True).fill("few")
    with page.expect_request(lambda request: "tool_start" in (request.post_data or "")) as asked:
        page.get_by_role("button", name="Run", exact=True).click()
    assert asked.value.post_data_json["data"]["entries"]["strengths"] == "0.8,-1"
    page.wait_for_selector("#lw-wrong-rank >> text=a whole number")
    assert not (server.runs / "tools" / "pid").exists()
    page.get_by_role("tab", name="Extract").click()
    output = page.get_by_label("Output", exact=True)
    page.get_by_label("Tuned", exact=True).fill("/models/tuned.safetensors")
    assert output.input_value() == "/models/tuned-difference.safetensors"
    page.get_by_label("Tuned", exact=True).fill("embedded:base.safetensors")
    assert output.input_value() == "", "there it could not be written"
    model = lora.with_name("captioner")
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "florence2"}')
    page.get_by_role("tab", name="Caption images").click()
    assert not page.get_by_label("Detail", exact=True).is_visible()
    page.get_by_label("Captioning model", exact=True).fill(str(model))
    page.get_by_label("Detail", exact=True).wait_for()
    assert not page.get_by_label("Threshold", exact=True).is_visible()
    run = Run(server.runs / "20260101-000000-new")
    run.output.mkdir(parents=True)
    EventLog(run.events).emit(Saved(str(loras.write(run.output / "new.safetensors")), 1, 1, "final"))
    page.get_by_role("tab", name="Inspect").click()
    page.get_by_label("LoRA", exact=True).focus()
    page.wait_for_selector("#lw-loras option[value$='new.safetensors']", state="attached")


def test_this_machine_is_checked_from_the_page(page):
    open_tools(page)
    page.get_by_role("tab", name="Check this machine").click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("rowheader", name="runs folder").wait_for(timeout=60000)
    page.wait_for_selector("#lw-tool-result >> text=All is well.", timeout=60000)
    assert "can be written to" in page.inner_text("#lw-tool-result")
    page.reload()
    page.wait_for_selector("html[data-lorawright=ready]", state="attached")
    open_tools(page)
    page.get_by_role("rowheader", name="disk").wait_for()
    assert page.get_by_role("rowheader").count() == 3
