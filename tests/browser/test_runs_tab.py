"""The Runs tab: repeat, resume, files, delete, compare, and the queue."""

import json
import shutil
import signal

from tests.browser.conftest import drafted, eventually, open_tab, set_text, shown, wait_state
from tests.browser.test_live import start
from trainer.run import Run
from trainer.tools import contact


def enter(page, name=None, words=None, rank=None):
    for tab, key, text in (
        ("Folders", "output_name", name),
        ("Parameters", "network_dim", rank),
        ("Source model", "training_comment", words),
    ):
        if text is not None:
            open_tab(page, tab)
            set_text(page, key, text)


def ended(server, page, words, state="done", name="cat"):
    enter(page, name, words)
    count = len(list(server.runs.glob("2*")))
    start(page, words)
    eventually(lambda: len(list(server.runs.glob("2*"))) > count)
    wait_state(page, "starting", "running")
    wait_state(page, state)
    newest = max(server.runs.glob("2*"), key=lambda folder: folder.stat().st_mtime)
    eventually((newest / "exit").exists)
    return newest


def row(page, folder):
    found = page.locator("#lw-runs tr").filter(has=page.get_by_label(f"Repeat {folder.name}", exact=True))
    found.wait_for()
    return found


def told_in(page, label):
    """A table of the comparison: each row's cells by their columns' names, by the row's name."""
    table = page.locator(f"#lw-compare [aria-label='{label}'] table")
    table.wait_for()
    columns = table.locator("thead th").all_inner_texts()[1:]
    return {
        line.locator("th").inner_text().strip(): dict(zip(columns, line.locator("td").all_inner_texts(), strict=True))
        for line in table.locator("tbody tr").all()
    }


def test_a_crashed_run_goes_on_from_its_state_with_one_button(server, page):
    crashed = ended(server, page, "steps=8 state crash", "crashed")
    enter(page, words="something else")
    page.locator("#lw-resume").click()
    eventually(lambda: len(list(server.runs.glob("2*"))) == 2)
    open_tab(page, "Source model")
    assert shown(page, "training_comment") == "steps=8 state crash"
    again = max(server.runs.glob("2*"), key=lambda folder: folder.stat().st_mtime)
    assert json.loads((again / "config.json").read_text())["resume"] == str(crashed / "output" / "last-state")
    eventually(lambda: drafted(server).get("training_comment") == "steps=8 state crash")
    assert not drafted(server).get("resume"), "the state goes when training has gone on from it"
    eventually((again / "exit").exists)
    wait_state(page, "done", "crashed")
    shutil.rmtree(crashed / "output" / "last-state")
    enter(page, words="something else")
    eventually(lambda: drafted(server)["training_comment"] == "something else")
    open_tab(page, "Runs")
    assert f"Went on from {crashed.name}" in row(page, again).inner_text()
    assert f"Went on as {again.name}" in row(page, crashed).inner_text()
    row(page, again).get_by_role("button", name="Repeat").click()
    page.wait_for_selector("#lw-banner >> text=The form now holds the settings of")
    eventually(lambda: drafted(server)["training_comment"] == "steps=8 state crash")
    assert not drafted(server).get("resume")


def test_what_cannot_be_resumed_now_leaves_the_form_alone_and_what_never_can_says_why(server, page):
    open_tab(page, "Runs")
    page.wait_for_selector("text=No runs yet. Each training that you start is listed here")
    hopeless = ended(server, page, "steps=8 crash", "crashed")
    crashed = ended(server, page, "steps=8 state crash", "crashed")
    start(page, "steps=3000")
    wait_state(page, "running")
    open_tab(page, "Runs")
    assert "saved no state. For the next run, switch on Save training state" in row(page, hopeless).inner_text()
    assert hopeless.name in row(page, hopeless).inner_text()
    row(page, crashed).get_by_role("button", name="Resume").click()
    page.locator("#lw-banner").get_by_role("button", name="Add to the queue").click()
    page.wait_for_selector("#lw-banner >> text=In the queue")
    page.wait_for_selector("#lw-next >> text=/cat(-2)? starts at once/")
    (queued,) = (folder.parent for folder in server.runs.glob("2*/queued"))
    assert json.loads((queued / "config.json").read_text())["resume"] == str(crashed / "output" / "last-state")
    open_tab(page, "Source model")
    assert shown(page, "training_comment") == "steps=3000"


