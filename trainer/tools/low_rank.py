"""A matrix as a product of two thin ones: singular values, how many of them to keep, and the factors.

Matrices are [out, in]; a convolution's weight [out, in, k, k] counts as [out, in·k·k].
"""

from __future__ import annotations

from typing import NamedTuple

import torch

SMALLEST = 1e-6  # a largest singular value below this is that of a zero matrix


class Parts(NamedTuple):
    """matrix = left · diag(values) · right, left [out, n], values [n] descending, right [n, in]; float64."""

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor


def decompose(matrix: torch.Tensor) -> Parts:
    """Singular values and vectors of any matrix, by the eigenvectors of its Gram matrix in float64.

    That is several times faster than an SVD where one side is much longer. Values below 1e-8 of the
    largest are not resolved; their vectors on the long side are zero.
    """
    m = matrix.double()
    if m.shape[0] > m.shape[1]:
        left, values, right = decompose(m.T)
        return Parts(right.T, values, left.T)
    squares, vectors = torch.linalg.eigh(m @ m.T)
    values = squares.flip(0).clamp(min=0).sqrt()
    left = vectors.flip(1)
    scale = torch.where(values > 1e-8 * values[0], values, torch.inf)
    return Parts(left, values, (left.T @ m) / scale[:, None])


def decompose_product(up: torch.Tensor, down: torch.Tensor) -> Parts:
    """Those of up [out, r] · down [r, in], through a matrix [r, r] only."""
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return Parts(q_up @ left, values, right @ q_down.T)


def kept_rank(values: torch.Tensor, most: int, method: str, share: float, shortest: int) -> int:
    """How many singular values to keep, `most` at most.

    sv_ratio: those above the largest / share. sv_fro: the fewest whose norm is that share of the whole
    norm. sv_cumulative: whose sum is that share of the sum. Each keeps one more than it says, as
    sd-scripts does, whose files these match. `shortest`: the matrix's shorter side.
    """
    if values[0] <= SMALLEST:
        return 1
    if method == "sv_ratio":
        found = int((values > values[0] / share).sum())
    elif method == "sv_fro":
        squares = values.square()
        found = int(torch.searchsorted(squares.cumsum(0) / squares.sum(), share**2)) + 1
    elif method == "sv_cumulative":
        found = int(torch.searchsorted(values.cumsum(0) / values.sum(), share)) + 1
    else:
        return min(most, len(values))
    return min(max(1, min(found, shortest - 1)) + 1, most, len(values))


def kept_norm(values: torch.Tensor, rank: int) -> float:
    """The share of the Frobenius norm that the first `rank` singular values hold."""
    whole = values.norm()
    return float(values[:rank].norm() / whole) if whole else 1.0


def factors(parts: Parts, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """up [out, rank] and down [rank, in], float32: the nearest product of that rank.

    Each singular value is shared out between its two vectors, so that neither leaves what fp16 can say.
    """
    roots = parts.values[:rank].sqrt()
    return (parts.left[:, :rank] * roots).float(), (roots[:, None] * parts.right[:rank]).float()


def as_layers(up: torch.Tensor, down: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """The two in the shapes of a LoRA file for a layer of the weight's shape: convolutions have four sides."""
    if len(shape) == 2:
        return up.contiguous(), down.contiguous()
    return up[:, :, None, None].contiguous(), down.reshape(-1, *shape[1:]).contiguous()
