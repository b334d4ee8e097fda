"""The Tools tab's side on the server: which files it suggests, and that one tool follows another."""

import sys
import time

import pytest

from gui import tools as gui_tools
from gui.files import Roots
from gui.runs import Runs, kill
from gui.tools import DOCTOR, Tools
from trainer.events import EventLog, Saved
from trainer.run import Run

TOOL = """
import json, sys, time
path = next(word.partition("=")[2] for word in sys.argv if word.startswith("--events="))
if {reports}:
    with open(path, "a") as file:
        file.write(json.dumps({{"type": "report", "time": 0, "report": {{"lines": ["x" * 100_000]}}}}) + "\\n")
time.sleep({seconds})
"""


@pytest.fixture
def tools(tmp_path):
    """Make the tab's server with a trainer that reports, or does not, and ends after a while."""
    made = []

    def make(reports=True, seconds=0):
        command = (sys.executable, "-c", TOOL.format(reports=reports, seconds=seconds))
        made.append(Tools(Runs(tmp_path / "runs", tmp_path, command), Roots([tmp_path / "runs", tmp_path / "mine"])))
        return made[-1]

    (tmp_path / "mine").mkdir()
    yield make
    for each in made:
        kill(each.job)


def ended(tools):
    until = time.monotonic() + 20
    while tools.poll(0)["state"] == "running":
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_tool_may_follow_another_as_soon_as_that_one_has_reported(tools):
    made = tools(seconds=0.7)
    assert made.start(DOCTOR["name"], {}) == []
    ended(made)
    assert made.job.process() is not None, "its process is still going"
    assert made.start(DOCTOR["name"], {}) == []
    assert not made.job.exit.exists(), "how the one before it ended is not said of it"


@pytest.mark.parametrize("reports", [False, True])
def test_no_tool_starts_beside_one_that_does_not_end(tools, reports, monkeypatch):
    monkeypatch.setattr(gui_tools, "ENDING_S", 0.2)
    made = tools(reports, seconds=60)
    made.start(DOCTOR["name"], {})
    while reports and made.poll(0)["state"] == "running":
        pass
    (problem,) = made.start(DOCTOR["name"], {})
    assert problem.label == "A tool is running"


def test_loras_are_suggested_newest_first_wherever_the_settings_put_them_inside_the_roots(tools, tmp_path):
    for number, folder in enumerate(("runs/20260101-000000-a/output", "mine", "elsewhere")):
        run = Run(tmp_path / "runs" / f"2026010{number + 1}-000000-{folder[0]}")
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        run.folder.mkdir(parents=True, exist_ok=True)
        events = EventLog(run.events)
        for step, what in ((1, "intermediate"), (1, "state"), (2, "intermediate"), (3, "final")):
            path = tmp_path / folder / f"{what}-{step}.safetensors"
            path.write_bytes(b"x")
            events.emit(Saved(str(path), step, 1, what))
        (tmp_path / folder / "intermediate-2.safetensors").unlink()
    found = tools().offer()["loras"]
    assert [path.removeprefix(f"{tmp_path}/") for path in found] == [
        "mine/final-3.safetensors",
        "mine/intermediate-1.safetensors",
        "runs/20260101-000000-a/output/final-3.safetensors",
        "runs/20260101-000000-a/output/intermediate-1.safetensors",
    ]
