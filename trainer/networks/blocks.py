"""Which block of the U-Net a layer is in, and how large its module becomes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from trainer.models import Target
from trainer.schema import Config
from trainer.schema.algorithms import USES
from trainer.schema.network import Network as Settings

DIFFUSERS = re.compile(r"_(down|up)_blocks_(\d+)_(resnets|attentions|downsamplers|upsamplers)_(\d+)_")
ORIGINAL = re.compile(r"^lora_unet_(input_blocks|middle_block|output_blocks)_(\d+)_")
MIDDLE = 12
ATTENTION = re.compile(r"_(attn1|attn2|self_attn)_")
# Tensors with the rank as their first size, or the last.
RANKED = {"lora_down.weight": 0, "hada_w1_b": 0, "lokr_w2_b": 0, "lokr_w1_b": 0, "b2.weight": 0, "oft_blocks": -1}
RANKLESS = ("on_input", "diff", "w_norm")


# The switches that a file's tensors tell of, by the field of trainer/schema/network.py.
SIGNS = {
    "tucker": {"lora_mid.weight", "hada_t1"},
    "cp": {"lokr_t2"},
    "dora": {"dora_scale"},
    "decompose_both": {"lokr_w1_a"},
    "rescaled": {"rescale"},
    "norms": {"w_norm"},
}


class Size(NamedTuple):
    """A module's rank (0: none is made) and alpha (0: the rank)."""

    rank: int
    alpha: float


SizeOf = Callable[[str, Target], Size]


def block_of(name: str) -> int | None:
    """The block that the layer with this kohya name is in; None outside of all.

    By diffusers' names (SD 1.x and 2.x): 0–11 IN, 12 MID, 13–24 OUT. By the original ones (SDXL):
    1–9, 10–12, 13–21.
    """
    if found := DIFFUSERS.search(name):
        way, stage, kind, place = found.groups()
        index = 3 * int(stage) + (2 if kind.endswith("samplers") else int(place))
        return index + 1 if way == "down" else MIDDLE + 1 + index
    if "mid_block_" in name:
        return MIDDLE
    if found := ORIGINAL.search(name):
        return {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}[found[1]] + int(found[2])
    return None


def uniform(rank: int, alpha: float) -> SizeOf:
    """One size for all layers of the attention blocks and the text encoder."""
    return lambda name, target: Size(rank if target.place == "attention" else 0, alpha)


REACHED: dict[str, Callable[[str, Target], bool]] = {
    "full": lambda name, target: True,
    "full-lin": lambda name, target: not is_large(target.layer),
    "attn-mlp": lambda name, target: target.place == "attention",
    "attn-only": lambda name, target: target.place == "attention" and bool(ATTENTION.search(name)),
    "unet-transformer-only": lambda name, target: (target.part, target.place) == ("unet", "attention"),
    "unet-convblock-only": lambda name, target: (
        target.place == "resnet" or (target.place == "edge" and is_large(target.layer))
    ),
}


def is_large(layer: torch.nn.Module) -> bool:
    """Whether a layer is a convolution whose kernel is larger than 1×1."""
    return isinstance(layer, torch.nn.Conv2d) and layer.kernel_size != (1, 1)


def is_norm(layer: torch.nn.Module) -> bool:
    """Whether a layer is a norm layer, which has no ranks."""
    return isinstance(layer, (torch.nn.GroupNorm, torch.nn.LayerNorm))


def from_file(tensors: Mapping[str, torch.Tensor]) -> SizeOf:
    """The size that each layer has in a LoRA file; none where the file has none."""

    def size_of(name: str, target: Target) -> Size:
        sizes = [tensors[f"{name}.{key}"].shape[at] for key, at in RANKED.items() if f"{name}.{key}" in tensors]
        alpha = float(tensors.get(f"{name}.alpha", torch.tensor(0)))
        if not sizes and f"{name}.lokr_w2" in tensors:  # both of its factors are whole, as with a rank that is large
            sizes = [max(tensors[f"{name}.lokr_w2"].shape)]
        if any(f"{name}.{key}" in tensors for key in RANKLESS):
            sizes = [1]
        return Size(sizes[0], alpha or sizes[0]) if sizes else Size(0, 0)

    return size_of


def settings_of_file(settings: Settings, tensors: Mapping[str, torch.Tensor]) -> Settings:
    """The settings with what a LoRA file's tensors tell of how its layers are made; sizes apart."""
    roles = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    told: dict[str, Any] = {name: bool(signs & roles.keys()) for name, signs in SIGNS.items()}
    if "on_input" in roles:
        told["on_input"] = bool(roles["on_input"])
    if "oft_blocks" in roles:
        told["constraint"] = float(roles.get("alpha", 0))
    if {"lokr_w1", "lokr_w1_a"} & roles.keys():
        from trainer.networks.lokr import factor_of  # its library takes seconds to load

        told["factor"] = factor_of(tensors)
    return settings.model_copy(update=told)


def from_settings(config: Config, weights: Sequence[float] | None) -> SizeOf:
    """The sizes that the settings give, block by block where they do; none at a block weight of 0.

    Linear layers and 1×1 convolutions have the network's rank, larger kernels the convolution
    rank. The blocks' resnets and samplers are reached only where convolutions are trained; the
    LyCORIS types have presets that say what is reached.
    """
    network, blocks = config.network, config.blocks
    plain = Size(network.rank, network.alpha)
    conv = Size(network.conv_rank if "conv_dim" in USES[network.type] else 0, network.conv_alpha)
    if "network_dim" not in USES[network.type]:  # the type has no rank
        conv = plain = Size(1, 1)
    reaches_convolutions = "conv_dim" in USES[network.type] or blocks.conv_ranks is not None
    reached = REACHED[network.reach] if "LyCORIS_preset" in USES[network.type] else None

    def size_of(name: str, target: Target) -> Size:
        if reached:
            if not reached(name, target):
                return Size(0, 0)
        elif target.place != "attention" and not (reaches_convolutions and target.place == "resnet"):
            return Size(0, 0)
        if is_norm(target.layer):
            return Size(1, 1)
        size, ranks, alphas = (
            (conv, blocks.conv_ranks, blocks.conv_alphas)
            if is_large(target.layer)
            else (plain, blocks.ranks, blocks.alphas)
        )
        block = block_of(name) if target.part == "unet" else None
        if block is None:
            return size
        if weights and weights[block] == 0:
            return Size(0, 0)
        return Size(ranks[block] if ranks else size.rank, alphas[block] if alphas else size.alpha)

    return size_of
