"""What a LoRA file is, told from its header alone: naming, family, type, ranks, and each tensor's kohya name.

Needs no torch.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trainer.errors import ModelError
from trainer.lora.names import PARTS, Layer, diffusers_layer, kohya, layer
from trainer.models import families
from trainer.models.facts import FAMILIES, UNCLAIMED
from trainer.paths import absent, resolve, shown
from trainer.schema.algorithms import type_of
from trainer.tensorfile import Header, TensorInfo, header

Naming = Literal["kohya", "diffusers", "PEFT", "cloneofsimo"]

WIDTHS = {family.width: name for name, family in FAMILIES.items()}
DIFFUSERS_NAMED = {name for name, family in FAMILIES.items() if not family.original_names}

UP, DOWN, MID, ALPHA = "lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha"
# A layer's tensors are those of one of these; which are needed, and which may be there besides.
ROLES: tuple[tuple[set[str], set[str]], ...] = (
    ({DOWN, UP, ALPHA}, {MID, "dora_scale"}),
    ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", ALPHA}, {"hada_t1", "hada_t2", "dora_scale"}),
    *(
        (first | second | {ALPHA}, {"lokr_t2", "dora_scale"})
        for first in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
        for second in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})
    ),
    ({"a1.weight", "a2.weight", "b1.weight", "b2.weight", ALPHA}, {"dora_scale", "bm.weight"}),
    ({"weight", "on_input"}, {ALPHA}),
    ({"oft_blocks", ALPHA}, {"rescale"}),
    ({"diff"}, {"diff_b", ALPHA}),
    ({"diff_b"}, {ALPHA}),
    ({"w_norm"}, {"b_norm", ALPHA}),
)
# The tensor whose size beside the rank is that of the layer's input: its name and where the rank is.
INPUTS = {DOWN: 0, "hada_w1_b": 0, "b2.weight": 0}
ORIGINAL = re.compile(r"lora_unet_(input_blocks|middle_block|output_blocks|time_embed_|label_emb|out)_?\d")
CONVOLUTION = re.compile(r"_(conv[12]?|conv_in|conv_out)$")

# A dotted name and a role of diffusers or PEFT: `….to_q.lora_A.weight`, `….processor.to_q_lora.down.weight`,
# `….q_proj.lora_linear_layer.up.weight`, `….to_q.lora.down.weight`.
_DOTTED = re.compile(
    r"(.+?)[._]lora(?:_linear_layer)?[._](A|B|up|down|mid|magnitude_vector)(?:\.(?!weight$)\w+)?(?:\.weight)?"
)
_DOTTED_ROLES = {"A": DOWN, "down": DOWN, "B": UP, "up": UP, "mid": MID, "magnitude_vector": "dora_scale"}
ADAPTER = "lora_adapter_metadata"
EMBEDDING = "<embed>"  # cloneofsimo's mark of a tensor that is a word's embedding


class Place(NamedTuple):
    """Where a tensor belongs: the layer and its role there, as kohya names roles."""

    layer: Layer
    role: str


@dataclass(frozen=True)
class Lora:
    """A LoRA file by its header.

    `type`: the LoRA type that its names tell; "" for up and down matrices, which several types write.
    `family`: sd1, sd2, sdxl; "" where neither names nor shapes tell. `names`: the file's name of each
    tensor → kohya's. `tensors`: by kohya's name. `alphas`: by layer, where the file holds them elsewhere
    than in tensors. `notes`: what was made up for, in sentences.
    """

    path: Path
    naming: Naming
    family: str
    type: str
    names: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    alphas: Mapping[str, float]
    metadata: Mapping[str, str]
    width: int | None
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def layers(self) -> dict[str, dict[str, TensorInfo]]:
        """Kohya's name of each layer → its tensors by role."""
        return by_layer(self.tensors)

    @property
    def modules(self) -> int:
        return len(self.layers)

    @property
    def parts(self) -> frozenset[str]:
        """The parts of the model that it changes: "unet", "text_encoder"."""
        return frozenset("unet" if name.startswith("lora_unet_") else "text_encoder" for name in self.layers)

    @property
    def ranks(self) -> frozenset[int]:
        """The ranks of linear layers and 1×1 convolutions."""
        return frozenset(rank for name, rank in self._ranks.items() if name not in self._large)

    @property
    def conv_ranks(self) -> frozenset[int]:
        """The ranks of 3×3 convolutions."""
        return frozenset(rank for name, rank in self._ranks.items() if name in self._large)

    @cached_property
    def _ranks(self) -> dict[str, int]:
        return {
            name: roles[role].shape[at]
            for name, roles in self.layers.items()
            for role, at in INPUTS.items()
            if role in roles
        }

    @cached_property
    def _large(self) -> set[str]:
        return convolutions(self.layers)


