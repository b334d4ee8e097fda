"""What optimizer, rates, clipping and masks do in a training."""

from __future__ import annotations

import importlib.util
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.test_optim import CLOSED_FORMS
from tests.test_training import of_type, prepared
from trainer import check, kohya, loop, optim
from trainer.run import EXIT_DONE


@pytest.mark.proves("max_grad_norm")
@pytest.mark.parametrize(("limit", "clipped"), [(1e-3, True), (0, False), ("0", False), (0.0, False)])
def test_gradients_are_clipped_to_the_limit_and_not_at_all_at_zero(settings, tmp_path, limit, clipped):
    session = prepared(settings | {"max_grad_norm": limit}, tmp_path)
    norms = []
    session.optimizer.step = lambda: norms.append(
        float(torch.stack([p.grad.norm() for p in session.network.parameters()]).norm())
    )
    session.scheduler.step = lambda: None
    session.network.attach()
    loop.take_step(session, 1, session.feed.batches(range(1)))
    session.network.detach()
    assert (norms[0] <= 1e-3 * (1 + 1e-4)) is clipped


@pytest.mark.proves("lr_scheduler", "unet_lr", "text_encoder_lr", "gradient_accumulation_steps", "lr_warmup")
def test_each_part_follows_its_own_rate_in_every_step_of_every_scheduler_under_accumulation(
    settings, tmp_path, monkeypatch
):
    rates = {"unet": 1e-3, "text_encoder": 2e-4}
    long = {"gradient_accumulation_steps": 2, "max_train_steps": 100, "unet_lr": 1e-3, "text_encoder_lr": 2e-4}
    session = prepared(settings | long | {"optimizer": "SGDNesterov", "learning_rate": 1e-3}, tmp_path)
    weights = list(session.network.parameters())
    monkeypatch.setattr(loop, "batch_loss", lambda s, batch: weights[0].sum() * 0)
    for name, (extra, factors) in CLOSED_FORMS.items():
        chosen = optim.Optim(**{"scheduler": name, "warmup_percent": 10, "learning_rate": 1e-3, **extra})
        for group in session.optimizer.param_groups:
            group["lr"] = group["initial_lr"] = rates[group["name"]]
        session.scheduler = optim.make_scheduler(session.optimizer.optimizer, chosen, session.length.total_steps)
        for step, factor in enumerate(factors, start=1):
            assert len(session.length.batches_of(step)) == 2
            _, used = loop.take_step(session, step, itertools.repeat(None))
            assert used == pytest.approx({part: rate * factor for part, rate in rates.items()}, abs=3e-7), (name, step)


@pytest.mark.proves("optimizer")
def test_the_file_of_a_schedule_free_training_holds_the_averaged_weights(settings, tmp_path):
    session = prepared(settings | {"optimizer": "AdamWScheduleFree"}, tmp_path)
    ended = loop.train(session, lambda: set())
    saved = load_file(ended.path)

    def same() -> bool:
        return all(torch.equal(tensor, saved[name]) for name, tensor in session.network.tensors().items())

    assert not same()
    with optim.averaged(session.optimizer):
        assert same()


@pytest.mark.proves("optimizer")
@pytest.mark.parametrize("name", ["Prodigy", "DAdaptAdam"])
def test_the_rates_told_are_those_that_an_optimizer_found_itself(settings, train, name):
    ones = {"learning_rate": 1, "unet_lr": 1, "text_encoder_lr": 1, "lr_scheduler": "constant", "epoch": 2}
    code, events, _ = train(settings | ones | {"optimizer": name})
    assert code == EXIT_DONE
    rates = [e["unet_lr"] for e in of_type(events, "step")]
    assert rates[0] == pytest.approx(1e-6)
    assert 1e-6 < rates[-1] < 0.1
    assert rates == [e["text_encoder_lr"] for e in of_type(events, "step")]


@pytest.mark.proves("optimizer")
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_paged_optimizer_trains_without_a_gpu_and_says_what_is_missing(settings, train):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code, events, _ = train(settings | {"optimizer": "PagedAdamW8bit", "max_train_steps": 1})
    assert code == EXIT_DONE
    assert any("PagedAdamW8bit" in e["message"] and "without a GPU" in e["message"] for e in of_type(events, "warning"))


def told(values, severity="error"):
    return [str(p) for p in check.problems(kohya.read(values)).problems if p.severity == severity]


@pytest.mark.proves("optimizer_args")
def test_the_check_refuses_unknown_arguments_with_the_list_of_valid_ones(settings):
    (problem,) = told(settings | {"optimizer": "Prodigy", "optimizer_args": '"decouple=True" "d_coeff=2"'})
    assert "(optimizer_args)" in problem
    assert "no argument d_coeff" in problem
    assert "d_coef, growth_rate" in problem


