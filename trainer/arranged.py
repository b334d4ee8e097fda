"""Frozen convolutions on a processor, their weights in the order in which oneDNN computes.

PyTorch gives oneDNN plain weights, and oneDNN puts them into blocks of its own at each call, for the answer and for the
gradient: with small pictures that takes several times as long as the convolution. Here it is done once. The numbers
are the same but for rounding, at the price of a second copy for the gradient.
"""

from __future__ import annotations

import logging
import platform

import psutil
import torch

from trainer.compact import Compact, give_back_memory

log = logging.getLogger(__name__)
PLAIN = {
    "kernel_size": (3, 3),
    "stride": (1, 1),
    "padding": (1, 1),
    "dilation": (1, 1),
    "groups": 1,
    "padding_mode": "zeros",
}
"""Only of these is the gradient of the input a convolution of the same kind."""


class ArrangedConv(Compact, torch.nn.Conv2d):
    """A 3×3 convolution that keeps the size; `blocks` and `mirrored` are weights in oneDNN's order."""

    blocks: torch.Tensor
    mirrored: torch.Tensor | None = None

    def packed(self) -> torch.Tensor:
        return self.blocks.to_dense()

    def answer(self, x: torch.Tensor) -> torch.Tensor:
        return _convolved(x, self.blocks, self.bias)

    def pulled_back(self, gradient: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The convolution of the gradient with the kernels turned by 180° and inputs and outputs exchanged."""
        if self.mirrored is None:  # first asked for here, as layers before the first trained one never are
            self.mirrored = _in_blocks(self.weight.flip(2, 3).transpose(0, 1))
        return _convolved(gradient, self.mirrored, None)


def arrange(model: torch.nn.Module) -> None:
    """Arrange the weights of a frozen model's 3×3 convolutions, where oneDNN is there and memory has room for two of them."""
    layers = [layer for layer in model.modules() if type(layer) is torch.nn.Conv2d and _fits(layer)]
    size = sum(layer.weight.nbytes for layer in layers)
    if not layers or not _supported(layers[0].weight.dtype) or psutil.virtual_memory().available < 4 * size:
        return
    for layer in layers:
        weight = layer.weight.detach()
        del layer.weight
        layer.blocks = _in_blocks(weight)
        layer.__class__ = ArrangedConv
        del weight
    give_back_memory()
    log.info(
        "%d convolutions are kept as this processor computes them fastest, for %d MB more", len(layers), size // 10**6
    )


def _fits(layer: torch.nn.Conv2d) -> bool:
    return all(getattr(layer, name) == value for name, value in PLAIN.items())


def _supported(dtype: torch.dtype) -> bool:
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def _in_blocks(weight: torch.Tensor) -> torch.Tensor:
    """`weight` [out, in, 3, 3] in the order that suits inputs of 16×16 best; others are computed as well.

    Not the order of the first input to come: a resumed training begins with another one, and must round alike.
    """
    reorder = torch.ops.mkldnn._reorder_convolution_weight
    return reorder(weight, [1, 1], [1, 1], [1, 1], 1, [1, weight.shape[1], 16, 16])  # type: ignore[no-any-return]


def _convolved(x: torch.Tensor, blocks: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    convolve = torch.ops.mkldnn._convolution_pointwise
    return convolve(x, blocks, bias, [1, 1], [1, 1], [1, 1], 1, "none", [], "")  # type: ignore[no-any-return]
