"""LoRA-FA: Standard with down frozen as it is drawn at the start; up alone is trained (Zhang et al. 2023)."""

from __future__ import annotations

import math

import torch

from trainer.networks.standard import LoRALayer, weight_update
from trainer.schema.network import Network as Settings

__all__ = ["module_for", "weight_update"]


def module_for(layer: torch.nn.Module, rank: int, alpha: float, settings: Settings) -> torch.nn.Module:
    """The trained module of one layer; on its device, in float32."""
    return LoRAFALayer(layer, rank, alpha, settings)


class LoRAFALayer(LoRALayer):
    """Less memory than Standard: the optimizer holds nothing for down, and its input is not kept for a gradient."""

    def start(self) -> None:
        """down is normal with the variance 2 / (in + rank), up is zero."""
        rank, width = self.lora_down.weight.shape[:2]
        torch.nn.init.normal_(self.lora_down.weight, std=math.sqrt(2 / (width + rank)))
        torch.nn.init.zeros_(self.lora_up.weight)
        self.lora_down.requires_grad_(False)
