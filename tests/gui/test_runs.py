import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from gui import history, live, runs
from gui.runs import BusyError, Runs
from trainer.events import Ended, EventLog, Phase, Saved, Step
from trainer.run import Run

ROOT = Path(__file__).resolve().parents[2]
FAKE = (sys.executable, str(Path(__file__).with_name("fake_trainer.py")))


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = Runs(tmp_path / "rüns with blanks", ROOT, FAKE)
    yield found
    for run_id in found.ids():
        runs.kill(found.find(run_id))


def wait(run, *states, patience_s=20):
    until = time.monotonic() + patience_s
    while runs.state(run) not in states:
        assert time.monotonic() < until, f"still {runs.state(run)}; log: {run.log.read_text()}"
        time.sleep(0.02)
    return runs.state(run)


def started(shelf, words, **values):
    return shelf.start({"output_name": "cat", "training_comment": words, **values}, {"kept_key": 7})


def test_a_run_goes_through_its_states_to_done(shelf):
    run = started(shelf, "steps=4")
    assert runs.state(run) in ("starting", "running")
    assert wait(run, "done") == "done"
    assert (run.output / "last.safetensors").exists()
    assert json.loads(run.config.read_text()) == {"kept_key": 7, "output_name": "cat", "training_comment": "steps=4"}


def test_the_exit_code_is_written_down(shelf):
    run = started(shelf, "steps=2")
    until = time.monotonic() + 20
    while runs.exit_code(run) is None and time.monotonic() < until:
        time.sleep(0.02)
    assert runs.exit_code(run) == 0


def test_the_end_of_a_run_is_waited_for_and_then_forgotten(shelf):
    for words, killed in (("steps=1", False), ("steps=500", True)):
        run = started(shelf, words)
        assert run.folder in runs._waiters
        if killed:
            runs.kill(run)
        wait(run, "crashed" if killed else "done")
        assert runs.exit_code(run) == (-signal.SIGKILL if killed else 0)
        until = time.monotonic() + 5
        while run.folder in runs._waiters:
            assert time.monotonic() < until
            time.sleep(0.01)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_whose_folder_goes_while_its_process_ends_is_forgotten_in_silence(shelf):
    run = started(shelf, "steps=500")
    wait(run, "running")
    waiter = runs._waiters[run.folder]
    run.folder.rename(run.folder.with_name("away"))
    Run(run.folder.with_name("away")).process().kill()
    waiter.join(10)
    assert run.folder not in runs._waiters


def test_a_run_whose_folder_is_just_being_made_is_not_the_newest(shelf):
    first = started(shelf, "steps=500")
    shelf.folder_for({"output_name": "zebra"}, {})
    assert shelf.find("") == first


def test_a_second_start_is_refused_while_a_run_goes_on_and_welcome_after_it(shelf):
    first = started(shelf, "steps=500")
    with pytest.raises(BusyError, match=first.folder.name):
        started(shelf, "steps=2")
    first.request("stop")
    assert wait(first, "stopped") == "stopped"
    assert wait(started(shelf, "steps=2"), "done") == "done"


def test_stopping_shows_until_the_trainer_is_done_with_it(shelf):
    run = started(shelf, "steps=500 deaf")
    wait(run, "running")
    run.request("stop")
    assert runs.state(run) == "stopping"
    assert runs.stop_asked(run) == pytest.approx(time.time(), abs=5)


def test_kill_ends_a_deaf_trainer_and_says_who_did_it(shelf):
    run = started(shelf, "steps=500 deaf")
    wait(run, "running")
    runs.kill(run)
    assert wait(run, "crashed") == "crashed"
    assert "from this page" in runs.cause(run, None).message


def test_another_server_finds_a_living_run_by_its_folder_alone(shelf):
    run = started(shelf, "steps=500")
    other = Runs(shelf.folder, ROOT, FAKE)
    assert other.active() == run
    with pytest.raises(BusyError):
        other.start({}, {})


