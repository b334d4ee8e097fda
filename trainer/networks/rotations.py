"""Rotations from trained blocks, which Diag-OFT and BOFT share."""

from __future__ import annotations

import torch


def cayley(blocks: torch.Tensor, most: float) -> torch.Tensor:
    """R = (I + Q)(I − Q)⁻¹ of each block [..., b, b], with Q = blocks − blocksᵀ (Qiu et al. 2023, eq. 5).

    Q's norm over all blocks is held at `most` (0: free). Blocks of zeros are no rotation.
    """
    q = blocks.float()
    q = q - q.transpose(-1, -2)
    if most:
        q = q * (most / (q.norm() + 1e-8)).clamp(max=1)
    one = torch.eye(q.shape[-1], device=q.device)
    return (one + q) @ torch.linalg.inv_ex(one - q).inverse
