"""What other programs accept of a LoRA file in kohya's naming: which layers' names, and which tensors of a layer.

Facts found in these programs' loaders, November 2026. A layer is told by its kind, one of `KINDS`;
whether a model of a family has it at all follows from the family's configs. Needs no torch.

    A1111       AUTOMATIC1111's stable-diffusion-webui 1.10. It maps diffusers' names to the original
                ones by patterns, and takes the original ones themselves. OpenCLIP's q, k, v and out are
                one layer there: it takes all four or none.
    Forge       its loader is ComfyUI's of 2024
    ComfyUI     maps both namings of every weight of the U-Net, and the text encoders' linear layers
    diffusers   load_lora_weights of 0.42: up and down matrices, turned into PEFT's
    sd-scripts  networks.lora, and lycoris-lora's module for the types named LyCORIS
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from trainer.lora.names import Layer, kohya, layer
from trainer.lora.recognise import ALPHA, DOWN, MID, ORIGINAL, UP, Lora
from trainer.models import layout
from trainer.models.facts import FAMILIES

# Kind of layer → its name in diffusers' naming; the first that fits is its kind.
KINDS = {
    "text": r"text_encoder(_2)?\.text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])",
    "text norm": r"text_encoder(_2)?\..*norm.*",
    "text other": r"text_encoder.*",
    "attention norm": r"unet\..*attentions.*norm\d?",
    "attention": r"unet\..*attentions.*",
    "resnet norm": r"unet\..*resnets.*norm\d",
    "resnet": r"unet\..*(resnets|samplers).*",
    "last norm": r"unet\.conv_norm_out",
    "size": r"unet\.add_embedding.*",
    "edge": r"unet\..*",
}
UNET_KINDS = frozenset(kind for kind in KINDS if not kind.startswith("text"))

MATRICES = {DOWN, UP, ALPHA}
DORA = {"dora_scale"}
HADAMARD = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}
KRONECKER = {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}
GLORA = {"a1.weight", "a2.weight", "b1.weight", "b2.weight"}
IA3 = {"weight", "on_input"}
ROTATIONS = {"oft_blocks", "rescale"}
FULL = {"diff", "diff_b"}
NORMS = {"w_norm", "b_norm"}
ALMOST_ALL = MATRICES | {MID} | DORA | HADAMARD | KRONECKER | GLORA | FULL | NORMS


@dataclass(frozen=True)
class Program:
    """One program's loader.

    `kinds`, `original_kinds`: the kinds of layers that it finds by diffusers' and by the original names.
    `roles`: the tensors of a layer that it reads. `pairs`: of which the first is read beside the second only.
    `whole_attention`: whether OpenCLIP's q, k, v and out must all be there. `any_size`: whether it loads
    base models of other sizes than the family's. `namings`: which it reads; `kinds` are of kohya's.
    """

    name: str
    kinds: frozenset[str]
    original_kinds: frozenset[str]
    roles: frozenset[str]
    pairs: tuple[tuple[str, str], ...] = ()
    whole_attention: bool = False
    any_size: bool = False
    namings: tuple[str, ...] = ("kohya",)

    def refuses(self, lora: Lora) -> str:
        """Why it does not load all of a file: the layers or tensors that it passes over; empty where it does."""
        if lora.naming not in self.namings:
            return f"reads kohya's names, and these are {lora.naming}'s; convert the file"
        unknown = {role for roles in lora.layers.values() for role in roles} - self.roles
        for role, other in self.pairs:
            unknown |= {role for roles in lora.layers.values() if role in roles and other not in roles}
        if unknown:
            return f"does not know {' and '.join(sorted(unknown)[:3])}"
        if not self.any_size and not of_usual_size(lora):
            return f"has no base model whose text states are {lora.width} wide"
        missed = [name for name in lora.layers if not self._finds(name, lora.family)]
        if self.whole_attention:
            missed += self._halved(lora)
        if missed:
            return f"passes over {len(missed)} of {lora.modules} layers (the first: {missed[0]})"
        return ""

    def _finds(self, name: str, family: str) -> bool:
        return kind_of(name, family) in (self.original_kinds if ORIGINAL.match(name) else self.kinds)

    def _halved(self, lora: Lora) -> list[str]:
        """The text encoder's attention layers of OpenCLIP that have not all of their four parts in the file."""
        groups: dict[str, list[str]] = {}
        for name in lora.layers:
            if name.startswith(_open_clip(lora.family)) and (
                match := re.fullmatch(r"(.*_self_attn)_(?:q|k|v|out)_proj", name)
            ):
                groups.setdefault(match[1], []).append(name)
        return [name for group in groups.values() if len(group) < 4 for name in group]


