"""A LoRA at a lower rank: the same for all layers, or by a kept share of each layer's singular values."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from trainer.errors import ModelError
from trainer.lora.recognise import by_layer
from trainer.networks import weight_update
from trainer.paths import resolve
from trainer.tools import Report, Tell
from trainer.tools.commands import Resize
from trainer.tools.lora_file import (
    ALPHA,
    DOWN,
    MID,
    UP,
    Roles,
    biases_left_out,
    biases_of,
    factors,
    family_of,
    has_matrix,
    precision_of,
    ranks_told,
    read_arguments,
    require_absolute,
    save_layers,
    weight_shape,
    whole,
    without_hashes,
    written,
)
from trainer.tools.low_rank import as_layers, decompose, decompose_product, kept_norm, kept_rank
from trainer.tools.low_rank import factors as low_rank_factors


def run(options: Resize, tell: Tell) -> Report:
    """Resize. alpha / rank, a layer's strength, stays what it was, and so does what is not up and down (DoRA)."""
    kept = options.kept if options.method != "fixed" else 0.0
    source = resolve(options.lora)
    out = written(options.output, [source])
    tell("reading the LoRA", 0, 0)
    file = whole(source)
    family, _ = family_of([file])
    layers: dict[str, Roles] = {}
    rows, shares, left_out = [], [], []
    found = by_layer(file.tensors)
    for i, (name, roles) in enumerate(found.items(), 1):
        tell("resizing", i, len(found))
        if lost := biases_of(name, roles):
            left_out.append(lost)
        if not has_matrix(roles):
            continue
        is_lora = {UP, DOWN} <= set(roles)
        if not is_lora:
            require_absolute(name, roles, source)
        shape = weight_shape(name, roles, family)
        if is_lora and MID not in roles:
            up, down, scale = factors(roles)
            parts = decompose_product(up, down)
        else:
            core = {role: tensor for role, tensor in roles.items() if role != "dora_scale"}
            parts, scale = decompose(weight_update(core, torch.empty(shape, device="meta")).flatten(1)), 1.0
        most = options.rank if shape[2:] in ((), (1, 1)) else options.conv_rank or options.rank
        rank = kept_rank(parts.values, most, options.method, kept, min(shape[0], shape[1:].numel()))
        up, down = as_layers(*low_rank_factors(parts, rank), shape)
        old = len(roles[DOWN]) if is_lora else "–"
        layers[name] = {UP: up, DOWN: down, ALPHA: torch.tensor(scale * rank)}
        if "dora_scale" in roles:
            layers[name] = {**layers[name], "dora_scale": roles["dora_scale"]}
        shares.append(kept_norm(parts.values, rank))
        rows.append((name, f"{old}", f"{rank}", f"{shares[-1]:.1%}"))
    if not layers:
        raise ModelError(f'"{source}" has no layer that could be resized.', "Choose a LoRA.")
    metadata = without_hashes(file.metadata)
    olds = [len(roles[DOWN]) for roles in found.values() if DOWN in roles]
    how = f"to {options.rank}" if options.method == "fixed" else f"by {options.method} {kept:g}"
    comment = metadata.get("ss_training_comment", "")
    metadata |= {
        "ss_training_comment": f"resized from rank {max(olds, default=0) or '(another type)'} {how}; {comment}",
        "ss_network_module": "networks.lora",
        **_told(options, layers, metadata),
    }
    dtype = precision_of(options.precision, file.about.tensors.values())
    told_of_file = save_layers(out, layers, dtype, metadata)
    before, after = source.stat().st_size, out.stat().st_size
    return Report(
        [
            f"{len(layers)} layers; on average {sum(shares) / len(shares):.1%} of a layer's norm is kept, "
            f"at least {min(shares):.1%}.",
            f"{before / 1e6:.1f} MB before, {after / 1e6:.1f} MB now.",
            told_of_file,
        ],
        path=str(out),
        columns=("Layer", "Rank before", "now", "Norm kept"),
        rows=rows,
        warnings=biases_left_out(left_out),
    )


def _told(options: Resize, layers: dict[str, Roles], before: Mapping[str, str]) -> dict[str, str]:
    """Rank, alpha and whether it is DoRA, for the metadata, Dynamic wherever the method may choose another for each layer."""
    told = ranks_told(layers)
    arguments = read_arguments(told) | {key: text for key, text in read_arguments(before).items() if key == "dora_wd"}
    told |= {"ss_network_args": json.dumps(arguments)} if arguments else {}
    return told if options.method == "fixed" else {**told, "ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}
