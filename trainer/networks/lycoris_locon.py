"""LyCORIS' LoCon: ΔW = alpha/rank · up · down on every layer, with DoRA, Tucker and a scalar to choose."""

from __future__ import annotations

import torch
from lycoris.modules.locon import LoConModule

from trainer.networks.lycoris_layers import Trained
from trainer.schema.network import Network as Settings

LABEL = "LyCORIS/LoCon"
USES = {
    "network_dim",
    "network_alpha",
    "conv_dim",
    "conv_alpha",
    "LyCORIS_preset",
    "use_tucker",
    "use_scalar",
    "dora_wd",
    "rank_dropout",
    "rank_dropout_scale",
    "module_dropout",
    "scale_weight_norms",
}


class LoConFactors(LoConModule):
    """Theirs, and ΔW as LoHa's and LoKr's classes have it."""

    def get_weight(self, shape: tuple[int, ...]) -> torch.Tensor:
        up, down = self.lora_up.weight.flatten(1), self.lora_down.weight.flatten(1)
        if self.tucker:
            return torch.einsum("or,rs...,si->oi...", up, self.lora_mid.weight, down) * self.scale
        return (up @ down).view(shape) * self.scale


class LoConLayer(Trained, LoConFactors):
    pass


def module_for(layer: torch.nn.Module, rank: int, alpha: float, settings: Settings) -> torch.nn.Module:
    """The trained module of one layer; on its device, in float32."""
    return LoConLayer.of(layer, rank, alpha, settings, use_tucker=settings.tucker)
