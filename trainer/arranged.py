"""Frozen convolutions on a processor, their weights in the order in which oneDNN computes.

PyTorch gives oneDNN plain weights, and oneDNN puts them into blocks of its own at each call, for the answer and for the
gradient: with small pictures that takes several times as long as the convolution. Here it is done once. The numbers
are the same but for rounding, at the price of a second copy for the gradient.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence

import psutil
import torch

from trainer import memory
from trainer.compact import Compact

log = logging.getLogger(__name__)
PLAIN = {
    "kernel_size": (3, 3),
    "padding": (1, 1),
    "dilation": (1, 1),
    "groups": 1,
    "padding_mode": "zeros",
}
"""Of those that take most of the convolutions' time: they keep the size or halve it. The others are 1×1."""
STRIDES = (1, 1), (2, 2)

SIDES = (16, 16)
"""Not those of the first input to come: a resumed training begins with another one, and must round alike."""


class ArrangedConv(Compact, torch.nn.Conv2d):
    """A 3×3 convolution that keeps the size or halves it; `blocks` and `backward_blocks` are weights in oneDNN's order."""

    blocks: torch.Tensor
    backward_blocks: torch.Tensor | None = None

    def packed(self) -> torch.Tensor:
        return self.blocks.to_dense()

    def answer(self, x: torch.Tensor) -> torch.Tensor:
        convolve = torch.ops.mkldnn._convolution_pointwise
        x = x.contiguous(memory_format=torch.channels_last)
        return convolve(x, self.blocks, self.bias, [1, 1], self.stride, [1, 1], 1, "none", [], "")  # type: ignore[no-any-return]

    def pulled_back(self, gradient: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The gradient of the input is the transposed convolution of the answer's."""
        if self.backward_blocks is None:  # first asked for here, as layers before the first trained one never are
            reorder = torch.ops.mkldnn._reorder_convolution_transpose_weight
            size = [1, self.out_channels, *SIDES]
            self.backward_blocks = reorder(self.weight, [1, 1], [0, 0], self.stride, [1, 1], 1, size)
        convolve = torch.ops.mkldnn._convolution_transpose_pointwise
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        # A stride of 2 ends one row short of an even side.
        left = [(side - 1) % step for side, step in zip(shape[2:], self.stride, strict=True)]
        return convolve(gradient, self.backward_blocks, None, [1, 1], left, self.stride, [1, 1], 1, "none", [], "")  # type: ignore[no-any-return]


def arrange(model: torch.nn.Module) -> None:
    """Arrange the weights of a frozen model's 3×3 convolutions, where oneDNN is there and memory has room for two of them."""
    layers = [layer for layer in model.modules() if type(layer) is torch.nn.Conv2d and _fits(layer)]
    size = sum(layer.weight.nbytes for layer in layers)
    if not layers or not _supported(layers[0].weight.dtype) or psutil.virtual_memory().available < 4 * size:
        return
    for layer in layers:
        weight = layer.weight.detach()
        del layer.weight
        layer.blocks = _in_blocks(weight, layer.stride)
        layer.__class__ = ArrangedConv
        del weight
    memory.give_back()
    log.info(
        "%d convolutions are kept as this processor computes them fastest, for %d MB more", len(layers), size // 10**6
    )


def _fits(layer: torch.nn.Conv2d) -> bool:
    return layer.stride in STRIDES and all(getattr(layer, name) == value for name, value in PLAIN.items())


def _supported(dtype: torch.dtype) -> bool:
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def _in_blocks(weight: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    """`weight` [out, in, 3, 3] in the order that suits inputs of `SIDES` best; others are computed as well."""
    reorder = torch.ops.mkldnn._reorder_convolution_weight
    return reorder(weight, [1, 1], stride, [1, 1], 1, [1, weight.shape[1], *SIDES])  # type: ignore[no-any-return]
