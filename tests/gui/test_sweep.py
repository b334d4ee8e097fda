"""A sweep: which runs it makes, that nothing is queued unless all can run, and what its runs are known by."""

import sys
from pathlib import Path

import pytest

from gui import history, runs, sweep
from gui.runs import Runs
from gui.waiting import Queue
from trainer import kohya
from trainer.events import Ended, EventLog, Saved, Step
from trainer.paths import DEMO
from trainer.run import Run

ROOT = Path(__file__).resolve().parents[2]
FAKE = (sys.executable, str(Path(__file__).with_name("fake_trainer.py")))
BASE = {"output_name": "cat", "network_alpha": 1, "train_data_dir": str(DEMO / "images"), "caption_extension": ".txt"}
BASE |= {"seed": 7}


def test_every_combination_is_a_run_named_after_what_it_has():
    found, problems = sweep.plan(BASE, [["learning_rate", "1e-4, 5e-5,1e-4"], ["network_dim", "4,8"]])
    assert not problems
    assert [(one.values["learning_rate"], one.values["network_dim"]) for one in found] == [
        (1e-4, 4),
        (1e-4, 8),
        (5e-5, 4),
        (5e-5, 8),
    ]
    assert found[1].values["output_name"] == "cat-learning_rate-1e-4-network_dim-8"
    assert found[1].words == "Learning rate 1e-4, Network Rank (Dimension) 8"
    assert all(one.values["network_alpha"] == 1 for one in found) and BASE["output_name"] == "cat"


def test_values_with_commas_switches_and_names_that_would_be_alike():
    found, _ = sweep.plan(BASE, [["max_resolution", "512,512; 768,768"], ["save_state", "On, off"]])
    assert [(one.values["max_resolution"], one.values["save_state"]) for one in found][:2] == [
        ("512,512", True),
        ("512,512", False),
    ]
    found, _ = sweep.plan(BASE, [["vae", f"/a/b; a b; {'/long' * 20}/c.vae"]])
    names = [one.values["output_name"] for one in found]
    assert names[:2] == ["cat-vae-a-b", "cat-vae-a-b-2"]
    assert names[2].endswith("-long-c.vae") and len(names[2]) < 40, "it becomes the name of files"


def test_a_value_spelled_in_two_ways_is_one_and_what_is_left_out_is_told():
    spelled = [["save_state", "on, OFF, ON, yes, off"], ["learning_rate", "1e-4, 0.0001, 5e-5"]]
    found, told = sweep.plan(BASE, spelled)
    assert [(one.values["save_state"], one.values["learning_rate"]) for one in found] == [
        (True, 1e-4),
        (True, 5e-5),
        (False, 1e-4),
        (False, 5e-5),
    ]
    assert [(problem.key, problem.severity, problem.message) for problem in told] == [
        ("save_state", "warning", "left out as the same value: ON (as on), yes (as on), off (as OFF)."),
        ("learning_rate", "warning", "left out as the same value: 0.0001 (as 1e-4)."),
    ]
    found, (refusal, _) = sweep.plan(BASE, [["network_dim", "8, 8.0"]])
    assert found == [] and "make 1 runs" in refusal.message


@pytest.mark.parametrize("blank", ["", None])
def test_without_a_seed_one_is_drawn_for_all_and_told(blank):
    fields = [["network_dim", "4, 8"]]
    found, (told,) = sweep.plan(BASE | {"seed": blank}, fields)
    (seed,) = {one.values["seed"] for one in found}
    assert isinstance(seed, int) and (told.key, told.severity) == ("seed", "warning") and str(seed) in told.message
    for has_one in ({"seed": 0}, {"additional_parameters": "--seed 3"}, {"resume": "auto"}):
        found, told = sweep.plan(BASE | {"seed": blank} | has_one, fields)
        assert told == [] and {one.values["seed"] for one in found} == {has_one.get("seed", blank)}
    assert sweep.plan(BASE | {"seed": blank}, [["seed", "1, 2"]])[1] == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "Choose a parameter"),
        ([["learning_rate", " , "]], "Choose a parameter"),
        ([["", "1,2"], []], "Choose a parameter"),
        ([["learning_rate", "1e-4"]], "make 1 runs"),
        ([["seed", ",".join(map(str, range(25)))]], "make 25 runs"),
        ([["seed", "1,2"], ["seed", "3,4"]], "the same one"),
        ([["no_such_key", "1,2"]], "no parameter"),
        ([["output_name", "a,b"]], "cannot be swept"),
        ([["wandb_api_key", "a,b"]], "cannot be swept"),
        ([["sample_prompts", "a,b"]], "cannot be swept"),
    ],
)
def test_what_is_no_sweep_is_refused_in_words(fields, message):
    found, (problem,) = sweep.plan(BASE, fields)
    assert found == [] and message in problem.message


