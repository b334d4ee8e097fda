"""How large a network becomes, told from the base model's header alone. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import LorawrightError
from trainer.models import hub
from trainer.models.facts import FAMILIES
from trainer.models.families import UNET, detect, header_of, locate, weight_files
from trainer.schema import Config
from trainer.schema.rules import text_encoder_rate, unet_rate
from trainer.tensorfile import Header, header

_ATTENTION = re.compile(r"\.(transformer_blocks|proj_in|proj_out)\.(.*\.)?weight$")
_TEXT = re.compile(r"\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12]|attn\.out_proj|mlp\.c_(fc|proj))\.weight$")
_FUSED = ".attn.in_proj_weight"
_BYTES = {"float": 4, "fp16": 2, "bf16": 2}
_HEADER_BYTES = 500
"""What a module takes in a file's header: three names with their places."""


@dataclass(frozen=True)
class Size:
    """`weights`: numbers that are trained; `file_bytes`: of the LoRA file, roughly."""

    modules: int
    weights: int
    file_bytes: int


def size_of(config: Config) -> Size | None:
    """The network's size; None where only building it tells (other LoRA types, sizes block by block).

    No network is asked: None for a model on huggingface.co that was not fetched yet.
    """
    network, blocks = config.network, config.blocks
    if network.type != "Standard" or network.dim_from_weights or network.norms or blocks.ranks or blocks.conv_ranks:
        return None
    if hub.is_name(config.model.path) and not hub.folder(config.model.path.strip()):
        return None
    try:
        path = locate(config.model.path)
        family = FAMILIES[detect(path).family]
        layers = [
            *(_unet(path) if unet_rate(config) else ()),
            *(_text(path, family.encoders) if text_encoder_rate(config) else ()),
        ]
    except LorawrightError:
        return None  # the check tells what is wrong with the model
    weights = sum(network.rank * (wide + high) for wide, high in layers)
    file_bytes = weights * _BYTES[config.saving.precision] + len(layers) * _HEADER_BYTES
    return Size(len(layers), weights, file_bytes)


def _unet(path: Path) -> Iterator[tuple[int, int]]:
    for head, prefix in _heads(path, "unet", UNET):
        for name, tensor in head.tensors.items():
            if name.startswith(prefix) and _ATTENTION.search(name) and len(tensor.shape) in (2, 4):
                yield tensor.shape[0], tensor.shape[1]


def _text(path: Path, encoders: tuple) -> Iterator[tuple[int, int]]:
    for encoder in encoders:
        for head, prefix in _heads(path, encoder.part, encoder.prefix):
            for name, tensor in head.tensors.items():
                if not name.startswith(prefix):
                    continue
                if _TEXT.search(name):
                    yield tensor.shape[0], tensor.shape[1]
                elif name.endswith(_FUSED):  # query, key and value in one
                    yield from ((tensor.shape[1], tensor.shape[1]),) * 3


def _heads(path: Path, part: str, prefix: str) -> Iterator[tuple[Header, str]]:
    """The headers that hold a part of a model, and what its tensors' names begin with there."""
    if path.is_dir():
        yield from ((header(file), "") for file in weight_files(path / part))
    else:
        yield header_of(path), prefix
