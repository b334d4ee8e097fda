"""Standard LoRA: ΔW = alpha/rank · up · down, with up and down of a low rank (Hu et al. 2021)."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

LABEL = "Standard"
USES = {"network_dim", "network_alpha"}


def module_for(layer: torch.nn.Module, rank: int, alpha: float) -> torch.nn.Module:
    """The trained module of one layer; on its device, in float32."""
    if isinstance(layer, torch.nn.Linear):
        return LoRALinear(layer, rank, alpha)
    assert isinstance(layer, torch.nn.Conv2d)
    return LoRAConv(layer, rank, alpha)


class LoRALayer(torch.nn.Module):
    """What both kinds share. The frozen layer is no submodule: only its forward is kept."""

    lora_down: torch.nn.Module
    lora_up: torch.nn.Module
    alpha: torch.Tensor

    def __init__(self, layer: torch.nn.Module, rank: int, alpha: float) -> None:
        super().__init__()
        self.rank = rank
        self.multiplier = 1.0
        self.frozen_forward = layer.forward
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.scale = alpha / rank

    def start(self) -> None:
        """down is random, up is zero: the update starts as nothing."""
        torch.nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        torch.nn.init.zeros_(self.lora_up.weight)

    def alpha_changed(self) -> None:
        self.scale = float(self.alpha) / self.rank


class LoRALinear(LoRALayer):
    """down: [rank, in], up: [out, rank]."""

    def __init__(self, layer: torch.nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(layer, rank, alpha)
        device = layer.weight.device
        self.lora_down = torch.nn.Linear(layer.in_features, rank, bias=False, device=device)
        self.lora_up = torch.nn.Linear(rank, layer.out_features, bias=False, device=device)
        self.start()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] → [..., out]; the scale is applied at the rank's width, where it is cheapest."""
        output = self.frozen_forward(x)
        if self.multiplier == 0:
            return output
        inner = F.linear(x, self.lora_down.weight.to(x.dtype))
        return output + F.linear(inner * (self.scale * self.multiplier), self.lora_up.weight.to(x.dtype))


class LoRAConv(LoRALayer):
    """down: [rank, in, k, k] with the layer's stride and padding, up: [out, rank, 1, 1]."""

    def __init__(self, layer: torch.nn.Conv2d, rank: int, alpha: float) -> None:
        super().__init__(layer, rank, alpha)
        device = layer.weight.device
        self.lora_down = torch.nn.Conv2d(
            layer.in_channels,
            rank,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            bias=False,
            device=device,
        )
        self.lora_up = torch.nn.Conv2d(rank, layer.out_channels, 1, bias=False, device=device)
        self.start()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, in, H, W] → [B, out, H', W']."""
        output = self.frozen_forward(x)
        if self.multiplier == 0:
            return output
        down = self.lora_down
        inner = F.conv2d(x, down.weight.to(x.dtype), None, down.stride, down.padding)
        return output + F.conv2d(inner * (self.scale * self.multiplier), self.lora_up.weight.to(x.dtype))
