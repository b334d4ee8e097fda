"""Rotations from trained blocks, which Diag-OFT and BOFT share."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def cayley(tensors: Mapping[str, torch.Tensor], rows: int) -> torch.Tensor:
    """R = (I + Q)(I − Q)⁻¹ of each block [..., b, b], with Q = blocks − blocksᵀ (Qiu et al. 2023, eq. 5).

    Q's norm over all blocks is held at alpha · rows (alpha 0: free). Blocks of zeros are no rotation.
    """
    blocks, alpha = tensors["oft_blocks"].float(), tensors.get("alpha", torch.tensor(0.0))
    q = blocks - blocks.transpose(-1, -2)
    held = (alpha.float() * rows / (q.norm() + 1e-8)).clamp(max=1)
    q = q * torch.where(alpha > 0, held, 1.0)
    one = torch.eye(q.shape[-1], device=q.device)
    return (one + q) @ torch.linalg.inv_ex(one - q).inverse


def rescaled(weight: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weight with the trained length of each row, where a layer has those."""
    return weight * tensors["rescale"] if "rescale" in tensors else weight
