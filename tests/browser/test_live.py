import json
import os
import signal
import time
from itertools import pairwise

import psutil
import pytest

from tests.browser.conftest import eventually, open_tab, set_text, wait_ready, wait_state
from tests.browser.test_form import load, put_preset
from trainer.events import EventLog, Phase, Sample, Started, Step
from trainer.run import Run
from trainer.schema.memory import ON_A_CPU


def start(page, words):
    set_text(page, "training_comment", words)
    page.get_by_role("button", name="Start training").click()


def loss_is_drawn(page):
    """Whether the canvas holds pixels in the accent's colour."""
    return page.evaluate(
        """() => {
            const canvas = document.getElementById('lw-loss'), pen = canvas.getContext('2d');
            const data = pen.getImageData(0, 0, canvas.width, canvas.height).data;
            for (let i = 0; i < data.length; i += 4)
                if (data[i] < 110 && data[i + 1] < 100 && data[i + 2] > 200 && data[i + 3] > 200) return true;
            return false;
        }"""
    )


def written_run(server, name="20260101-000000-written", **step):
    """A run's folder as a trainer leaves it, kept alive by this process."""
    run = Run(server.runs / name)
    run.folder.mkdir()
    run.config.write_text("{}")
    run.pid.write_text(json.dumps({"pid": os.getpid(), "started": psutil.Process().create_time()}))
    return run


@pytest.fixture
def alive(server):
    """Runs written by a test; what makes them look alive is taken away before anything could kill us."""
    runs = []

    def make(*arguments):
        runs.append(written_run(server, *arguments))
        return runs[-1]

    yield make
    for run in runs:
        run.pid.unlink(missing_ok=True)


def test_a_run_from_start_to_download_through_reload_and_a_second_tab(server, visit):
    page = visit(server)
    start(page, "steps=1000 pause=0.02")
    assert "running" in wait_state(page, "running")
    page.wait_for_function("Number(document.getElementById('lw-progress').getAttribute('aria-valuenow')) > 35")
    assert "/1000" in page.inner_text("#lw-pill")
    for part in ("epoch", "it/s", "ETA", "3.0\u00a0GB"):
        assert part in page.inner_text("#lw-figures")
    assert loss_is_drawn(page)
    page.locator("#lw-try[aria-disabled=true][title*='while a run is going on']").dispatch_event("click")
    page.wait_for_selector("#lw-banner >> text=is still going on, and would be measured too")
    page.get_by_role("button", name="Sample now").click()
    page.wait_for_selector("#lw-samples img >> nth=3")
    eventually(lambda: page.evaluate("[...document.querySelectorAll('#lw-samples img')].every(i => i.naturalWidth)"))
    assert page.locator("#lw-samples figure").count() == 2
    assert page.locator("#lw-samples span", has_text="before").count() == 2
    assert "▶" in page.title()

    page.reload()
    wait_ready(page)
    wait_state(page, "running")
    eventually(lambda: loss_is_drawn(page))
    second = visit(server)
    wait_state(second, "running")
    second.get_by_role("button", name="Start training").click()
    second.wait_for_selector("#lw-banner >> text=still going on")
    for one in (page, second):
        one.wait_for_selector("#lw-others >> text=open twice")
    page.bring_to_front()  # behind another tab it draws once a second, and so does what clicks in it

    page.get_by_role("button", name="Stop", exact=True).click()
    assert "at step" in wait_state(page, "stopped")
    wait_state(second, "stopped")
    second.wait_for_function("!document.querySelector('#lw-banner').textContent")
    assert_the_file_is_marked_as_verified(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="last.safetensors").click()
    assert download.value.suggested_filename == "last.safetensors"
    assert download.value.path().read_bytes().startswith(b"not really weights")

    start(page, "steps=30")
    wait_state(page, "starting", "running")
    assert "30 steps" in wait_state(page, "done")
    assert "✓" in page.title()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert "fake trainer" in download.value.path().read_text()


def assert_the_file_is_marked_as_verified(page):
    """The newest file has a mark and a sentence; what was proved shows when it is asked for."""
    assert "last.safetensors ✓" in page.inner_text("#lw-saved")
    proof = page.locator("#lw-saved details")
    assert proof.locator("summary").inner_text() == "✓ loads in diffusers, ComfyUI"
    detail = proof.get_by_text("all numbers are finite")
    assert detail.is_hidden()
    proof.locator("summary").click()
    assert detail.is_visible() and proof.get_by_text("Other UI knows no LoKr.").is_visible()


