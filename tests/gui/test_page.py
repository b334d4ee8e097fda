import json
import re
import sys
import threading
import time
from pathlib import Path

import pytest

from gui import page
from gui.desk import Desk, outline
from gui.files import Roots
from gui.presets import Presets
from gui.runs import Runs, exit_code
from trainer import kohya
from trainer.events import EventLog, Saved
from trainer.schema import PARAMETERS

ROOT = Path(__file__).resolve().parents[2]
FAKE = (sys.executable, str(Path(__file__).with_name("fake_trainer.py")))


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "shipped").mkdir()
    allowed = []
    made = Desk(
        runs=Runs(tmp_path / "runs", ROOT, FAKE),
        presets=Presets(tmp_path / "shipped", tmp_path / "own"),
        roots=Roots([tmp_path]),
        allow=allowed.append,
    )
    made.allowed = allowed
    return made


def entries(desk, **changes):
    return {**desk.hello({})["draft"]["entries"], **changes}


def test_the_page_keeps_its_budgets(desk):
    config = page.build(desk).get_config_file()
    assert len(config["components"]) <= 300
    assert len(config["dependencies"]) <= 12
    assert [d for d in config["dependencies"] if d["api_visibility"] == "public"] == []
    assert len(json.dumps(config)) + len(page.style()) < 250_000


def test_every_parameter_has_a_widget_and_a_real_label(desk):
    widgets = {c["props"].get("elem_id"): c["props"] for c in page.build(desk).get_config_file()["components"]}
    for key, parameter in PARAMETERS.items():
        assert widgets[f"field-{key}"]["label"] == parameter.label


def test_the_script_calls_only_functions_that_are_offered(desk):
    offered = {function.__name__ for function in desk.functions()}
    called = set(re.findall(r"\b(?:server\.|askAtOnce\(\")(\w+)", page.script({})))
    assert called == offered


def test_the_style_and_markup_fetch_nothing_from_elsewhere():
    for path in page.STATIC.iterdir():
        text = path.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")  # a name, not a place
        assert not re.search(r"https?://|@import|url\(", text), path.name


def test_the_first_visit_finds_the_preset_of_first_steps(desk, tmp_path):
    assert desk.hello({})["draft"]["entries"]["epoch"] == "1"
    (tmp_path / "shipped" / "first-steps.json").write_text('{"epoch": 7}')
    assert desk.hello({})["draft"]["entries"]["epoch"] == "7"
    desk.draft_saved({"entries": entries(desk, epoch="3"), "kept": {}})
    assert desk.hello({})["draft"]["entries"]["epoch"] == "3"


def test_a_page_is_told_while_another_one_shows_the_form(desk, monkeypatch):
    def others(page):
        return desk.poll({"run": None, "follow": "", "events": 0, "log": 0, "page": page})["others"]

    assert not others("one") and not others("one")
    assert others("two") and others("one") and others("one")
    desk.left({"page": "two"})
    assert not others("one")
    others("two")  # asked before it was closed, answered behind that
    assert not others("one")
    assert others("three")
    now = time.monotonic()
    monkeypatch.setattr("gui.desk.time.monotonic", lambda: now + 91)
    assert not others("one"), "one that has not asked for long is gone"


def test_a_draft_survives_a_restart_with_what_the_form_cannot_use(desk):
    desk.draft_saved({"entries": entries(desk, learning_rate="fast", network_dim="16"), "kept": {"other": 1}})
    again = desk.hello({})["draft"]
    assert (again["entries"]["learning_rate"], again["entries"]["network_dim"]) == ("fast", "16")
    assert again["kept"] == {"other": 1}
    assert [p["key"] for p in again["problems"]] == ["learning_rate"]


def test_a_draft_that_cannot_be_read_gives_the_defaults(desk):
    desk.runs.folder.mkdir()
    desk.draft.write_text("{half")
    assert desk.hello({})["draft"]["entries"]["epoch"] == "1"


def test_a_loaded_preset_tells_what_became_of_its_keys(desk, tmp_path, monkeypatch):
    monkeypatch.setitem(kohya.PENDING, "for_later", ())
    (tmp_path / "shipped" / "old.json").write_text(
        '{"xformers": true, "for_later": true, "nonsense": 1, "v2": "perhaps"}'
    )
    answer = desk.load({"id": "shipped/old"})
    assert {note["key"]: note["what"] for note in answer["notes"]} == {
        "xformers": "converted",
        "for_later": "not supported",
        "nonsense": "unknown",
    }
    assert answer["problems"][0]["key"] == "v2" and "default is shown" in answer["problems"][0]["message"]
    assert answer["entries"]["xformers"] == "xformers"


