"""LoKr: ΔW = alpha/rank · w₁ ⊗ w₂, the Kronecker product of a small matrix and a larger one of low rank."""

from __future__ import annotations

import torch
from lycoris.modules.lokr import LokrModule

from trainer.networks.lycoris_layers import Trained
from trainer.schema.network import Network as Settings

LABEL = "LyCORIS/LoKr"
USES = {
    "network_dim",
    "network_alpha",
    "conv_dim",
    "conv_alpha",
    "LyCORIS_preset",
    "factor",
    "decompose_both",
    "use_cp",
    "use_scalar",
    "dora_wd",
    "rank_dropout",
    "rank_dropout_scale",
    "module_dropout",
    "scale_weight_norms",
}


class LoKrLayer(Trained, LokrModule):
    pass


def module_for(layer: torch.nn.Module, rank: int, alpha: float, settings: Settings) -> torch.nn.Module:
    """The trained module of one layer; on its device, in float32."""
    return LoKrLayer.of(
        layer,
        rank,
        alpha,
        settings,
        factor=settings.factor,
        decompose_both=settings.decompose_both,
        use_tucker=settings.cp,
    )
