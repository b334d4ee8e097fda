"""Muon: momentum whose matrices are made orthogonal before each step (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

The embedded model is made on a CPU, where steps are dear. With this optimizer its autoencoder reaches 22 dB after 350
steps, with AdamW at the same rate 18 dB.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the Newton–Schulz step X ← aX + b(XXᵀ)X + c(XXᵀ)²X, from the same source."""


class Muon(torch.optim.Optimizer):
    """Matrices and convolutions (as matrices [out, in·k·k]) step by Muon, all else by Adam, at one learning rate.

    Muon's step is scaled by 0.2 √(longer side), which gives it Adam's usual size (Liu et al. 2025, arXiv 2502.16982).
    Vectors, thin matrices and `tables` (embeddings, of which a batch touches few rows) are left to Adam.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict],
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        thinnest: int = 8,
        tables: int = 10_000,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "betas": betas})
        self.thinnest, self.tables = thinnest, tables

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                rows, columns = len(weight), weight[0].numel()
                if min(rows, columns) >= self.thinnest and rows < self.tables:
                    self._muon(weight, group)
                else:
                    self._adam(weight, group)

    def _muon(self, weight: torch.nn.Parameter, group: dict) -> None:
        state, gradient = self.state[weight], weight.grad
        if not state:
            state["mean"] = torch.zeros_like(weight)
        state["mean"].lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(state["mean"], group["momentum"]).flatten(1)
        step = orthogonal(ahead).view(weight.shape)
        weight.add_(step, alpha=-group["lr"] * 0.2 * max(ahead.shape) ** 0.5)

    def _adam(self, weight: torch.nn.Parameter, group: dict) -> None:
        state, (first, second) = self.state[weight], group["betas"]
        if not state:
            state.update(mean=torch.zeros_like(weight), square=torch.zeros_like(weight), steps=0)
        state["steps"] += 1
        state["mean"].lerp_(weight.grad, 1 - first)
        state["square"].lerp_(weight.grad.square(), 1 - second)
        mean = state["mean"] / (1 - first ** state["steps"])
        deviation = (state["square"] / (1 - second ** state["steps"])).sqrt()
        weight.addcdiv_(mean, deviation.add_(1e-8), value=-group["lr"])


def orthogonal(matrix: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """The nearest matrix whose singular values are about 1 (0.7 … 1.2), by `rounds` Newton–Schulz steps."""
    a, b, c = COEFFICIENTS
    wide = len(matrix) <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x.bfloat16() if min(x.shape) >= 64 else x  # smaller ones gain nothing
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.T).to(matrix.dtype)
