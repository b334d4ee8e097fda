"""iA3: each row of W (or each column) is multiplied by 1 + one trained number (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lycoris.modules.ia3 import IA3Module

from trainer.networks.lycoris_layers import Trained
from trainer.schema.network import Network as Settings


def weight_update(tensors: Mapping[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """ΔW of a layer whose frozen weight is `weight`."""
    return scaled(weight, tensors["weight"], bool(tensors["on_input"]))


def scaled(weight: torch.Tensor, factors: torch.Tensor, columns: bool) -> torch.Tensor:
    """The columns or the rows of a weight, each times its factor."""
    ones = [1] * (weight.ndim - 2)
    return weight * factors.view(*((1, -1) if columns else (-1, 1)), *ones)


class IA3Layer(Trained, IA3Module):
    def weight_update(self, tensors: Mapping[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
        """As above, without asking the device which it is."""
        return scaled(weight, tensors["weight"], self.train_input)

    def taken(self) -> None:
        self.train_input = bool(self.on_input)


def module_for(layer: torch.nn.Module, rank: int, alpha: float, settings: Settings) -> torch.nn.Module:
    """The trained module of one layer; on its device, in float32."""
    return IA3Layer.of(layer, rank, alpha, settings, train_on_input=settings.on_input)
