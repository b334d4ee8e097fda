"""The trial before the start: what it measures, and that it leaves no trace."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import forget_accelerator
from trainer import trial
from trainer.__main__ import main
from trainer.data.buckets import Placement
from trainer.run import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED
from trainer.schema import parse


@pytest.fixture
def settings(settings):
    """With steps that leave every photograph its pixels."""
    return settings | {"bucket_reso_steps": 16}


@pytest.fixture
def tried(settings, tmp_path, capsys):
    """`check --trial --json` with some settings changed: (exit code, its answer)."""

    def go(**changes):
        path = tmp_path / "preset.json"
        path.write_text(json.dumps(settings | changes))
        code = main(["check", str(path), "--trial", "--json"])
        forget_accelerator()
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return go


def test_a_trial_tells_memory_and_time_of_steps_and_pictures(tried):
    code, answer = tried(sample_prompts="a cat --s 3", sample_every_n_epochs=1, gradient_accumulation_steps=2)
    assert code == EXIT_DONE and answer["problems"] == []
    found = answer["trial"]
    assert found["ended_in"] == "" and found["savings"]
    assert 1e8 < found["memory"] < found["memory_there"]
    assert found["step_seconds"] > 0 and found["picture_seconds"] > 0
    steps = answer["summary"]["total_steps"]
    assert found["seconds"] > steps * found["step_seconds"] + 2 * found["picture_seconds"]
    assert (
        "of 64×64 pixels a batch" in found["lines"][0] or "64×96" in found["lines"][0] or "96×64" in found["lines"][0]
    )


def test_a_trial_leaves_no_trace_and_the_training_behind_it_is_the_same(settings, train, tried, photographs, tmp_path):
    settings |= {"cache_latents": True}
    train(settings)
    first = load_file(tmp_path / "out" / "photo.safetensors")
    before = {path: path.stat().st_mtime_ns for root in (tmp_path, photographs) for path in root.rglob("*")}
    code, answer = tried(cache_latents_to_disk=True, cache_latents=True, logging_dir=str(tmp_path / "logs"))
    assert code == EXIT_DONE and answer["trial"]["picture_seconds"] is None, "it draws none"
    after = {path: path.stat().st_mtime_ns for root in (tmp_path, photographs) for path in root.rglob("*")}
    assert set(after) - set(before) == {tmp_path / "preset.json"}
    assert all(after[path] == time for path, time in before.items() if path.is_file())
    train(settings)
    second = load_file(tmp_path / "out" / "photo.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_memory_that_does_not_suffice_is_the_answer_with_where_and_what_to_do(tried, ruin):
    ruin({2}, lambda loss: torch.empty(1 << 46))
    code, answer = tried()
    assert code == EXIT_FAILED
    found = answer["trial"]
    assert found["ended_in"] == "steps" and found["tight"] and found["seconds"] is None
    assert [saving["key"] for saving in found["savings"]][:2] == ["gradient_checkpointing", "mixed_precision"]


def test_settings_with_a_problem_are_not_tried(tried):
    code, answer = tried(train_batch_size=-1)
    assert code == EXIT_CONFIG and "trial" not in answer


def test_a_trial_that_fails_otherwise_says_why(tried, monkeypatch):
    def fail(*_, **__):
        raise trial.LorawrightError("The model is odd.", "Choose another.")

    monkeypatch.setattr("trainer.prepare.prepare", fail)
    code, answer = tried()
    assert code == EXIT_FAILED
    assert [problem["message"] for problem in answer["problems"]] == ["The model is odd. Choose another."]


def test_the_batch_with_the_most_pixels_is_tried(settings):
    """One large image weighs less than a whole batch of middling ones."""
    trying = trial._Trying(parse(settings | {"train_batch_size": 3}), SimpleNamespace(summary=trial_summary()), None)
    sizes = [(96, 96), (64, 64), (64, 64), (64, 64), (64, 64), (32, 32)]
    pictures = [SimpleNamespace(repeats=1) for _ in sizes]
    placements = [Placement(size, size, (0, 0)) for size in sizes]
    assert trying._heaviest(pictures, placements) == [1, 2, 3]
    assert (trying.bucket, trying.images) == ((64, 64), 3)
    pictures[0].repeats = 2
    assert trying._heaviest(pictures, placements) == [0]
    assert (trying.bucket, trying.images) == ((96, 96), 2)


def test_the_time_of_all_counts_preparation_every_step_and_every_picture(settings):
    """Of 6 images 2 were tried: caching takes three times as long, and all else before the steps as long as here."""
    drawn = {"sample_every_n_steps": 4, "sample_every_n_epochs": 2, "sample_prompts": "a cat\n\na dog"}
    trying = trial._Trying(parse(settings | drawn), SimpleNamespace(summary=trial_summary()), None)
    trying.images = 2
    trying.took |= {"loading the base model": 20, "caching latents": 3, "steps": 50, "drawing a picture": 60}
    pictures = 2 * (1 + 10 // 4 + 5 // 2)  # prompts, before the first step, by steps, by epochs
    assert trying._in_all(2.0, 7.0) == 20 + 3 * 3 + 10 * 2.0 + pictures * 7.0
    assert trying._in_all(2.0, None) == 20 + 3 * 3 + 10 * 2.0


def trial_summary():
    return SimpleNamespace(images=6, regularisation=0, total_steps=10, epochs=5)
