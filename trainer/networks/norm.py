"""Norm layers, trained beside the layers of any LyCORIS type: their weight and bias get a difference of their own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lycoris.modules.norms import NormModule
from torch.nn import functional as F

from trainer.networks.lycoris_layers import Trained
from trainer.schema.network import Network as Settings


def weight_update(tensors: Mapping[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """Δw of a norm layer is the saved difference."""
    return tensors["w_norm"]


class NormLayer(Trained, NormModule):
    """There are no ranks to drop, and no product whose norm could be limited."""

    weight_update = staticmethod(weight_update)

    def answer(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """In two steps: torch 2.13 crashes in group_norm's gradient for the weight alone, of channels-last x on a CPU."""
        along = (-1, *[1] * (x.ndim - 2)) if self.op is F.group_norm else (-1,)
        normal = self.op(x, **self.kw_dict) * weight.view(along)
        return normal if bias is None else normal + bias.view(along)

    def bias_change(self, dtype: torch.dtype) -> torch.Tensor | None:
        return (self.b_norm * self.multiplier).to(dtype)

    def dropped(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def limit_norm(self, largest: float) -> None:
        pass


def module_for(layer: torch.nn.Module, rank: int, alpha: float, settings: Settings) -> torch.nn.Module:
    """The trained module of one layer; on its device, in float32."""
    return NormLayer.of(layer, rank, alpha, settings)
