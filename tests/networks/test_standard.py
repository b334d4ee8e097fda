from __future__ import annotations

import pytest
import torch

from trainer import networks
from trainer.errors import ModelError
from trainer.models import Target
from trainer.networks import blocks, standard
from trainer.schema.network import Network as Settings

LAYERS = {
    "linear": (lambda: torch.nn.Linear(12, 20), (3, 7, 12)),
    "conv1": (lambda: torch.nn.Conv2d(12, 20, 1), (2, 12, 6, 5)),
    "conv3": (lambda: torch.nn.Conv2d(12, 20, 3, stride=2, padding=1), (2, 12, 6, 5)),
}


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    return make().requires_grad_(False), torch.randn(shape)


def randomised(layer: torch.nn.Module, rank: int = 4, alpha: float = 2.0) -> torch.nn.Module:
    module = standard.module_for(layer, rank, alpha, Settings())
    torch.nn.init.normal_(module.lora_up.weight)
    return module


def test_an_untrained_module_changes_nothing(case):
    layer, x = case
    before = layer(x)
    assert torch.equal(standard.module_for(layer, 4, 1.0, Settings())(x), before)


def test_the_output_is_that_of_the_merged_weight(case):
    layer, x = case
    module = randomised(layer)
    down, up = module.lora_down.weight, module.lora_up.weight
    delta = (up.flatten(1) @ down.flatten(1)).view(layer.weight.shape) * (2.0 / 4)
    answer = module(x)
    layer.weight.add_(delta.detach())
    torch.testing.assert_close(answer, layer(x), rtol=1e-5, atol=1e-5)


def test_strength_zero_is_the_base_bit_for_bit_and_half_is_half(case):
    layer, x = case
    base = layer(x)
    network = networks.Network({"a": randomised(layer)}, {"a": "unet"}, {"a": layer})
    network.attach()
    full = layer(x)
    with network.strength(0):
        assert torch.equal(layer(x), base)
    with network.strength(0.5):
        torch.testing.assert_close(layer(x) - base, (full - base) / 2, rtol=1e-4, atol=1e-5)
    network.detach()
    assert torch.equal(layer(x), base)


def test_only_the_trained_tensors_have_gradients(case):
    layer, x = case
    module = randomised(layer)
    module(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert all(p.grad is None for p in layer.parameters())


def test_gradients_are_exact_in_float32_while_the_layer_computes_in_bfloat16(case):
    layer, x = case
    module = randomised(layer.to(torch.bfloat16))
    answer = module(x.bfloat16())
    assert answer.dtype == torch.bfloat16
    answer.float().square().sum().backward()
    assert module.lora_down.weight.grad.dtype == torch.float32


def test_reading_a_file_of_another_rank_is_refused_with_both_shapes():
    layer = torch.nn.Linear(12, 20)
    targets = {"lora_unet_x": Target("unet", layer)}
    network = networks.build(Settings(rank=4, alpha=1.0), targets, {"unet"})
    other = networks.build(Settings(rank=8, alpha=1.0), targets, {"unet"}).tensors()
    with pytest.raises(ModelError, match=r"\[8, 12\].*\[4, 12\]"), torch.no_grad():
        network.read(other)


def test_reading_takes_over_alpha_too():
    layer = torch.nn.Linear(12, 20)
    targets = {"lora_unet_x": Target("unet", layer)}
    network = networks.build(Settings(rank=4, alpha=1.0), targets, {"unet"})
    with torch.no_grad():
        network.read(networks.build(Settings(rank=4, alpha=3.0), targets, {"unet"}).tensors())
    assert network.layers["lora_unet_x"].scale == pytest.approx(3 / 4)


def test_rank_and_alpha_can_come_from_a_file():
    layers = {"lora_unet_x": torch.nn.Linear(12, 20), "lora_unet_y": torch.nn.Linear(5, 6)}
    targets = {name: Target("unet", layer) for name, layer in layers.items()}
    one = {"lora_unet_x": targets["lora_unet_x"]}
    weights = networks.build(Settings(rank=6, alpha=3.0), one, {"unet"}).tensors()
    network = networks.build(Settings(rank=2), targets, {"unet"}, blocks.from_file(weights))
    assert set(network.layers) == {"lora_unet_x"}
    assert network.layers["lora_unet_x"].rank == 6
    assert network.layers["lora_unet_x"].scale == pytest.approx(0.5)
