"""LoHa: ΔW = alpha/rank · (a₁ b₁) ∘ (a₂ b₂), two low-rank products multiplied value by value (FedPara, Hyeon-Woo et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lycoris.functional.loha import make_weight, make_weight_tucker
from lycoris.modules.loha import LohaModule

from trainer.networks.lycoris_layers import Trained
from trainer.networks.standard import strength
from trainer.schema.network import Network as Settings


def weight_update(tensors: Mapping[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """ΔW, by lycoris-lora's functions, which make the two products again for the gradient instead of keeping them."""
    b1, a1, b2, a2 = (tensors[f"hada_{name}"] for name in ("w1_b", "w1_a", "w2_b", "w2_a"))
    scale = strength(tensors, len(b1))
    if "hada_t1" in tensors:
        return make_weight_tucker(tensors["hada_t1"], b1, a1, tensors["hada_t2"], b2, a2, scale)
    return make_weight(b1, a1, b2, a2, scale).view(weight.shape)


class LoHaLayer(Trained, LohaModule):
    weight_update = staticmethod(weight_update)


def module_for(layer: torch.nn.Module, rank: int, alpha: float, settings: Settings) -> torch.nn.Module:
    """The trained module of one layer; on its device, in float32."""
    return LoHaLayer.of(layer, rank, alpha, settings, use_tucker=settings.tucker)
