"""LoKr: ΔW = alpha/rank · w₁ ⊗ w₂, the Kronecker product of a small matrix and a larger one of low rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lycoris.functional.general import factorization
from lycoris.modules.lokr import LokrModule

from trainer.networks.lycoris_layers import Trained
from trainer.networks.standard import strength
from trainer.schema.network import Network as Settings

ROLES = ("w1", "w1_a", "w2", "w2_a", "t2")


def weight_update(tensors: Mapping[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """ΔW, [out₁·out₂, in₁·in₂(, k, k)]. Where both matrices are whole, alpha does not count."""
    t = tensors
    small = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        large = t["lokr_w2"]
    elif "lokr_t2" in t:
        large = torch.einsum("ij...,ip,jr->pr...", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        large = t["lokr_w2_a"] @ t["lokr_w2_b"].flatten(1)
    large = large.reshape(weight.shape[0] // len(small), weight.shape[1] // small.shape[1], *weight.shape[2:])
    rank = next((len(t[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in t), None)
    scaled = small if rank is None else small * strength(t, rank)
    # torch.kron asks for a memory layout that Tucker's product does not have.
    blocks = scaled.view(len(small), 1, -1, 1, *[1] * (large.ndim - 2)) * large[None, :, None]
    return blocks.reshape(weight.shape)


def factor_of(tensors: Mapping[str, torch.Tensor]) -> int:
    """The factor that a file's small matrices were made with; -1 where it was left to the layers' sizes."""
    rows = []  # of the small matrix and of the large one, layer by layer
    for layer in {name.partition(".")[0] for name in tensors if ".lokr_w1" in name}:
        roles = {role: tensors[f"{layer}.lokr_{role}"] for role in ROLES if f"{layer}.lokr_{role}" in tensors}
        large = roles["w2"] if "w2" in roles else roles["w2_a"]
        rows.append((len(roles.get("w1", roles.get("w1_a"))), large.shape[1 if "t2" in roles else 0]))
    candidates = [-1, *sorted({small for small, _ in rows}, reverse=True)]
    return next((f for f in candidates if all(factorization(a * b, f)[0] == a for a, b in rows)), -1)


class LoKrLayer(Trained, LokrModule):
    weight_update = staticmethod(weight_update)


def module_for(layer: torch.nn.Module, rank: int, alpha: float, settings: Settings) -> torch.nn.Module:
    """The trained module of one layer; on its device, in float32."""
    return LoKrLayer.of(
        layer,
        rank,
        alpha,
        settings,
        factor=settings.factor,
        decompose_both=settings.decompose_both,
        use_tucker=settings.cp,
    )
