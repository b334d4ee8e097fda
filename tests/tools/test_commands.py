"""The tools' declarations, from which the command line and the Tools tab follow."""

import argparse
import re
import sys
import time
from pathlib import Path

import pytest

from gui.files import Roots
from gui.runs import Runs, kill
from gui.tools import Tools
from tests.tools import loras
from trainer.events import EventLog, Saved
from trainer.tools.commands import TOOLS, add_to

ROOT = Path(__file__).resolve().parents[2]
SLOW = "import sys, time; print('working', flush=True); time.sleep(60)"


def parsed(words):
    parser = argparse.ArgumentParser()
    add_to(parser.add_subparsers(dest="command"))
    return parser.parse_args(words)


@pytest.mark.parametrize("name", TOOLS)
def test_every_option_comes_back_from_the_words_that_mean_it(name):
    tool = TOOLS[name]
    values = {
        p.key: {"switch": False, "lines": "a b\n-c"}.get(p.kind, "-0.5" if p.key == "strengths" else "x y")
        for p in tool.parameters.values()
    }
    given = parsed(tool.words(values))
    for key, value in values.items():
        got = getattr(given, key)
        assert ("\n".join(got) if key == "loras" else ",".join(got) if key == "strengths" else got) == value


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_and_option_says_what_it_is_for(name):
    tool = TOOLS[name]
    assert tool.summary.endswith(".") and tool.example.startswith(name)
    assert all(p.help.endswith(".") and p.label for p in tool.parameters.values())
    given = parsed(tool.example.split())
    assert given.command == name


def test_the_readme_shows_every_tool():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"python -m trainer ([\w-]+) (?:\w+\.safetensors|models/)", readme)) == set(TOOLS)


@pytest.fixture
def tools(tmp_path):
    """The Tools tab's side on the server, with a trainer that takes a minute."""
    made = Tools(Runs(tmp_path / "runs", tmp_path, (sys.executable, "-c", SLOW)), Roots([tmp_path]))
    yield made
    kill(made.job)


def entries(path):
    return {"lora": str(path)}


def until(tools, state):
    for _ in range(200):
        if tools.poll(0)["state"] == state:
            return tools.poll(0)
        time.sleep(0.05)
    raise AssertionError(f"never {state}: {tools.poll(0)}")


def test_one_tool_runs_at_a_time_and_is_found_again(tools, tmp_path):
    path = loras.write(tmp_path / "a.safetensors")
    assert tools.poll(0) == {"state": "none"}
    assert tools.start("inspect", entries(path)) == []
    assert "Stop it first" in tools.start("verify", entries(path))[0].message
    again = Tools(tools.runs, tools.roots)
    assert again.poll(0)["state"] == "running" and again.poll(0)["tool"] == "inspect"


def test_a_tool_that_ends_without_a_word_is_told_with_its_last_line(tools, tmp_path):
    tools.start("inspect", entries(loras.write(tmp_path / "a.safetensors")))
    while "working" not in tools.job.log.read_text():
        time.sleep(0.05)
    process = tools.job.process()
    process.kill()
    failed = until(tools, "failed")["failed"]
    assert "SIGKILL" in failed["message"]


@pytest.mark.parametrize("path", ["/etc/hosts", "../outside.safetensors", "~/x.safetensors"])
def test_paths_outside_the_allowed_folders_are_refused_for_reading_and_writing(tools, tmp_path, path):
    inside = loras.write(tmp_path / "a.safetensors")
    assert "outside the folders" in tools.start("inspect", entries(path))[0].message
    found = tools.start("resize", {"lora": str(inside), "output": path, "rank": "4", "method": "fixed"})
    assert [(p.key, "outside the folders" in p.message) for p in found] == [("output", True)]


def test_nothing_is_written_where_the_embedded_files_are(tools, tmp_path):
    inside = loras.write(tmp_path / "a.safetensors")
    given = {"model": "embedded:base.safetensors", "loras": str(inside), "strengths": "1", "precision": "same"}
    found = tools.start("merge", given | {"output": "embedded:base.safetensors"})
    assert [(p.key, "outside the folders" in p.message) for p in found] == [("output", True)]
    assert tools.start("merge", given | {"output": str(tmp_path / "out.safetensors")}) == []


def test_a_link_does_not_lead_outside(tools, tmp_path):
    (tmp_path / "link.safetensors").symlink_to("/etc/hosts")
    assert "outside the folders" in tools.start("inspect", entries(tmp_path / "link.safetensors"))[0].message


def test_relative_paths_count_from_where_the_trainer_works(tools, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    loras.write(tmp_path / "a.safetensors")
    assert tools.start("inspect", entries("a.safetensors")) == []


def test_the_folder_says_which_captioning_model_it_holds_and_outside_of_the_roots_nothing(tools, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    assert "no config.json" in tools.captioning(str(folder))["told"]
    (folder / "config.json").write_text('{"model_type": "florence2"}')
    assert tools.captioning("model") == {"kind": "Florence-2", "told": ""}
    kinds = {kind for field in TOOLS["caption"].parameters.values() for kind in field.when.get("model_kind", ())}
    (folder / "config.json").rename(folder / "model.onnx")
    assert kinds == {"Florence-2", "BLIP", tools.captioning(f" {folder} ")["kind"]}
    assert tools.captioning("/etc") == tools.captioning("") == {"kind": "", "told": ""}


def test_loras_of_runs_are_offered_before_those_of_models(tools, tmp_path):
    output = tmp_path / "runs" / "20260101-000000-x" / "output"
    output.mkdir(parents=True)
    (tmp_path / "models").mkdir()
    for folder in (output, tmp_path / "models"):
        (folder / "a.safetensors").write_bytes(b"")
    EventLog(output.parent / "events.jsonl").emit(Saved("output/a.safetensors", 1, 1, "final"))
    assert tools.offer()["loras"] == [str(output / "a.safetensors"), str(tmp_path / "models" / "a.safetensors")]


def test_what_captions_were_is_kept_where_the_dataset_tab_looks_for_it(tools, tmp_path, monkeypatch):
    launched = []
    monkeypatch.setattr("gui.runs.launch", lambda run, command, root: launched.extend(command))
    (tmp_path / "images").mkdir()
    form = next(form for form in tools.offer()["tools"] if form["name"] == "caption")
    values = {field["key"]: field["default"] for field in form["fields"]}
    assert "backups" not in values
    assert tools.start("caption", {**values, "model": str(tmp_path), "folder": str(tmp_path / "images")}) == []
    assert f"--backups={tmp_path / 'runs' / 'captions'}" in launched
