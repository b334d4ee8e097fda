"""How the U-Net attends: PyTorch's own way, xFormers', or the plain one; on some processors as products of matrices.

softmax(q kᵀ / √d) v, for each head (Vaswani et al. 2017, eq. 1).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from trainer.schema.training import Training

log = logging.getLogger(__name__)
AT_ONCE = 2**20
"""Scores of queries and keys: in 16 bit as many as stay in a processor's cache."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Queries [B, heads, n, d], keys and values [B, heads, m, d] → [B, heads, n, d]."""


def choose(model: Any, training: Training, device: torch.device) -> None:
    """Have a model's U-Net attend as the settings say."""
    if training.attention == "none" and not training.memory_efficient_attention:
        from diffusers.models.attention_processor import AttnProcessor

        model.unet.set_attn_processor(AttnProcessor())
        return
    if training.attention == "xformers":
        try:
            if device.type != "cuda":
                raise RuntimeError("it has kernels for NVIDIA GPUs only")
            model.unet.enable_xformers_memory_efficient_attention()
            return
        except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            log.info("xformers is not used (%s). scaled-dot-product attention takes its place.", reason)
    pays = device.type == "cpu" and model.dtype == torch.bfloat16 and multiplies_bf16()
    model.unet.set_attn_processor(Processor(by_products if pays else F.scaled_dot_product_attention))


def multiplies_bf16() -> bool:
    """Whether this processor has instructions for products of bf16 matrices."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


class Processor:
    """What diffusers' attention layers of the U-Net do, without what these families do not use."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    def __call__(
        self,
        layer: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`hidden_states` [B, n, C] attend to `encoder_hidden_states` [B, m, C'], or to themselves."""
        assert attention_mask is None
        known = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        inputs = (layer.to_q(hidden_states), layer.to_k(known), layer.to_v(known))
        answer = self.attend(*(x.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for x in inputs))
        return layer.to_out[1](layer.to_out[0](answer.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


Processor.__call__.__signature__ = inspect.signature(Processor.__call__)  # type: ignore[attr-defined]
"""diffusers asks for it at each call; it is not worked out anew."""


def by_products(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention as products of whole matrices, which oneDNN computes faster in bf16 than PyTorch's fused kernel does.

    As that one, it keeps no table of scores for the backward pass. Its rounding is about twice as coarse.
    """
    if torch.compiler.is_compiling():  # the pieces would be a graph of hundreds of products
        return F.scaled_dot_product_attention(queries, keys, values)
    return _ByProducts.apply(queries, keys, values)  # type: ignore[no-any-return]


class _ByProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        ctx.scale = queries.shape[-1] ** -0.5
        # What all keys have in common changes no answer; without it the scores are small, and rounded less.
        q, k, v = (x.flatten(0, 1) for x in (queries * ctx.scale, keys - keys.mean(-2, keepdim=True), values))
        answer = torch.empty_like(q)
        for head, rows in _pieces(q, k):
            torch.matmul(_shares(q[head][..., rows, :], k[head]), v[head], out=answer[head][..., rows, :])
        ctx.save_for_backward(q, k, v)
        return answer.view(queries.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        """With S = q kᵀ and P = softmax(S): dv = Pᵀ g, dP = g vᵀ, dS = P ∘ (dP − Σ P ∘ dP), dq = dS k, dk = dSᵀ q."""
        q, k, v = ctx.saved_tensors
        shape, gradient = gradient.shape, gradient.flatten(0, 1)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        for head, rows in _pieces(q, k):
            some, pulls = q[head][..., rows, :], gradient[head][..., rows, :]
            shares = _shares(some, k[head])
            scores = torch._softmax_backward_data(pulls @ v[head].mT, shares, -1, shares.dtype)
            torch.matmul(scores, k[head], out=dq[head][..., rows, :])
            if rows.start:
                dv[head].addmm_(shares.mT, pulls)
                dk[head].addmm_(scores.mT, some)
            else:
                torch.matmul(shares.mT, pulls, out=dv[head])
                torch.matmul(scores.mT, some, out=dk[head])
        return tuple(x.view(*shape[:2], *x.shape[1:]) for x in (dq.mul_(ctx.scale), dk, dv))


def _shares(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """How much of each value [..., n, m] an answer takes."""
    return torch.softmax(queries @ keys.mT, -1)


def _pieces(queries: torch.Tensor, keys: torch.Tensor) -> Iterator[tuple[slice | int, slice]]:
    """Places of [heads, rows] that are computed together: several small heads, or some rows of a large one."""
    heads, count, _ = queries.shape
    if (together := AT_ONCE // (count * keys.shape[1])) > 1:
        for start in range(0, heads, together):
            yield slice(start, start + together), slice(None)
    else:
        rows = max(1, AT_ONCE // keys.shape[1])
        for head in range(heads):
            for start in range(0, count, rows):
                yield head, slice(start, start + rows)
