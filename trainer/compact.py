"""The frozen base model in fewer bits a weight: fp8, or bitsandbytes' int8 and NF4.

A layer's weight is widened while it computes, and once more in the backward pass instead of being
kept from one to the other: what is saved would else be lost again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import functional as F

from trainer import memory

LARGEST_FP8 = float(torch.finfo(torch.float8_e4m3fn).max)


class Fp8:
    """8 bits a weight, and one scale for each output (channel): the largest weight of it is the largest number."""

    def __init__(self, weight: torch.Tensor) -> None:
        largest = weight.float().abs().amax(tuple(range(1, weight.ndim)), keepdim=True)
        # At least the dtype's smallest whole-precision number: in fp16 a smaller scale would be 0, and 0 / 0 no number.
        self.scale = (largest / LARGEST_FP8).clamp(min=torch.finfo(weight.dtype).tiny).to(weight.dtype)
        self.values = (weight / self.scale).clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn)

    def __call__(self) -> torch.Tensor:
        return self.values.to(self.scale.dtype) * self.scale


class Int8:
    """8 bits a weight, by blocks of 4096 with a scale each (Dettmers et al. 2022, "8-bit optimizers", section 2.1)."""

    def __init__(self, weight: torch.Tensor) -> None:
        from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

        self.widen = dequantize_blockwise
        self.packed = quantize_blockwise(_flat(weight))
        self.shape = weight.shape

    def __call__(self) -> torch.Tensor:
        return _shaped(self.widen(*self.packed), self.shape)


class Nf4:
    """4 bits a weight, by blocks of 64 with a scale each (Dettmers et al. 2023, "QLoRA", section 3)."""

    def __init__(self, weight: torch.Tensor) -> None:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        self.widen = dequantize_4bit
        self.packed = quantize_4bit(_flat(weight), quant_type="nf4")
        self.shape = weight.shape

    def __call__(self) -> torch.Tensor:
        return _shaped(self.widen(*self.packed), self.shape)


KINDS: dict[str, Callable[[torch.Tensor], Callable[[], torch.Tensor]]] = {"fp8": Fp8, "int8": Int8, "nf4": Nf4}


def _flat(weight: torch.Tensor) -> torch.Tensor:
    """The weight in the order in which convolutions want it back: channels last."""
    return (weight.permute(0, 2, 3, 1) if weight.ndim == 4 else weight).contiguous().view(-1)


def _shaped(flat: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if len(shape) != 4:
        return flat.view(shape)
    out, channels, height, width = shape
    return flat.view(out, height, width, channels).permute(0, 3, 1, 2)


class _Frozen(torch.autograd.Function):
    """A frozen layer's answer, and the gradient of its input; nothing is saved but the input's shape."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any) -> torch.Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.answer(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return ctx.layer.pulled_back(gradient, ctx.shape), None


class Compact:
    """Mixed in before a layer's own class; `packed` is its weight."""

    packed: Callable[[], torch.Tensor]

    @property
    def weight(self) -> torch.Tensor:
        """The weight as it computes, made anew at each look."""
        return self.packed()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Frozen.apply(x, self)  # type: ignore[no-any-return]


class CompactLinear(Compact, torch.nn.Linear):
    def answer(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def pulled_back(self, gradient: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        return gradient @ self.weight


class CompactConv(Compact, torch.nn.Conv2d):
    def answer(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight, self.bias)

    def pulled_back(self, gradient: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        return torch.nn.grad.conv2d_input(  # type: ignore[no-any-return]
            shape, self.weight, gradient, self.stride, self.padding, self.dilation, self.groups
        )


CLASSES: dict[type, type] = {torch.nn.Linear: CompactLinear, torch.nn.Conv2d: CompactConv}


def compact(layers: Iterable[torch.nn.Module], kind: str, device: torch.device) -> None:
    """Keep the weights of linear layers and convolutions on `device` as `kind` ("fp8", "int8", "nf4") from now on.

    Other layers stay as they are.
    """
    for layer in layers:
        if type(layer) in CLASSES:
            weight = layer.weight.detach().to(device)
            del layer.weight
            layer.packed = KINDS[kind](weight)
            layer.__class__ = CLASSES[type(layer)]
            del weight
            memory.give_back()
