"""GLoRA: ΔW = alpha/rank · (W a₁ a₂ + b₁ b₂), one low-rank product on the inputs and one beside W (Chavan et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lycoris.modules.glora import GLoRAModule

from trainer.networks.lycoris_layers import Trained
from trainer.networks.standard import strength
from trainer.schema.network import Network as Settings


def weight_update(tensors: Mapping[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """ΔW of a layer whose frozen weight is `weight`."""
    a1, a2, b1, b2 = (tensors[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    on_inputs = torch.einsum("oi...,ir,rj->oj...", weight.to(a1.dtype), a1, a2)
    return (on_inputs + (b1 @ b2).view(weight.shape)) * strength(tensors, len(a2))


class GLoRALayer(Trained, GLoRAModule):
    weight_update = staticmethod(weight_update)

    def degree(self) -> int:
        return 2


def module_for(layer: torch.nn.Module, rank: int, alpha: float, settings: Settings) -> torch.nn.Module:
    """The trained module of one layer; on its device, in float32."""
    return GLoRALayer.of(layer, rank, alpha, settings)
