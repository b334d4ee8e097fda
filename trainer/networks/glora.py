"""GLoRA: ΔW = alpha/rank · (W a₁ a₂ + b₁ b₂), one low-rank product on the inputs and one beside W (Chavan et al. 2023)."""

from __future__ import annotations

import torch
from lycoris.modules.glora import GLoRAModule

from trainer.networks.lycoris_layers import Trained
from trainer.schema.network import Network as Settings

LABEL = "LyCORIS/GLoRA"
USES = {
    "network_dim",
    "network_alpha",
    "conv_dim",
    "conv_alpha",
    "LyCORIS_preset",
    "use_scalar",
    "rank_dropout",
    "rank_dropout_scale",
    "module_dropout",
    "scale_weight_norms",
}


class GLoRAFactors(GLoRAModule):
    """Theirs, and ΔW as LoHa's and LoKr's classes have it."""

    def get_weight(self, shape: tuple[int, ...]) -> torch.Tensor:
        a1, a2, b1, b2 = (layer.weight.flatten(1) for layer in (self.a1, self.a2, self.b1, self.b2))
        on_inputs = torch.einsum("oi...,ir,rj->oj...", self.org_weight.to(a1.dtype), a1, a2)
        return (on_inputs + (b1 @ b2).view(shape)) * self.scale


class GLoRALayer(Trained, GLoRAFactors):
    def degree(self) -> int:
        return 2


def module_for(layer: torch.nn.Module, rank: int, alpha: float, settings: Settings) -> torch.nn.Module:
    """The trained module of one layer; on its device, in float32."""
    return GLoRALayer.of(layer, rank, alpha, settings)
