"""LoRAs into a base model: W + Σ strength · ΔW, tensor by tensor from file to file."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from trainer.errors import ModelError
from trainer.lora.names import Layer, layer
from trainer.lora.reading import LoraFile
from trainer.lora.recognise import by_layer
from trainer.models.facts import FAMILIES
from trainer.models.weights import DTYPES
from trainer.networks import bias_update, weight_update
from trainer.tools import Report, Tell
from trainer.tools.base import Base, open_base
from trainer.tools.commands import Merge
from trainer.tools.lora_file import Roles, precision_of, spec, whole, without_hashes, written
from trainer.tools.stream import cast, finish, write

Updates = Mapping[Layer, list[tuple[Roles, float]]]


def run(options: Merge, tell: Tell) -> Report:
    """Merge. Raises ModelError where a LoRA does not fit the base model."""
    pairs = options.pairs()
    tell("reading the LoRAs", 0, 0)
    files = [(whole(path), strength) for path, strength in pairs]
    with open_base(options.model) as base:
        out = written(
            options.output, [base.path, *(path for path, _ in pairs)], "" if base.is_folder else ".safetensors"
        )
        updates, strangers = _placed(base, files)
        written_metadata = spec(
            base.family, base.prediction, out.stem, [base.path, *(path for path, _ in pairs)], is_lora=False
        )
        total = sum(len(file.header.tensors) for file in base.files.values())
        done = 0

        def counted() -> None:
            nonlocal done
            done += 1
            tell("merging", done, total)

        def write_all(temporary: Path) -> None:
            if base.is_folder:
                copy_beside(base, temporary)
            for source in base.files:
                to = temporary / source.relative_to(base.path) if base.is_folder else temporary
                _write(base, source, to, updates, options.precision, written_metadata, counted)

        _, told_of_file = finish(out, write_all)
        parts = sorted({place.part for place in updates})
        warnings = (
            [f"{len(strangers)} layers of the LoRAs are not in this model, the first is {strangers[0]}."]
            if strangers
            else []
        )
        return Report(
            [f"{len(updates)} layers of {len(parts)} parts ({', '.join(parts)}) were changed.", told_of_file],
            path=str(out),
            warnings=warnings,
        )


def copy_beside(base: Base, to: Path) -> None:
    """Copy everything of a diffusers folder but the weights that are written anew."""
    replaced = {path.resolve() for path in base.files}
    weights = {".safetensors", ".bin", ".ckpt", ".msgpack", ".onnx"}

    def left_out(folder: str, names: list[str]) -> list[str]:
        paths = [Path(folder) / name for name in names]
        return [
            p.name for p in paths
            if p.resolve() in replaced or (p.suffix in weights and "safety_checker" not in p.parts) or p.name.startswith(".")
        ]  # fmt: skip

    shutil.copytree(base.path, to, ignore=left_out)


def _placed(base: Base, files: list[tuple[LoraFile, float]]) -> tuple[Updates, list[str]]:
    """What is to be added to each of the model's layers, and the names that have no place in it."""
    updates: dict[Layer, list[tuple[Roles, float]]] = {}
    strangers = []
    known = {place for place, _ in base.places}
    for file, strength in files:
        family = file.about.family
        if family and family != base.family.name:
            raise ModelError(
                f'"{file.about.path}" is a LoRA for {FAMILIES[family].title}; "{base.path}" is {base.family.what}.',
                "Choose a checkpoint of the LoRA's family.",
            )
        found = 0
        for name, roles in by_layer(file.tensors).items():
            place = layer(name)
            if place in known:
                updates.setdefault(place, []).append((roles, strength))
                found += 1
            else:
                strangers.append(name)
        if not found:
            raise ModelError(
                f'None of the layers of "{file.about.path}" is in "{base.path}".',
                "Choose a checkpoint of the family that the LoRA was trained on.",
            )
    return updates, strangers


def _write(
    base: Base, source: Path, to: Path, updates: Updates, precision: str, spec: Mapping[str, str], counted
) -> None:
    """Write one of the model's files anew."""
    file = base.files[source]
    held = base.in_tensor()

    def dtype_of(name: str) -> torch.dtype:
        info = file.header.tensors[name]
        return precision_of(precision, [info]) if DTYPES[info.dtype].is_floating_point else DTYPES[info.dtype]

    def make(name: str) -> torch.Tensor:
        tensor = file.get_tensor(name)
        for place, part in held.get((source, name), ()):
            terms = updates.get(place, ())
            tensor = tensor.float() if terms else tensor
            # Some types' updates follow from the weight: each from that of the base model, whatever was added to it.
            before = part.of(tensor).clone() if len(terms) > 1 else part.of(tensor)
            for roles, strength in terms:
                change(part.of(tensor), part.kind, roles, strength, str(place), before)
        counted()
        return cast(tensor, dtype_of(name), name)

    tensors = {name: (dtype_of(name), info.shape) for name, info in file.header.tensors.items()}
    write(to, tensors, make, {**without_hashes(file.header.metadata), **({} if base.is_folder else spec)})


def change(values: torch.Tensor, kind: str, roles: Roles, strength: float, name: str, before: torch.Tensor) -> None:
    """Add a LoRA layer's update of the weight or bias `before`, in place. Raises ModelError where the shapes differ."""
    if kind == "bias":
        update = bias_update(roles)
        if update is None:
            return
    elif set(roles) == {"diff_b"}:
        return
    else:
        try:
            update = weight_update(roles, before)
        except RuntimeError as error:
            raise _misfit(values, roles, name) from error
    if update.numel() != values.numel():
        raise _misfit(values, roles, name)
    values.add_(update.reshape(values.shape), alpha=strength)


def _misfit(values: torch.Tensor, roles: Roles, name: str) -> ModelError:
    shapes = ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in roles.items())
    return ModelError(
        f"{name}: the model's weight is {list(values.shape)}, which the LoRA's tensors do not fit ({shapes}).",
        "Choose a checkpoint of the family that the LoRA was trained on.",
    )
