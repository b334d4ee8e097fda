"""Runs that are over: going on from their state, being compared, being deleted."""

import json
import os
import shutil
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from gui import history, live
from gui.runs import Runs
from tests.gui.fake_trainer import state
from trainer.aside import set_aside, written_at
from trainer.events import EventLog, Phase, Sample, Saved, Started, Step
from trainer.run import Run


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path / "runs" / "20260101-000000-cat")
    made.folder.mkdir(parents=True)
    made.config.write_text("{}")
    return made


def wrote_state(run, name, step):
    folder = state(run.output / name, step)
    EventLog(run.events).emit(Saved(str(folder), step, 1, "state", written_at(folder / "state.json")))
    return folder


def test_the_newest_state_that_is_sound_is_the_one_to_go_on_from(run):
    assert history.newest_state(run) is None and not history.has_state(run)
    older, newer = wrote_state(run, "a-state", 10), wrote_state(run, "b-state", 20)
    assert history.newest_state(run) == newer
    (newer / "tensors.safetensors").write_bytes(b"4321")  # as long as it was, but not what was written
    assert history.newest_state(run) == older
    (older / "state.json").unlink()
    assert history.newest_state(run) is None


def test_a_run_that_cannot_go_on_tells_a_lost_state_from_one_that_never_was(run):
    assert history.stranded(run) == "none"
    folder = wrote_state(run, "a-state", 10)
    assert history.stranded(run) == ""
    (folder / "state.json").unlink()
    assert history.stranded(run) == "gone"


def test_a_state_that_another_run_wrote_over_is_not_this_runs(run):
    folder = wrote_state(run, "shared-state", 10)
    later = time.time() + 1
    os.utime(folder / "state.json", (later, later))
    assert not history.has_state(run) and history.newest_state(run) is None


def test_of_a_run_that_does_not_tell_when_it_wrote_a_state_one_of_an_hour_later_is_not_its(run):
    folder = state(run.output / "shared-state", 10)
    EventLog(run.events).emit(Saved(str(folder), 10, 1, "state"))
    assert history.has_state(run)
    later = time.time() + 3600
    os.utime(folder / "state.json", (later, later))
    assert not history.has_state(run) and history.newest_state(run) is None


def test_two_runs_that_write_the_same_name_each_keep_their_own_file(run, tmp_path):
    shared = tmp_path / "loras" / "cat.safetensors"
    shared.parent.mkdir()
    later = Run(run.folder.with_name("20260101-000013-cat"))
    later.folder.mkdir()
    for one, content, at_s in ((run, b"first", 1_700_000_000), (later, b"second", 1_700_000_013)):
        set_aside(shared)
        shared.write_bytes(content)
        os.utime(shared, (at_s, at_s))
        one.config.write_text(json.dumps({"output_dir": str(shared.parent)}))
        EventLog(one.events).emit(Saved(str(shared), 4, 1, "final", written_at(shared)))
    for one, content in ((run, b"first"), (later, b"second")):
        (found,) = history.checkpoints(one)
        assert Path(found["path"]).read_bytes() == content
        assert live.downloads(one, tmp_path)[found["name"]].read_bytes() == content
    Path(history.checkpoints(run)[0]["path"]).unlink()
    assert history.checkpoints(run) == []


def test_a_curve_is_thinned_and_keeps_the_last_step(run):
    events = EventLog(run.events)
    for n in range(1, 1002):
        events.emit(Step(n, 1001, 1, 1, 0.5, 1 / n, 1e-4, None, 2.0, None, 0))
    curve = history.curve(run)
    assert len(curve) <= history.MOST_POINTS and curve[-1] == [1001, 1 / 1001]
    assert {later[0] - earlier[0] for earlier, later in pairwise(curve)} == {3}


