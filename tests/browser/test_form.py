import json

import pytest
from PIL import Image

from tests.browser.conftest import drafted, eventually, open_tab, set_text, shown, wait_ready

OLD = {
    "sample_prompts": "a\nb",
    "v2": True,
    "learning_rate": "fast",
    "network_dim": "16",
    "xformers": True,
    "nonsense": [1],
    "description": "From the wild.",
}


def put_preset(server, name, values):
    folder = server.runs / "presets"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(values))


PRESETS = {
    "old": OLD,
    "wrong": {"learning_rate": "fast", "keep_tokens": -1},
    "constant": {"lr_scheduler": "constant"},
    "hub": dict.fromkeys(("model_list", "pretrained_model_name_or_path"), "runwayml/stable-diffusion-v1-5"),
    "mine": {"network_dim": 32, "learning_rate": "1e-4", "cache_latents": False, "epoch": ""},
}


@pytest.fixture
def server(server):
    """With presets that the page lists from its start."""
    for name, values in PRESETS.items():
        put_preset(server, name, values)
    return server


@pytest.fixture
def page(page):
    if not page.evaluate("document.querySelector(`#lw-preset [value='own/old']`) !== null"):
        page.reload()
        wait_ready(page)
    return page


def load(page, name):
    page.select_option("#lw-preset", f"own/{name}")
    page.get_by_role("button", name="Load", exact=True).click()
    page.wait_for_selector(f"#lw-banner >> text=Loaded “{name}”")


def test_a_preset_fills_every_tab_and_tells_what_became_of_its_keys(page):
    open_tab(page, "Samples")
    set_text(page, "sample_sampler", "ddim")
    load(page, "old")
    banner = page.inner_text("#lw-banner")
    assert "From the wild." in banner
    for words in ("converted", "unknown", "nonsense", "Learning rate"):
        assert words in banner
    assert shown(page, "sample_prompts") == "a\nb"
    assert shown(page, "sample_sampler") == "euler_a", "what the preset does not name goes back to its default"
    open_tab(page, "Parameters")
    assert shown(page, "network_dim") == "16"
    open_tab(page, "Source model")
    assert page.get_by_label("v2", exact=True).is_checked()
    page.get_by_role("button", name="Undo").click()
    page.wait_for_function("!document.querySelector('#lw-banner').textContent")
    assert not page.get_by_label("v2", exact=True).is_checked()
    open_tab(page, "Samples")
    assert shown(page, "sample_sampler") == "ddim"


def test_the_banner_names_the_control_and_a_click_focuses_it(page):
    load(page, "wrong")
    told = page.evaluate(
        "() => { for (const id of ['lw-check', 'lw-reset']) document.getElementById(id).click();"
        " return document.getElementById('lw-banner').textContent; }"
    )
    assert "One thing at a time" in told  # nothing is reset
    page.wait_for_selector("#lw-banner >> text=2 things stand in the way")
    for width in (1440, 390):
        page.set_viewport_size({"width": width, "height": 900})
        page.locator("#lw-banner").get_by_role("button", name="Learning rate", exact=True).click()
        page.wait_for_function("document.activeElement.closest('.field')?.id === 'field-learning_rate'")
        assert page.locator("#field-learning_rate input").get_attribute("aria-invalid") is not None
        # This one is hidden while captions are not shuffled; the banner shows it all the same.
        page.locator("#lw-banner").get_by_role("button", name="Keep n tokens").click()
        page.wait_for_function("document.activeElement.closest('.field')?.id === 'field-keep_tokens'")


def test_a_change_survives_a_reload_and_is_marked(server, page):
    assert page.inner_text("#lw-changed") == "all default"
    open_tab(page, "Parameters")
    set_text(page, "network_dim", "32")
    page.get_by_label("Cache latents", exact=True).uncheck()
    page.wait_for_selector("#lw-changed >> text=2 changed")
    eventually(lambda: str(drafted(server).get("network_dim")) == "32")
    dots = page.evaluate(
        "[...document.querySelectorAll('.lw-dot')].filter(dot => dot.offsetParent).map(dot => dot.parentElement.id)"
    )
    assert dots == ["field-cache_latents", "field-network_dim"]
    page.evaluate("window.unhurried = true")
    set_text(page, "epoch", "7")
    page.wait_for_selector("#lw-changed >> text=3 changed")
    page.reload()  # sooner than what was typed last is sent by itself
    wait_ready(page)
    assert page.inner_text("#lw-changed") == "3 changed"
    assert page.get_by_role("tab", selected=True).all_inner_texts() == ["Parameters", "Basic"], "where it was left"
    open_tab(page, "Parameters")
    assert shown(page, "network_dim") == "32"
    assert not page.get_by_label("Cache latents", exact=True).is_checked()


