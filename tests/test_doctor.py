"""`python -m trainer doctor` finds what is wrong, and says what to do."""

from __future__ import annotations

import shutil
from collections import namedtuple
from importlib import metadata

import pytest

from trainer import doctor, events
from trainer.__main__ import main
from trainer.run import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED

SHORT = [look for look in doctor.LOOKS if look.__name__ != "_training"]


@pytest.fixture
def without_training(monkeypatch):
    monkeypatch.setattr(doctor, "LOOKS", SHORT)


def lines(capsys):
    """What was printed: by what was looked at, its state and the advice below it."""
    printed = capsys.readouterr().out.splitlines()
    found = {}
    for line, below in zip(printed, [*printed[1:], ""], strict=True):
        if not line.startswith(" "):
            found[line[6:22].strip()] = (line[:6].strip(), line[22:], below.strip() if below.startswith(" ") else "")
    return found


def test_a_sound_installation_trains_the_embedded_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(doctor.TRAINING, "max_train_steps", 2)
    monkeypatch.setitem(doctor.TRAINING, "num_cpu_threads_per_process", 1)
    assert main(["doctor", "--runs", str(tmp_path / "runs")]) == EXIT_DONE
    found = lines(capsys)
    assert found["training"][0] == "ok"
    assert found["training"][1] == "2 steps of the embedded model ran, and the LoRA was saved"
    assert found["bitsandbytes"][:2] == ("ok", "a step of AdamW8bit on the cpu is right")
    assert found["runs folder"][0] == "ok"
    assert not any((tmp_path / "runs").iterdir())


def test_the_page_gets_each_finding_as_an_event(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "LOOKS", (doctor._writing, doctor._room))
    told = tmp_path / "events.jsonl"
    assert main(["doctor", "--runs", str(tmp_path), "--events", str(told)]) == EXIT_DONE
    *findings, last = [event for event, _ in events.read(told)]
    assert [finding["what"] for finding in findings] == ["runs folder", "disk", "memory"]
    assert {finding["type"] for finding in findings} == {"finding"}
    assert last["report"]["lines"] == [capsys.readouterr().out.splitlines()[-1]] == ["All is well."]


def test_a_stop_ends_it_as_stopped(tmp_path, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "LOOKS", (interrupted,))
    told = tmp_path / "events.jsonl"
    assert main(["doctor", "--runs", str(tmp_path), "--events", str(told)]) == EXIT_STOPPED
    assert [event["kind"] for event, _ in events.read(told)] == ["stopped"]


def test_a_training_that_fails_is_told_with_its_own_words(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "LOOKS", (doctor._training,))
    monkeypatch.setitem(doctor.TRAINING, "train_data_dir", str(tmp_path / "nowhere"))
    assert main(["doctor", "--runs", str(tmp_path)]) == EXIT_FAILED
    state, text, _ = lines(capsys)["training"]
    assert state == "wrong"
    assert "nowhere" in text


def test_a_library_that_breaks_is_a_finding(tmp_path, capsys, monkeypatch, without_training):
    import bitsandbytes.optim

    def broken(*_, **__):
        raise RuntimeError("no kernel\nmore")

    monkeypatch.setattr(bitsandbytes.optim, "AdamW8bit", broken)
    assert main(["doctor", "--runs", str(tmp_path)]) == EXIT_FAILED
    state, text, advice = lines(capsys)["bitsandbytes"]
    assert (state, text) == ("wrong", "RuntimeError: no kernel")
    assert "pip install" in advice


def test_a_kernel_that_computes_wrongly_is_a_finding(tmp_path, capsys, monkeypatch, without_training):
    import bitsandbytes.optim

    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", lambda self: None)
    assert main(["doctor", "--runs", str(tmp_path)]) == EXIT_FAILED
    assert lines(capsys)["bitsandbytes"][:2] == ("wrong", "a step of AdamW8bit on the cpu is wrong")


def test_a_package_that_is_missing_is_a_finding(tmp_path, capsys, monkeypatch, without_training):
    version = metadata.version

    def without_diffusers(name):
        if name == "diffusers":
            raise metadata.PackageNotFoundError
        return version(name)

    monkeypatch.setattr(metadata, "version", without_diffusers)
    assert main(["doctor", "--runs", str(tmp_path)]) == EXIT_FAILED
    assert lines(capsys)["diffusers"][:2] == ("wrong", "is not installed")


def test_a_runs_folder_that_cannot_be_written_to_is_a_finding(tmp_path, capsys, monkeypatch, without_training):
    (tmp_path / "a file").touch()
    assert main(["doctor", "--runs", str(tmp_path / "a file" / "runs")]) == EXIT_FAILED
    state, _, advice = lines(capsys)["runs folder"]
    assert state == "wrong"
    assert "--runs" in advice


def test_little_room_is_a_note(tmp_path, capsys, monkeypatch, without_training):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(2 * 2**30))
    assert main(["doctor", "--runs", str(tmp_path)]) == EXIT_DONE
    state, text, advice = lines(capsys)["disk"]
    assert (state, text[:9]) == ("note", "2 GB free")
    assert "Make room" in advice