def test_the_samples_with_the_lora_and_inside_the_run_only(run):
    run.samples.mkdir()
    events = EventLog(run.events)
    for step, index, strength in ((0, 0, 1.0), (4, 0, 1.0), (4, 0, 0.0), (4, 1, 1.0)):
        path = run.samples / f"{step}_{index}_{strength}.png"
        path.write_bytes(b"x")
        events.emit(Sample(f"samples/{path.name}", f"prompt {index}", index, 7, step, strength))
    events.emit(Sample("../../../etc/passwd", "bad", 2, 7, 9, 1.0))
    found = [(s["prompt"], s["step"], s["path"].rsplit("/", 1)[1]) for s in history.samples(run)]
    assert found == [("prompt 0", 0, "0_0_1.0.png"), ("prompt 0", 4, "4_0_1.0.png"), ("prompt 1", 4, "4_1_1.0.png")]


def test_deleting_takes_what_the_run_wrote_and_leaves_what_others_put_there(run, tmp_path):
    elsewhere = tmp_path / "loras"
    elsewhere.mkdir()
    (elsewhere / "cat.safetensors").write_bytes(b"mine")
    events = EventLog(run.events)
    for path in (run.output / "cat.safetensors", elsewhere / "cat.safetensors"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
        events.emit(Saved(str(path), 4, 1, "final"))
    wrote_state(run, "cat-state", 4)
    run.samples.mkdir()
    (run.samples / "0.png").write_bytes(b"x")
    events.emit(Sample("samples/0.png", "cat", 0, 7, 0, 1.0))
    (run.logs / "board").mkdir(parents=True)
    (run.output / "cat-resized.safetensors").write_bytes(b"made by a tool")
    (run.folder / "notes.txt").write_text("mine")
    found = history.delete(run)
    assert {path.name for path in found.stays} == {"cat-resized.safetensors", "notes.txt"}
    left = {path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*")}
    assert left == {"output", "output/cat-resized.safetensors", "notes.txt"}
    assert (elsewhere / "cat.safetensors").read_bytes() == b"x"


def test_deleting_follows_no_links_and_no_forged_event(run, tmp_path):
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "file").write_text("kept")
    run.logs.symlink_to(outside)
    run.output.symlink_to(outside)
    lines = [{"type": "saved", "time": 1, "path": str(outside / "file"), "step": 1, "epoch": 1, "what": "final"}]
    lines += [
        {"type": "sample", "time": 1, "path": "../../precious/file", "prompt": "", "index": 0, "seed": 1, "step": 1}
    ]
    run.events.write_text("".join(json.dumps(line) + "\n" for line in lines))
    history.delete(run)
    assert (outside / "file").read_text() == "kept"
    assert not run.logs.is_symlink() and run.output.is_symlink()  # a link in the place of output/ is not the trainer's


def test_a_run_with_nothing_else_in_it_is_gone_whole(run):
    run.log.write_text("x")
    history.delete(run)
    assert not run.folder.exists()


def step(n):
    return Step(n, 100, 1, 1, 0.5, 1 / n, 1e-4, None, 2.0, None, 0)


@pytest.fixture
def line_of_runs(tmp_path):
    """Three runs, each resumed from the state in the middle of the one before: steps 1–20, 11–30, 21–40."""
    state, made = "", []
    for index, name in enumerate(("one", "two", "three")):
        run = Run(tmp_path / "runs" / f"20260101-00000{index}-{name}")
        run.samples.mkdir(parents=True)
        run.config.write_text("{}")
        log, first = EventLog(run.events), 10 * index + 1
        log.emit(Phase("loading the base model"))
        log.emit(Started(name, "SD 1.5", "cpu", "no", 4, 8, 10, 100, first, 42, state))
        for n in range(first, first + 20):
            log.emit(step(n))
            if n % 10 == 0:
                path = run.samples / f"{n}.png"
                path.write_bytes(b"")
                log.emit(Sample(f"samples/{path.name}", "a cat", 0, 7, n))
            if n == first + 9:
                state = str(tmp_path / "out" / f"{name}-state")
                log.emit(Saved(state, n, 1, "state"))
        made.append(run)
    return made


def told(run):
    shelf = Runs(run.folder.parent, run.folder.parent, ())
    return live.poll(shelf, {"run": run.folder.name, "follow": run.folder.name, "events": 0, "log": 0})


def test_a_resumed_run_shows_the_curve_and_samples_of_those_that_it_goes_on_from(line_of_runs):
    answer = told(line_of_runs[2])
    assert [point[0] for point in answer["points"]] == list(range(1, 41))
    assert answer["step"]["step"] == 40
    drawn = [(sample["step"], Path(sample["path"]).parents[1].name[16:]) for sample in answer["samples"]]
    assert drawn == [(10, "one"), (20, "two"), (30, "three"), (40, "three")]
    assert [history.origin(run) for run in line_of_runs] == [None, (line_of_runs[0], 10), (line_of_runs[1], 20)]


def test_a_comparison_has_the_losses_from_before_a_resume(line_of_runs):
    assert [point[0] for point in history.curve(line_of_runs[2])] == list(range(1, 41))
    low, beyond = replace(step(20), average_loss=0.01), replace(step(31), average_loss=0.001)
    for one in (low, beyond):
        EventLog(line_of_runs[1].events).emit(one)
    found = history.outcome(line_of_runs[2])
    assert found["lowest"] == [20, 0.01] and found["last"] == [40, 1 / 40]


def test_what_came_before_a_resume_is_sent_once_and_thinned(line_of_runs, monkeypatch):
    monkeypatch.setattr(history, "MOST_POINTS", 7)
    first = told(line_of_runs[2])
    earlier = [point[0] for point in first["points"] if point[0] <= 20]
    assert len(earlier) <= 7 and earlier[-1] == 20
    EventLog(line_of_runs[2].events).emit(step(41))
    ask = {"run": line_of_runs[2].folder.name, "follow": "", "events": first["events"], "log": 0}
    shelf = Runs(line_of_runs[2].folder.parent, line_of_runs[2].folder.parent, ())
    assert [point[0] for point in live.poll(shelf, ask)["points"]] == [41]


def test_a_resumed_run_whose_origin_was_deleted_begins_at_its_resume(line_of_runs):
    shutil.rmtree(line_of_runs[1].folder)
    assert history.origin(line_of_runs[2]) is None
    assert told(line_of_runs[2])["points"][0][0] == 21


def test_of_two_runs_that_wrote_a_state_of_that_name_the_later_one_is_the_origin(line_of_runs):
    first, second, third = line_of_runs
    text = second.events.read_text().replace("two-state", "one-state")
    second.events.write_text(text)
    third.events.write_text(third.events.read_text().replace("two-state", "one-state"))
    assert history.origin(third) == (second, 20) and history.origin(second) == (first, 10)


def test_the_lowest_loss_is_not_that_of_the_first_steps_which_are_no_average_yet(tmp_path):
    run = Run(tmp_path / "20260101-000000-cat")
    run.folder.mkdir()
    events = EventLog(run.events)
    for step, average in ((1, 0.01), (9, 0.02), (10, 0.3), (50, 0.2), (100, 0.25)):
        events.emit(Step(step, 100, 1, 1, 9.0, average, 1e-4, None, 2.0, None, 0))
    assert history.outcome(run)["lowest"] == [50, 0.2]


def test_files_in_an_output_folder_that_is_relative_are_found_from_any_other(settings, train, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    some = {"output_dir": "made", "max_train_steps": 1, "save_state": True, "save_every_n_epochs": 0}
    _, _, folder = train(settings | some)
    monkeypatch.chdir(tmp_path)
    made = tmp_path / "here" / "made"
    assert [one["path"] for one in history.checkpoints(Run(folder))] == [str(made / "photo.safetensors")]
    assert {one.path.parent for one in history.saved(Run(folder))} == {made}
    assert live.downloads(Run(folder), tmp_path / "here")["photo.safetensors"] == made / "photo.safetensors"
