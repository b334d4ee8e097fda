import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.testclient import TestClient

from gui.runs import Runs
from gui.view import View
from trainer.events import Ended, EventLog, Failed, Phase, Sample, Saved, Started, Step, Verified, Warned
from trainer.run import Run

SECRET = "/home/someone/secret"


@pytest.fixture
def run(tmp_path):
    """A run that names a folder wherever one can be named."""
    run = Run(tmp_path / "runs" / "20260101-000000-my-secret-face")
    run.samples.mkdir(parents=True)
    run.config.write_text(json.dumps({"train_data_dir": SECRET, "wandb_api_key": "key-of-wandb"}))
    run.log.write_text(f"loading {SECRET}/model.safetensors\n")
    Image.new("RGB", (8, 8)).save(run.samples / "1.png")
    events = EventLog(run.events)
    events.emit(Phase("loading the base model"))
    events.emit(Started(SECRET, "SD 1.5", "cpu", "no", 4, 8, 10, 80, 1, 42))
    events.emit(Step(7, 80, 1, 10, 0.5, 0.4, 1e-4, 5e-5, 2.0, 36.5, 2**30))
    events.emit(Sample("samples/1.png", "a cat", 0, 7, 7))
    events.emit(Sample("../../escape.png", "a dog", 0, 7, 7))
    events.emit(Saved(f"{SECRET}/face.safetensors", 7, 1, "final"))
    events.emit(Verified(f"{SECRET}/face.safetensors"))
    events.emit(Warned(f"{SECRET} is slow"))
    events.emit(Phase("saving my-secret-face.safetensors"))
    return run


@pytest.fixture
def view(tmp_path):
    return View(Runs(tmp_path / "runs", tmp_path, (sys.executable, "none")))


@pytest.fixture
def client(view):
    return TestClient(Starlette(routes=[view.route()]), follow_redirects=False)


def test_the_link_shows_state_loss_and_samples(run, view, client):
    answer = client.get(f"/{view.path}poll").json()
    assert answer["points"] == [[7, 0.5, 0.4]]
    assert answer["step"]["total"] == 80 and answer["state"] == "crashed"
    (sample,) = answer["samples"]
    assert sample["prompt"] == "a cat"
    picture = client.get(f"/{view.path}{sample['address']}")
    assert picture.content == (run.samples / "1.png").read_bytes()
    more = client.get(f"/{view.path}poll", params={"run": answer["run"], "events": answer["events"]}).json()
    assert more["points"] == [] and more["events"] == answer["events"]


@pytest.mark.parametrize("end", [Failed("crash", f"{SECRET} broke", SECRET), Ended("done", 80, SECRET, 3.0), None])
def test_no_folder_no_key_and_no_name_of_a_file_is_told(run, view, client, end):
    if end:
        EventLog(run.events).emit(end)
    text = client.get(f"/{view.path}poll").text
    assert "secret" not in text and "key-of" not in text and str(run.folder.parent) not in text
    assert '"name":"saving"' in text


def test_a_crash_is_told_by_its_kind_alone(run, view):
    EventLog(run.events).emit(Failed("out_of_memory", f"no room for {SECRET}", SECRET))
    assert view.poll("", "")["cause"] == {"title": "Out of memory"}


def test_the_page_has_no_control_and_runs_nothing_from_elsewhere(view, client):
    answer = client.get(f"/{view.path}")
    for control in ("Stop", "Kill", "Sample now", "Save now", "Download", "lw-log", "owner"):
        assert control not in answer.text
    assert "lw-loss" in answer.text and "lw-samples" in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["referrer-policy"] == "no-referrer"
    for part in ("view.js", "view.css"):
        assert client.get(f"/{view.path}{part}").status_code == 200


def test_without_a_run_there_is_nothing_to_see(view, client):
    assert client.get(f"/{view.path}poll").json().keys() == {"run", "now"}


@pytest.mark.parametrize(
    "path",
    [
        "/view/",
        "/view/x/",
        "/view/x/poll",
        "/view/{key}x/poll",
        "/view/%20{key}/poll",
        "/{path}samples/20260101-000000/../config.json",
        "/{path}samples/20260101-000000/%2e%2e%2fconfig.json",
        "/{path}samples/20260101-000000/..%2f1.png",
        "/{path}samples/20260101-000000/link.png",
        "/{path}samples/20260101-000000/no%00thing.png",
        "/{path}samples/20250101-000000/1.png",
        "/{path}log.txt",
        "/{path}config.json",
        "/{path}control",
        "/{path}../config",
    ],
)
def test_everything_else_is_not_there(run, view, client, path):
    (run.samples / "link.png").symlink_to(run.config)
    assert client.get(path.format(key=view.key, path=view.path)).status_code in (404, 400)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_sent(run, view, client, method):
    before = sorted(path.name for path in run.folder.iterdir())
    assert client.request(method, f"/{view.path}poll", content=b'{"word": "stop"}').status_code == 405
    assert sorted(path.name for path in run.folder.iterdir()) == before


@pytest.mark.parametrize("events", ["-1", "x", "9" * 40, "٣", "1e3", "99999"])
def test_an_offset_that_is_none_begins_anew(run, view, events):
    moment = view.poll("", "")["run"]
    assert view.poll(moment, events)["points"] == [[7, 0.5, 0.4]]


def test_each_start_has_a_link_of_its_own(view):
    assert len(view.key) >= 24 and View(view.runs).key != view.key


def test_the_static_parts_are_there():
    from gui import view

    for name in (*(f"{n}.js" for n in view.SCRIPTS), *(f"{n}.css" for n in view.STYLES), "view.html", "login.html"):
        assert (Path(view.STATIC) / name).is_file()
