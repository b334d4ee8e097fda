"""What a training does when it cannot take the next step: it goes back to a state, or on with less memory."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors import safe_open
from safetensors.torch import load_file

from tests.test_faults import OnlyTheGradientIsNone
from tests.test_training import of_type, prepared
from trainer import check, kohya, loop, state
from trainer.models.sd import StableDiffusion
from trainer.run import EXIT_DONE, EXIT_FAILED

GOING_BACK = {"go_back_on_nan": True, "save_state": True, "save_every_n_steps": 2, "save_every_n_epochs": 0}


def told(events, words):
    return [e["message"] for e in of_type(events, "warning") if words in e["message"]]


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def same(one, other):
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("allowed", [0, 5])
def test_a_weight_that_the_optimizer_made_no_number_is_noticed_at_once(settings, train, tmp_path, monkeypatch, allowed):
    real, calls = AcceleratedOptimizer.step, []

    def step(optimizer, closure=None):
        real(optimizer, closure)
        calls.append(1)
        if len(calls) == 2:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][-1].view(-1)[0] = float("inf")

    monkeypatch.setattr(AcceleratedOptimizer, "step", step)
    code, events, _ = train(settings | {"save_every_n_steps": 1, "save_state": True, "max_skipped_steps": allowed})
    assert code == EXIT_FAILED
    failed = of_type(events, "failed")[-1]
    assert failed["kind"] == "not_a_number"
    assert "A weight behind step 2 is not a number; its images: " in failed["message"]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["photo-step00000001-state", "photo-step00000001.safetensors"]


@pytest.mark.proves("go_back_on_nan")
@pytest.mark.parametrize("loss", [lambda loss: loss * float("nan"), OnlyTheGradientIsNone.apply])
def test_training_goes_back_to_the_newest_state_with_half_the_rate_and_other_noise(
    settings,
    train,
    tmp_path,
    ruin,
    loss,
):
    ruin({9}, loss)
    settings |= GOING_BACK | {"max_train_steps": 12, "lr_scheduler": "constant"}
    code, events, _ = train(settings)
    assert code == EXIT_DONE
    (message,) = told(events, "goes back")
    assert "of step 9 is not a number" in message and "goes back to step 8" in message
    steps = of_type(events, "step")
    assert [e["step"] for e in steps] == [*range(1, 9), *range(9, 13)]
    assert [e["unet_lr"] for e in steps] == pytest.approx([0.01] * 8 + [0.005] * 4)
    assert metadata(tmp_path / "out" / "photo.safetensors")["ss_rates_halved_after_steps"] == "[8]"


@pytest.mark.proves("go_back_on_nan")
def test_the_noise_behind_the_return_is_another(settings, train, ruin, monkeypatch):
    drawn = {}
    real = loop.noised

    def noised(s, latents):
        found = real(s, latents)
        drawn.setdefault(len(s.returns), []).append(found[2])
        return found

    monkeypatch.setattr(loop, "noised", noised)
    ruin({5})
    train(settings | GOING_BACK)
    assert not torch.equal(drawn[0][4], drawn[1][0])
    assert drawn[0][4].shape == drawn[1][0].shape, "the same images come again"


@pytest.mark.proves("go_back_on_nan")
def test_what_goes_on_from_a_state_behind_a_return_is_the_training_that_never_stopped(
    settings,
    train,
    tmp_path,
    ruin,
):
    settings |= GOING_BACK | {"max_train_steps": 8}
    ruin({3})
    train(settings)
    whole = tmp_path / "in one go"
    (tmp_path / "out").rename(whole)
    train(settings | {"resume": str(whole / "photo-step00000004-state")})
    assert state.read(whole / "photo-step00000004-state").returns == (2,)
    assert same(whole / "photo.safetensors", tmp_path / "out" / "photo.safetensors")


@pytest.mark.proves("go_back_on_nan")
def test_a_text_encoder_that_rests_already_is_trained_again_behind_the_return(settings, train, tmp_path, ruin):
    ruin({7})
    settings |= GOING_BACK | {"save_every_n_steps": 4, "max_train_steps": 8}
    code, events, _ = train(settings | {"stop_text_encoder_training": 70})  # it rests from step 6 on
    assert code == EXIT_DONE and "goes back to step 4" in told(events, "goes back")[0]
    before, after = (load_file(tmp_path / "out" / f"photo{at}.safetensors") for at in ("-step00000004", ""))
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("lora_te_"))


@pytest.mark.proves("go_back_on_nan")
@pytest.mark.parametrize(("bad", "returns"), [(set(range(3, 99)), 3), ({1}, 0)])
def test_it_ends_after_three_returns_and_where_there_is_no_state_yet(settings, train, ruin, bad, returns):
    ruin(bad)
    code, events, _ = train(settings | GOING_BACK)
    assert code == EXIT_FAILED
    assert of_type(events, "failed")[-1]["kind"] == "not_a_number"
    assert len(told(events, "goes back")) == returns


def test_going_back_without_states_is_refused(settings):
    found = check.problems(kohya.read(settings | {"go_back_on_nan": True}), decode=False).errors
    assert [problem.key for problem in found] == ["go_back_on_nan"]
    assert "(save_state)" in found[0].message


@pytest.fixture
def scaled(settings, tmp_path):
    """A training with fp16's scaler, which begins at 16, on the CPU."""
    # Where there is a scaler from the start, the optimizer is not fused.
    session = prepared(settings | {"max_grad_norm": 0, "optimizer_args": "fused=False"}, tmp_path)
    session.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    session.optimizer = AcceleratedOptimizer(session.optimizer.optimizer, scaler=session.accelerator.scaler)
    session.network.attach()
    yield session
    session.network.detach()


