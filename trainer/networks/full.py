"""Native fine-tuning: every weight and bias has a trained difference of its own; no low rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lycoris.modules.base import LycorisBaseModule

from trainer.networks.lycoris_layers import Trained
from trainer.schema.network import Network as Settings


def weight_update(tensors: Mapping[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """ΔW is the saved difference; nothing where a layer has one of its bias alone."""
    return tensors["diff"].view(weight.shape) if "diff" in tensors else torch.zeros(weight.shape)


class Differences(LycorisBaseModule):
    """As lycoris' FullModule, which keeps a second copy of all frozen weights."""

    def __init__(self, name: str, layer: Any, **arguments: Any) -> None:
        super().__init__(name, layer)
        self.diff = torch.nn.Parameter(torch.zeros(layer.weight.shape))
        if layer.bias is not None:
            self.diff_b = torch.nn.Parameter(torch.zeros(layer.bias.shape))


class FullLayer(Trained, Differences):
    weight_update = staticmethod(weight_update)

    def bias_change(self, dtype: torch.dtype) -> torch.Tensor | None:
        return (self.diff_b * self.multiplier).to(dtype) if hasattr(self, "diff_b") else None

    def factors(self) -> list[torch.nn.Parameter]:
        return [self.diff]


def module_for(layer: torch.nn.Module, rank: int, alpha: float, settings: Settings) -> torch.nn.Module:
    """The trained module of one layer; on its device, in float32."""
    return FullLayer.of(layer, rank, alpha, settings)