def test_a_failed_event_gives_the_cause_and_the_controls_that_help(shelf):
    run = started(shelf, "steps=8 crash")
    wait(run, "crashed")
    answer = live.poll(shelf, {"run": run.folder.name, "follow": ""})
    assert answer["cause"]["message"] == "The memory is full."
    assert "train_batch_size" in answer["cause"]["keys"]


def test_a_signal_is_told_in_plain_words(shelf):
    run = started(shelf, "steps=8 killed")
    wait(run, "crashed")
    until = time.monotonic() + 5
    while runs.exit_code(run) is None and time.monotonic() < until:
        time.sleep(0.02)
    cause = runs.cause(run, None)
    assert cause.title == "Signal 9 (SIGKILL)" and "memory" in cause.message


def test_an_exit_without_an_event_shows_the_last_line_of_the_log(shelf):
    run = started(shelf, "steps=8 exit=7")
    wait(run, "crashed")
    until = time.monotonic() + 5
    while runs.exit_code(run) is None and time.monotonic() < until:
        time.sleep(0.02)
    cause = runs.cause(run, None)
    assert (cause.title, cause.message) == ("Exit code 7", "something odd happened")


def test_a_dead_process_without_a_record_is_a_crash(tmp_path):
    run = Run(tmp_path / "20260101-000000-old")
    run.folder.mkdir()
    run.pid.write_text(json.dumps({"pid": 2**22 - 3, "started": 1.0}))
    assert runs.state(run) == "crashed"
    assert runs.cause(run, None).title == "Ended without a word"


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGTERM])
def test_every_signal_has_words(tmp_path, number):
    run = Run(tmp_path)
    run.exit.write_text(json.dumps({"code": -number}))
    assert number.name in runs.cause(run, None).title


def test_ids_are_newest_first_and_only_runs(tmp_path):
    for name in ("20260101-000000-a", "20260102-000000-b", "presets", "20260103"):
        (tmp_path / name).mkdir()
    assert Runs(tmp_path, ROOT, FAKE).ids() == ["20260102-000000-b", "20260101-000000-a"]


@pytest.mark.parametrize("run_id", ["..", "../x", "/etc", "20260101-000000-a/../../x", "presets"])
def test_an_id_cannot_leave_the_folder(tmp_path, run_id):
    (tmp_path / "presets").mkdir()
    assert Runs(tmp_path, ROOT, FAKE).find(run_id) is None


def test_check_finds_what_the_schema_finds(shelf):
    found = shelf.check({"learning_rate": "fast"}, {})
    assert [p["key"] for p in found["problems"]] == ["learning_rate"]


def test_a_check_that_breaks_is_told_and_stops_the_start(tmp_path):
    broken = Runs(tmp_path, ROOT, (sys.executable, "-c", "raise SystemExit('no such program')"))
    (problem,) = broken.check({}, {})["problems"]
    assert problem["severity"] == "error" and "no such program" in problem["message"]


# Polling


@pytest.fixture
def quiet_run(tmp_path):
    run = Run(tmp_path / "20260101-000000-quiet")
    run.folder.mkdir()
    return run


def step(n):
    return Step(n, 5000, 1, 1, 0.5, 0.4, 1e-4, None, 2.0, None, 0)


def test_poll_returns_only_what_is_new(quiet_run, tmp_path):
    shelf, name = Runs(tmp_path, ROOT, FAKE), quiet_run.folder.name
    events = EventLog(quiet_run.events)
    events.emit(step(1))
    first = live.poll(shelf, {"run": name, "follow": "", "events": 0, "log": 0})
    assert first["points"] == [[1, 0.5, 0.4, 1e-4, None]]
    events.emit(step(2))
    events.emit(Phase("saving", 1, 2))
    second = live.poll(shelf, {"run": name, "follow": "", "events": first["events"], "log": 0})
    assert [p[0] for p in second["points"]] == [2] and second["phase"]["done"] == 1
    third = live.poll(shelf, {"run": name, "follow": "", "events": second["events"], "log": 0})
    assert third["points"] == [] and "phase" not in third