def test_a_step_that_the_scaler_leaves_out_is_none_of_the_schedule(scaled, ruin):
    ruin({2}, OnlyTheGradientIsNone.apply)
    batches = scaled.feed.batches(range(3))
    weights = []
    for step in (1, 2, 3):
        total, _ = loop.take_step(scaled, step, batches)
        weights.append(torch.cat([p.detach().flatten() for p in scaled.network.parameters()]))
        assert torch.isfinite(total), "it is no failure"
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert scaled.scheduler.last_epoch == 2
    assert scaled.accelerator.scaler.get_scale() == 8
    parts = state.parts_of(scaled.network, scaled.optimizer, scaled.scheduler, scaled.accelerator.scaler)
    assert parts["scaler"]["scale"] == 8


def test_a_gradient_that_overflows_at_any_scale_is_not_a_number(scaled, ruin):
    ruin(set(range(99)), OnlyTheGradientIsNone.apply)
    batches = scaled.feed.batches(range(6))
    totals = [float(loop.take_step(scaled, step, batches)[0]) for step in range(1, 6)]
    assert [total == total for total in totals] == [True, True, True, True, False], "16, 8, 4, 2, 1 are left"


class Memory:
    """A device on which the U-Net fits only with checkpointing, or with few images, or without the text encoders."""

    def __init__(self, monkeypatch, fits):
        self.calls = 0
        real = StableDiffusion.predict

        def predict(model, latents, timesteps, text, sizes):
            self.calls += 1
            if self.calls > 2 and not fits(model, latents):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return real(model, latents, timesteps, text, sizes)

        monkeypatch.setattr(StableDiffusion, "predict", predict)


FITS = {
    "checkpointing": lambda model, latents: model.unet.is_gradient_checkpointing,
    "2 parts": lambda model, latents: len(latents) <= 2,
    "3 parts": lambda model, latents: len(latents) <= 1,
    "no text encoders": lambda model, latents: model.text_encoders["te"].device.type == "meta",
}
WAYS = {
    "checkpointing": ["Gradient checkpointing"],
    "2 parts": ["Gradient checkpointing", "in 2 parts"],
    "3 parts": ["Gradient checkpointing", "in 2 parts", "in 3 parts"],
    "no text encoders": ["Gradient checkpointing", "in 2 parts", "in 3 parts", "Cache text encoder outputs"],
}


