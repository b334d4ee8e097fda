"""LyCORIS' LoCon: ΔW = alpha/rank · up · down on every layer, with DoRA, Tucker and a scalar to choose."""

from __future__ import annotations

import torch
from lycoris.modules.locon import LoConModule

from trainer.networks.lycoris_layers import Trained
from trainer.networks.standard import is_up, weight_update
from trainer.schema.network import Network as Settings


class LoConLayer(Trained, LoConModule):
    weight_update = staticmethod(weight_update)
    is_up = staticmethod(is_up)


def module_for(layer: torch.nn.Module, rank: int, alpha: float, settings: Settings) -> torch.nn.Module:
    """The trained module of one layer; on its device, in float32."""
    return LoConLayer.of(layer, rank, alpha, settings, use_tucker=settings.tucker)
