"""LoHa: ΔW = alpha/rank · (a₁ b₁) ∘ (a₂ b₂), two low-rank products multiplied value by value (FedPara, Hyeon-Woo et al. 2022)."""

from __future__ import annotations

import torch
from lycoris.modules.loha import LohaModule

from trainer.networks.lycoris_layers import Trained
from trainer.schema.network import Network as Settings

LABEL = "LyCORIS/LoHa"
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


class LoHaLayer(Trained, LohaModule):
    pass


def module_for(layer: torch.nn.Module, rank: int, alpha: float, settings: Settings) -> torch.nn.Module:
    """The trained module of one layer; on its device, in float32."""
    return LoHaLayer.of(layer, rank, alpha, settings, use_tucker=settings.tucker)