@pytest.mark.proves("optimizer")
@pytest.mark.parametrize("name", ["prodigyplus.ProdigyPlusScheduleFree", "DAdaptAdanIP"])
def test_an_optimizer_whose_package_is_missing_is_refused_by_name(settings, monkeypatch, name):
    assert told(settings | {"optimizer": name, "learning_rate": 1}) == []
    find = importlib.util.find_spec
    absent = ("prodigyplus", "dadaptation")
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module in absent else find(module))
    (problem,) = told(settings | {"optimizer": name, "learning_rate": 1})
    assert f'Optimizer (optimizer): "{name}" needs the package' in problem
    assert "pip install" in problem


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optimizer": "Prodigy", "learning_rate": 1e-4}, ("text_encoder_lr", "0.0001 is very low", "Set it to 1")),
        (
            {"optimizer": "DAdaptAdam", "text_encoder_lr": 0.5, "unet_lr": 1},
            ("text_encoder_lr", "(unet_lr), 1", "uses 0.5"),
        ),
        ({"optimizer": "Adafactor"}, ("optimizer", "chooses the rates itself", "relative_step=False")),
        ({"optimizer": "DAdaptation", "learning_rate": 1}, ("optimizer", "DAdaptAdam is used", "DAdaptAdamPreprint")),
        ({"debiased_estimation_loss": True, "min_snr_gamma": 5}, ("debiased_estimation_loss", "min_snr_gamma")),
        ({"noise_offset_random_strength": True}, ("noise_offset_random_strength", "(noise_offset) is 0")),
        ({"ip_noise_gamma_random_strength": True}, ("ip_noise_gamma_random_strength", "(ip_noise_gamma) is 0")),
        ({"masked_loss": True}, ("masked_loss", "none of the 3 images", "train_data_dir")),
    ],
)
def test_what_was_surely_not_meant_is_a_warning_that_says_what_happens(settings, values, words):
    assert any(all(word in warning for word in words) for warning in told(settings | values, "warning"))
    assert told(settings | values) == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optimizer": "Prodigy", "loraplus_lr_ratio": 4}, ("loraplus_lr_ratio", "(optimizer) Prodigy")),
        ({"optimizer": "DAdaptLion", "up_lr_weight": "linear"}, ("up_lr_weight", "(optimizer) DAdaptLion")),
        (
            {"optimizer": "Adafactor", "lr_scheduler": "adafactor", "optimizer_args": "relative_step=False"},
            ("lr_scheduler", "relative_step=False"),
        ),
        ({"lr_scheduler": "cosine_with_min_lr"}, ("lr_scheduler", "(lr_scheduler_args)", "min_lr_rate=0.1")),
        ({"min_timestep": 600, "max_timestep": 200}, ("min_timestep", "(max_timestep), 200")),
        ({"scale_v_pred_loss_like_noise_pred": True}, ("scale_v_pred_loss", "v_parameterization")),
    ],
)
def test_what_cannot_work_is_refused_naming_both_controls(settings, values, words):
    (problem,) = told(settings | values)
    assert all(word in problem for word in words)


@pytest.fixture
def cut_out(photographs, tmp_path):
    """The photographs with an alpha channel: opaque on the left, transparent on the right."""

    def make(share: float):
        folder = tmp_path / f"cut {share}" / "2_photo"
        folder.mkdir(parents=True)
        for path in sorted((photographs / "2_photo").glob("*.png")):
            picture = Image.open(path).convert("RGBA")
            alpha = np.zeros((picture.height, picture.width), np.uint8)
            alpha[:, : round(picture.width * share)] = 255
            picture.putalpha(Image.fromarray(alpha))
            picture.save(folder / path.name)
        return {"train_data_dir": str(folder.parent), "masked_loss": True}

    return make


@pytest.mark.proves("masked_loss")
def test_what_is_transparent_does_not_count(settings, train, cut_out):
    losses = []
    for share in (0.0, 0.5, 1.0):
        _, events, _ = train(settings | cut_out(share) | {"max_train_steps": 2})
        losses.append([e["loss"] for e in of_type(events, "step")])
    nothing, half, whole = losses
    assert nothing == [0, 0]
    assert all(0.25 < h / w < 0.75 for h, w in zip(half, whole, strict=True))
    _, events, _ = train(settings | cut_out(1.0 - 1e-9) | {"max_train_steps": 2, "masked_loss": False})
    assert [e["loss"] for e in of_type(events, "step")] == pytest.approx(whole)


@pytest.mark.proves("masked_loss")
def test_masks_come_with_cached_latents_from_memory_disk_and_without_a_cache(settings, tmp_path, cut_out):
    masked = settings | cut_out(0.5) | {"flip_aug": True}
    memory = prepared(masked, tmp_path)
    first = prepared(masked | {"cache_latents_to_disk": True}, tmp_path)
    again = prepared(masked | {"cache_latents_to_disk": True}, tmp_path)
    uncached = prepared(masked | {"cache_latents": False}, tmp_path)
    sides = set()
    for number in range(6):
        batches = [session.feed[number] for session in (memory, first, again, uncached)]
        mask = batches[0].masks[0]
        assert all(torch.equal(batch.masks[0], mask) for batch in batches[1:])
        assert all(torch.equal(batch.latents, batches[0].latents) for batch in batches[1:3])
        assert mask.shape == batches[0].latents.shape[-2:]
        left, right = mask[:, : mask.shape[1] // 2 - 1].mean(), mask[:, mask.shape[1] // 2 + 1 :].mean()
        assert {round(float(left)), round(float(right))} == {0, 1}
        sides.add(bool(left > right))
    assert sides == {True, False}  # mirrored with the image
    plain = prepared(masked | {"cache_latents_to_disk": True, "masked_loss": False}, tmp_path)
    assert not torch.equal(plain.feed[0].latents, memory.feed[0].latents)  # laid on white, not the mask's colours
    assert plain.feed[0].masks is None
