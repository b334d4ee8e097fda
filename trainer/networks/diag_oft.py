"""Diag-OFT: the rows of W are rotated within small groups (Qiu et al. 2023); W + ΔW = R W, R of blocks on a diagonal."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lycoris.modules.diag_oft import DiagOFTModule

from trainer.networks.lycoris_layers import Trained
from trainer.networks.rotations import cayley, rescaled
from trainer.schema.network import Network as Settings


def weight_update(tensors: Mapping[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """ΔW of a layer whose frozen weight is `weight`. `oft_blocks`: [groups, rows, rows]."""
    frozen = weight.float()
    groups = frozen.reshape(*tensors["oft_blocks"].shape[:2], *weight.shape[1:])
    turned = torch.einsum("knm,kn...->km...", cayley(tensors, len(weight)), groups).reshape(weight.shape)
    return rescaled(turned, tensors) - frozen


class OFTLayer(Trained, DiagOFTModule):
    weight_update = staticmethod(weight_update)


def module_for(layer: torch.nn.Module, rank: int, alpha: float, settings: Settings) -> torch.nn.Module:
    """The trained module of one layer; on its device, in float32."""
    return OFTLayer.of(layer, rank, alpha, settings, constraint=settings.constraint, rescaled=settings.rescaled)