def test_a_preset_of_how_to_train_leaves_on_what_and_under_which_name(desk, tmp_path):
    (tmp_path / "shipped" / "first-steps.json").write_text(
        '{"output_name": "linocut", "train_data_dir": "embedded:images"}'
    )
    (tmp_path / "shipped" / "style.json").write_text('{"epoch": 7, "output_name": "style"}')
    shown = {"train_data_dir": "/cats", "output_name": "cats", "sample_prompts": "a cat", "network_dim": "16"}
    ask = {"entries": entries(desk, **shown), "source": "shipped/first-steps"}
    answer = desk.load({"id": "shipped/style", **ask})
    assert answer["stays"] == ["train_data_dir", "sample_prompts"]
    found = {key: answer["entries"][key] for key in ("epoch", *shown)}
    assert found == {"epoch": "7", **shown, "output_name": "style", "network_dim": "8"}
    untouched = entries(desk, train_data_dir="embedded:images", output_name="linocut")
    answer = desk.load({"id": "shipped/style", "entries": untouched, "source": "shipped/first-steps"})
    assert (answer["stays"], answer["entries"]["train_data_dir"]) == ([], ""), "it was the preset's"


def test_a_preset_that_is_gone_is_told(desk):
    assert "cannot be read" in desk.load({"id": "own/gone"})["problems"][0]["message"]


def test_saving_asks_before_it_replaces(desk):
    order = {"name": "mine", "entries": entries(desk), "kept": {}}
    assert desk.save(order)["id"] == "own/mine"
    assert desk.save(order) == {"exists": True}
    assert desk.save({**order, "replace": True})["presets"] == ["own/mine"]
    assert desk.save({**order, "name": "a/b"})["problems"][0]["key"] == "preset"
    assert desk.preset_delete({"id": "shipped/mine"})["problems"][0]["key"] == "preset"
    assert desk.preset_delete({"id": "own/mine"}) == {"presets": [], "misnamed": []}


