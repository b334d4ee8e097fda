"""BOFT: rotations of pairs of rows in several rounds, each across larger distances (butterflies; Liu et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lycoris.modules.boft import ButterflyOFTModule

from trainer.networks.lycoris_layers import Trained
from trainer.networks.rotations import cayley, rescaled
from trainer.schema.network import Network as Settings


def weight_update(tensors: Mapping[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """ΔW of a layer whose frozen weight is `weight`. `oft_blocks`: [rounds, groups, rows, rows]."""
    shape, size = weight.shape, tensors["oft_blocks"].shape[-1]
    frozen = turned = weight.float()
    for level, rotations in enumerate(cayley(tensors, len(weight))):
        distance = 2**level * (size // 2)  # rows this far apart are brought together
        near = turned.unflatten(0, (-1, 2, distance)).transpose(1, 2).reshape(-1, size, *shape[1:])
        far = torch.einsum("kij,kj...->ki...", rotations, near)
        turned = far.reshape(-1, distance, 2, *shape[1:]).transpose(1, 2).reshape(shape)
    return rescaled(turned, tensors) - frozen


class BOFTLayer(Trained, ButterflyOFTModule):
    weight_update = staticmethod(weight_update)


def smallest(rows: int) -> int:
    """The smallest block that so many rows can be cut into: twice their odd part (10 for 320, 640 and 1280)."""
    return 2 * (rows // (rows & -rows))


def module_for(layer: torch.nn.Module, rank: int, alpha: float, settings: Settings) -> torch.nn.Module:
    """The trained module of one layer; on its device, in float32."""
    return BOFTLayer.of(
        layer,
        max(rank, smallest(len(layer.weight))),
        alpha,
        settings,
        constraint=settings.constraint,
        rescaled=settings.rescaled,
    )
