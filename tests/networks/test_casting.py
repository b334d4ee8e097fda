"""Copies of the factors, cast for all layers together, against each layer's own."""

from contextlib import nullcontext

import pytest
import torch

from tests.test_training import prepared
from trainer import loop
from trainer.networks import casting
from trainer.randomness import set_torch_to

BOTH = {"mixed_precision": "bf16", "unet_lr": 1e-4, "text_encoder_lr": 1e-4, "network_dim": 4}


def learn(session):
    """Weights that are not zero, so that both factors have a gradient."""
    torch.manual_seed(3)
    for parameter in session.network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)


def gradients(session, *, together):
    set_torch_to(1, "x")
    with session.network.cast(session.model.dtype) if together else nullcontext():
        loss = loop.batch_loss(session, session.feed[0])
        loss.backward()
    found = {name: p.grad for name, p in session.network.named_parameters()}
    session.network.zero_grad()
    return loss.detach(), found


@pytest.mark.parametrize("at_once", [1, 5, 1000])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gradient_checkpointing": True},
        {"LoRA_type": "Kohya LoCon", "conv_dim": 4, "conv_alpha": 4},
        {"LoRA_type": "LoRA-FA"},
        {"network_dropout": 0.3, "rank_dropout": 0.3, "module_dropout": 0.3},
        {"mixed_precision": "fp16"},
    ],
    ids=lambda more: "-".join(map(str, more)) or "plain",
)
def test_cast_together_loss_and_gradients_are_those_of_each_layer_casting_its_own(
    settings, tmp_path, monkeypatch, more, at_once
):
    monkeypatch.setattr(casting, "AT_ONCE", at_once)
    session = prepared(settings | BOTH | {"network_alpha": 2} | more, tmp_path)
    session.network.attach()
    learn(session)
    (own_loss, own), (loss, found) = (gradients(session, together=together) for together in (False, True))
    assert any(layer for layer in session.network.layers.values() if casting.serves(layer))
    assert loss == own_loss
    assert any(gradient is not None and gradient.abs().sum() for gradient in found.values())
    for name, gradient in found.items():  # the scale is a half, so that it may stand anywhere in the product
        assert (gradient is None) == (own[name] is None), name
        assert gradient is None or (gradient.dtype == torch.float32 and torch.equal(gradient, own[name])), name


def test_a_scale_that_rounds_is_multiplied_in_the_factors_own_precision(settings, tmp_path):
    session = prepared(settings | BOTH | {"network_alpha": 0.7}, tmp_path)
    session.network.attach()
    learn(session)
    layer = next(iter(session.network.layers.values()))
    with session.network.cast(torch.bfloat16):
        down, up, scale = layer.copies
        assert scale == 1
        assert torch.equal(down, layer.lora_down.weight.bfloat16())
        assert torch.equal(up, (layer.lora_up.weight * (0.7 / 4)).bfloat16())
        up.sum().backward()
    torch.testing.assert_close(layer.lora_up.weight.grad, torch.full_like(layer.lora_up.weight, 0.7 / 4))


def test_behind_a_step_the_layers_cast_what_they_have_learned(settings, tmp_path):
    session = prepared(settings | BOTH, tmp_path)
    session.network.attach()
    loop.take_step(session, 1, session.feed.batches(range(1)))
    assert all(layer.copies is None for layer in session.network.layers.values())
    with pytest.raises(ZeroDivisionError), session.network.cast(torch.bfloat16):
        raise ZeroDivisionError
    assert all(layer.copies is None for layer in session.network.layers.values())


@pytest.mark.parametrize(
    "more", [{"mixed_precision": "no"}, {"full_bf16": True}, {"LoRA_type": "Kohya DyLoRA", "unit": 2, "conv_dim": 2}]
)
def test_nothing_is_copied_that_is_in_the_precision_already_or_drawn_anew(settings, tmp_path, more):
    session = prepared(settings | BOTH | more, tmp_path)
    with session.network.cast(session.model.dtype):
        assert not any(layer.copies for layer in session.network.layers.values())


def test_factors_that_are_not_trained_get_copies_without_a_gradient(settings, tmp_path):
    session = prepared(settings | BOTH | {"LoRA_type": "LoRA-FA"}, tmp_path)
    with session.network.cast(torch.bfloat16):
        for layer in session.network.layers.values():
            assert [copy.requires_grad for copy in layer.copies[:2]] == [False, True]