def test_a_run_is_repeated_its_files_fetched_and_then_deleted_with_care(server, page):
    run = ended(server, page, "steps=4")
    (run / "notes.txt").write_text("mine")
    enter(page, words="something else")
    open_tab(page, "Runs")
    assert row(page, run).get_by_role("button", name="Resume").count() == 0
    row(page, run).get_by_role("button", name="Repeat").click()
    page.wait_for_selector("#lw-banner >> text=The form now holds the settings of")
    open_tab(page, "Source model")
    assert shown(page, "training_comment") == "steps=4"
    open_tab(page, "Runs")
    row(page, run).get_by_role("button", name="Files").click()
    with page.expect_download() as download:
        page.locator("dialog").get_by_role("button", name="last.safetensors").click()
    assert download.value.path().read_bytes().startswith(b"not really")
    page.keyboard.press("Escape")
    row(page, run).get_by_role("button", name="Delete").click()
    text = page.locator("dialog").inner_text()
    assert "output/last.safetensors" in text and "did not write it: notes.txt" in text
    page.get_by_role("button", name="Keep").click()
    assert (run / "config.json").exists()
    row(page, run).get_by_role("button", name="Choose a checkpoint").click()
    page.locator("#lw-choose section").wait_for()
    row(page, run).get_by_role("button", name="Delete").click()
    page.locator("dialog").get_by_role("button", name="Delete", exact=True).click()
    page.locator("#lw-choose section").wait_for(state="detached")
    page.wait_for_selector(f"#lw-banner >> text=Deleted {run.name}.")
    eventually(lambda: [path.name for path in run.iterdir()] == ["notes.txt"])


def test_runs_are_compared_side_by_side(server, page):
    first = ended(server, page, "steps=8", name="first")
    enter(page, rank="16")
    second = ended(server, page, "steps=16 loss=2", name="second")
    open_tab(page, "Runs")
    compare = page.get_by_role("button", name="Compare the chosen")
    for folder in (first, second):
        row(page, folder).wait_for()
        assert compare.is_disabled()
        page.get_by_label(f"Compare {folder.name}").check()
    compare.click()
    told = told_in(page, "Results")
    assert told["first"]["Network Rank (Dimension)"] == "8" and told["second"]["Network Rank (Dimension)"] == "16"
    assert told["second"]["Training comment"] == "steps=16 loss=2" and "step 16" in told["second"]["Last loss"]
    assert len(told["first"]) == 7  # and no other setting differs
    page.wait_for_function(
        "[...document.querySelectorAll('#lw-compare img')].filter((i) => i.naturalWidth).length === 2 + 4"
    )
    samples = page.locator("#lw-compare [aria-label=Samples]")
    assert samples.locator("figcaption").all_inner_texts() == ["step 8", "step 8", "step 16", "step 16"]
    slider = page.get_by_label("Step of the samples compared")
    slider.press("Home")
    assert set(samples.locator("figcaption").all_inner_texts()) == {"step 0"}
    slider.fill("3")
    assert page.locator(".lw-steps output").inner_text() == "up to step 6"
    assert samples.locator("figcaption").all_inner_texts() == ["step 6", "step 6", "step 4", "step 4"]
    samples.locator(".lw-picture").first.click()
    page.keyboard.press("ArrowDown")
    assert "second · step 4" in page.locator("dialog figcaption").inner_text()
    page.keyboard.press("Escape")
    assert page.locator(".lw-legend").inner_text().count("at step") == 2
    canvas = page.locator(".lw-curves")
    canvas.focus()
    page.keyboard.press("Home")
    assert page.locator(".lw-legend").inner_text().count("at step 1\n") == 1
    page.keyboard.press("End")
    assert "at step 8" in page.locator(".lw-legend li").nth(0).inner_text()
    assert "at step 16" in page.locator(".lw-legend li").nth(1).inner_text()
    canvas.hover(position={"x": 46, "y": 90})
    assert "first: " in canvas.get_attribute("aria-valuetext") and canvas.get_attribute("aria-valuenow") == "1"
    coloured = """() => {
        const canvas = document.querySelector('.lw-curves');
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        const drawn = (...rgb) => {
            for (let i = 0; i < data.length; i += 4)
                if (data[i + 3] > 200 && rgb.every((value, k) => Math.abs(data[i + k] - value) < 30)) return true;
            return false;
        };
        return drawn(79, 70, 229) && drawn(180, 83, 9);
    }"""
    eventually(lambda: page.evaluate(coloured))
    row(page, second).get_by_role("button", name="Delete").click()
    page.locator("dialog").get_by_role("button", name="Delete", exact=True).click()
    page.locator("#lw-compare section").wait_for(state="detached")


