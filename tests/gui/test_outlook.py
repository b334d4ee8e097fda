"""What would be trained, as the page tells it while the form is filled."""

import json

import pytest

from gui.outlook import outlook
from gui.runs import Runs
from trainer.check import problems
from trainer.errors import ModelError
from trainer.events import EventLog, Step
from trainer.kohya import Preset
from trainer.models import hub
from trainer.run import Run

DEMO = {"train_data_dir": "embedded:images", "max_resolution": "128,128", "caption_extension": ".txt"}


@pytest.fixture
def shelf(tmp_path):
    return Runs(tmp_path, tmp_path, ())


def written(shelf, name, values, speed=4.0):
    run = Run(shelf.folder / name)
    run.folder.mkdir()
    run.config.write_text(json.dumps(values))
    EventLog(run.events).emit(Step(9, 9, 1, 1, 0.1, 0.1, 1e-4, None, speed, None, 3 * 2**30))


def test_it_counts_images_steps_and_the_network(shelf):
    found = outlook(DEMO | {"epoch": 2, "network_dim": 4}, shelf)
    assert (found["summary"]["images"], found["summary"]["total_steps"], found["errors"]) == (24, 192, [])
    twice = outlook(DEMO | {"network_dim": 8}, shelf)["size"]
    assert twice["weights"] == 2 * found["size"]["weights"] and twice["modules"] == found["size"]["modules"]


def test_time_and_memory_are_those_of_the_newest_run_that_is_alike(shelf):
    assert outlook(DEMO, shelf)["like"] is None
    written(shelf, "20260101-000000-alike", DEMO | {"network_dim": "8", "learning_rate": 1})
    written(shelf, "20260102-000000-larger", DEMO | {"train_batch_size": 7}, speed=1.0)
    assert outlook(DEMO, shelf)["like"] == {"run": "20260101-000000-alike", "seconds": 0.25, "memory": 3 * 2**30}
    assert outlook(DEMO | {"train_batch_size": 7}, shelf)["like"]["seconds"] == 1.0


def test_what_stands_in_the_way_is_counted(shelf):
    found = outlook({"train_data_dir": "/nowhere", "learning_rate": "fast"}, shelf)
    assert {"train_data_dir", "learning_rate"} <= {problem["key"] for problem in found["errors"]}
    assert found["summary"]["total_steps"] is None


def test_a_model_on_huggingface_is_asked_for_by_the_check_alone(shelf, monkeypatch):
    asked = []

    def files(name):
        asked.append(name)
        raise ModelError("no network")

    monkeypatch.setattr(hub, "files", files)
    monkeypatch.setattr(hub, "folder", lambda name: None)
    values = DEMO | {"pretrained_model_name_or_path": "someone/model"}
    found = outlook(values, shelf)
    assert (asked, found["errors"], found["size"]) == ([], [], None)
    assert found["summary"]["images"] == 24
    assert "no network" in str(problems(Preset(values), decode=False).errors[0])
    assert asked