def test_each_combination_is_checked_and_a_problem_names_the_first_that_has_it():
    found, _ = sweep.plan(BASE, [["network_dim", "8, 0"], ["optimizer", "AdamW, Sgd"]])
    wrong = {problem.key: problem.message for problem in sweep.check(found)}
    assert set(wrong) == {"network_dim", "optimizer"}
    assert wrong["network_dim"].startswith("with Network Rank (Dimension) 0, Optimizer AdamW:")
    assert wrong["optimizer"].startswith("with Network Rank (Dimension) 8, Optimizer Sgd:")
    assert sweep.check(sweep.plan(BASE, [["network_dim", "8, 16"]])[0]) == []


@pytest.mark.parametrize(
    ("fields", "values", "message"),
    [
        (["learning_rate", "1e-4, 5e-5"], {}, "has no effect: Unet learning rate (unet_lr) and"),
        (["network_dropout", "0, 0.1"], {"LoRA_type": "LyCORIS/LoHa"}, "LyCORIS/LoHa does not use it"),
        (["noise_offset", "0, 0.1"], {"noise_offset_type": "Multires"}, "(noise_offset_type) is Multires"),
        (["epoch", "1, 2"], {"max_train_steps": "100"}, "Max train steps (max_train_steps) goes before it"),
        (["learning_rate", "1e-4, 5e-5"], {"unet_lr": ""}, ""),
    ],
)
def test_what_changes_nothing_is_not_swept(fields, values, message):
    found = sweep.check(sweep.plan(BASE | values, [fields])[0])
    assert [problem.key for problem in found] == [fields[0]] * bool(message)
    assert all(message in problem.message for problem in found)


@pytest.fixture
def queue(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    made = Queue(Runs(tmp_path / "runs", ROOT, FAKE))
    yield made
    for run_id in made.runs.ids():
        runs.kill(made.runs.find(run_id))


def test_the_runs_of_a_sweep_are_queued_in_order_and_known_by_it_after_their_start(queue):
    found, _ = sweep.plan({**BASE, "training_comment": "steps=500"}, [["seed", "1,2,3"]])
    sweep.enqueue(queue, found, {"foreign": "kept"})
    assert [run.folder.name[16:] for run in queue.waiting()] == [f"cat-seed-{n}" for n in (1, 2, 3)]
    assert [kohya.load(run.config).kept for run in queue.waiting()] == [{"foreign": "kept"}] * 3
    queue.start_next()
    (same,) = {queue.runs.summary(run_id)["sweep"] for run_id in queue.runs.ids()}
    assert same


def test_where_the_disk_refuses_one_none_is_queued(queue, monkeypatch):
    found, _ = sweep.plan(BASE, [["seed", "1,2,3"]])
    add = queue.add

    def full(values, kept, mark):
        if values["seed"] == 3:
            raise OSError(28, "No space left on device")
        return add(values, kept, mark)

    monkeypatch.setattr(queue, "add", full)
    with pytest.raises(OSError):
        sweep.enqueue(queue, found, {})
    assert queue.waiting() == []


def test_what_came_of_a_run(tmp_path):
    run = Run(tmp_path / "20260101-000000-cat")
    run.output.mkdir(parents=True)
    assert history.outcome(run) == {"last": None, "lowest": None, "seconds": None, "file": None}
    events = EventLog(run.events)
    for step, average in ((1, 0.5), (2, 0.2), (3, 0.3)):
        events.emit(Step(step, 3, 1, 1, 9.0, average, 1e-4, None, 2.0, None, 0))
    (run.output / "cat.safetensors").write_bytes(b"x")
    events.emit(Saved(str(run.output / "cat.safetensors"), 3, 1, "final"))
    events.emit(Ended("done", 3, "", 1.0))
    found = history.outcome(run)
    assert (found["last"], found["lowest"], found["file"]) == ([3, 0.3], [2, 0.2], "cat.safetensors")
    assert 0 <= found["seconds"] < 5