def test_settings_wait_in_the_queue_change_places_and_start_in_turn_also_behind_a_killed_server(server, page):
    start(page, "steps=3000 pause=0.02")
    wait_state(page, "running")
    for name in ("second", "third", "fourth"):
        enter(page, name, "steps=3")
        page.get_by_role("button", name="Add to queue").click()
        page.wait_for_selector("#lw-banner >> text=In the queue: it starts when what runs has ended")
        eventually(lambda name=name: list(server.runs.glob(f"*-{name}/queued")))
        page.get_by_role("button", name="Dismiss").click()
    assert "running" in page.inner_text("#lw-pill")
    open_tab(page, "Runs")
    page.wait_for_selector("#lw-runs tr >> nth=3")
    queued = page.locator("#lw-runs tr:has([data-state=queued])")
    assert queued.locator(".lw-pill").all_inner_texts() == ["queued 1", "queued 2", "queued 3"]
    queued.nth(2).get_by_role("button", name="Earlier").click()
    eventually(lambda: "fourth" in queued.nth(1).inner_text())
    queued.nth(2).get_by_role("button", name="Remove").click()
    eventually(lambda: queued.count() == 2)
    server.stop(signal.SIGKILL)
    assert "unreachable" in wait_state(page, "unreachable")
    assert "not affected" in page.inner_text("#lw-sentence")
    page.get_by_role("button", name="Check", exact=True).click()
    page.wait_for_selector("#lw-banner >> text=The server does not answer")
    server.start()
    wait_state(page, "running")
    page.wait_for_selector("#lw-banner:empty", state="attached")
    page.get_by_role("button", name="Stop", exact=True).click()
    eventually(lambda: len(list(server.runs.glob("2*/output/last.safetensors"))) == 3, 40)
    began = {folder.name[16:]: folder.name[:15] for folder in server.runs.glob("2*")}
    assert set(began) - {"second", "fourth"} and "third" not in began
    assert began["second"] <= began["fourth"] and not list(server.runs.glob("2*/queued"))


def test_a_sweep_is_checked_queued_and_ends_in_a_table(server, page):
    enter(page, "cat", "steps=2 pause=0.01")
    open_tab(page, "Folders")
    set_text(page, "train_data_dir", "embedded:images")
    open_tab(page, "Runs")
    page.get_by_text("Try several values: a sweep").click()
    values = page.locator("#lw-sweep-values-1")
    told = page.locator("#lw-sweep-told-1")
    values.fill("4, 16")
    assert told.inner_text() == "Of which parameter? Enter its label or key."
    assert page.locator("#lw-sweep-start").is_disabled()
    page.locator("#lw-sweep-field-1").fill("network_dim")
    page.wait_for_selector("#lw-sweep-about-1 >> text=in the form: 8")
    for text, reason in (("4,4", "One value only: enter at least two that differ."), (",", "There is no value here.")):
        values.fill(text)
        assert told.inner_text() == reason and page.locator("#lw-sweep-start").is_disabled()
    values.fill("0, 16")
    assert told.inner_text() == "with commas between"
    press = page.locator("#lw-sweep-start")
    press.click()
    page.wait_for_selector("#lw-banner >> text=with Network Rank (Dimension) 0:")
    assert not list(server.runs.glob("2*"))
    page.locator("#lw-sweep-field-2").fill("max_resolution")
    page.wait_for_selector("#lw-sweep-told-2 >> text=with semicolons between")
    page.wait_for_selector("#lw-banner:empty", state="attached")
    page.locator("#lw-sweep-field-2").fill("")
    values.fill("4, 16")
    assert press.inner_text() == "Check and queue 2 runs"
    press.click()
    page.wait_for_selector("#lw-banner >> text=2 runs are in the queue")
    assert "drawn since Seed is empty" in page.inner_text("#lw-banner")
    eventually(lambda: len(list(server.runs.glob("2*/output/last.safetensors"))) == 2, 30)
    page.wait_for_function("document.querySelectorAll('#lw-runs [data-state=done]').length === 2")
    page.locator("#lw-runs tr").first.get_by_role("button", name="Sweep").click()
    told = told_in(page, "Results")
    assert {name: row["Network Rank (Dimension)"] for name, row in told.items()} == {
        "cat-network_dim-4": "4",
        "cat-network_dim-16": "16",
    }
    assert all("last.safetensors" in row["File"] and "step 2" in row["Lowest loss"] for row in told.values())