def test_what_a_run_saves_while_its_state_is_read_comes_with_that_state(quiet_run, tmp_path, monkeypatch):
    read_state = runs.state

    def slow_state(run, tail):
        found = read_state(run, tail)
        EventLog(run.events).emit(Saved("output/last.safetensors", 3, 1, "final"))
        return found

    monkeypatch.setattr(runs, "state", slow_state)
    answer = live.poll(
        Runs(tmp_path, ROOT, FAKE),
        {"run": quiet_run.folder.name, "follow": quiet_run.folder.name, "events": 0, "log": 0},
    )
    assert [saved["step"] for saved in answer["saved"]] == [3]


def test_poll_returns_at_most_1000_points_and_says_there_is_more(quiet_run, tmp_path):
    events = EventLog(quiet_run.events)
    for n in range(1, 2501):
        events.emit(step(n))
    shelf, offset, sizes, more = Runs(tmp_path, ROOT, FAKE), 0, [], True
    while more:
        answer = live.poll(shelf, {"run": quiet_run.folder.name, "follow": "", "events": offset, "log": 0})
        offset, more = answer["events"], answer["more"]
        sizes.append(len(answer["points"]))
    assert sizes == [1000, 1000, 500]


def test_half_a_line_waits_and_a_broken_one_is_passed_over(quiet_run, tmp_path):
    quiet_run.events.write_bytes(
        b'{"type": "phase", "time": 1, "name": "a", "done": 0, "total": 0}\nrubbish\n{"type": "st'
    )
    answer = live.poll(Runs(tmp_path, ROOT, FAKE), {"run": quiet_run.folder.name, "follow": "", "events": 0})
    assert answer["phase"]["name"] == "a" and answer["points"] == []
    with quiet_run.events.open("ab") as file:
        file.write(
            b'ep", "time": 2, "step": 1, "total": 1, "epoch": 1, "epochs": 1, "loss": 1, "average_loss": 1, '
            b'"unet_lr": null, "text_encoder_lr": null, "steps_per_s": 1, "seconds_left": 0, "memory_bytes": 0}\n'
        )
    answer = live.poll(
        Runs(tmp_path, ROOT, FAKE), {"run": quiet_run.folder.name, "follow": "", "events": answer["events"]}
    )
    assert len(answer["points"]) == 1


def test_another_newest_run_starts_anew(quiet_run, tmp_path):
    shelf = Runs(tmp_path, ROOT, FAKE)
    EventLog(quiet_run.events).emit(step(1))
    newer = Run(tmp_path / "20260102-000000-newer")
    newer.folder.mkdir()
    EventLog(newer.events).emit(step(9))
    answer = live.poll(shelf, {"run": quiet_run.folder.name, "follow": "", "events": 70, "log": 5})
    assert answer["run"] == newer.folder.name and answer["points"][0][0] == 9 and answer["from"] == 0
    pinned = live.poll(shelf, {"run": "", "follow": quiet_run.folder.name, "events": 0, "log": 0})
    assert pinned["run"] == quiet_run.folder.name


def test_samples_outside_the_run_are_not_offered(quiet_run, tmp_path):
    lines = [
        {"type": "sample", "time": 1, "path": p, "prompt": "", "index": 0, "seed": 1, "step": 1}
        for p in ("samples/a.png", "/etc/passwd", "samples/../../x.png")
    ]
    quiet_run.events.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answer = live.poll(Runs(tmp_path, ROOT, FAKE), {"run": "", "follow": "", "events": 0})
    assert [Path(s["path"]).name for s in answer["samples"]] == ["a.png"]


