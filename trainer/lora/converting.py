"""The same LoRA under another naming, to the last bit: kohya's for web UIs, diffusers' (PEFT's) for pipelines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save

from trainer.checkpoint import hashes, on_disk
from trainer.errors import ModelError
from trainer.lora.names import layer
from trainer.lora.reading import LoraFile, read
from trainer.lora.recognise import ADAPTER, ALPHA, DOWN, UP, by_layer
from trainer.models.facts import FAMILIES
from trainer.paths import shown
from trainer.run import write_whole

ROLES = {DOWN: "lora_A.weight", UP: "lora_B.weight", "dora_scale": "lora_magnitude_vector"}


@dataclass(frozen=True)
class Converted:
    """A file that was written: `naming` before, how many layers, and what to know."""

    path: Path
    naming: str
    layers: int
    notes: tuple[str, ...]


def convert(
    path: Path | str, out: Path, to: Literal["kohya", "diffusers"] = "kohya", alpha: Literal["", "rank"] = ""
) -> Converted:
    """Write the LoRA file at `path` to `out` under the other naming. Numbers are not touched.

    diffusers has no tensors for alpha: there it is in the settings in the header
    (`lora_adapter_metadata`), from which it comes back. `alpha` "rank": a file of kohya's naming that
    lacks alphas, which is refused else, is read with the ranks for them. Raises ModelError for what
    diffusers' naming cannot hold, which is all but up and down matrices and DoRA's lengths of outputs.
    """
    file = read(path, missing_alpha=alpha)
    if to == "kohya":
        tensors, metadata = dict(file.tensors), _for_kohya(file)
        metadata |= hashes(tensors, metadata)
    else:
        tensors, metadata = _for_diffusers(file)
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    on_disk(out, lambda path: write_whole(path, data))
    return Converted(out, file.about.naming, file.about.modules, file.about.notes)


def _for_kohya(file: LoraFile) -> dict[str, str]:
    """The metadata: what the file said, and where it said nothing what web UIs sort LoRAs by."""
    lora = file.about
    of_pairs = lora.naming == "cloneofsimo"  # its entries are about tensors that are named otherwise now
    kept = {key: text for key, text in file.metadata.items() if key not in (ADAPTER, "format") and not of_pairs}
    alphas = {float(tensor) for name, tensor in file.tensors.items() if name.endswith(".alpha")}
    told = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(*lora.ranks) if len(lora.ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(*alphas) if len(alphas) == 1 else "Dynamic",
    }
    if lora.family:
        told |= FAMILIES[lora.family].entries("epsilon")
    return kept if any(key.startswith("ss_") for key in kept) else kept | told


def _for_diffusers(file: LoraFile) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors: dict[str, torch.Tensor] = {}
    sizes: dict[str, dict[str, tuple[int, float]]] = {}
    has_dora = set()
    for name, roles in by_layer(file.tensors).items():
        place = layer(name)
        assert place, name
        if unknown := set(roles) - {*ROLES, ALPHA}:
            raise _no_room(file, name, unknown)
        sizes.setdefault(place.part, {})[place.path] = len(roles[DOWN]), float(roles[ALPHA])
        for role, theirs in ROLES.items():
            if role in roles:
                tensors[f"{place}.{theirs}"] = _magnitudes(file, name, roles) if role == "dora_scale" else roles[role]
        if "dora_scale" in roles:
            has_dora.add(place.part)
    settings = {
        f"{part}.{key}": value
        for part, layers in sizes.items()
        for key, value in _settings(layers, part in has_dora).items()
    }
    kept = {
        key: text for key, text in file.metadata.items() if not key.startswith("sshs_") and "hash_sha256" not in key
    }
    return tensors, kept | {"format": "pt", ADAPTER: json.dumps(settings, indent=2, sort_keys=True)}


def _magnitudes(file: LoraFile, name: str, roles: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """DoRA's lengths as PEFT has them: [out] of a linear layer, [1, out, 1, 1] of a convolution."""
    lengths = roles["dora_scale"]
    if lengths.numel() != len(roles[UP]):
        raise _no_room(file, name, {"dora_scale of inputs"})
    return lengths.reshape(-1) if roles[DOWN].ndim == 2 else lengths.reshape(1, -1, 1, 1)


def _settings(layers: Mapping[str, tuple[int, float]], has_dora: bool) -> dict[str, Any]:
    """PEFT's settings of one part: its most frequent rank and alpha, and the layers that have others."""
    rank, alpha = (Counter(sizes).most_common(1)[0][0] for sizes in zip(*layers.values(), strict=True))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: r for path, (r, _) in layers.items() if r != rank},
        "alpha_pattern": {path: a for path, (_, a) in layers.items() if a != alpha},
        "target_modules": sorted(layers),
        "use_dora": has_dora,
    }


def _no_room(file: LoraFile, name: str, what: set[str]) -> ModelError:
    return ModelError(
        f'"{shown(file.about.path)}" cannot be named as diffusers does: {name} has {" and ".join(sorted(what))}, '
        "and diffusers knows only up and down matrices.",
        "Use it under kohya's names, or merge it into its checkpoint.",
    )