def test_a_grid_is_shown_as_it_is_drawn_and_a_file_chosen_from_it(server, page):
    run = ended(server, page, "steps=4")
    (run / "grid").mkdir()
    index = {
        "rows": ["last.safetensors", "gone-epoch-01-step00000002.safetensors"],
        "at": [0, 1],
        "lines": "a cat --d 7",
    }
    index |= {"pictures": [[["a.png"], ["b.png"]], [["c.png"], ["d.png"]]]}
    contact.write(run / "grid", index | {"prompts": [{"prompt": "a cat", "seed": 7, "size": [96, 96]}]})
    (run / "grid" / "a.png").write_bytes(next((run / "samples").iterdir()).read_bytes())
    tools = Run(server.runs / "tools")
    tools.folder.mkdir()
    tools.config.write_text(json.dumps({"tool": "grid", "entries": {"output": str(run / "grid")}}))
    report = {"type": "report", "time": 0, "report": {"warnings": ["It is slow."]}}
    tools.events.write_text(json.dumps(report) + "\n")
    open_tab(page, "Runs")
    row(page, run).get_by_role("button", name="Choose a checkpoint").click()
    grid = page.locator("#lw-choose table")
    grid.get_by_role("button", name="a cat, last.safetensors at strength 0, open large").wait_for()
    assert grid.locator(".lw-none").count() == 3
    assert page.inner_text("#lw-choose .lw-note") == "It is slow."
    assert page.locator("#lw-choose [role=alert]").text_content() == "", "a warning is no failure"
    assert page.get_by_label("Prompts, one a line").input_value() == "a cat --d 7"
    page.get_by_label("Strengths").fill("0, one")
    assert (
        page.get_by_text("Numbers, as in 0, 0.5, 1.").is_visible()
        and page.locator("#lw-choose button:has-text('Draw')").is_disabled()
    )
    page.get_by_label("Strengths").fill("0, 1 1.0")
    assert page.get_by_role("button", name="Draw 2 pictures").is_enabled()
    grid.locator(".lw-picture").click()
    page.keyboard.press("ArrowRight")  # not drawn yet: the one in view stays
    assert "<lora:last:0>" in page.locator("dialog").inner_text()
    assert str(run / "output" / "last.safetensors") in page.locator("dialog").inner_text()
    with page.expect_download() as download:
        page.get_by_role("button", name="Use this one").click()
    assert download.value.suggested_filename == "last.safetensors"
    page.keyboard.press("Escape")
    page.get_by_label("Prompts, one a line").fill("a cat pause=60")
    page.set_viewport_size({"width": 1440, "height": 500})
    page.evaluate("scrollTo(0, 0)")
    page.get_by_role("button", name="Draw 2 pictures").focus()
    page.keyboard.press("Enter")
    page.locator("#lw-choose progress").wait_for()
    prompt = {"prompt": "a cat", "seed": 7, "size": [512, 512]}
    contact.write(run / "grid", index | {"prompts": [prompt], "lines": "a cat pause=60"})
    page.wait_for_function(
        "Math.abs(document.querySelector('#lw-choose [type=submit]').getBoundingClientRect().top - 62) < 10"
    )
    page.get_by_role("button", name="Stop", exact=True).locator("visible=true").click()
    page.locator("#lw-choose progress").wait_for(state="hidden")
    (run / "output" / "last.safetensors").unlink()
    page.get_by_role("button", name="Draw 2 pictures").click()
    page.wait_for_selector("#lw-choose .lw-wrong >> text=LoRAs: is empty, and the tool needs it.")
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate(LINES_OF_NAMES) == {"last": 1, "gone-": 1, "epoch-": 1, "01-": 1, "step00000002": 1}


LINES_OF_NAMES = """() => Object.fromEntries(
    [...document.querySelectorAll('.lw-contact tbody th > span')].flatMap((name) => [...name.childNodes])
        .filter((node) => node.nodeType === Node.TEXT_NODE)
        .map((node) => {
            const range = document.createRange();
            range.selectNode(node);
            return [node.data, new Set([...range.getClientRects()].map((line) => line.top)).size];
        }))"""
"""On how many lines each part of a file's name stands."""


def test_the_tab_fits_a_phone(server, page):
    run = ended(server, page, "steps=4")
    page.set_viewport_size({"width": 390, "height": 800})
    page.evaluate(
        "() => [...document.querySelectorAll('#form [role=tab], #form .overflow-dropdown button')].find((t) => t.textContent.trim() === 'Runs').click()"
    )
    row(page, run)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.get_by_role("button", name="Add to queue").is_visible()
