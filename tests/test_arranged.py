"""Frozen convolutions in oneDNN's own order: the same numbers, and no order made anew at each call."""

from __future__ import annotations

import pytest
import torch

from tests.test_training import prepared
from trainer import arranged, loop

pytestmark = pytest.mark.skipif(not arranged._supported(torch.float32), reason="oneDNN is not there")
KINDS = [torch.float32, *([torch.bfloat16] if arranged._supported(torch.bfloat16) else [])]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", KINDS)
def test_an_arranged_convolution_and_the_gradient_of_its_input_are_the_plain_ones(dtype, stride):
    torch.manual_seed(0)
    plain, other = (torch.nn.Conv2d(24, 40, 3, stride, 1).to(dtype).requires_grad_(False) for _ in range(2))
    other.load_state_dict(plain.state_dict())
    weight = plain.weight.clone()
    arranged.arrange(torch.nn.Sequential(other))
    assert type(other) is arranged.ArrangedConv
    assert torch.equal(other.weight, weight)
    for height, width in ((8, 8), (5, 12)):  # the second is not what the order was chosen for
        x = torch.randn(2, 24, height, width, dtype=dtype)
        answers, gradients = [], []
        for layer in (plain, other):
            seen = x.clone().requires_grad_(True)
            answer = layer(seen)
            answer.float().square().sum().backward()
            answers.append(answer.detach().float())
            gradients.append(seen.grad.float())
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for one, two in (answers, gradients):
            assert one.shape == two.shape
            assert (one - two).abs().max() <= tolerance * one.abs().max()


def test_the_gradient_takes_no_second_copy_where_nothing_is_asked_of_it():
    layer = torch.nn.Conv2d(16, 16, 3, padding=1).requires_grad_(False)
    arranged.arrange(torch.nn.Sequential(layer))
    layer(torch.randn(1, 16, 8, 8))
    assert layer.backward_blocks is None


@pytest.mark.parametrize("changed", [{"stride": 3}, {"kernel_size": 1, "padding": 0}, {"groups": 4}, {"dilation": 2}])
def test_other_convolutions_stay_as_they_are(changed):
    layer = torch.nn.Conv2d(16, 16, **{"kernel_size": 3, "padding": 1} | changed)
    arranged.arrange(torch.nn.Sequential(layer))
    assert type(layer) is torch.nn.Conv2d


def test_without_room_for_two_copies_nothing_is_arranged(monkeypatch):
    layer = torch.nn.Conv2d(16, 16, 3, padding=1)
    size = layer.weight.nbytes
    monkeypatch.setattr(arranged.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 4 * size - 1}))
    arranged.arrange(torch.nn.Sequential(layer))
    assert type(layer) is torch.nn.Conv2d


def test_a_step_puts_no_frozen_weight_in_order_and_its_loss_is_the_plain_one(settings, tmp_path, monkeypatch):
    losses = []
    for name in ("plain", "arranged"):
        with monkeypatch.context() as patch:
            if name == "plain":
                patch.setattr("trainer.prepare.arrange", lambda model: None)
            session = prepared(settings | {"mixed_precision": "no"}, tmp_path / name)
        session.network.attach()
        kinds = [type(layer) for layer in session.model.unet.modules()]
        assert (arranged.ArrangedConv in kinds) == (name == "arranged")
        losses.append([float(loop.take_step(session, n, session.feed.batches(range(n - 1, n)))[0]) for n in (1, 2)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_types_that_compute_with_the_frozen_weights_keep_them_plain(settings, tmp_path):
    session = prepared(settings | {"LoRA_type": "LyCORIS/LoKr"}, tmp_path)
    assert not any(isinstance(layer, arranged.ArrangedConv) for layer in session.model.unet.modules())
