"""Trained norm layers: nothing at the start, the merged weights after a step, gradients of the difference alone."""

from __future__ import annotations

import pytest
import torch

from trainer import networks
from trainer.models import Target
from trainer.schema.network import Network as Settings

LAYERS = {
    "group": (lambda: torch.nn.GroupNorm(8, 32), (2, 32, 5, 6)),
    "layer": (lambda: torch.nn.LayerNorm(32), (2, 7, 32)),
}


@pytest.mark.proves("train_norm")
@pytest.mark.parametrize("kind", LAYERS)
def test_a_norm_layer_is_trained_as_a_difference_of_weight_and_bias(kind):
    """The input is in the U-Net's layout and needs no gradient, as before the first trained layer."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer, x = make().requires_grad_(False), torch.randn(shape)
    if kind == "group":
        x = x.contiguous(memory_format=torch.channels_last)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    network = networks.build(
        Settings(type="LyCORIS/LoCon", norms=True, rank_dropout=0.5),
        {"lora_unet_norm": Target("unet", layer)},
        {"unet"},
    )
    before = layer(x)
    network.attach()
    assert torch.equal(layer(x), before)
    (layer(x) - 1).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())
    torch.optim.SGD(network.parameters(), lr=1.0).step()
    after = layer(x)
    network.limit_norms(1e-6)
    assert torch.equal(layer(x), after)
    network.detach()
    tensors = {name.removeprefix("lora_unet_norm."): tensor for name, tensor in network.tensors().items()}
    assert tensors.keys() == {"w_norm", "b_norm"}
    layer.weight.add_(networks.weight_update(tensors, layer.weight))
    layer.bias.add_(networks.bias_update(tensors))
    torch.testing.assert_close(layer(x), after, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-2)
