"""Networks that are trained on top of a frozen model, one file an algorithm.

An algorithm's file says which controls it uses (`USES`, read by the schema) and builds one
layer's module (`module_for`). `Network` is what they share: the walk over the model's layers,
kohya's names, attaching, reading and writing.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from trainer.errors import ModelError
from trainer.models import Target
from trainer.networks.blocks import SizeOf, uniform
from trainer.schema import algorithms
from trainer.schema.network import Network as Settings


def algorithm(label: str) -> Any:
    """A LoRA type's module. Only this one is imported: some bring libraries that take seconds."""
    return importlib.import_module(f"trainer.networks.{algorithms.MODULES[label]}")


class Network(torch.nn.Module):
    """The trained modules, by kohya's name; part of the model while attached.

    `parts` tells to which part of the model ("unet", "text_encoder") each belongs.
    """

    def __init__(self, modules: Mapping[str, torch.nn.Module], parts: Mapping[str, str], layers: Mapping[str, Any]):
        super().__init__()
        self.layers = torch.nn.ModuleDict(modules)
        self.part_of = dict(parts)
        self._frozen = dict(layers)

    def attach(self) -> None:
        """From now on the model's layers answer with their update added."""
        for name, layer in self._frozen.items():
            layer.forward = self.layers[name].forward

    def detach(self) -> None:
        """The model is the base model again."""
        for layer in self._frozen.values():
            del layer.forward

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Inside a with block every module takes part in full, as it will where the file is used."""
        self.eval()
        try:
            yield
        finally:
            self.train()

    @torch.no_grad()
    def limit_norms(self, largest: float) -> None:
        """Shrink each trained update whose norm (Frobenius, scale included) is above `largest` to it."""
        for module in self.layers.values():
            if any(p.requires_grad for p in module.parameters()):
                module.limit_norm(largest)  # type: ignore[operator]

    @contextmanager
    def strength(self, multiplier: float) -> Iterator[None]:
        """Scale the update inside a with block; 0 switches it off without a trace."""
        before = {name: module.multiplier for name, module in self.layers.items()}
        for module in self.layers.values():
            module.multiplier = multiplier  # type: ignore[assignment]
        try:
            yield
        finally:
            for name, module in self.layers.items():
                module.multiplier = before[name]

    def parameters_of(self, part: str) -> list[torch.nn.Parameter]:
        """The trained tensors that belong to one part of the model."""
        return [p for name, module in self.layers.items() if self.part_of[name] == part for p in module.parameters()]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the LoRA file holds: kohya's names → tensors, on their device, as trained."""
        return {
            f"{name}.{key}": tensor.detach()
            for name, module in self.layers.items()
            for key, tensor in module.saved().items()
        }

    def read(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over a LoRA file's weights. Raises ModelError where the two do not fit."""
        own = self.tensors()
        missing = sorted(set(own) - set(tensors))
        extra = sorted(set(tensors) - set(own))
        if missing or extra:
            raise ModelError(
                f"LoRA network weights: {len(missing)} tensors of this network are not in the file"
                f"{f' (the first: {missing[0]})' if missing else ''}, and {len(extra)} of the file have no place here"
                f"{f' (the first: {extra[0]})' if extra else ''}.",
                "The file was made with other settings: choose its LoRA type, and train the same parts (U-Net, "
                "text encoder) and blocks as it holds.",
            )
        for name, tensor in tensors.items():
            if own[name].shape != tensor.shape:
                raise ModelError(
                    f"LoRA network weights: {name} has the shape {list(tensor.shape)}, "
                    f"this network has {list(own[name].shape)}.",
                    "Set Network Rank to the file's, or tick DIM from weights.",
                )
        for name, module in self.layers.items():
            module.take({key: tensors[f"{name}.{key}"] for key in module.saved()})  # type: ignore[operator]


def build(settings: Settings, targets: Mapping[str, Target], parts: set[str], size_of: SizeOf | None = None) -> Network:
    """A network on the target layers (by kohya's name) of the wanted parts.

    `size_of` tells rank and alpha of each layer; without it, all of attention has the network's.
    """
    size_of = size_of or uniform(settings.rank, settings.alpha)
    make = algorithm(settings.type).module_for
    modules: dict[str, torch.nn.Module] = {}
    for name, target in targets.items():
        rank, alpha = size_of(name, target) if target.part in parts else (0, 0)
        if rank:
            modules[name] = make(target.layer, rank, alpha or rank, settings)
    return Network(modules, {n: targets[n].part for n in modules}, {n: targets[n].layer for n in modules})
