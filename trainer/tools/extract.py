"""A LoRA from the difference of two checkpoints: the best approximation of W' − W of a rank, layer by layer."""

from __future__ import annotations

import torch

from trainer.errors import ModelError
from trainer.lora.names import Layer, kohya
from trainer.tools import Report, Tell
from trainer.tools.base import Base, open_base
from trainer.tools.commands import Extract
from trainer.tools.lora_file import ALPHA, DOWN, UP, Roles, precision_of, ranks_told, save_layers, spec, written
from trainer.tools.low_rank import as_layers, decompose, factors, kept_norm

ATTENTION = (".attentions.", ".self_attn.", ".mlp.")
CONVOLUTIONS = (".resnets.", ".downsamplers.", ".upsamplers.")


def run(options: Extract, tell: Tell) -> Report:
    """Extract. Raises ModelError where the two are of different families or do not differ."""
    with open_base(options.original) as original, open_base(options.tuned) as tuned:
        if original.family != tuned.family:
            raise ModelError(
                f'"{original.path}" is {original.family.what}, "{tuned.path}" is {tuned.family.what}.',
                "Only checkpoints of one family can be compared.",
            )
        out = written(options.output, [original.path, tuned.path])
        notes = []
        places = _layers(tuned, "unet", (*ATTENTION, *(CONVOLUTIONS if options.conv_rank else ())))
        if options.text_encoder:
            texts = [place for encoder in tuned.family.encoders for place in _layers(tuned, encoder.part, ATTENTION)]
            largest = 0.0
            for i, place in enumerate(texts, 1):
                tell("comparing the text encoder", i, len(texts))
                largest = max(largest, float(_difference(original, tuned, place).abs().max()))
            if largest > options.min_diff:
                places = [*texts, *places]
            else:
                notes.append(
                    f"The text encoder differs by {largest:.2g} at most, which is not more than "
                    f"{options.min_diff:g} (Least difference), so it was left out."
                )
        layers: dict[str, Roles] = {}
        rows = []
        for i, place in enumerate(places, 1):
            tell("extracting", i, len(places))
            difference = _difference(original, tuned, place)
            if not difference.any():
                continue
            large = difference.shape[2:] not in ((), (1, 1))
            rank = min((large and options.conv_rank) or options.rank, *difference.shape[:2])
            parts = decompose(difference.flatten(1))
            up, down = as_layers(*factors(parts, rank), difference.shape)
            name = kohya(place, original.family.name)
            layers[name] = {UP: up, DOWN: down, ALPHA: torch.tensor(float(rank))}
            rows.append((name, f"{rank}", f"{kept_norm(parts.values, rank):.1%}", f"{difference.abs().max():.2g}"))
        if not layers:
            raise ModelError(
                f'"{original.path}" and "{tuned.path}" do not differ in the layers that are extracted.',
                "Choose two different checkpoints; give a rank of 3×3 convolutions if only those were trained.",
            )
        if len(layers) < len(places):
            notes.append(f"{len(places) - len(layers)} layers are the same in both and were left out.")
        stored = [info for file in tuned.files.values() for info in file.header.tensors.values()]
        metadata = {
            **original.family.entries(tuned.prediction),
            "ss_network_module": "networks.lora",
            "ss_network_args": "{}",
            **ranks_told(layers),
            **spec(original.family, tuned.prediction, out.stem, [], is_lora=True),
        }
        told_of_file = save_layers(out, layers, precision_of(options.precision, stored), metadata)
    return Report(
        [f"{len(layers)} layers, of rank {options.rank} where their size allows it.", told_of_file],
        path=str(out),
        columns=("Layer", "Rank", "Norm kept", "Largest difference"),
        rows=rows,
        warnings=notes,
    )


def _layers(base: Base, part: str, kinds: tuple[str, ...]) -> list[Layer]:
    """The matrices and convolutions of a part whose names hold one of `kinds`."""
    return [
        place
        for (place, kind), at in base.places.items()
        if place.part == part
        and kind == "weight"
        and any(word in place.path for word in kinds)
        and len(base.files[at.file].header.tensors[at.tensor].shape) > 1
    ]


def _difference(original: Base, tuned: Base, place: Layer) -> torch.Tensor:
    """W' − W, float32. Raises ModelError where the two are not of one shape."""
    before, after = original.read(place), tuned.read(place)
    if before is None or after is None or before.numel() != after.numel():
        sizes = " and ".join("missing" if one is None else str(list(one.shape)) for one in (before, after))
        raise ModelError(f"{place} is {sizes} in the two checkpoints.", "Choose two checkpoints of one family.")
    difference = after.float() - before.float().reshape(after.shape)
    if not torch.isfinite(difference).all():
        broken = tuned if torch.isfinite(before.float()).all() else original
        raise ModelError(f'"{broken.path}" has values that are not numbers in {place}.', "Choose another checkpoint.")
    return difference