def test_a_long_log_begins_with_its_last_part_at_the_start_of_a_line(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("".join(f"line {n} of a hundred thousand\n" for n in range(100_000)))
    part = live.log_from(log, 0)
    assert part["text"].startswith("line ") and part["text"].endswith("line 99999 of a hundred thousand\n")
    assert len(part["text"]) <= live.LOG_BYTES
    assert live.log_from(log, part["log"])["text"] == ""


def test_a_character_is_never_cut_in_two(tmp_path):
    log = tmp_path / "log.txt"
    cat = "🐈".encode()
    log.write_bytes(b"a" + cat[:3])
    first = live.log_from(log, 0)
    assert first["text"] == "a"
    log.write_bytes(b"a" + cat + b"\n")
    assert live.log_from(log, first["log"])["text"] == "🐈\n"


def test_bytes_that_are_no_text_do_not_stop_the_log(tmp_path):
    log = tmp_path / "log.txt"
    log.write_bytes(b"\xff\xfe\x80\n")
    assert live.log_from(log, 0)["log"] == 4


def test_only_a_runs_own_files_can_be_fetched(quiet_run, tmp_path):
    lora = tmp_path / "elsewhere" / "cat.safetensors"
    lora.parent.mkdir()
    lora.write_bytes(b"x")
    quiet_run.log.write_text("")
    quiet_run.events.write_text(
        json.dumps({"type": "saved", "time": 1, "path": str(lora), "step": 1, "epoch": 1, "what": "final"}) + "\n"
    )
    own = {"log.txt": quiet_run.log}
    assert live.downloads(quiet_run, tmp_path) == own
    assert live.downloads(quiet_run, tmp_path, [lora.parent]) == {**own, "cat.safetensors": lora}
    for folder in ({"output_dir": "elsewhere"}, {"output_dir": str(lora.parent)}):
        quiet_run.config.write_text(json.dumps(folder))
        found = live.downloads(quiet_run, tmp_path)
        assert found == {**own, "config.json": quiet_run.config, "cat.safetensors": lora}


def test_a_trainer_does_not_die_with_its_server(shelf):
    run = started(shelf, "steps=500")
    wait(run, "running")
    assert os.getsid(run.process().pid) != os.getsid(0)


def test_a_run_that_the_machine_was_taken_away_from_goes_on_from_its_newest_state(shelf):
    assert shelf.go_on() is None
    gone = started(shelf, "steps=60 pause=0.05 state")
    assert shelf.go_on() is None, "it still runs"
    until = time.monotonic() + 20
    while not history.has_state(gone):
        assert time.monotonic() < until
        time.sleep(0.02)
    runs.kill(gone)
    assert shelf.go_on() is None, "it was killed from the page"
    gone.killed.unlink()
    assert shelf.go_on() is None, "the system killed it, most likely for its memory"
    gone.exit.unlink()  # nobody was there any more to write it down
    again = shelf.go_on()
    assert json.loads(again.config.read_text())["resume"] == str(gone.output / "last-state")
    assert json.loads(again.config.read_text())["kept_key"] == 7
    runs.kill(again)
    assert shelf.go_on() is None


def test_a_training_is_told_that_the_machine_is_taken_away_and_awaited(shelf):
    shelf.save_before_the_end()  # nothing goes on
    run = started(shelf, "steps=500")
    wait(run, "running")
    shelf.save_before_the_end()
    assert run.process() is None
    assert runs.exit_code(run) == -signal.SIGTERM, "the stand-in has no way to save"
    assert runs.interrupted(run)


@pytest.mark.parametrize(("by", "goes_on"), [("SIGTERM", True), ("SIGINT", False), ("", False)])
def test_a_run_that_was_stopped_goes_on_only_where_the_system_stopped_it(shelf, by, goes_on):
    run = shelf.folder_for({"output_name": "cat", "training_comment": "steps=2", "resume": "auto"}, {})
    EventLog(run.events).emit(Ended("stopped", 3, "", 1.0, by))
    again = shelf.go_on()
    assert (again is not None) == goes_on
    if again is not None:
        assert json.loads(again.config.read_text())["resume"] == "auto"
        wait(again, "done")


def test_the_key_reaches_the_trainer_and_no_file(shelf):
    run = started(shelf, "steps=500", wandb_api_key="0123-key", log_with="wandb")
    wait(run, "running")
    assert run.process().environ()["WANDB_API_KEY"] == "0123-key"
    assert "0123-key" not in " ".join(run.process().cmdline())
    runs.kill(run)
    assert all(b"0123-key" not in path.read_bytes() for path in shelf.folder.rglob("*") if path.is_file())
