"""BOFT: rotations of pairs of rows in several rounds, each across larger distances (butterflies; Liu et al. 2024)."""

from __future__ import annotations

import torch
from lycoris.modules.boft import ButterflyOFTModule

from trainer.networks.lycoris_layers import Trained
from trainer.networks.rotations import cayley
from trainer.schema.network import Network as Settings

LABEL = "LyCORIS/BOFT"
USES = {
    "network_dim",
    "conv_dim",
    "LyCORIS_preset",
    "constrain",
    "rescaled",
    "rank_dropout",
    "rank_dropout_scale",
    "module_dropout",
}


class BOFTFactors(ButterflyOFTModule):
    """Theirs, and ΔW as LoHa's and LoKr's classes have it."""

    def get_weight(self, shape: tuple[int, ...]) -> torch.Tensor:
        frozen = turned = self.org_weight.float()
        for level, rotations in enumerate(cayley(self.oft_blocks, self.constraint)):
            distance = 2**level * (self.boft_b // 2)  # rows this far apart are brought together
            near = turned.unflatten(0, (-1, 2, distance)).transpose(1, 2).reshape(-1, self.boft_b, *shape[1:])
            far = torch.einsum("kij,kj...->ki...", rotations, near)
            turned = far.reshape(-1, distance, 2, *shape[1:]).transpose(1, 2).reshape(shape)
        return (turned * self.rescale if self.rescaled else turned) - frozen


class BOFTLayer(Trained, BOFTFactors):
    def taken(self) -> None:
        self.constraint = float(self.alpha) * self.dim


def smallest(rows: int) -> int:
    """The smallest block that so many rows can be cut into: twice their odd part (10 for 320, 640 and 1280)."""
    return 2 * (rows // (rows & -rows))


def module_for(layer: torch.nn.Module, rank: int, alpha: float, settings: Settings) -> torch.nn.Module:
    """The trained module of one layer; on its device, in float32."""
    return BOFTLayer.of(
        layer,
        max(rank, smallest(len(layer.weight))),
        alpha,
        settings,
        constraint=settings.constraint,
        rescaled=settings.rescaled,
    )
