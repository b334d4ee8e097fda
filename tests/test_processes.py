"""Several processes train what one trains on batches as large as all of theirs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.test_training import of_type
from trainer import loop, schema
from trainer.__main__ import main
from trainer.errors import ConfigError, TrainingError
from trainer.processes import Place, followed
from trainer.run import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, Run


@pytest.fixture
def three(settings, tmp_path):
    """Trains on three images of one bucket, each once an epoch: with two or four a batch, some are short."""
    inner = tmp_path / "images" / "1_photo"
    shutil.copytree(f"{settings['train_data_dir']}/2_photo", inner)
    return settings | {"train_data_dir": str(inner.parent), "enable_bucket": False, "save_every_n_epochs": 0}


@pytest.fixture
def children():
    """The processes that the test started; a server and a browser of other tests may run beside them."""
    others = set(psutil.Process().children())
    return lambda: set(psutil.Process().children()) - others


def losses(events):
    return {event["step"]: event["loss"] for event in of_type(events, "step")}


def alike(one, other):
    return one.keys() == other.keys() and all(torch.allclose(one[k], other[k], rtol=1e-4, atol=1e-5) for k in one)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("images", [1, 2, 5, 6])
def test_shares_take_each_image_once_and_differ_by_one_at_most(count, images):
    shares = [Place(rank, count).share(images) for rank in range(count)]
    assert [i for share in shares for i in share] == list(range(images))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.proves("num_processes")
def test_two_processes_train_what_one_does_with_twice_the_batch(three, train, tmp_path):
    three |= {
        "epoch": 6,
        "gradient_accumulation_steps": 2,
        "cache_latents": False,
        "max_data_loader_n_workers": 0,
        "noise_offset": 0.05,
        "multires_noise_iterations": 2,
        "max_grad_norm": 0.01,
        "optimizer": "SGDNesterov",
        "no_token_padding": True,
    }
    code, alone, _ = train(three | {"train_batch_size": 4})
    assert code == EXIT_DONE
    one = load_file(tmp_path / "out" / "photo.safetensors")
    code, together, _ = train(three | {"train_batch_size": 2, "num_processes": 2})
    assert code == EXIT_DONE
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)
    assert len(losses(together)) == 3
    assert alike(load_file(tmp_path / "out" / "photo.safetensors"), one)


def test_stopped_resumed_and_ended_by_the_death_of_one_they_are_where_one_process_is(
    three, train, children, tmp_path, monkeypatch
):
    three |= {"epoch": 3, "learning_rate": 1e-3}
    _, alone, _ = train(three | {"train_batch_size": 2, "save_every_n_steps": 4, "save_state": True})
    shutil.move(tmp_path / "out", tmp_path / "one")

    three |= {"num_processes": 2, "save_state_on_train_end": True}
    step = loop.take_step

    def take_step(session, number, batches):
        if number == 3:
            session.run.request("stop")
        if number == 5:
            for child in children():
                child.kill()
        return step(session, number, batches)

    monkeypatch.setattr(loop, "take_step", take_step)
    code, before, _ = train(three)
    assert code == EXIT_STOPPED
    assert list(losses(before)) == [1, 2, 3]
    assert not children()

    code, behind, folder = train(three | {"resume": "auto", "seed": ""})
    assert code == EXIT_FAILED
    failed = of_type(behind, "failed")[-1]
    assert failed["kind"] == "process_lost"
    assert failed["message"] == "Process 2 of 2 was ended by signal 9."
    assert not list(folder.glob("*.failed"))

    both, one = losses(before) | losses(behind), losses(alone)
    assert both == pytest.approx({number: one[number] for number in both}, rel=1e-5)
    states = [load_file(tmp_path / at / "photo-step00000004-state" / "tensors.safetensors") for at in ("out", "one")]
    assert alike(*states)


@pytest.mark.proves("gpu_ids")
def test_training_sees_the_gpus_that_are_named_and_no_others(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with followed(Run(tmp_path), 1, "0,2", {}, print):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,2"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.fixture
def launched(monkeypatch):
    """As a launcher leaves the environment for a process of this rank of two."""

    def launched(rank):
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
        for name, value in (place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}).items():
            monkeypatch.setenv(name, str(value))

    return launched


@pytest.mark.proves("gpu_ids")
def test_a_process_that_a_launcher_started_sees_the_named_gpus_and_tells_why_it_ends(
    launched, settings, tmp_path, monkeypatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    launched(1)

    def prepare(config, run, emit):
        raise TrainingError("file", f"It sees {os.environ['CUDA_VISIBLE_DEVICES']}.")

    monkeypatch.setattr("trainer.prepare.prepare", prepare)
    preset = tmp_path / "preset.json"
    preset.write_text(json.dumps(settings | {"gpu_ids": "0,2"}))
    assert main(["train", str(preset), "--run", str(tmp_path / "run")]) == EXIT_FAILED
    told = json.loads((tmp_path / "run" / "process1.failed").read_text())
    assert (told["kind"], told["message"]) == ("file", "It sees 0,2.")


def test_what_a_launcher_started_is_not_started_again_and_needs_one_folder(launched, children, tmp_path, capsys):
    launched(0)
    with followed(Run(tmp_path), 2, "", {}, print):
        assert not children()
    preset = tmp_path / "preset.json"
    preset.write_text("{}")
    assert main(["train", str(preset)]) == EXIT_CONFIG
    assert "--run FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "key", "message"),
    [
        ({"gpu_ids": "0;1"}, "gpu_ids", '"0;1" is not allowed'),
        ({"gpu_ids": "1,1"}, "gpu_ids", '"1,1" is not allowed'),
        ({"gpu_ids": "0", "num_processes": 2}, "gpu_ids", "names 1 GPUs, and Number of processes"),
        ({"go_on_with_less_memory": True, "num_processes": 2}, "go_on_with_less_memory", "works with one process"),
        ({"go_back_on_nan": True, "save_state": True, "num_processes": 2}, "go_back_on_nan", "works with one process"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_naming_both_controls(values, key, message):
    with pytest.raises(ConfigError) as caught:
        schema.parse(values)
    assert [(p.key, message in p.message) for p in caught.value.problems] == [(key, True)]


LEADER = """
import json, os, sys, time
from pathlib import Path
from trainer.processes import followed
from trainer.run import Run
with followed(Run(Path(sys.argv[1])), 2, "", json.loads(sys.argv[2]), print):
    print("started", flush=True)
    time.sleep(60)
"""


def test_nobody_outlives_the_first_one(three, tmp_path):
    words = [sys.executable, "-c", LEADER, str(tmp_path), json.dumps(three | {"num_processes": 2})]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as leader:
        assert leader.stdout
        leader.stdout.readline()
        (follower,) = psutil.Process(leader.pid).children()
        time.sleep(1)
        assert follower.is_running() and follower.status() != psutil.STATUS_ZOMBIE
        os.kill(leader.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs([follower], timeout=20)
    assert not alive