def test_the_log_folds_progress_bars_and_can_be_paused(page, alive):
    run = alive()
    run.log.write_text("".join(f"line {n}\n" for n in range(100_000)) + "loading:  10%\rloading: 100%\n")
    log = page.locator("#lw-log")
    page.wait_for_function("document.getElementById('lw-log').textContent.includes('line 99999')")
    text = log.text_content()
    assert text.startswith("line ") and len(text) <= 65536
    assert "loading: 100%" in text and "10%" not in text.replace("100%", "")
    log.evaluate("log => { log.scrollTop = 0; }")
    page.get_by_role("button", name="Paused").wait_for()
    with run.log.open("a") as file:
        file.write("something new\n")
    page.wait_for_function("document.getElementById('lw-log').textContent.includes('something new')")
    assert log.evaluate("log => log.scrollTop") == 0
    page.get_by_role("button", name="Paused").click()
    assert log.evaluate("log => log.scrollTop > 0")


def test_memory_that_really_ends_shows_as_its_cause_the_controls_that_help_and_the_whole_log(server, visit):
    big = {"train_data_dir": "embedded:images", "caption_extension": ".txt", "optimizer": "AdamW"}
    big |= {"max_resolution": "512,512", "train_batch_size": 96, "num_cpu_threads_per_process": 1}
    put_preset(server, "big", big | {"training_comment": "room=1000"})
    page = visit(server)
    load(page, "big")
    page.evaluate("window.unhurried = true")  # the trainer needs the processor
    page.get_by_role("button", name="Start training").click()
    wait_state(page, "starting", patience_s=60)
    wait_state(page, "crashed", patience_s=60)
    crash = page.locator("#lw-crash")
    assert "The memory is full" in crash.inner_text() and "lower it from 96" in crash.inner_text()
    with page.expect_download() as download:
        crash.get_by_role("button", name="Whole log").click()
    log = download.value.path().read_text()
    assert any(words in log for words in ON_A_CPU), "torch's or oneDNN's own words"
    crash.get_by_role("button", name="Train batch size").click()
    page.wait_for_function("document.activeElement.closest('.field')?.id === 'field-train_batch_size'")


def test_a_trainer_ended_by_the_system_is_told_in_plain_words(server, page):
    start(page, "steps=5000")
    wait_state(page, "running")
    (run,) = [Run(folder) for folder in server.runs.glob("2*")]
    os.kill(run.process().pid, signal.SIGKILL)
    wait_state(page, "crashed")
    page.wait_for_selector("#lw-crash >> text=memory ran out")
    page.reload()
    wait_ready(page)
    page.wait_for_selector("#lw-crash >> text=SIGKILL")


def test_kill_is_offered_after_a_minute_of_stopping_and_asks(server, page):
    start(page, "steps=5000 deaf")
    wait_state(page, "running")
    kill = page.get_by_role("button", name="Kill", exact=True)
    page.get_by_role("button", name="Stop", exact=True).click()
    wait_state(page, "stopping")
    assert kill.is_hidden()
    (run,) = [Run(folder) for folder in server.runs.glob("2*")]
    os.utime(run.control, (time.time() - 61, time.time() - 61))
    kill.click()
    page.get_by_role("button", name="Leave it").click()
    assert run.process() is not None
    kill.click()
    page.locator("dialog").get_by_role("button", name="Kill", exact=True).click()
    wait_state(page, "crashed")
    assert "killed from this page" in page.inner_text("#lw-crash")
    assert run.process() is None


def test_silence_turns_amber_and_names_the_phase(page, alive):
    run = alive()
    lines = [
        {"type": "phase", "time": time.time() - 200, "name": "caching latents", "done": 120, "total": 400},
    ]
    run.events.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "caching latents 120/400" in wait_state(page, "quiet")
    assert "No sign of life for 3 min" in page.inner_text("#lw-sentence")
    run.request("stop")
    events = EventLog(run.events)
    events.emit(Step(8, 20, 1, 1, 0.1, 0.1, 1e-4, None, 2.0, None, 0))
    page.wait_for_selector("#lw-pill >> text=stopping · saving at step 8")
    events.emit(Phase("drawing samples", 0, 3))
    page.wait_for_selector("#lw-sentence >> text=The picture is left unfinished; it stops after one more step.")
    assert page.inner_text("#lw-pill") == "stopping"


NOTE_LABELS = """() => {
    const write = CanvasRenderingContext2D.prototype.fillText;
    let labels = {}, above = 0;
    CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
        if (this.textAlign === 'right' && this.canvas.id === 'lw-loss') {
            if (y <= above) labels = {};
            labels[text] = above = y;
        }
        return write.call(this, text, x, y);
    };
    lorawright.labels = () => { CanvasRenderingContext2D.prototype.fillText = write; return labels; };
}"""
"""Note which losses the axis names when it was drawn last, and where."""


