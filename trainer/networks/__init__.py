"""Networks that are trained on top of a frozen model, one file an algorithm.

An algorithm's file (its row is in trainer/schema/algorithms.py) has

    module_for(layer, rank, alpha, settings)    one layer's trained module
    weight_update(tensors, weight)              ΔW by the algorithm's formula, from a file's tensors of a layer

`Network` is what they share: the walk over the model's layers, kohya's names, attaching, reading and
writing. Files are used without any model by

    weight_update(tensors: Mapping[str, Tensor], weight: Tensor) -> Tensor
    bias_update(tensors: Mapping[str, Tensor]) -> Tensor | None

which know all types: what is to be added to a layer's weight and bias for the file's full strength.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from trainer.errors import ModelError
from trainer.models import Target
from trainer.networks import casting
from trainer.networks.blocks import SIGNS, SizeOf, is_norm, uniform
from trainer.networks.lycoris_layers import decomposed
from trainer.schema import PARAMETERS, algorithms
from trainer.schema.network import Network as Settings


def algorithm(label: str) -> Any:
    """A LoRA type's module."""
    return _module(algorithms.TYPES[label].module)


def _module(name: str) -> Any:
    """Only this one is imported: some bring libraries that take seconds."""
    return importlib.import_module(f"trainer.networks.{name}")


def weight_update(tensors: Mapping[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """ΔW of one layer, float32, of `weight`'s shape: what the layer's tensors in a LoRA file add to its weight.

    `tensors`: by kohya's names without the layer's ("lora_down.weight", "alpha", "hada_w1_a", "w_norm", …).
    `weight`: the base model's, [out, in] or [out, in, k, k], or [channels] of a norm layer. Up and down matrices, LoHa, LoKr and native
    fine-tuning look at its shape alone, so that an empty tensor on the meta device will do; iA3, GLoRA,
    the rotations and DoRA need its values. Raises ModelError for tensors of no known type.
    """
    label = algorithms.type_of({name: tensor.ndim for name, tensor in tensors.items()})
    if not label and "w_norm" not in tensors:
        raise ModelError(
            f"These tensors of a layer are of no LoRA type that is known here: {', '.join(sorted(tensors))}.",
            f"Known are {', '.join(algorithms.TYPES)}.",
        )
    values = {name: tensor.float() for name, tensor in tensors.items()}
    update = _module(algorithms.TYPES[label].module if label else "norm").weight_update(values, weight)
    if "dora_scale" in values:
        frozen = weight.float()
        update = decomposed(frozen + update, values["dora_scale"]) - frozen
    return update  # type: ignore[no-any-return]


def bias_update(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """What the layer's tensors in a LoRA file add to its bias, float32; None for nothing."""
    return next((tensors[name].float() for name in ("diff_b", "b_norm") if name in tensors), None)


class Network(torch.nn.Module):
    """The trained modules, by kohya's name; part of the model while attached.

    `parts` tells to which part of the model ("unet", "text_encoder") each belongs.
    """

    def __init__(self, modules: Mapping[str, torch.nn.Module], parts: Mapping[str, str], layers: Mapping[str, Any]):
        super().__init__()
        self.layers = torch.nn.ModuleDict(modules)
        self.part_of = dict(parts)
        self._frozen = dict(layers)
        self._drawing = [module for module in modules.values() if hasattr(module, "draw")]
        self._castable = [module for module in modules.values() if casting.serves(module)]

    @cached_property
    def weights(self) -> list[torch.nn.Parameter]:
        """All parameters, gathered once: a step asks for them, and to go through all modules takes a millisecond."""
        return list(self.parameters())

    def attach(self) -> None:
        """From now on the model's layers answer with their update added."""
        for name, layer in self._frozen.items():
            layer.forward = self.layers[name].forward

    def detach(self) -> None:
        """The model is the base model again."""
        for layer in self._frozen.values():
            del layer.forward

    @property
    def draws(self) -> bool:
        """Whether a step trains one unit of ranks, and the next another."""
        return bool(self._drawing)

    def draw(self, share: float) -> None:
        """Choose the unit of ranks for the next step by a number of 0 ≤ share < 1, in the types that train one at a time."""
        for module in self._drawing:
            module.draw(share)

    @contextmanager
    def cast(self, dtype: torch.dtype) -> Iterator[None]:
        """Around a forward pass and its backward: the layers whose type allows it take part in `dtype`, cast together."""
        with casting.cast([layer for layer in self._castable if layer.lora_up.weight.dtype != dtype], dtype):
            yield

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
                "text encoder) and blocks as it holds; "
                f"{_told_by(missing + extra)}or let DIM from weights (dim_from_weights) take them from the file.",
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


def _told_by(names: Iterable[str]) -> str:
    """The controls that explain tensors which are only in one of two networks, in words."""
    roles = {name.partition(".")[2] for name in names}
    fields = [field for field, signs in SIGNS.items() if signs & roles]
    controls = [p for p in PARAMETERS.values() if p.group == "network" and p.name in fields]
    if not controls:
        return ""
    return f"here {', '.join(f'{p.label} ({p.key})' for p in controls)} makes the difference: set it as it was, "


def build(settings: Settings, targets: Mapping[str, Target], parts: set[str], size_of: SizeOf | None = None) -> Network:
    """A network on the target layers (by kohya's name) of the wanted parts.

    `size_of` tells rank and alpha of each layer; without it, all of attention has the network's.
    """
    size_of = size_of or uniform(settings.rank, settings.alpha)
    modules: dict[str, torch.nn.Module] = {}
    for name, target in targets.items():
        rank, alpha = size_of(name, target) if target.part in parts else (0, 0)
        if rank:
            kind = "norm" if is_norm(target.layer) else algorithms.TYPES[settings.type].module
            modules[name] = _module(kind).module_for(target.layer, rank, alpha or rank, settings)
    return Network(modules, {n: targets[n].part for n in modules}, {n: targets[n].layer for n in modules})
