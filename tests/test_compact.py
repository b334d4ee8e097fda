"""The frozen base model in fewer bits: how near it stays, what it keeps, and that a LoRA on it is trained."""

from __future__ import annotations

import pytest
import torch

from tests.test_training import prepared
from trainer import loop
from trainer.check import problems
from trainer.compact import CompactConv, CompactLinear, compact
from trainer.kohya import Preset
from trainer.randomness import set_torch_to

CPU = torch.device("cpu")
# Relative error of a normal weight: 3 bits of fraction; 8 bits with a scale a block; 16 levels a block.
ERROR = {"fp8": 0.027, "int8": 0.014, "nf4": 0.1}
SETTINGS = {
    "fp8": {"fp8_base": True},
    "fp8 of the U-Net": {"fp8_base_unet": True},
    "int8": {"base_weights": "int8"},
    "nf4": {"base_weights": "nf4"},
}
LAYERS = {
    "linear": lambda: (torch.nn.Linear(128, 256), torch.randn(2, 5, 128)),
    "1x1": lambda: (torch.nn.Conv2d(64, 128, 1), torch.randn(2, 64, 6, 6)),
    "3x3 with stride": lambda: (torch.nn.Conv2d(64, 128, 3, 2, 1), torch.randn(2, 64, 9, 9)),
}


@pytest.mark.parametrize("kind", ERROR)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_answer_and_gradient_are_those_of_the_weight_that_is_left(kind, make):
    torch.manual_seed(0)
    layer, x = make()
    layer.requires_grad_(False)
    x.requires_grad_()
    whole = layer.weight.detach().clone()
    compact([layer], kind, CPU)
    assert (layer.weight - whole).norm() / whole.norm() < ERROR[kind]
    expected, found = plain_answer(layer, x), layer(x)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, x, gradient), torch.autograd.grad(expected, x, gradient), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ERROR)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_outputs_without_weights_and_tiny_weights_stay_numbers(kind, dtype):
    layer = torch.nn.Linear(128, 3, dtype=dtype).requires_grad_(False)
    layer.weight[0], layer.weight[1] = 0, 1e-5
    compact([layer], kind, CPU)
    assert layer.weight.dtype == dtype and layer.weight.isfinite().all()
    assert layer.weight[0].abs().max() < 1e-5  # int8's levels have no 0
    if kind == "fp8":  # which alone has a scale for each output
        torch.testing.assert_close(layer.weight[1].float(), torch.full((128,), 1e-5), rtol=0.1, atol=1e-7)


def plain_answer(layer, x):
    if isinstance(layer, torch.nn.Linear):
        return torch.nn.functional.linear(x, layer.weight, layer.bias)
    return torch.nn.functional.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)


@pytest.mark.parametrize("kind", ERROR)
def test_the_widened_weight_is_not_kept_for_the_backward_pass(kind):
    layer = torch.nn.Linear(128, 256).requires_grad_(False)
    compact([layer], kind, CPU)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        layer(torch.randn(3, 128, requires_grad=True))
    assert kept == []


def first_loss_and_gradients(session):
    session.network.attach()
    for module in session.network.layers.values():
        torch.nn.init.normal_(module.lora_up.weight, std=0.02, generator=torch.Generator().manual_seed(1))
    set_torch_to(1, "x")
    loss = loop.batch_loss(session, session.feed[0])
    loss.backward()
    session.network.detach()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in session.network.parameters()])


def frozen_modules(session):
    return [session.model.unet, *session.model.text_encoders.values()]


@pytest.mark.proves("fp8_base", "fp8_base_unet", "base_weights")
@pytest.mark.parametrize("name", SETTINGS)
def test_training_on_a_compact_base_is_near_to_that_on_the_whole_one(settings, tmp_path, name, monkeypatch):
    monkeypatch.setattr("trainer.prepare.arrange", lambda model: None)  # the whole one's weights are looked into
    settings |= {"mixed_precision": "bf16"}
    whole, session = (prepared(settings | change, tmp_path) for change in ({}, SETTINGS[name]))
    before, after = (bytes_of(s.model.unet) for s in (whole, session))
    assert after < {"fp8": 0.6, "int8": 0.6, "nf4": 0.4}[name.split()[0]] * before
    in_fp8 = any(isinstance(layer, CompactLinear) for layer in session.model.text_encoders["te"].modules())
    assert in_fp8 == (name == "fp8")
    assert type(session.model.unet.conv_in) is type(session.model.unet.conv_out) is torch.nn.Conv2d
    loss, gradient = first_loss_and_gradients(session)
    assert loss == pytest.approx(first_loss_and_gradients(whole)[0], rel=0.05)
    # The whole model with the weights that are left: the same gradients, to bf16's rounding.
    for theirs, ours in zip(frozen_modules(whole), frozen_modules(session), strict=True):
        for to, layer in zip(theirs.modules(), ours.modules(), strict=True):
            if isinstance(layer, CompactLinear | CompactConv):
                to.weight.data.copy_(layer.weight)
    whole.network.zero_grad()
    expected_loss, expected = first_loss_and_gradients(whole)
    assert loss == pytest.approx(expected_loss, rel=1e-2)
    assert torch.nn.functional.cosine_similarity(gradient, expected, dim=0) > 0.999


def bytes_of(module):
    """The bytes of all tensors that a module holds, packed ones included."""
    total = 0
    for part in module.modules():
        tensors = [*part._parameters.values(), *part._buffers.values()]
        packed = vars(part).get("packed")
        if packed is not None:
            held = vars(packed)
            tensors += [held.get("values"), held.get("scale"), *held.get("packed", ())]
            state = held.get("packed", (None, None))[1]
            tensors += [getattr(state, "absmax", None)]
        total += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
    return total


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        ({"fp8_base": True}, "fp8_base", "(mixed_precision) fp16 or bf16"),
        ({"fp8_base_unet": True}, "fp8_base_unet", "(mixed_precision) fp16 or bf16"),
        ({"base_weights": "nf4"}, "base_weights", "(mixed_precision) fp16 or bf16"),
        (
            {"base_weights": "nf4", "fp8_base": True, "mixed_precision": "bf16"},
            "fp8_base",
            "Base weights (base_weights)",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, change, key, words):
    (problem,) = problems(Preset(settings | change), decode=False).errors
    assert problem.key == key
    assert words in problem.message


@pytest.mark.parametrize("kind", ["Kohya LoCon", "LyCORIS/LoHa", "LyCORIS/LoKr", "LyCORIS/Diag-OFT", "LyCORIS/iA3"])
def test_other_lora_types_train_on_a_compact_base(settings, train, kind):
    settings |= {"LoRA_type": kind, "mixed_precision": "bf16", "base_weights": "nf4", "max_train_steps": 1}
    code, events, _ = train(settings)
    assert code == 0, events[-1]