PROGRAMS = (
    Program(
        "A1111",
        kinds=UNET_KINDS - {"last norm", "size"} | {"text", "text norm"},
        original_kinds=UNET_KINDS,
        roles=frozenset(ALMOST_ALL | IA3 | ROTATIONS),
        pairs=(("diff_b", "diff"), ("w_norm", "b_norm")),
        whole_attention=True,
    ),
    Program("Forge", UNET_KINDS | {"text"}, UNET_KINDS, frozenset(ALMOST_ALL)),
    Program("ComfyUI", UNET_KINDS | {"text"}, UNET_KINDS, frozenset(ALMOST_ALL | ROTATIONS)),
    Program(
        "diffusers",
        kinds=frozenset({"text", "attention", "resnet"}),
        original_kinds=frozenset({"attention", "resnet"}),
        roles=frozenset(MATRICES | DORA),
        any_size=True,
        namings=("kohya", "diffusers", "PEFT"),
    ),
    Program(
        "sd-scripts",
        kinds=UNET_KINDS | {"text"},
        original_kinds=UNET_KINDS,
        roles=frozenset(ALMOST_ALL | IA3 | ROTATIONS),
    ),
)


def kind_of(name: str, family: str) -> str:
    """The kind of the layer with this kohya name; "" where it is no layer."""
    found = layer(name)
    kind = next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, str(found))), "") if found else ""
    return "text other" if kind == "text norm" and name.startswith(_open_clip(family)) else kind


def _open_clip(family: str) -> tuple[str, ...]:
    """How the kohya names of a family's OpenCLIP text encoders begin."""
    encoders = FAMILIES[family].encoders if family in FAMILIES else ()
    return tuple(f"lora_{encoder.key}_" for encoder in encoders if encoder.naming == "open_clip")


def of_usual_size(lora: Lora) -> bool:
    """Whether its base model is as large as its family's are, as far as the file tells."""
    return lora.width is None or (lora.family in FAMILIES and lora.width == FAMILIES[lora.family].width)


def strangers(lora: Lora) -> list[str]:
    """The layers that no full-size model of the file's family has."""
    if not of_usual_size(lora):
        return []
    known = frozenset().union(*map(layers_of, [lora.family] if lora.family else FAMILIES))
    return [name for name in lora.layers if name not in known]


@lru_cache
def layers_of(family: str) -> frozenset[str]:
    """Kohya's name of every layer of a family's full-size model, norms and embeddings included."""
    facts = FAMILIES[family]
    names = {Layer("unet", _module(ours)) for ours in layout.unet_names(facts.configs["unet"]).values()}
    for encoder in facts.encoders:
        for i in range(facts.configs[encoder.part]["num_hidden_layers"]):
            parts = (f"self_attn.{p}_proj" for p in ("q", "k", "v", "out"))
            block = f"text_model.encoder.layers.{i}"
            names |= {Layer(encoder.part, f"{block}.{part}") for part in (*parts, "mlp.fc1", "mlp.fc2")}
            names |= {Layer(encoder.part, f"{block}.layer_norm{n}") for n in (1, 2)}
    attends = {name.path.split(".attentions.")[0] for name in names if ".attentions." in name.path}
    return frozenset(kohya(name, family, name.path.split(".upsamplers.")[0] in attends) for name in names)


def _module(tensor: object) -> str:
    return str(tensor).rpartition(".")[0]


def loading(lora: Lora) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """The programs that load all of a file, and why each of the others does not."""
    reasons = {program.name: program.refuses(lora) for program in PROGRAMS}
    return tuple(name for name, why in reasons.items() if not why), {n: why for n, why in reasons.items() if why}