@pytest.mark.proves("go_on_with_less_memory")
@pytest.mark.parametrize("enough", FITS)
def test_when_memory_ends_the_step_is_taken_again_in_the_next_way_that_takes_less(
    settings, train, tmp_path, monkeypatch, enough
):
    """Three images of one size in a batch; the first two steps have the memory."""
    settings |= {"text_encoder_lr": 0, "enable_bucket": False, "train_batch_size": 3, "max_train_steps": 6}
    train(settings | {"output_dir": str(tmp_path / "with memory")})
    Memory(monkeypatch, FITS[enough])
    code, events, folder = train(settings | {"go_on_with_less_memory": True})
    assert code == EXIT_DONE
    warnings = told(events, "The memory is full at step 3 (CUDA out of memory")
    assert [way in message for way, message in zip(WAYS[enough], warnings, strict=True)] == [True] * len(warnings)
    assert [e["step"] for e in of_type(events, "step")] == [1, 2, 3, 4, 5, 6]
    files = [tmp_path / place / "photo.safetensors" for place in ("with memory", "out")]
    if enough == "checkpointing":
        assert same(*files), "on a CPU, in full precision"
    one, other = map(load_file, files)
    moved = max(float(one[name].abs().max()) for name in one if "lora_up" in name)
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 0.02 * moved
    found = metadata(files[1])
    assert found["ss_gradient_checkpointing"] == "True"
    assert found.get("ss_batch_parts") == {"2 parts": "2"}.get(enough, None if enough == "checkpointing" else "3")
    kept = json.loads((folder / "config.json").read_text())
    assert kept["gradient_checkpointing"] is True
    assert kept.get("sdxl_cache_text_encoder_outputs", False) is (enough == "no text encoders")


@pytest.mark.proves("go_on_with_less_memory")
def test_when_nothing_is_enough_it_ends_with_the_state_behind_the_last_step_and_goes_on_from_there(
    settings, train, tmp_path, monkeypatch
):
    settings |= {"max_train_steps": 6}
    train(settings | {"output_dir": str(tmp_path / "with memory")})
    with monkeypatch.context() as patch:
        Memory(patch, lambda model, latents: False)
        code, events, _ = train(settings | {"go_on_with_less_memory": True})
    assert code == EXIT_FAILED
    assert of_type(events, "failed")[-1]["kind"] == "out_of_memory"
    assert len(told(events, "The memory is full")) == 1, "checkpointing; the rest is not possible here"
    code, events, _ = train(settings | {"resume": "auto"})
    assert of_type(events, "started")[0]["first_step"] == 3
    assert same(*(tmp_path / place / "photo.safetensors" for place in ("with memory", "out")))


def test_the_memory_of_a_cpu_that_is_full_is_told_with_what_these_settings_could_do(settings, train, ruin):
    ruin({2}, lambda loss: torch.empty(1 << 46))
    code, events, _ = train(settings | {"gradient_checkpointing": True, "train_batch_size": 2})
    assert code == EXIT_FAILED
    failed = of_type(events, "failed")[-1]
    assert failed["kind"] == "out_of_memory"
    assert "(gradient_checkpointing)" not in failed["hint"], "it is on already"
    assert "(train_batch_size): lower it from 2" in failed["hint"]


@pytest.mark.parametrize("saves", [False, True])
def test_a_failure_keeps_the_last_step_and_no_state_that_was_asked_for_is_replaced(
    settings,
    train,
    tmp_path,
    ruin,
    saves,
):
    def lose(loss):
        raise ValueError("anything")

    ruin({3}, lose)
    train(settings | {"save_state": saves, "save_every_n_steps": 2})
    assert state.read(tmp_path / "out" / "photo-step00000002-state").stopgap is not saves
