"""What goes wrong in the middle of a training ends in an event that says so, and what was saved stays. docs/faults.md
lists all of it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.test_training import of_type
from trainer import events, pictures, sampling, saving, state
from trainer.run import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, Run
from trainer.schema import Config
from trainer.start import explain

ROOT = Path(__file__).parents[1]


class OnlyTheGradientIsNone(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


@pytest.mark.parametrize("loss", [lambda loss: loss * float("nan"), OnlyTheGradientIsNone.apply])
@pytest.mark.parametrize("limit", [0, 1])
def test_a_step_that_is_not_a_number_ends_the_run_and_names_its_images(settings, train, tmp_path, ruin, loss, limit):
    ruin({2}, loss)
    code, events, _ = train(settings | {"max_grad_norm": limit, "save_every_n_steps": 1})
    assert code == EXIT_FAILED
    failed = of_type(events, "failed")[-1]
    assert failed["kind"] == "not_a_number"
    assert "step 2 " in failed["message"]
    assert sum(failed["message"].count(name) for name in ("astronaut.png", "chelsea.png", "rocket.png")) == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["photo-step00000001.safetensors"]
    assert not of_type(events, "ended")


@pytest.mark.proves("max_skipped_steps")
def test_such_steps_are_left_out_as_many_in_a_row_as_allowed(settings, train, tmp_path, ruin):
    ruin({2, 3, 5})
    code, events, _ = train(settings | {"max_skipped_steps": 2})
    assert code == EXIT_DONE
    told = [e["message"] for e in of_type(events, "warning") if "is left out" in e["message"]]
    assert [message.split("of step ")[1][0] for message in told] == ["2", "3", "5"]
    assert [e["step"] for e in of_type(events, "step")] == [1, 4, 6]
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "out" / "photo.safetensors").values())


@pytest.mark.proves("max_skipped_steps")
def test_one_more_in_a_row_than_allowed_ends_the_run(settings, train, tmp_path, ruin):
    ruin({2, 3})
    code, events, _ = train(settings | {"max_skipped_steps": 1})
    assert code == EXIT_FAILED
    assert "2 such steps in a row are too many" in of_type(events, "failed")[-1]["message"]
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_vanishes_in_the_middle_is_named_and_what_was_saved_stays(settings, train, tmp_path, workers):
    own = shutil.copytree(settings["train_data_dir"], tmp_path / "own photographs")
    lost = own / "2_photo" / "chelsea.png"
    settings |= {"train_data_dir": str(own), "cache_latents": False, "max_data_loader_n_workers": workers}
    real = saving.save

    def save_then_lose(s, step, due):
        lost.unlink(missing_ok=True)
        return real(s, step, due)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "save", save_then_lose)
        code, events, _ = train(settings | {"save_every_n_steps": 1, "epoch": 4})
    assert code == EXIT_FAILED
    failed = of_type(events, "failed")[-1]
    assert failed["kind"] == "data"
    assert failed["message"] == f'"{lost}" cannot be read as an image: no such file or directory.'
    assert load_file(tmp_path / "out" / "photo-step00000001.safetensors")


@pytest.mark.parametrize("with_states", [False, True])
def test_a_full_disk_is_told_and_leaves_only_whole_files(settings, train, small_disk, with_states):
    code, events, _ = train(
        settings | {"output_dir": str(small_disk), "save_every_n_steps": 1, "epoch": 4, "save_state": with_states}
    )
    assert code == EXIT_FAILED
    failed = of_type(events, "failed")[-1]
    assert failed["kind"] == "disk_full"
    assert failed["hint"]
    assert not list(small_disk.glob(".*"))
    files = list(small_disk.glob("*.safetensors"))
    assert files and all(load_file(file) for file in files)


@pytest.fixture
def read_only(small_disk):
    """Makes what lies in a small file system unchangeable, also for root."""
    return lambda: subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)


def test_an_output_folder_that_is_read_only_is_refused_before_the_start(settings, train, small_disk, read_only, capsys):
    read_only()
    code, _, _ = train(settings | {"output_dir": str(small_disk / "new")})
    assert code == EXIT_CONFIG
    assert "Output folder (output_dir)" in (told := capsys.readouterr().err)
    assert "cannot be written to (Read-only file system)" in told


def test_a_disk_that_becomes_read_only_in_the_middle_is_told_with_the_path(
    settings, train, small_disk, read_only, monkeypatch
):
    real = saving.prove
    monkeypatch.setattr(saving, "prove", lambda *what: (real(*what), read_only()))
    code, stream, _ = train(settings | {"output_dir": str(small_disk), "save_every_n_steps": 1})
    assert code == EXIT_FAILED
    failed = of_type(stream, "failed")[-1]
    assert failed["kind"] == "file"
    assert str(small_disk) in failed["message"] and "Read-only file system" in failed["message"]
    assert load_file(small_disk / "photo-step00000001.safetensors")


def test_images_on_a_read_only_disk_are_trained_without_a_cache_beside_them(
    settings, train, small_disk, read_only, tmp_path, caplog
):
    shutil.copytree(Path(settings["train_data_dir"]) / "2_photo", small_disk / "2_photo")
    read_only()
    code, _, _ = train(
        settings | {"train_data_dir": str(small_disk), "cache_latents": True, "cache_latents_to_disk": True}
    )
    assert code == EXIT_DONE
    assert "latents are not cached in" in caplog.text and "Read-only file system" in caplog.text


def test_a_disk_too_full_for_the_event_still_ends_as_failed(settings, train, monkeypatch, capsys):
    from trainer.events import EventLog

    def full(log, event):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(EventLog, "emit", full)
    code, _, _ = train(settings)
    assert code == EXIT_FAILED
    assert "could not be written" in capsys.readouterr().err
    assert explain(OSError(errno.ENOSPC, "No space left on device"), Config()).kind == "disk_full"


def test_a_sample_that_fails_is_told_and_training_goes_on(settings, train, monkeypatch):
    def fail(*_):
        raise RuntimeError("a size that cannot be")

    monkeypatch.setattr(sampling, "draw", fail)
    code, events, _ = train(settings | {"sample_prompts": "a cat --s 1", "sample_every_n_epochs": 1})
    assert code == EXIT_DONE
    assert any("Sample prompt 1 could not be drawn: a size" in e["message"] for e in of_type(events, "warning"))


@pytest.mark.parametrize(("brightest", "black"), [(0, True), (2, True), (3, False)])
def test_a_black_sample_is_named_as_such(settings, train, monkeypatch, brightest, black):
    picture = Image.new("RGB", (64, 64))
    picture.putpixel((5, 5), (0, brightest, 0))
    assert pictures.is_black(picture) == black
    if brightest != 0:
        return
    monkeypatch.setattr(sampling, "draw", lambda *_: picture)
    _, events, _ = train(settings | {"sample_prompts": "a cat", "sample_every_n_epochs": 1, "max_train_steps": 1})
    assert any("sample prompt 1 at step 0 is black" in e["message"] for e in of_type(events, "warning"))


def test_memory_that_ends_is_told_with_what_would_lower_it(settings, train, ruin):
    def full(loss):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    ruin({2}, full)
    code, events, _ = train(settings)
    assert code == EXIT_FAILED
    failed = of_type(events, "failed")[-1]
    assert failed["kind"] == "out_of_memory"
    assert "Gradient checkpointing" in failed["hint"]


@pytest.mark.parametrize(
    ("moment", "step"),
    [
        ("loading PyTorch", 0),
        ("caching latents", 0),
        ("drawing samples", 0),
        ("training", 1),
        ("saving photo-step00000002.safetensors", 3),
        ("saving photo-step00000002-state", 3),
    ],
)
def test_a_signal_that_ends_the_machine_is_safe_at_any_moment(settings, train, tmp_path, monkeypatch, moment, step):
    """It ends before the first step with nothing to save, or behind the step that is next with LoRA and state."""
    real, sent = events.EventLog.emit, []

    def emit(log, event):
        real(log, event)
        if isinstance(event, events.Phase) and event.name == moment and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    monkeypatch.setattr(events.EventLog, "emit", emit)
    settings |= {"save_state": True, "save_every_n_steps": 2, "sample_prompts": "a cat --s 2", "max_train_steps": 6}
    code, stream, _ = train(settings | {"sample_every_n_steps": 4})
    assert sent and code == EXIT_STOPPED
    assert (stream[-1]["type"], stream[-1]["by"], stream[-1]["step"]) == ("ended", "SIGTERM", step)
    assert step == 0 or state.find(tmp_path / "out")[0].step == step
    assert not list((tmp_path / "out").glob(".*"))


def test_the_same_command_again_goes_on_where_the_machine_was_taken_away_and_ends_the_same(settings, train, tmp_path):
    settings |= {"max_train_steps": 40, "resume": "auto"}
    # What the check tries these on must leave a process that can still import the base model's classes.
    settings |= {
        "optimizer_args": "weight_decay=0.02",
        "lr_scheduler": "polynomial",
        "lr_scheduler_args": "lr_end=1e-6",
    }
    train(settings | {"output_dir": str(tmp_path / "in one go"), "resume": ""})
    preset = tmp_path / "preset.json"
    preset.write_text(json.dumps(settings))

    def go(number):
        run = Run(tmp_path / f"run of the machine {number}")
        return run, [sys.executable, "-m", "trainer", "train", str(preset), "--run", str(run.folder)]

    run, command = go(1)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 120
        while not (run.events.exists() and b'"type": "step"' in run.events.read_bytes()):
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == EXIT_STOPPED
    *_, ended = [event for event, _ in events.read(run.events)]
    assert (ended["status"], ended["by"]) == ("stopped", "SIGTERM")
    assert load_file(ended["path"])
    assert state.find(tmp_path / "out")[0].step == ended["step"] > 0
    run, command = go(2)
    assert subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == EXIT_DONE
    assert next(e["first_step"] for e, _ in events.read(run.events) if e["type"] == "started") > 1
    whole, pieces = (load_file(tmp_path / folder / "photo.safetensors") for folder in ("in one go", "out"))
    assert whole.keys() == pieces.keys() and all(torch.equal(whole[name], pieces[name]) for name in whole)
