"""The queue: what waits lies on disk, starts when its turn comes, and survives failures and restarts."""

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gui import runs, waiting
from gui.runs import BusyError, Runs
from gui.waiting import Queue

ROOT = Path(__file__).resolve().parents[2]
FAKE = (sys.executable, str(Path(__file__).with_name("fake_trainer.py")))


@pytest.fixture
def queue(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(waiting, "LOOK_AGAIN_S", 0.1)
    made = Queue(Runs(tmp_path / "runs", ROOT, FAKE))
    yield made
    for run_id in made.runs.ids():
        runs.kill(made.runs.find(run_id))


def add(queue, name, words="steps=2", **values):
    return queue.add({"output_name": name, "training_comment": words, **values}, {})


def names(queue):
    return [run.folder.name[16:] for run in queue.waiting()]


def until(check, patience_s=40):
    end = time.monotonic() + patience_s
    while not check():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def states(queue):
    with queue.runs.alone():
        return {run_id[16:]: runs.state(queue.runs.find(run_id)) for run_id in queue.runs.ids()}


def test_what_waits_is_queued_in_the_order_of_adding_and_is_not_the_newest_run(queue):
    for name in ("a", "b", "c"):
        add(queue, name)
    assert names(queue) == ["a", "b", "c"] and set(states(queue).values()) == {"queued"}
    assert queue.runs.find("") is None and queue.runs.active() is None


def test_the_order_can_be_changed_and_runs_taken_out(queue):
    a, b, c = (add(queue, name) for name in ("a", "b", "c"))
    assert queue.earlier(c) and names(queue) == ["a", "c", "b"]
    assert not queue.earlier(a)
    assert queue.remove(c) and not c.folder.exists() and names(queue) == ["a", "b"]
    assert not queue.remove(c) and not queue.earlier(c)
    assert names(Queue(queue.runs)) == ["a", "b"]  # another server knows as much
    assert b.folder.exists()


def test_one_after_the_other_through_failures_each_named_by_when_it_began(queue):
    add(queue, "bad", "steps=4 crash")
    add(queue, "dead", "steps=4 killed")
    add(queue, "good")
    queue.serve()
    until(lambda: states(queue) == {"bad": "crashed", "dead": "crashed", "good": "done"})
    began = {run_id[16:]: run_id for run_id in queue.runs.ids()}
    assert sorted(began, key=lambda name: began[name]) == ["bad", "dead", "good"]
    assert not list(queue.runs.folder.glob("*/queued"))
    assert queue.runs.find("").folder.name == began["good"]


def test_nothing_starts_while_a_run_goes_on_and_a_restarted_server_goes_on_with_the_queue(queue):
    going = queue.runs.start({"output_name": "now", "training_comment": "steps=500"}, {})
    add(queue, "next")
    assert queue.start_next() is None
    runs.kill(going)
    again = Queue(Runs(queue.runs.folder, ROOT, FAKE))
    assert again.start_next().folder.name.endswith("next")
    with pytest.raises(BusyError):
        again.runs.start({}, {})
    until(lambda: states(again)["next"] == "done")


def test_a_run_whose_server_died_right_after_its_start_is_not_started_twice(queue):
    add(queue, "a")
    run = queue.start_next()
    run.queued.write_text("1.0")  # as if the server had ended before it took the marker away
    assert queue.waiting() == []
    until(lambda: states(queue)["a"] == "done")
    assert queue.start_next() is None


def test_two_servers_of_one_folder_start_one_run_at_a_time_and_each_once(queue):
    for name in ("a", "b", "c", "d"):
        add(queue, name)
    servers = [Queue(Runs(queue.runs.folder, ROOT, FAKE)) for _ in range(2)]
    ready = threading.Barrier(2)

    def at_once(server):
        ready.wait()
        return server.start_next()

    for _ in range(4):
        with ThreadPoolExecutor(2) as pool:
            started = [run for run in pool.map(at_once, servers) if run]
        assert len(started) == 1
        runs.kill(started[0])
    assert sorted(states(queue)) == ["a", "b", "c", "d"] and not queue.waiting()


HOLDER = """
import sys
from pathlib import Path
from gui.runs import Runs
with Runs(Path(sys.argv[1]), Path.cwd(), ()).alone():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_killed_server_does_not_keep_the_queue_from_the_next(queue):
    add(queue, "a", "steps=1 pause=0")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(queue.runs.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(queue.start_next)
        with pytest.raises(TimeoutError):
            waits.result(0.2)
        holder.kill()
        assert waits.result(20).folder.name.endswith("a")
    holder.wait()


def test_a_queue_that_cannot_start_says_why_and_goes_on_once_it_can(queue):
    queue.runs.trainer = ("/no/such/program",)
    add(queue, "a")
    queue.serve()
    until(lambda: queue.trouble)
    assert "/no/such/program" in queue.trouble and names(queue) == ["a"]
    queue.runs.trainer = FAKE
    until(lambda: states(queue).get("a") == "done")
    until(lambda: not queue.trouble)


def test_the_key_waits_in_memory_alone(queue):
    add(queue, "a", "steps=500", wandb_api_key="0123-key")
    assert all(b"0123-key" not in path.read_bytes() for path in queue.runs.folder.rglob("*") if path.is_file())
    run = queue.start_next()
    until(lambda: runs.state(run) == "running")
    assert run.process().environ()["WANDB_API_KEY"] == "0123-key"
    assert "wandb_api_key" not in json.loads(run.config.read_text())