def test_a_long_run_arrives_in_parts_and_stays_fluent(page, alive):
    page.evaluate(NOTE_LABELS)
    run = alive()
    events = EventLog(run.events)
    events.emit(Started("x", "sd1", "cpu", "no", 1, 1, 1, 8000, 1, 1))
    events.emit(Phase("training", 0, 8000))
    for n in range(1, 5001):
        events.emit(Step(n, 8000, 1, 1, 0.1073 + n * 8e-6, 0.13, 1e-4, None, 2.0, None, 0))
    page.wait_for_function("document.getElementById('lw-pill').textContent.includes('5000/8000')")
    page.wait_for_function("document.getElementById('lw-readout').textContent.includes('step 5000')")
    share = page.evaluate(
        """async () => {
            let busy = 0;
            new PerformanceObserver(list => { for (const e of list.getEntries()) busy += e.duration; }).observe({entryTypes: ['longtask']});
            await new Promise(r => setTimeout(r, 2000));
            return busy / 2000;
        }"""
    )
    assert share < 0.2
    labels = page.evaluate("lorawright.labels()")
    assert "0.1" in labels and "0.098" not in labels, "they would be printed over each other"
    places = sorted(labels.values())
    assert all(below - above >= 11 for above, below in pairwise(places))


def test_an_older_run_can_be_watched_and_stays_after_a_reload(server, page):
    for words in ("steps=3", "steps=5"):
        start(page, words)
        wait_state(page, "starting", "running")
        wait_state(page, "done")
        eventually(lambda: len(list(server.runs.glob("2*/exit"))) == len(list(server.runs.glob("2*"))))
    open_tab(page, "Runs")
    page.wait_for_selector("#lw-runs tr >> nth=1")
    page.locator("#lw-runs tr").nth(1).get_by_title("at the side").click()
    page.wait_for_selector("#lw-pill >> text=done · 3 steps")
    page.reload()
    wait_ready(page)
    page.wait_for_selector("#lw-pill >> text=done · 3 steps")
    page.get_by_role("button", name="Follow the newest").click()
    page.wait_for_selector("#lw-pill >> text=done · 5 steps")


def test_a_page_at_rest_leaves_the_processor_alone(page):
    """One look at the form follows a click, and no look calls for the next."""
    counted = page.evaluate(
        """async () => {
            let reads = 0;
            const read = lorawright.read;
            lorawright.read = (values) => { reads += 1; return read(values); };
            document.body.click();
            await new Promise((later) => setTimeout(later, 1000));
            lorawright.read = read;
            return reads;
        }"""
    )
    assert counted == 1


def test_what_a_picture_shows_is_a_line_at_its_edge(server, page):
    start(page, "steps=8")
    wait_state(page, "starting", "running")
    wait_state(page, "done")
    (folder,) = server.runs.glob("2*")
    events = EventLog(Run(folder).events)
    events.emit(Sample("samples/000008_0.png", "a cat", 0, 7, 8, 0.0))
    events.emit(Sample("samples/000008_0.png", "a cat", 0, 7, 9))  # as at the end, of one prompt alone
    page.reload()
    wait_ready(page)
    badge = page.get_by_title("no LoRA")
    badge.wait_for()
    assert page.locator("#lw-samples .lw-picture").all_inner_texts() == ["no LoRA", "step 9", "before", "step 8"]
    for width in (1440, 390):
        page.set_viewport_size({"width": width, "height": 900})
        high, above, pictured = badge.evaluate(
            "badge => [badge.offsetHeight, badge.offsetTop, badge.parentElement.offsetHeight]"
        )
        assert high <= 16 and above + high >= pictured - 4


def test_the_log_gives_way_so_that_its_end_is_in_view(page, alive):
    run = alive()
    run.log.write_text("".join(f"line {n}\n" for n in range(100)))
    events = EventLog(run.events)
    events.emit(Started("x", "sd1", "cpu", "no", 1, 1, 1, 8, 1, 1))
    events.emit(Step(1, 8, 1, 1, 0.1, 0.1, 1e-4, None, 2.0, None, 0))
    wait_state(page, "running")
    page.wait_for_function("document.getElementById('lw-log').textContent.includes('line 99')")
    for height, lines in ((900, 11), (640, 5)):
        page.set_viewport_size({"width": 1440, "height": height})
        log, panel = (page.locator(part).bounding_box() for part in ("#lw-log", "#live"))
        assert log["y"] + log["height"] < panel["y"] + panel["height"] <= height, height
        assert log["height"] > 17 * lines
        page.wait_for_function(
            "(log => log.scrollHeight - log.scrollTop - log.clientHeight < 2)(document.getElementById('lw-log'))"
        )
    assert page.inner_text("#lw-follow") == "Following"


def test_samples_open_large_and_arrows_go_through_steps(page):
    start(page, "steps=8")
    wait_state(page, "starting", "running")
    wait_state(page, "done")
    page.get_by_role("button", name="a cat, step 8, open large").click()
    caption = page.locator("dialog figcaption")
    assert caption.inner_text().startswith("step 8 ")
    page.keyboard.press("ArrowLeft")
    assert caption.inner_text().startswith("step 6 ")
    page.keyboard.press("ArrowDown")
    assert "a dog" in caption.inner_text()
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="detached")
