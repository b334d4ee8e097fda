"""Copies of Standard's factors in the precision that is computed in, made for many layers by a few kernels.

Each layer would cast and scale its own, forward and backward: five small kernels a layer, which a GPU computes
faster than Python and autograd can ask for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from trainer.networks.standard import LoRALayer

AT_ONCE = 32
"""Layers. The gradients of so many are held in both precisions until the last of them is known."""


def serves(layer: torch.nn.Module) -> bool:
    """Whether a layer is Standard's, down and up being all that it computes with."""
    return isinstance(layer, LoRALayer) and type(layer).matrices is LoRALayer.matrices


@contextmanager
def cast(layers: Sequence[LoRALayer], dtype: torch.dtype) -> Iterator[None]:
    """Inside a with block, forward and backward, the layers have copies of their factors; the gradients are theirs.

    The same numbers as without, but that the scale is multiplied into up, in its own precision.
    """
    for start in range(0, len(layers), AT_ONCE):
        some = layers[start : start + AT_ONCE]
        factors = [layer.matrices() for layer in some]
        downs, ups, scales = zip(*factors, strict=True)
        copies = _Copies.apply(dtype, [1.0] * len(some) + [*scales], *downs, *ups)
        for layer, down, up in zip(some, copies[: len(some)], copies[len(some) :], strict=True):
            # A module's own way looks for parameters first, fourteen times as long.
            vars(layer)["copies"] = down, up, 1.0
    try:
        yield
    finally:
        for layer in layers:
            vars(layer)["copies"] = None


class _Copies(torch.autograd.Function):
    """Tensors of any precision and shape → each times its scale, in `dtype`."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, scales: list[float], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.scales, ctx.dtypes = scales, [tensor.dtype for tensor in tensors]
        ctx.set_materialize_grads(False)
        copies = _changed(tensors, scales, [dtype] * len(tensors))
        wanted = ctx.needs_input_grad[2:]
        ctx.mark_non_differentiable(*(copy for copy, is_wanted in zip(copies, wanted, strict=True) if not is_wanted))
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        known = [i for i, gradient in enumerate(gradients) if gradient is not None]
        there = [gradients[i] for i in known]
        answer: list[torch.Tensor | None] = [None] * len(gradients)
        if known:
            changed = _changed(there, [ctx.scales[i] for i in known], [ctx.dtypes[i] for i in known], after=True)
            for i, gradient in zip(known, changed, strict=True):
                answer[i] = gradient
        return None, None, *answer


def _changed(
    tensors: Sequence[Any], scales: list[float], dtypes: list[torch.dtype], *, after: bool = False
) -> list[torch.Tensor]:
    """New tensors: scaled and cast, or (`after`) cast and scaled, so that it is done in the better precision."""
    scaled = any(scale != 1 for scale in scales)
    if scaled and not after:
        tensors = torch._foreach_mul(list(tensors), scales)
    made = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    torch._foreach_copy_(made, list(tensors))
    if scaled and after:
        torch._foreach_mul_(made, scales)
    return made