def convolutions(layers: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Those of the layers (`by_layer`) that are convolutions with a kernel."""
    return {
        name
        for name, roles in layers.items()
        if CONVOLUTION.search(name)
        or any(tensor.shape[2:] == (3, 3) for role, tensor in roles.items() if role != "oft_blocks")
    }


def by_layer(tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Tensors by kohya's names → by layer, then role."""
    layers: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        place, _, role = name.partition(".")
        layers.setdefault(place, {})[role] = tensor
    return layers


def recognise(text: str | Path, missing_alpha: Literal["", "rank"] = "") -> Lora:
    """What the LoRA file of this name (as entered) is.

    `missing_alpha` "rank": take the rank for an alpha that a file of kohya's naming lacks.
    Raises ModelError, saying what is wrong with it and what to do, for a file that is missing,
    damaged, no LoRA, one for another kind of model, or malformed.
    """
    path = resolve(str(text))
    if not os.path.exists(path):  # noqa: PTH110  answers False where pathlib raises
        message = absent(str(text), "file")
        raise ModelError(message[:1].upper() + message[1:])
    head = header(path)
    naming = _naming(path, head.tensors, head.metadata)
    notes: list[str] = []
    if naming == "cloneofsimo":
        from trainer.lora.cloneofsimo import places  # here, since it needs this module

        found, notes = places(path, head)
    else:
        found = {name: _place(path, name, naming) for name in head.tensors}
    width = _width(found, head.tensors)
    family = _family(path, found, head, width)
    names = {name: f"{_kohya(name, place, family)}.{place.role}" for name, place in found.items()}
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        both = [name for name, other in names.items() if other == twice[0]]
        raise _malformed(
            path, f"{both[0]} and {both[1]} are the same tensor", "Two files' tensors were mixed; make it again."
        )
    tensors = {ours: head.tensors[name] for name, ours in names.items()}
    alphas: dict[str, float] = {}
    if naming != "kohya" or missing_alpha:
        layers = {kohya(place.layer, family): place.layer for place in found.values()}
        try:
            alphas, note = _alphas(path, head.metadata, layers, tensors)
        except (ValueError, TypeError, AttributeError, re.error) as error:
            why = f"its adapter's settings cannot be read ({error})"
            raise _malformed(path, why, "Fetch or save it again.") from error
        notes += note
    _require_whole(path, tensors, alphas)
    return Lora(
        path, naming, family, _type(by_layer(tensors)), names, tensors, alphas, head.metadata, width, tuple(notes)
    )


def _kohya(name: str, place: Place, family: str) -> str:
    """Kohya's name of a tensor's layer: the file's own, unless that is in another family's way."""
    own = name.partition(".")[0]
    facts = FAMILIES[family] if family else UNCLAIMED
    if place.layer.part == "unet":
        fits = bool(ORIGINAL.match(own)) == facts.original_names
    else:
        fits = own.startswith(tuple(f"lora_{encoder.key}_" for encoder in facts.encoders))
    return own if own.startswith(tuple(PARTS)) and fits else kohya(place.layer, family)


def _naming(path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> Naming:
    if any(name.startswith(tuple(PARTS)) for name in tensors):
        return "kohya"
    if any(re.fullmatch(r"\w+:\d+:(up|down)", name) for name in tensors):
        return "cloneofsimo"
    loras = [match for name in tensors if (match := _DOTTED.fullmatch(name))]
    if loras:
        return "PEFT" if any(match[2] in "AB" for match in loras) else "diffusers"
    what = families.other_than_a_base_model(tensors)
    what = what or ("a base model" if any(n.startswith(families.UNET) for n in tensors) else "not a LoRA")
    raise ModelError(
        f'"{shown(path)}" is {what}: its {len(tensors)} tensors are named neither as kohya\'s '
        f"(lora_unet_…) nor as diffusers' (unet.….lora_A.weight){_first(tensors)}.",
        "Choose a .safetensors LoRA file.",
    )


def _first(names: Iterable[str]) -> str:
    first = next(iter(names), "")
    return f"; the first is {first}" if first else ""


def _place(path: Path, name: str, naming: Naming) -> Place:
    """Where a tensor of this name belongs. Raises ModelError where these models have no such place."""
    if name.startswith("lora_"):
        start, _, role = name.partition(".")
        place = layer(start)
        if not place:
            raise _no_layer(path, name, start)
        if not any(role in needed | others for needed, others in ROLES):
            raise _malformed(
                path,
                f'{name}: no LoRA type that is known here has a tensor "{role}"',
                "It was made by a newer or another kind of program; convert it there to a plain LoRA.",
            )
        return Place(place, role)
    match = _DOTTED.fullmatch(name)
    start, role = (match[1], _DOTTED_ROLES[match[2]]) if match else (name.rpartition(".")[0], name.rpartition(".")[2])
    if not match and role not in (ALPHA, "dora_scale"):
        raise _malformed(
            path, f"{name} is no tensor of a LoRA", "It holds other things besides a LoRA; save the LoRA alone."
        )
    place = diffusers_layer(start)
    if not place:
        raise _no_layer(path, name, start)
    return Place(place, role)


def _no_layer(path: Path, name: str, start: str) -> ModelError:
    if doubled := re.match(r"lora_(unet|te\d?)_(unet|te\d?|text_encoder(_2)?)_|(unet)\.unet\.", start):
        return _malformed(
            path,
            f"{name} has its prefix twice ({doubled[0]}…), which no program finds a layer for",
            "It was written by a faulty conversion; convert the original again.",
        )
    if re.match(r"lora_(unet|transformer)_(double|single|joint|transformer|layers)_?|transformer\.|lora_te3_", start):
        return ModelError(
            f'"{shown(path)}" is a LoRA for a transformer model (Flux, SD 3 or the like), '
            f"by its tensor {name}; that is not supported.",
            f"Choose one for {families.TITLES}.",
        )
    return _malformed(
        path,
        f"{name}: Stable Diffusion 1.x, 2.x and SDXL have no such layer",
        "It is for another kind of model, or was damaged by a conversion.",
    )


def _malformed(path: Path, why: str, hint: str) -> ModelError:
    return ModelError(f'"{shown(path)}" is no LoRA that can be used: {why}.', hint)


def _width(found: Mapping[str, Place], tensors: Mapping[str, TensorInfo]) -> int | None:
    """How wide the text states are that the U-Net attends to; None where the file does not tell."""
    for name, (place, role) in found.items():
        shape = tensors[name].shape
        if ".attn2.to_k" in str(place) and (role in INPUTS or role == "diff") and len(shape) > 1:
            return shape[1]
    return None


def _family(path: Path, found: Mapping[str, Place], head: Header, width: int | None) -> str:
    """The family by width, by what only SDXL has, else by what the file says; "" where none tells.

    Raises ModelError where two are mixed.
    """
    tensors = head.tensors
    prefixes = {prefix for prefix in PARTS for name in found if name.startswith(prefix)}
    layers = {place.layer for place in found.values()}
    deep = any(re.search(r"transformer_blocks\.[1-9]", one.path) for one in layers)
    is_xl = deep or any(one.part == "text_encoder_2" or "add_embedding" in one.path for one in layers)
    is_xl = is_xl or (width is None and "lora_te1_" in prefixes)
    is_xl = is_xl or (WIDTHS.get(width or 0) not in DIFFUSERS_NAMED and any(map(ORIGINAL.match, found)))
    by_width = WIDTHS.get(width or 0, "")
    if width is None and not is_xl:
        by_width = next(
            (
                WIDTHS.get(tensors[name].shape[1], "")
                for name, (one, role) in found.items()
                if one.part == "text_encoder" and "self_attn" in one.path and role in INPUTS
            ),
            "",
        )
    mixed = ""
    if "lora_te_" in prefixes and ({"lora_te1_", "lora_te2_"} & prefixes or is_xl or by_width == "sdxl"):
        mixed = "lora_te_… is the text encoder of SD 1.x and 2.x, and other tensors are SDXL's"
    elif is_xl and by_width in DIFFUSERS_NAMED:
        mixed = f"some tensors are SDXL's, and its U-Net attends to text states {width} wide as {FAMILIES[by_width].title} does"
    if mixed:
        raise _malformed(path, f"it mixes model families ({mixed})", "Make it again for one family.")
    if is_xl or by_width or width:
        return "sdxl" if is_xl else by_width
    said = head.metadata.get("ss_base_model_version")
    return next((name for name, family in FAMILIES.items() if said in family.versions.values()), "")


def _alphas(
    path: Path, metadata: Mapping[str, str], layers: Mapping[str, Layer], tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, float], list[str]]:
    """Kohya's alpha of each layer that has no tensor for it, and what it was taken from.

    From the settings that diffusers and PEFT write (`lora_adapter_metadata` in the header, or
    `adapter_config.json` beside the file): lora_alpha with its exceptions by pattern, times the root of
    the rank where `use_rslora` is on. Without, these programs take the rank itself, and so does this.
    """
    missing = {
        name: one
        for name, one in layers.items()
        if f"{name}.{DOWN}" in tensors and f"{name}.{ALPHA}" not in tensors and tensors[f"{name}.{DOWN}"].shape
    }
    if not missing:
        return {}, []
    settings = _adapter_settings(path, metadata)
    alphas = {}
    for name, one in missing.items():
        rank = tensors[f"{name}.{DOWN}"].shape[0]
        given = settings.get(one.part, settings.get("", {}))
        alpha = given.get("lora_alpha", rank)
        for pattern, exception in dict(given.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", one.path):
                alpha = exception
                break
        alphas[name] = float(alpha) * (rank**0.5 if given.get("use_rslora") else 1.0)
    if settings:
        return alphas, [f"The alphas of {len(alphas)} layers come from the adapter's settings."]
    return alphas, [
        f"{len(alphas)} layers have no alpha: it is the rank (the update counts in full), as its program takes it."
    ]


def _adapter_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """PEFT's settings by part of the model; "" for any. Raises ValueError or AttributeError for what is none."""
    if ADAPTER in metadata:
        flat = json.loads(metadata[ADAPTER])
        parts: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            part, dot, name = key.partition(".")
            part, name = (part, name) if dot and part in set(PARTS.values()) else ("", key)
            parts.setdefault(part, {})[name] = value
        return parts
    beside = path.with_name("adapter_config.json")
    return {"": json.loads(beside.read_text(encoding="utf-8"))} if beside.is_file() else {}


def _type(layers: Mapping[str, Mapping[str, TensorInfo]]) -> str:
    """The LoRA type of most layers that only one type writes; "" for up and down matrices alone."""
    types = Counter(type_of({role: len(one.shape) for role, one in roles.items()}) for roles in layers.values())
    for matrices in ("", "Standard"):
        types.pop(matrices, None)
    if types:
        return types.most_common(1)[0][0]
    by_lycoris = any(MID in roles or "dora_scale" in roles for roles in layers.values())
    return "LyCORIS/LoCon" if by_lycoris else ""


def _require_whole(path: Path, tensors: Mapping[str, TensorInfo], alphas: Mapping[str, float]) -> None:
    """Raises ModelError for a layer whose tensors are incomplete or do not fit each other."""
    for name, roles in by_layer(tensors).items():
        there = set(roles) | ({ALPHA} if name in alphas else set())
        fitting = [needed for needed, others in ROLES if needed <= there <= needed | others]
        if not fitting:
            nearest = min(ROLES, key=lambda kind: (len(there - kind[0] - kind[1]), len(kind[0] - there)))
            lacking = nearest[0] - there
            if lacking == {ALPHA}:
                raise _malformed(
                    path,
                    f"{name} has no alpha, so how strong it is meant to be is not known",
                    "Most programs then take the rank. If that is meant, convert the file with --alpha rank.",
                )
            what = f"lacks {' and '.join(sorted(lacking))}" if lacking else f"has both {' and '.join(sorted(there))}"
            raise _malformed(path, f"{name} {what}", "The file is incomplete; fetch or make it again.")
        problem = _misfit(roles)
        if problem:
            raise _malformed(
                path, f"{name}: {problem}", "The file was damaged by a conversion or edit; fetch it again."
            )


def _misfit(roles: Mapping[str, TensorInfo]) -> str:
    """What does not fit between the tensors of one layer; empty where all does."""
    shapes = {role: tensor.shape for role, tensor in roles.items()}
    if ALPHA in shapes and shapes[ALPHA] not in ((), (1,)) and "oft_blocks" not in shapes:
        return f"alpha has the shape {list(shapes[ALPHA])} instead of being one number"
    if DOWN in shapes:
        up, down = shapes[UP], shapes[DOWN]
        if len(up) < 2 or len(down) < 2 or up[1] != down[0] or (MID in shapes and shapes[MID][:2] != (up[1], down[0])):
            return f"up {list(up)} and down {list(down)} share no rank"
        if 0 in up + down:
            return f"up {list(up)} or down {list(down)} is empty"
    for one, two in (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"), ("lokr_w1_a", "lokr_w1_b")):
        if one in shapes and (len(shapes[one]) != 2 or len(shapes[two]) != 2) and "hada_t1" not in shapes:
            return f"{one} {list(shapes[one])} and {two} {list(shapes[two])} are no matrices"
    if "oft_blocks" in shapes and (len(shapes["oft_blocks"]) not in (3, 4) or len(set(shapes["oft_blocks"][-2:])) > 1):
        return f"oft_blocks {list(shapes['oft_blocks'])} are no square blocks"
    return ""