def test_files_that_cannot_be_listed_come_with_the_presets(desk, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a&b.json").write_text("{}")
    assert (desk.hello({})["presets"], desk.hello({})["misnamed"]) == ([], ["a&b.json"])


@pytest.mark.parametrize(
    ("text", "line"), [('{"a": 1,\n oops}', 2), ("", 1), ("[1]", 1), ('{"epoch": 1,\n"seed": 2,\n"epoch" : 7}', 3)]
)
def test_json_that_is_no_preset_is_told_with_its_line(desk, text, line):
    answer = desk.parse({"text": text})
    assert answer["line"] == line and answer["problems"] and "entries" not in answer


def test_the_form_as_json_and_back(desk):
    text = desk.flat({"entries": entries(desk, network_dim="16"), "kept": {"other": [1], "wandb_api_key": "secret"}})[
        "text"
    ]
    assert "secret" not in text
    again = desk.parse({"text": text})
    assert again["entries"]["network_dim"] == "16" and again["kept"] == {"other": [1]}


def test_a_start_with_errors_starts_nothing(desk):
    answer = desk.start({"entries": entries(desk, learning_rate="fast"), "kept": {}})
    assert "run" not in answer and [p["key"] for p in answer["problems"]] == ["learning_rate"]
    assert desk.runs.ids() == []


def test_a_second_start_says_which_run_goes_on(desk):
    order = {"entries": entries(desk, training_comment="steps=500"), "kept": {}}
    run = desk.start(order)["run"]
    try:
        assert run in desk.start(order)["problems"][0]["message"]
    finally:
        desk.control({"run": run, "word": "kill"})


def test_only_samples_and_asked_for_files_may_be_fetched(desk):
    run = desk.start({"entries": entries(desk, training_comment="steps=2"), "kept": {}})["run"]
    folder = desk.runs.folder / run
    while desk.poll({"run": "", "follow": run})["state"] != "done":
        pass
    assert set(desk.allowed) == {folder / "samples"}
    assert desk.download({"run": run, "name": "last.safetensors"})["path"] == str(
        folder / "output" / "last.safetensors"
    )
    assert desk.download({"run": run, "name": "../../x"}) == {"path": None}
    assert desk.download({"run": "../x", "name": "log.txt"}) == {"path": None}


def test_the_picture_that_a_tool_drew_may_be_fetched_and_no_other_file(desk, tmp_path):
    desk.tools.job.folder.mkdir(parents=True)
    desk.tools.job.config.write_text('{"tool": "grid", "entries": {}}')
    outside = tmp_path.parent / f"{tmp_path.name}-outside.png"
    for path in (tmp_path / "sheet.png", tmp_path / "style.safetensors", outside):
        path.write_bytes(b"")
        desk.tools.job.events.write_text(
            json.dumps({"type": "report", "time": 0, "report": {"path": str(path)}}) + "\n"
        )
        shown = desk.poll_tool({"offset": 0})["picture"]
        assert bool(shown) == (path.name == "sheet.png")
    assert desk.allowed == [tmp_path / "sheet.png"]


def test_requests_that_are_none_are_not_written(desk):
    run = desk.start({"entries": entries(desk, training_comment="steps=2"), "kept": {}})["run"]
    desk.control({"run": run, "word": "rm -rf"})
    assert not (desk.runs.folder / run / "control").exists()
    while desk.poll({"run": "", "follow": run})["state"] != "done":
        pass


def test_the_outline_counts_in_plain_words():
    summary = {
        "images": 1,
        "buckets": [1],
        "repeats": 10,
        "epochs": 2,
        "total_steps": 20,
        "model": "SDXL, v-prediction",
    }
    assert outline(summary) == "1 image · 1 bucket · 10 seen in an epoch · 2 epochs · 20 steps · SDXL, v-prediction"
    assert outline({}) == ""


def test_a_trial_is_measured_alone(desk):
    asked = {"entries": entries(desk, training_comment="steps=500"), "kept": {}}
    assert desk.trial(asked)["trial"]["lines"][0].startswith("Tried on the CPU")
    desk.start(asked)
    answer = desk.trial(asked)
    assert "trial" not in answer and "still going on" in answer["problems"][0]["message"]


def test_a_trial_can_be_stopped(desk):
    answers = []
    asked = {"entries": entries(desk, training_comment="slow"), "kept": {}}
    trying = threading.Thread(target=lambda: answers.append(desk.trial(asked)))
    trying.start()
    while not answers and trying.is_alive():
        desk.trial_stop({})
        trying.join(0.1)
    assert answers == [{"notes": [], "summary": {}, "problems": []}]


def test_a_trial_whose_page_was_left_gives_way_to_a_start(desk):
    answers = []
    asked = {"entries": entries(desk, training_comment="slow"), "kept": {}}
    trying = threading.Thread(target=lambda: answers.append(desk.trial(asked)))
    trying.start()
    while not desk.runs._trials:
        assert trying.is_alive()
    assert desk.start({"entries": entries(desk, training_comment="steps=500"), "kept": {}})["run"]
    trying.join(20)
    assert answers == [{"notes": [], "summary": {}, "problems": []}]


def ended_run(desk, words="steps=8"):
    run = desk.start({"entries": entries(desk, training_comment=words, output_name="cat"), "kept": {}})["run"]
    while desk.poll({"run": "", "follow": run})["state"] not in ("done", "crashed", "stopped"):
        pass
    return run


def test_a_crashed_runs_settings_come_back_with_its_newest_state(desk):
    run = ended_run(desk, "steps=8 state crash")
    (row,) = desk.list_runs({})["runs"]
    assert row["stranded"] == ""
    answer = desk.resume({"run": run})
    assert answer["entries"]["resume"] == str(desk.runs.folder / run / "output" / "last-state")
    assert answer["entries"]["training_comment"] == "steps=8 state crash"


def test_a_run_without_a_state_cannot_go_on_and_says_so(desk):
    run = ended_run(desk, "steps=8 crash")
    assert desk.list_runs({})["runs"][0]["stranded"] == "none"
    assert "No state" in desk.resume({"run": run})["problems"][0]["message"]


def test_deleting_names_first_what_goes_and_spares_the_living(desk, tmp_path):
    run = desk.start({"entries": entries(desk, training_comment="steps=500"), "kept": {}})["run"]
    assert "not over" in desk.delete({"run": run, "sure": True})["refused"]
    assert (desk.runs.folder / run / "config.json").exists()
    while desk.poll({"run": "", "follow": run})["state"] != "running":
        pass
    desk.control({"run": run, "word": "kill"})
    assert exit_code(desk.runs.find(run)) == -9
    lora = tmp_path / "loras" / "cat.safetensors"
    lora.parent.mkdir()
    lora.write_bytes(b"x")
    EventLog(desk.runs.find(run).events).emit(Saved(str(lora), 5, 1, "final"))
    answer = desk.delete({"run": run})
    assert answer["elsewhere"] == [str(lora)]
    assert {"config.json", "events.jsonl", "log.txt", "killed"} <= set(answer["goes"]) and answer["stays"] == []
    assert (desk.runs.folder / run).exists()
    assert "goes" in desk.delete({"run": run, "sure": "yes"}) and (desk.runs.folder / run).exists()
    desk.delete({"run": run, "sure": True})
    assert not (desk.runs.folder / run).exists() and lora.exists()


FORGED = ["", "..", "../x", "/etc", "presets", "20260101-000000-a/../../x", "20260101-000000-none", None, 7, ["x"]]


@pytest.mark.parametrize("run", FORGED)
def test_forged_run_ids_change_and_tell_nothing(desk, run, tmp_path):
    (desk.runs.folder / "presets").mkdir(parents=True)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    assert "refused" in desk.delete({"run": run, "sure": True})
    assert desk.resume({"run": run}).get("entries") is None
    assert desk.files({"run": run}) == {"files": []}
    assert desk.compare({"runs": [run]}) == {"runs": []}
    for word in ("earlier", "remove", "delete", None):
        assert desk.turn({"run": run, "word": word}) == {"done": False}
    assert sorted(tmp_path.rglob("*")) == before and desk.allowed == []


def test_a_linked_run_is_not_deleted(desk, tmp_path):
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "config.json").write_text("{}")
    desk.runs.folder.mkdir()
    (desk.runs.folder / "20260101-000000-link").symlink_to(outside)
    assert "link" in desk.delete({"run": "20260101-000000-link", "sure": True})["refused"]
    assert (outside / "config.json").exists()


