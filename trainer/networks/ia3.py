"""iA3: each row of W (or each column) is multiplied by 1 + one trained number (Liu et al. 2022)."""

from __future__ import annotations

import torch
from lycoris.modules.ia3 import IA3Module

from trainer.networks.lycoris_layers import Trained
from trainer.schema.network import Network as Settings

LABEL = "LyCORIS/iA3"
USES = {
    "LyCORIS_preset",
    "train_on_input",
    "rank_dropout",
    "rank_dropout_scale",
    "module_dropout",
    "scale_weight_norms",
}


class IA3Factors(IA3Module):
    """Theirs, and ΔW as LoHa's and LoKr's classes have it."""

    def get_weight(self, shape: tuple[int, ...]) -> torch.Tensor:
        vector = self.weight.flatten()
        return self.org_weight * vector.view(*((1, -1) if self.train_input else (-1, 1)), *[1] * (len(shape) - 2))


class IA3Layer(Trained, IA3Factors):
    def taken(self) -> None:
        self.train_input = bool(self.on_input)


def module_for(layer: torch.nn.Module, rank: int, alpha: float, settings: Settings) -> torch.nn.Module:
    """The trained module of one layer; on its device, in float32."""
    return IA3Layer.of(layer, rank, alpha, settings, train_on_input=settings.on_input)
