"""The checkpoint chooser's side on the server; what is drawn is in tests/tools/test_grid.py."""

import sys

import pytest

from gui import choosing
from gui.files import Roots
from gui.runs import Runs, kill
from gui.tools import Tools
from trainer import kohya
from trainer.events import EventLog, Saved
from trainer.run import Run
from trainer.tools import contact

SLOW = "import sys, time; print(*sys.argv[1:], sep='\\n', flush=True); time.sleep(60)"


@pytest.fixture
def tools(tmp_path):
    """With a trainer that prints its words and then takes a minute; outputs of runs may lie outside the roots."""
    made = Tools(Runs(tmp_path / "runs", tmp_path, (sys.executable, "-c", SLOW)), Roots([tmp_path / "nowhere"]))
    yield made
    kill(made.job)


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path / "runs" / "20260101-000000-cat")
    made.output.mkdir(parents=True)
    kohya.save(made.config, {"sample_prompts": "a cat --d 1"}, {})
    events = EventLog(made.events)
    for step, what in ((2, "intermediate"), (2, "state"), (4, "intermediate"), (6, "final"), (4, "intermediate")):
        path = made.output / f"cat-{step}{'-state' if what == 'state' else '.safetensors'}"
        path.write_bytes(b"x")
        events.emit(Saved(str(path), step, 1, what))
    (made.output / "cat-2.safetensors").unlink()
    return made


def test_files_that_are_still_there_are_offered_each_once_with_the_runs_own_prompts(run):
    found = choosing.offer(run)
    assert [(file["name"], file["step"]) for file in found["files"]] == [
        ("cat-6.safetensors", 6),
        ("cat-4.safetensors", 4),
    ]
    assert found["prompts"] == "a cat --d 1"


def test_settings_that_cannot_be_read_leave_the_prompts_to_be_typed_in(run):
    run.config.write_text("{")
    found = choosing.offer(run)
    assert found["prompts"] == "" and len(found["files"]) == 2


def test_the_grid_is_drawn_by_the_tool_with_the_runs_settings_and_shown_as_far_as_it_is(run, tools):
    assert choosing.poll(tools, run) == {"state": "none", "grid": None, "there": [], "folder": str(run.grid)}
    assert choosing.start(tools, run, [], {"at": "1", "prompts": "a cat"})[0].key == "loras"
    assert choosing.start(tools, run, ["cat-4.safetensors"], {"at": "0, 1", "prompts": "a cat\na dog"}) == []
    while len(words := tools.job.log.read_text().splitlines()) < 8:
        assert tools.job.process()
    assert words[0] == "grid" and words[-2:] == ["--", str(run.output / "cat-4.safetensors")]
    assert f"--settings={run.config}" in words and f"--output={run.grid}" in words and "--at=0, 1" in words
    run.grid.mkdir()
    contact.write(run.grid, {"rows": ["/x/cat-4.safetensors"], "at": [0, 1], "pictures": [[["a.png"], ["b.png"]]]})
    (run.grid / "a.png").write_bytes(b"x")
    found = choosing.poll(tools, run)
    assert found["state"] == "running" and found["there"] == ["a.png"]
    assert found["grid"]["rows"] == ["cat-4.safetensors"]
    other = Run(run.folder.with_name("20260101-000001-dog"))
    assert choosing.poll(tools, other)["state"] == "none"
