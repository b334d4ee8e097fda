"""Standard networks from settings and from files."""

from __future__ import annotations

import pytest
import torch

from trainer import networks
from trainer.errors import ModelError
from trainer.models import Target
from trainer.networks import blocks
from trainer.schema.network import Network as Settings


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
