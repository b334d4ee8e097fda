"""DyLoRA: Standard in units of ranks, of which one is drawn for a step and trained (Valipour et al. 2023).

In a step, the units below the drawn one take part frozen and those above are left out, so that every
unit learns to add to those below it, and the first k · unit ranks of the file are a LoRA by
themselves. All layers train the same place in a step, as in the paper; sd-scripts draws for each
layer anew, and leaves the untrained units above in the output.

The undrawn units' tensors have no gradient, so an optimizer passes them over: neither their weights
nor their moments move, decay included, and AdamW's bias correction counts a unit's own steps only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from trainer.errors import ModelError
from trainer.networks.standard import LoRALayer, weight_update
from trainer.schema.network import Network as Settings

__all__ = ["module_for", "weight_update"]


def module_for(layer: torch.nn.Module, rank: int, alpha: float, settings: Settings) -> torch.nn.Module:
    """The trained module of one layer; on its device, in float32. Raises ModelError for a rank that is no multiple."""
    if rank % settings.unit:
        raise ModelError(
            f"A layer of rank {rank} cannot be cut into units of {settings.unit} ranks.",
            "Set DyLoRA Unit / Block size (unit) to a number that divides every rank.",
        )
    return DyLoRALayer(layer, rank, alpha, settings)


class DyLoRALayer(LoRALayer):
    """`downs`: [unit, in(, k, k)] each, `ups`: [out, unit(, 1, 1)] each, from the first ranks to the last."""

    def __init__(self, layer: Any, rank: int, alpha: float, settings: Settings) -> None:
        super().__init__(layer, rank, alpha, settings)
        self.downs, self.ups = (
            torch.nn.ParameterList(part.clone() for part in matrix.weight.detach().split(settings.unit, dim))
            for matrix, dim in ((self.lora_down, 0), (self.lora_up, 1))
        )
        del self.lora_down, self.lora_up
        self.drawn = len(self.downs) - 1

    def draw(self, share: float) -> None:
        """Train the unit at this share (0 ≤ share < 1) of all in the step that follows."""
        self.drawn = int(share * len(self.downs))

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """down and up of the ranks that take part now, and the scale: alpha / rank, while training · √(rank / ranks).

        The root keeps an update of few ranks about as strong as one of all; it is 1 at all of them.
        """
        if not self.training:
            return torch.cat(tuple(self.downs)), torch.cat(tuple(self.ups), 1), self.scale
        below, count = range(self.drawn), self.drawn + 1
        down = torch.cat([*(self.downs[i].detach() for i in below), self.downs[self.drawn]])
        up = torch.cat([*(self.ups[i].detach() for i in below), self.ups[self.drawn]], 1)
        return down, up, self.scale * math.sqrt(len(self.downs) / count)

    def factors(self) -> list[list[torch.nn.Parameter]]:
        return [list(self.downs), list(self.ups)]

    @staticmethod
    def is_up(name: str) -> bool:
        return name.startswith("ups")

    def saved(self) -> Mapping[str, torch.Tensor]:
        """Standard's file, all ranks in it. The first r of them want alpha · √(r / rank) as their alpha."""
        return {
            "alpha": self.alpha,
            "lora_down.weight": torch.cat(tuple(self.downs)),
            "lora_up.weight": torch.cat(tuple(self.ups), 1),
        }

    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over the tensors of a LoRA file."""
        for parts, name, dim in ((self.downs, "lora_down.weight", 0), (self.ups, "lora_up.weight", 1)):
            for own, part in zip(parts, tensors[name].split(self.settings.unit, dim), strict=True):
                own.copy_(part)
        self.alpha.copy_(tensors["alpha"])
        self.scale = float(self.alpha) / self.rank
