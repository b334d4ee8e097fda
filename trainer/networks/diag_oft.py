"""Diag-OFT: the rows of W are rotated within small groups (Qiu et al. 2023); W + ΔW = R W, R of blocks on a diagonal."""

from __future__ import annotations

import torch
from lycoris.modules.diag_oft import DiagOFTModule

from trainer.networks.lycoris_layers import Trained
from trainer.networks.rotations import cayley
from trainer.schema.network import Network as Settings

LABEL = "LyCORIS/Diag-OFT"
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


class OFTFactors(DiagOFTModule):
    """Theirs, and ΔW as LoHa's and LoKr's classes have it."""

    def get_weight(self, shape: tuple[int, ...]) -> torch.Tensor:
        frozen = self.org_weight.float()
        groups = frozen.reshape(self.block_num, self.block_size, *shape[1:])
        turned = torch.einsum("knm,kn...->km...", cayley(self.oft_blocks, self.constraint), groups).reshape(shape)
        return (turned * self.rescale if self.rescaled else turned) - frozen


class OFTLayer(Trained, OFTFactors):
    def taken(self) -> None:
        self.constraint = float(self.alpha) * self.dim


def module_for(layer: torch.nn.Module, rank: int, alpha: float, settings: Settings) -> torch.nn.Module:
    """The trained module of one layer; on its device, in float32."""
    return OFTLayer.of(layer, rank, alpha, settings, constraint=settings.constraint, rescaled=settings.rescaled)
