"""Several LoRAs into one: ΔW = Σ strength · ΔW of each, exactly by adding up their ranks or to a rank by SVD."""

from __future__ import annotations

import torch

from trainer.errors import ModelError
from trainer.lora.recognise import by_layer
from trainer.models.facts import Family
from trainer.networks import weight_update
from trainer.tools import Report, Tell
from trainer.tools.commands import MergeLoras
from trainer.tools.lora_file import (
    ALPHA,
    DOWN,
    UP,
    Roles,
    biases_left_out,
    biases_of,
    factors,
    family_of,
    has_matrix,
    plain,
    precision_of,
    ranks_told,
    require_absolute,
    save_layers,
    spec,
    weight_shape,
    whole,
    written,
)
from trainer.tools.low_rank import as_layers, decompose, decompose_product
from trainer.tools.low_rank import factors as low_rank_factors

Terms = list[tuple[Roles, float]]


def run(options: MergeLoras, tell: Tell) -> Report:
    """Merge LoRAs. Raises ModelError where they are of two families or cannot be added."""
    pairs = options.pairs()
    out = written(options.output, [path for path, _ in pairs])
    tell("reading the LoRAs", 0, 0)
    files = [whole(path) for path, _ in pairs]
    family, prediction = family_of(files)
    terms: dict[str, Terms] = {}
    left_out: list[str] = []
    for file, (path, strength) in zip(files, pairs, strict=True):
        for name, roles in by_layer(file.tensors).items():
            require_absolute(name, roles, path)
            if options.rank is None and not plain(roles):
                raise ModelError(
                    f'"{path}" is not of up and down matrices ({name} has {", ".join(sorted(roles))}), '
                    "so it cannot be joined exactly.",
                    "Give a rank: then the best LoRA of that rank is computed.",
                )
            if has_matrix(roles):
                terms.setdefault(name, []).append((roles, strength))
            if lost := biases_of(name, roles):
                left_out.append(lost)
    layers: dict[str, Roles] = {}
    for i, (name, of_layer) in enumerate(terms.items(), 1):
        tell("merging", i, len(terms))
        layers[name] = (
            joined(name, of_layer, family) if options.rank is None else _fitted(name, of_layer, family, options)
        )
    dtype = precision_of(options.precision, files[0].about.tensors.values())
    metadata = {
        **(family.entries(prediction) if family else {}),
        "ss_network_module": "networks.lora",
        **ranks_told(layers),
        **spec(family, prediction, out.stem, [path for path, _ in pairs], is_lora=True),
    }
    told_of_file = save_layers(out, layers, dtype, metadata)
    ranks = sorted({len(roles[DOWN]) for roles in layers.values()})
    told = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return Report(
        [f"{len(files)} LoRAs, {len(layers)} layers of rank {told}.", told_of_file],
        path=str(out),
        warnings=biases_left_out(left_out),
    )


def joined(name: str, terms: Terms, family: Family | None = None) -> Roles:
    """The exact sum of up · down layers: their ups beside, their downs below each other; alpha is the rank.

    Each term's factor is shared out between its up and its down, so that neither grows too large for fp16.
    """
    shape = _one_shape(name, terms, family)
    ups, downs = [], []
    for roles, strength in terms:
        up, down, scale = factors(roles)
        factor = scale * strength
        ups.append(up * abs(factor) ** 0.5 * (-1 if factor < 0 else 1))
        downs.append(down * abs(factor) ** 0.5)
    up, down = as_layers(torch.cat(ups, 1), torch.cat(downs), shape)
    return {UP: up, DOWN: down, ALPHA: torch.tensor(float(len(down)))}


def _fitted(name: str, terms: Terms, family: Family | None, options: MergeLoras) -> Roles:
    """The nearest layer of the wanted rank; alpha is the rank."""
    shape = _one_shape(name, terms, family)
    assert options.rank is not None
    rank = options.rank if shape[2:] in ((), (1, 1)) else options.conv_rank or options.rank
    if all(plain(roles) for roles, _ in terms):
        exact = joined(name, terms, family)
        parts = decompose_product(exact[UP].flatten(1), exact[DOWN].flatten(1))
    else:
        empty = torch.empty(shape, device="meta")
        parts = decompose(sum(weight_update(roles, empty) * strength for roles, strength in terms).flatten(1))
    up, down = low_rank_factors(parts, min(rank, len(parts.values)))
    up, down = as_layers(up, down, shape)
    return {UP: up, DOWN: down, ALPHA: torch.tensor(float(len(down)))}


def _one_shape(name: str, terms: Terms, family: Family | None) -> torch.Size:
    """The shape of the weight that all terms are an update of. Raises ModelError where they differ."""
    shapes = {weight_shape(name, roles, family) for roles, _ in terms}
    if len({(shape[0], shape[1:].numel()) for shape in shapes}) > 1:
        raise ModelError(
            f"{name} is of different sizes in these LoRAs: {' and '.join(str(list(shape)) for shape in shapes)}.",
            "Only LoRAs for base models of one size can become one.",
        )
    return max(shapes, key=len)