def test_pasted_and_deleted_text_counts_as_a_change(page):
    box = page.locator("#field-training_comment input")
    box.evaluate("box => { box.focus(); document.execCommand('insertText', false, 'pasted'); }")
    page.wait_for_selector("#lw-changed >> text=1 changed")
    box.press("Control+A")
    box.press("Backspace")
    page.wait_for_selector("#lw-changed >> text=all default")


def test_a_number_that_means_the_default_is_no_change(page):
    open_tab(page, "Parameters")
    set_text(page, "learning_rate", "1e-4")
    set_text(page, "epoch", "")
    set_text(page, "seed", "3")
    set_text(page, "unet_lr", "")  # blank means: as the learning rate
    page.wait_for_selector("#lw-changed >> text=2 changed")


def test_a_preset_of_how_to_train_leaves_the_image_folder_that_was_entered(page):
    open_tab(page, "Folders")
    set_text(page, "train_data_dir", "/my/cats")
    load(page, "constant")
    assert "Kept as you entered it: Image folder" in page.inner_text("#lw-banner")
    assert shown(page, "train_data_dir") == "/my/cats"


def test_controls_come_and_go_with_what_they_depend_on(page):
    open_tab(page, "Parameters")
    cycles, warmup = page.locator("#field-lr_scheduler_num_cycles"), page.locator("#field-lr_warmup")
    assert cycles.is_hidden() and warmup.is_visible()
    page.locator("#field-lr_scheduler input").click()
    page.get_by_role("option", name="cosine_with_restarts").click()
    cycles.wait_for(state="visible")
    load(page, "constant")
    cycles.wait_for(state="hidden")
    warmup.wait_for(state="hidden")


def test_a_bad_value_is_marked_while_it_is_typed(page):
    open_tab(page, "Parameters")
    set_text(page, "epoch", "many")
    page.wait_for_selector("#field-epoch input[aria-invalid]")
    assert "whole number" in page.evaluate(
        "getComputedStyle(document.getElementById('field-epoch'), '::after').content"
    )
    set_text(page, "network_dim", "none")
    page.get_by_role("button", name="Check", exact=True).click()
    page.wait_for_selector("#lw-banner >> text=2 things stand in the way")
    set_text(page, "network_dim", "8")
    page.wait_for_selector("#lw-banner >> text=One thing stands in the way")
    set_text(page, "epoch", "3")
    page.wait_for_selector("#field-epoch input:not([aria-invalid])")
    page.wait_for_selector("#lw-banner:empty", state="attached")

    open_tab(page, "Folders")
    set_text(page, "train_data_dir", "/there/is/no/such/folder")
    page.wait_for_selector("#field-train_data_dir input[aria-invalid]")
    set_text(page, "output_name", "other")  # the mark of the path stays while another field is typed in
    page.wait_for_timeout(400)  # by then the page has asked anew
    assert page.locator("#field-train_data_dir input[aria-invalid]").count() == 1
    set_text(page, "train_data_dir", "")
    page.wait_for_selector("#field-train_data_dir input:not([aria-invalid])")


def test_help_opens_by_keyboard_and_by_mouse(page):
    tip = page.get_by_role("tooltip")
    page.get_by_role("button", name="Help for VAE").hover()
    assert "Another VAE" in tip.inner_text()
    page.mouse.move(5, 700)
    tip.wait_for(state="hidden")
    page.get_by_label("VAE", exact=True).focus()
    page.keyboard.press("F1")
    assert "Another VAE" in tip.inner_text()
    page.keyboard.press("Escape")
    tip.wait_for(state="hidden")


