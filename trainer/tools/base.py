"""A base model on disk: which tensor of which file holds which layer, whatever its layout."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from trainer.lora.names import Layer
from trainer.models import families, layout
from trainer.models.facts import FAMILIES, Family
from trainer.models.weights import Pickled, Safetensors, opened


@dataclass(frozen=True)
class Place:
    """Where a layer's weight or bias is: a tensor of a file, or some of its rows.

    OpenCLIP's q, k and v are thirds of one tensor.
    """

    file: Path
    tensor: str
    kind: str  # "weight" or "bias"
    third: int | None = None

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This layer's part of the tensor; a view."""
        return tensor if self.third is None else tensor.chunk(3)[self.third]


@dataclass(frozen=True)
class Base:
    """An open base model. `path`: a file, or a folder in diffusers' layout."""

    path: Path
    family: Family
    prediction: str
    files: dict[Path, Safetensors | Pickled]
    places: dict[tuple[Layer, str], Place]
    _open: ExitStack = field(repr=False)

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir()

    def read(self, layer: Layer, kind: str = "weight") -> torch.Tensor | None:
        """A layer's weight or bias, in the file's dtype; None where it has none."""
        place = self.places.get((layer, kind))
        return None if place is None else place.of(self.files[place.file].get_tensor(place.tensor))

    def in_tensor(self) -> dict[tuple[Path, str], list[tuple[Layer, Place]]]:
        """What each tensor holds."""
        found: dict[tuple[Path, str], list[tuple[Layer, Place]]] = {}
        for (layer, _), place in self.places.items():
            found.setdefault((place.file, place.tensor), []).append((layer, place))
        return found

    def __enter__(self) -> Base:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()


def open_base(text: str) -> Base:
    """Open the base model that `text` names. Raises ModelError when it is none."""
    path = families.locate(text)
    found = families.detect(path)
    family = FAMILIES[found.family]
    parts = [part for part in family.parts if part != "vae"]
    with ExitStack() as stack:
        if path.is_dir():
            paths = [file for part in family.parts for file in families.weight_files(path / part)]
        else:
            paths = [path]
        files = {file: stack.enter_context(opened(file)) for file in paths}
        places = _of_folder(path, parts, files) if path.is_dir() else _of_file(path, family, parts, files[path])
        return Base(path, family, found.prediction or "epsilon", files, places, stack.pop_all())
    raise AssertionError  # an ExitStack may swallow errors, says its type; this one does not


def _of_folder(
    path: Path, parts: list[str], files: dict[Path, Safetensors | Pickled]
) -> dict[tuple[Layer, str], Place]:
    return {
        (_layer(part, name), kind): Place(file, tensor, kind)
        for part in parts
        for file, open_file in files.items()
        if file.parent == path / part
        for tensor in open_file.header.tensors
        for name, _, kind in [tensor.rpartition(".")]
    }


def _of_file(
    path: Path, family: Family, parts: list[str], file: Safetensors | Pickled
) -> dict[tuple[Layer, str], Place]:
    configs = json.loads(file.header.metadata.get("config", "{}")) or family.configs
    places: dict[tuple[Layer, str], Place] = {}
    for part, names in layout.tables(family, configs).items():
        for tensor, ours in names.items() if part in parts else ():
            several = isinstance(ours, tuple)
            for i, full in enumerate(ours if isinstance(ours, tuple) else (ours,)):
                name, _, kind = full.rpartition(".")
                # Held transposed by OpenCLIP, and no LoRA's.
                if name != "text_projection":
                    places[_layer(part, name), kind] = Place(path, tensor, kind, i if several else None)
    return places


def _layer(part: str, name: str) -> Layer:
    """transformers names its text encoder with `text_model.` in front or without, by its version."""
    plain = part == "unet" or name.startswith("text_model.") or name == "text_projection"
    return Layer(part, name if plain else f"text_model.{name}")
