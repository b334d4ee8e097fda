"""Standard LoRA: ΔW = alpha/rank · up · down, with up and down of a low rank (Hu et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.nn import functional as F

from trainer.schema.network import Network as Settings

LABEL = "Standard"
USES = {
    "network_dim",
    "network_alpha",
    "down_lr_weight",
    "mid_lr_weight",
    "up_lr_weight",
    "block_lr_zero_threshold",
    "block_dims",
    "block_alphas",
    "conv_block_dims",
    "conv_block_alphas",
    "network_dropout",
    "rank_dropout",
    "module_dropout",
    "scale_weight_norms",
    "loraplus_lr_ratio",
    "loraplus_unet_lr_ratio",
    "loraplus_text_encoder_lr_ratio",
}


def module_for(layer: torch.nn.Module, rank: int, alpha: float, settings: Settings) -> torch.nn.Module:
    """The trained module of one layer; on its device, in float32."""
    if isinstance(layer, torch.nn.Linear):
        return LoRALinear(layer, rank, alpha, settings)
    assert isinstance(layer, torch.nn.Conv2d)
    return LoRAConv(layer, rank, alpha, settings)


class LoRALayer(torch.nn.Module):
    """What both kinds share. The frozen layer is no submodule: only its forward is kept."""

    lora_down: torch.nn.Module
    lora_up: torch.nn.Module
    alpha: torch.Tensor

    def __init__(self, layer: torch.nn.Module, rank: int, alpha: float, settings: Settings) -> None:
        super().__init__()
        self.rank = rank
        self.settings = settings
        self.multiplier = 1.0
        self.frozen_forward = layer.forward
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.scale = alpha / rank

    def start(self) -> None:
        """down is random, up is zero: the update starts as nothing."""
        torch.nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        torch.nn.init.zeros_(self.lora_up.weight)

    def saved(self) -> Mapping[str, torch.Tensor]:
        """The tensors of a LoRA file."""
        return self.state_dict()

    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over the tensors of a LoRA file."""
        self.load_state_dict(tensors)
        self.scale = float(self.alpha) / self.rank

    @staticmethod
    def is_up(name: str) -> bool:
        """Whether the parameter of this name starts at zero and learns at LoRA+'s ratio."""
        return name.startswith("lora_up")

    @property
    def skipped(self) -> bool:
        """Whether nothing is to be added now: switched off, or dropped as a whole in this step."""
        p = self.settings.module_dropout
        return self.multiplier == 0 or bool(p and self.training and torch.rand(1) < p)

    def drop(self, inner: torch.Tensor) -> torch.Tensor:
        """Dropout of the values, then of the ranks, [B, …, rank] or [B, rank, H, W]; only while training.

        A rank is dropped for a whole image, the others are scaled by 1 / (1 − p).
        """
        settings = self.settings
        if not self.training:
            return inner
        if settings.dropout:
            inner = F.dropout(inner, settings.dropout)
        if settings.rank_dropout:
            kept = torch.rand((len(inner), self.rank), device=inner.device) > settings.rank_dropout
            between, behind = ([], [1, 1]) if inner.ndim == 4 else ([1] * (inner.ndim - 2), [])
            factors = (kept / (1 - settings.rank_dropout)).to(inner.dtype)
            inner = inner * factors.view(len(inner), *between, self.rank, *behind)
        return inner

    def limit_norm(self, largest: float) -> None:
        """Shrink up and down alike, so that |ΔW| is at most `largest` (Frobenius).

        |up · down|² = tr((upᵀ up)(down downᵀ)), of which only matrices [rank, rank] are needed.
        """
        down, up = self.lora_down.weight, self.lora_up.weight
        down_gram, up_gram = (m.float().flatten(1) @ m.float().flatten(1).T for m in (down, up.transpose(0, 1)))
        norm = (down_gram * up_gram).sum().clamp(min=0).sqrt() * self.scale
        share = (largest / norm).clamp(max=1).sqrt().to(down.dtype)
        down.mul_(share)
        up.mul_(share)


class LoRALinear(LoRALayer):
    """down: [rank, in], up: [out, rank]."""

    def __init__(self, layer: torch.nn.Linear, rank: int, alpha: float, settings: Settings) -> None:
        super().__init__(layer, rank, alpha, settings)
        device = layer.weight.device
        self.lora_down = torch.nn.Linear(layer.in_features, rank, bias=False, device=device)
        self.lora_up = torch.nn.Linear(rank, layer.out_features, bias=False, device=device)
        self.start()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] → [..., out]; the scale is applied at the rank's width, where it is cheapest."""
        output = self.frozen_forward(x)
        if self.skipped:
            return output
        inner = self.drop(F.linear(x, self.lora_down.weight.to(x.dtype)))
        return output + F.linear(inner * (self.scale * self.multiplier), self.lora_up.weight.to(x.dtype))


class LoRAConv(LoRALayer):
    """down: [rank, in, k, k] with the layer's stride and padding, up: [out, rank, 1, 1]."""

    def __init__(self, layer: torch.nn.Conv2d, rank: int, alpha: float, settings: Settings) -> None:
        super().__init__(layer, rank, alpha, settings)
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
        if self.skipped:
            return output
        down = self.lora_down
        inner = self.drop(F.conv2d(x, down.weight.to(x.dtype), None, down.stride, down.padding))
        return output + F.conv2d(inner * (self.scale * self.multiplier), self.lora_up.weight.to(x.dtype))
