"""Native fine-tuning: every weight and bias has a trained difference of its own; no low rank."""

from __future__ import annotations

from typing import Any

import torch
from lycoris.modules.base import LycorisBaseModule

from trainer.networks.lycoris_layers import Trained
from trainer.schema.network import Network as Settings

LABEL = "LyCORIS/Native Fine-Tuning"
USES = {
    "LyCORIS_preset",
    "module_dropout",
    "scale_weight_norms",
}


class Differences(LycorisBaseModule):
    """As lycoris' FullModule, which keeps a second copy of all frozen weights."""

    def __init__(self, name: str, layer: Any, **arguments: Any) -> None:
        super().__init__(name, layer)
        self.diff = torch.nn.Parameter(torch.zeros(layer.weight.shape))
        if layer.bias is not None:
            self.diff_b = torch.nn.Parameter(torch.zeros(layer.bias.shape))

    def get_weight(self, shape: tuple[int, ...]) -> torch.Tensor:
        return self.diff.view(shape)


class FullLayer(Trained, Differences):
    def bias_change(self, dtype: torch.dtype) -> torch.Tensor | None:
        return (self.diff_b * self.multiplier).to(dtype) if hasattr(self, "diff_b") else None

    def factors(self) -> list[torch.nn.Parameter]:
        return [self.diff]

    def taken(self) -> None:
        pass


def module_for(layer: torch.nn.Module, rank: int, alpha: float, settings: Settings) -> torch.nn.Module:
    """The trained module of one layer; on its device, in float32."""
    return FullLayer.of(layer, rank, alpha, settings)