def test_the_keyboard_stops_once_at_a_field(page):
    page.locator("#field-metadata_author input").focus()
    for key in ("metadata_description", "metadata_license", "metadata_tags"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('.field').id") == f"field-{key}"


def test_a_parameter_is_found_by_its_label_its_key_and_its_help(page):
    page.keyboard.press("Control+K")
    found = page.get_by_role("listbox", name="Parameters found").get_by_role("option")
    for words, first in (
        ("network rank", "Network Rank (Dimension)"),
        ("lr_warmup", "LR warmup"),
        ("linocut or no such thing", "Nothing found."),
        ("forget intermediate", "Gradient checkpointing"),
        ("regularisation directory", "Regularisation folder"),
        ("LR # cycles", "LR number of cycles"),
    ):
        page.keyboard.type(words)
        page.wait_for_function(
            "first => document.querySelector('#lw-found li')?.textContent.startsWith(first)", arg=first
        )
        page.keyboard.press("Escape")
        found.first.wait_for(state="detached")
    page.keyboard.type("noise")
    page.keyboard.press("ArrowDown")
    key = page.locator("#lw-found [aria-selected=true] code").inner_text()
    assert key.startswith("noise_") and key != page.locator("#lw-found li code").first.inner_text()
    page.keyboard.press("Enter")
    page.wait_for_function("key => document.activeElement.closest('.field')?.id === `field-${key}`", arg=key)
    assert found.count() == 0


def test_a_changed_field_goes_back_to_its_default_by_its_dot_and_comes_back_by_undo(page):
    open_tab(page, "Parameters")
    assert page.get_by_role("button", name="Reset Network Rank").is_hidden()
    set_text(page, "network_dim", "32")
    page.get_by_label("Cache latents", exact=True).uncheck()
    page.wait_for_selector("#lw-changed >> text=2 changed")
    page.locator("#field-network_dim").get_by_role("button", name="Reset Network Rank").click()
    page.wait_for_selector("#lw-changed >> text=1 changed")
    assert shown(page, "network_dim") == "8"
    page.get_by_role("button", name="Undo").click()
    page.wait_for_selector("#lw-changed >> text=2 changed")
    assert shown(page, "network_dim") == "32"
    # By keyboard it is in the list of what is changed.
    page.locator("#lw-changed").click()
    page.locator("#lw-banner").get_by_role("button", name="Reset Cache latents").press("Enter")
    page.wait_for_selector("#lw-changed >> text=1 changed")
    assert page.get_by_label("Cache latents", exact=True).is_checked()


def test_what_a_preset_would_change_is_told_before_it_is_loaded(page):
    page.select_option("#lw-preset", "own/mine")
    page.get_by_role("button", name="Diff").click()
    page.wait_for_selector("#lw-banner >> text=“mine” would change 2 parameters")
    lines = page.locator("#lw-banner li").all_inner_texts()
    assert [line.strip() for line in lines] == ["Cache latents on → off", "Network Rank (Dimension) 8 → 32"]
    assert page.inner_text("#lw-changed") == "all default"
    page.get_by_role("button", name="Load it").click()
    page.wait_for_selector("#lw-changed >> text=2 changed")
    page.get_by_role("button", name="Diff").click()
    page.wait_for_selector("#lw-banner >> text=“mine” is what the form shows")


def test_what_changed_since_the_last_run_is_told_and_can_be_taken_back(server, page):
    run = server.runs / "20260101-000000-last"
    run.mkdir()
    (run / "config.json").write_text('{"network_dim": 16}')
    (run / "exit").write_text('{"code": 0}')
    open_tab(page, "Parameters")
    set_text(page, "epoch", "3")
    page.wait_for_selector("#lw-changed >> text=1 changed")
    page.locator("#lw-changed").click()
    page.get_by_role("button", name="Since the last run").click()
    page.wait_for_selector(f"#lw-banner >> text=Changed since {run.name}")
    lines = page.locator("#lw-banner li").all_inner_texts()
    assert [line.strip() for line in lines] == ["Epoch 1 → 3", "Network Rank (Dimension) 16 → 8"]
    page.get_by_role("button", name="Back to its settings").click()
    page.wait_for_function("document.querySelector('#field-network_dim input').value === '16'")
    assert shown(page, "epoch") == "1"


def test_the_preset_is_no_longer_named_when_the_form_was_filled_with_something_else(page):
    load(page, "mine")
    open_tab(page, "Config (JSON)")
    page.get_by_label("Settings as JSON").fill('{"network_dim": 12}')
    page.get_by_role("button", name="Apply").click()
    page.wait_for_selector("#lw-banner >> text=The form shows what the JSON says; what it leaves out is at its default")
    assert page.locator("#lw-preset").input_value() == ""
    assert page.get_by_role("button", name="Load", exact=True).is_disabled()
    page.reload()
    wait_ready(page)
    assert page.locator("#lw-preset").input_value() == ""
    load(page, "mine")
    assert page.locator("#lw-preset").input_value() == "own/mine"


def test_leaving_a_dropdown_by_tab_closes_its_list(page):
    page.locator("#field-save_precision input").click()
    page.get_by_role("option", name="bf16").wait_for()
    page.keyboard.press("Tab")
    page.get_by_role("option", name="bf16").wait_for(state="detached")


def test_saving_asks_before_it_replaces_and_the_preset_comes_back_until_it_is_deleted(server, page):
    set_text(page, "training_comment", "first")
    for comment, replaces in (("first", False), ("second", True)):
        set_text(page, "training_comment", comment)
        page.get_by_role("button", name="Save preset").click()
        page.get_by_label("Name of the preset").fill("Mine (ü)")
        page.get_by_label("Description of the preset").fill("For cats.")
        page.keyboard.press("Enter")
        if replaces:
            page.get_by_role("button", name="Replace").click()
        page.wait_for_selector("#lw-banner >> text=Saved as")
        page.get_by_role("button", name="Dismiss").click()
    page.get_by_role("button", name="Reset to defaults").click()
    page.wait_for_selector("#lw-changed >> text=all default")
    assert shown(page, "training_comment") == ""
    load(page, "Mine (ü)")
    assert "For cats." in page.inner_text("#lw-banner")
    assert shown(page, "training_comment") == "second"
    assert page.evaluate("document.getElementById('lw-preset').selectedOptions[0].textContent") == "Mine (ü)"
    page.get_by_role("button", name="Delete the preset").click()
    page.locator("dialog").get_by_role("button", name="Delete", exact=True).click()
    page.wait_for_selector("#lw-banner >> text=Deleted “Mine (ü)”")
    assert not (server.runs / "presets" / "Mine (ü).json").exists()
    assert page.locator("#lw-preset").input_value() == "" and page.locator("#lw-delete").is_hidden()
    assert shown(page, "training_comment") == "second"


def test_a_path_is_picked_in_the_browser_of_folders(page):
    open_tab(page, "Folders")
    page.get_by_role("button", name="Browse for Image folder").click()
    page.get_by_role("option", name="files").click()
    page.get_by_role("option", name="10_cat").click()
    page.wait_for_selector("text=1 image in this folder")
    page.get_by_role("button", name="Use this folder").click()
    assert shown(page, "train_data_dir").endswith("10_cat")
    page.wait_for_selector("#lw-changed >> text=1 changed")


def test_what_is_called_as_the_text_is_found_first(page):
    page.get_by_label("Find a parameter").fill("Noise offset")
    page.keyboard.press("Enter")
    page.wait_for_function("document.activeElement.closest('.field')?.id === 'field-noise_offset'")


@pytest.mark.proves("model_list")
def test_a_model_that_was_found_can_be_picked_and_typing_a_path_ends_the_pick(page):
    page.locator("#field-model_list input").click()
    page.get_by_role("option", name="toy.safetensors").click()
    path = page.locator("#field-pretrained_model_name_or_path input")
    page.wait_for_function(
        "document.querySelector('#field-pretrained_model_name_or_path input').value.endsWith('toy.safetensors')"
    )
    path.fill("/elsewhere")
    path.press("Tab")
    page.wait_for_function("document.querySelector('#field-model_list input').value === 'custom'")
    assert path.input_value() == "/elsewhere"


def test_a_pick_of_a_preset_that_is_not_offered_ends_with_its_path(page):
    load(page, "hub")
    pick = page.locator("#field-model_list input")
    path = page.locator("#field-pretrained_model_name_or_path input")
    assert pick.input_value() == path.input_value() == "runwayml/stable-diffusion-v1-5"
    path.fill("")
    path.press("Tab")
    page.wait_for_function("document.querySelector('#field-model_list input').value === 'custom'")
    assert path.input_value() == ""


def test_the_json_of_the_form_can_be_edited_discarded_copied_or_opened_and_errors_have_a_line(page):
    open_tab(page, "Config (JSON)")
    box = page.get_by_label("Settings as JSON")
    page.wait_for_function("document.getElementById('lw-json').value.includes('network_dim')")
    box.fill('{"network_dim": 12,\n "epoch" 3}')
    page.get_by_text("edited, not applied").wait_for()
    page.get_by_role("button", name="Discard my edit").click()
    page.wait_for_function("document.getElementById('lw-json').value.includes('train_data_dir')")
    assert page.get_by_text("edited, not applied").count() == 0
    for clipboard in ("undefined", "{ writeText: () => Promise.reject() }"):  # as where the page is not secure
        page.evaluate(f"Object.defineProperty(navigator, 'clipboard', {{ value: {clipboard}, configurable: true }})")
        page.get_by_role("button", name="Copy", exact=True).click()
        page.locator("#lw-json-told", has_text="Copied.").wait_for()
        page.evaluate("document.getElementById('lw-json-told').textContent = ''")
    for holds, told in (('{"network_dim": 20}', "The form shows what mine.json says"), ("{20", "Line 1")):
        file = {"name": "mine.json", "mimeType": "application/json", "buffer": holds.encode()}
        page.get_by_label("Open file…").set_input_files(file)
        page.wait_for_selector(f"#lw-banner >> text={told}")
        page.wait_for_function(
            "(text) => document.getElementById('lw-json').value.includes(text)", arg=holds.strip("{}")
        )
    assert box.input_value() == "{20"
    box.fill('{"network_dim": 12,\n "epoch" 3}')
    page.get_by_role("button", name="Apply").click()
    page.wait_for_selector("#lw-banner >> text=Line 2")
    box.fill('{"network_dim": 12,\n "epoch": 3, "other": 1}')
    page.get_by_role("button", name="Apply").click()
    page.wait_for_selector("#lw-changed >> text=2 changed")
    page.wait_for_function("document.getElementById('lw-json').value.includes('\"other\": 1')")
    open_tab(page, "Parameters")
    assert (shown(page, "network_dim"), shown(page, "epoch")) == ("12", "3")


def test_what_will_be_trained_follows_the_form_and_the_dataset_shows_each_image_with_its_crop(server, page, tmp_path):
    for name, size, caption in (("a.png", (64, 64), "cat, grey fur"), ("b.png", (128, 64), "dog, grey fur")):
        (tmp_path / "10_x").mkdir(exist_ok=True)
        Image.new("RGB", size, "teal").save(tmp_path / "10_x" / name)
        (tmp_path / "10_x" / name).with_suffix(".txt").write_text(caption)
    square = {"train_data_dir": str(tmp_path), "caption_extension": ".txt", "max_resolution": "64,64"}
    put_preset(server, "mine", square | {"enable_bucket": False})
    page.reload()
    wait_ready(page)
    load(page, "mine")
    page.wait_for_selector("#lw-outlook >> text=2 images, 20 seen in an epoch · 20 steps in 1 epoch · 102 modules")
    open_tab(page, "Dataset")
    page.wait_for_selector("#lw-dataset-sum >> text=20 steps")
    page.wait_for_selector("#lw-images img >> nth=1")
    assert page.locator(".lw-crop").nth(1).get_attribute("style") == "left: 25%; top: 0%; width: 50%; height: 100%;"
    assert page.locator("#lw-images textarea").nth(0).input_value().startswith("cat, grey fur")
    page.get_by_role("button", name="dog 1").click()
    page.wait_for_selector("#lw-dataset-count >> text=1 of 2 images")
    assert page.locator("#lw-images figure >> visible=true").count() == 1
    open_tab(page, "Parameters")
    set_text(page, "epoch", "4")
    page.wait_for_selector("#lw-outlook >> text=80 steps in 4 epochs")


def test_a_phone_shows_every_tab_and_never_scrolls_sideways(page):
    page.set_viewport_size({"width": 390, "height": 844})
    schemes = ["light", "dark"]
    for tab in ("Folders", "Parameters", "Advanced", "Samples", "Dataset", "Config (JSON)", "Runs", "Tools"):
        page.get_by_role("tab", name=tab, exact=True).click()  # nothing lies over it
        open_tab(page, tab)
        for scheme in schemes:
            page.emulate_media(color_scheme=scheme)
            page.wait_for_selector("body.dark" if scheme == "dark" else "body:not(.dark)")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, f"{tab}, {scheme}"
        schemes.reverse()
    page.emulate_media(color_scheme="light")


def test_every_control_has_a_name(page):
    for tabs in (
        ["Source model"],
        ["Folders"],
        ["Parameters", "Basic"],
        ["Advanced"],
        ["Samples"],
        ["Dataset"],
        ["Config (JSON)"],
        ["Runs"],
    ):
        open_tab(page, *tabs)
        nameless = page.evaluate(
            """() => [...document.querySelectorAll('input, textarea, select, button')].filter(e => e.offsetParent)
               .filter(e => !(e.labels?.[0]?.textContent || e.ariaLabel || e.textContent || e.title).trim())
               .map(e => e.outerHTML.slice(0, 120))"""
        )
        assert nameless == []
