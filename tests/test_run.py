"""A run's folder: what a killed process left half written."""

import os
import subprocess
import sys

from trainer import events
from trainer.run import new_run, sweep, unfinished

DEAD = 2**22 + 1  # beyond the highest process number


def test_what_a_killed_process_was_writing_goes_and_all_else_stays(tmp_path):
    whole = ["photo.safetensors", ".photo.tmp", ".gitignore", ".notes.12x.tmp"]
    for name in (*whole, f".photo.safetensors.{DEAD}.tmp"):
        (tmp_path / name).write_text(name)
    folder = tmp_path / f".photo-state.{DEAD}.tmp"
    folder.mkdir()
    (folder / "tensors.safetensors").touch()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(whole)


def test_what_was_being_replaced_comes_back_unless_its_successor_is_there(tmp_path):
    for name in ("lost", "replaced"):
        (tmp_path / f".{name}-state.{DEAD}.old").mkdir()
    (tmp_path / "replaced-state").mkdir()
    (tmp_path / "replaced-state" / "state.json").touch()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lost-state", "replaced-state"]
    assert (tmp_path / "replaced-state" / "state.json").exists()


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    with unfinished(tmp_path / "photo.png") as temporary:
        temporary.touch()
        sweep(tmp_path)
        assert temporary.exists()


def test_the_number_of_a_dead_process_may_be_another_by_now(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        left = tmp_path / f".photo.png.{other.pid}.tmp"
        left.touch()
        os.utime(left, (1, 1))
        sweep(tmp_path)
        assert not left.exists()
    finally:
        other.communicate(b"\n")


def test_a_folder_that_is_not_there_needs_no_sweeping(tmp_path):
    sweep(tmp_path / "nothing")


def test_an_event_after_a_line_that_was_cut_off_is_read(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"type": "phase", "ti')
    events.EventLog(path).emit(events.Failed("disk_full", "", ""))
    assert [event["type"] for event, _ in events.read(path)] == ["failed"]


def test_the_folder_of_a_run_with_a_long_name_can_be_made(tmp_path):
    for name in ("x" * 300, "ü" * 200, "猫" * 200):
        assert new_run(tmp_path, name).folder.is_dir()