def test_only_what_waits_can_be_taken_out_of_the_queue(desk):
    run = ended_run(desk)
    assert desk.turn({"run": run, "word": "remove"}) == {"done": False}
    answer = desk.enqueue({"entries": entries(desk), "kept": {}})
    waits = answer["run"]
    second = desk.enqueue({"entries": entries(desk), "kept": {}})
    assert answer["at_once"] and not second["at_once"]
    assert desk.turn({"run": second["run"], "word": "remove"}) == {"done": True}
    assert desk.list_runs({})["queue"] == [waits]
    assert "not over" in desk.delete({"run": waits, "sure": True})["refused"]
    assert desk.turn({"run": waits, "word": "remove"}) == {"done": True}
    assert desk.list_runs({})["queue"] == [] and (desk.runs.folder / run).exists()


def test_settings_with_errors_do_not_wait_in_the_queue(desk):
    answer = desk.enqueue({"entries": entries(desk, learning_rate="fast"), "kept": {}})
    assert "run" not in answer and [p["key"] for p in answer["problems"]] == ["learning_rate"]
    assert desk.runs.ids() == []


def test_a_sweep_is_queued_and_what_was_decided_for_it_is_told(desk):
    form = entries(desk, train_data_dir="embedded:images", caption_extension=".txt")
    asked = {"entries": form, "kept": {}, "fields": [["network_dim", "4, 8, 8.0"]]}
    answer = desk.sweep(asked)
    assert answer["runs"] == len(desk.list_runs({})["queue"]) == 2
    assert [(p["key"], p["severity"]) for p in answer["problems"]] == [("network_dim", "warning"), ("seed", "warning")]
    refused = desk.sweep(asked | {"fields": [["network_dim", "4, 0"]]})
    assert "runs" not in refused and "must be" in refused["problems"][-1]["message"]


def test_runs_are_compared_by_settings_curve_outcome_and_samples(desk):
    first, second = ended_run(desk), ended_run(desk, "steps=4")
    answer = desk.compare({"runs": [first, second, first, "../x"]})["runs"]
    assert [run["run"] for run in answer] == [first, second]
    assert [run["curve"][-1][0] for run in answer] == [8, 4]
    assert [sample["step"] for sample in answer[0]["samples"]][-2:] == [8, 8]
    assert answer[1]["outcome"]["last"][0] == 4 and answer[1]["outcome"]["file"] == "last.safetensors"
    assert answer[0]["entries"]["training_comment"] == "steps=8"
    assert desk.runs.folder / first / "samples" in desk.allowed
