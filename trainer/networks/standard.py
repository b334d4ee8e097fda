"""Standard LoRA: ΔW = alpha/rank · up · down, with up and down of a low rank (Hu et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from trainer.schema.network import Network as Settings


def weight_update(tensors: Mapping[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """ΔW, of `weight`'s shape: up [out, rank(, 1, 1)] · down [rank, in(, k, k)].

    Where there is `lora_mid` [rank, rank, k, k], down is [rank, in, 1, 1] (Tucker).
    """
    up, down = tensors["lora_up.weight"].flatten(1), tensors["lora_down.weight"].flatten(1)
    if "lora_mid.weight" in tensors:
        update = torch.einsum("or,rs...,si->oi...", up, tensors["lora_mid.weight"], down)
    else:
        update = (up @ down).view(weight.shape)
    return update * strength(tensors, len(down))


def strength(tensors: Mapping[str, torch.Tensor], rank: int) -> torch.Tensor | float:
    """alpha / rank, by which an update is multiplied; 1 in a file without alpha. Stays on the device."""
    return tensors["alpha"] / rank if "alpha" in tensors else 1.0


def is_up(name: str) -> bool:
    """Whether the parameter of this name starts at zero and learns at LoRA+'s ratio."""
    return name.startswith("lora_up")


def module_for(layer: torch.nn.Module, rank: int, alpha: float, settings: Settings) -> torch.nn.Module:
    """The trained module of one layer; on its device, in float32."""
    return LoRALayer(layer, rank, alpha, settings)


class LoRALayer(torch.nn.Module):
    """Beside a linear layer, down: [rank, in], up: [out, rank]; beside a convolution
    down: [rank, in, k, k] with the layer's stride and padding, up: [out, rank, 1, 1].

    The frozen layer is no submodule: only its forward is kept.
    """

    alpha: torch.Tensor
    copies: tuple[torch.Tensor, torch.Tensor, float] | None = None
    """What `matrices` tells, in the precision that is computed in, inside `casting.cast`."""

    def __init__(self, layer: Any, rank: int, alpha: float, settings: Settings) -> None:
        super().__init__()
        self.rank = rank
        self.settings = settings
        self.multiplier = 1.0
        self.frozen_forward = layer.forward
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.scale = alpha / rank
        device = layer.weight.device
        if isinstance(layer, torch.nn.Linear):
            self.op, self.down_arguments = F.linear, {}
            self.lora_down = torch.nn.Linear(layer.in_features, rank, bias=False, device=device)
            self.lora_up = torch.nn.Linear(rank, layer.out_features, bias=False, device=device)
        else:
            steps = self.down_arguments = {"stride": layer.stride, "padding": layer.padding}
            self.op = F.conv2d
            size = layer.kernel_size
            self.lora_down = torch.nn.Conv2d(layer.in_channels, rank, size, **steps, bias=False, device=device)
            self.lora_up = torch.nn.Conv2d(rank, layer.out_channels, 1, bias=False, device=device)
        self.start()

    def start(self) -> None:
        """down is random, up is zero: the update starts as nothing."""
        torch.nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        torch.nn.init.zeros_(self.lora_up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] → [..., out], or [B, in, H, W] → [B, out, H', W']; scaled at the rank's width, where it is cheapest."""
        is_linear = self.op is F.linear
        inputs = x.flatten(0, -2) if is_linear else x
        output = self.frozen_forward(inputs)
        if not self.skipped:
            down, up, scale = self.copies or self.matrices()
            inner = self.drop(self.op(inputs, down.to(x.dtype), None, **self.down_arguments), len(x))
            if scale * self.multiplier != 1:
                inner = inner * (scale * self.multiplier)
            # A product that is added where the frozen layer's stands is one kernel.
            output = output.addmm_(inner, up.to(x.dtype).t()) if is_linear else output + self.op(inner, up.to(x.dtype))
        return output.view(*x.shape[:-1], -1) if is_linear else output

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """down, up, and the scale in front of their product."""
        return self.lora_down.weight, self.lora_up.weight, self.scale

    def factors(self) -> list[list[torch.nn.Parameter]]:
        """The tensors that down consists of, and those of up."""
        return [[self.lora_down.weight], [self.lora_up.weight]]

    def saved(self) -> Mapping[str, torch.Tensor]:
        """The tensors of a LoRA file."""
        return self.state_dict()

    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over the tensors of a LoRA file."""
        self.load_state_dict(tensors)
        self.scale = float(self.alpha) / self.rank

    is_up = staticmethod(is_up)

    @property
    def skipped(self) -> bool:
        """Whether nothing is to be added now: switched off, or dropped as a whole in this step."""
        p = self.settings.module_dropout
        return self.multiplier == 0 or bool(p and self.training and torch.rand(1) < p)

    def drop(self, inner: torch.Tensor, images: int) -> torch.Tensor:
        """Dropout of the values, then of the ranks, [images · tokens, rank] or [images, rank, H, W]; only while training.

        A rank is dropped for a whole image, the others are scaled by 1 / (1 − p).
        """
        settings = self.settings
        if not self.training:
            return inner
        if settings.dropout:
            inner = F.dropout(inner, settings.dropout)
        if settings.rank_dropout:
            kept = torch.rand((images, inner.shape[1]), device=inner.device) > settings.rank_dropout
            factors = (kept / (1 - settings.rank_dropout)).to(inner.dtype)
            shape = (images, -1, inner.shape[1]) if inner.ndim == 2 else inner.shape
            inner = (inner.view(shape) * (factors[:, None] if inner.ndim == 2 else factors[..., None, None])).view_as(
                inner
            )
        return inner

    def limit_norm(self, largest: float) -> None:
        """Shrink what is trained of up and down alike, so that |ΔW| is at most `largest` (Frobenius).

        |up · down|² = tr((upᵀ up)(down downᵀ)), of which only matrices [rank, rank] are needed.
        """
        tensors = self.saved()
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        down_gram, up_gram = (m.float().flatten(1) @ m.float().flatten(1).T for m in (down, up.transpose(0, 1)))
        norm = (down_gram * up_gram).sum().clamp(min=0).sqrt() * self.scale
        trained = [factor for factor in self.factors() if factor[0].requires_grad]
        share = (largest / norm).clamp(max=1) ** (1 / len(trained))
        for part in (part for factor in trained for part in factor):
            part.mul_(share.to(part.dtype))
