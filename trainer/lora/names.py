"""The name of a layer in every naming.

    kohya       lora_unet_down_blocks_0_attentions_0_proj_in, lora_te_text_model_encoder_layers_0_mlp_fc1;
                for SDXL lora_unet_input_blocks_4_1_proj_in, lora_te1_…, lora_te2_…
    diffusers   unet.down_blocks.0.attentions.0.proj_in, text_encoder.text_model.encoder.layers.0.mlp.fc1
    original    input_blocks.1.1.proj_in (the U-Net of a checkpoint in one file)

All of these families' U-Nets have two resnets a level, of which the original names' numbers follow.
Needs no torch.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from trainer.models.facts import FAMILIES, UNCLAIMED

# Prefix in kohya's naming → part of a diffusers pipeline.
PARTS = {"lora_unet_": "unet"} | {
    f"lora_{encoder.key}_": encoder.part for family in FAMILIES.values() for encoder in family.encoders
}

# The words that diffusers', transformers' and the original names consist of, besides numbers.
_WORDS = [
    "down_blocks",
    "up_blocks",
    "mid_block",
    "attentions",
    "resnets",
    "downsamplers",
    "upsamplers",
    "transformer_blocks",
    "attn1",
    "attn2",
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "ff",
    "net",
    "proj",
    "proj_in",
    "proj_out",
    "norm",
    "norm1",
    "norm2",
    "norm3",
    "conv",
    "conv1",
    "conv2",
    "conv_in",
    "conv_out",
    "conv_norm_out",
    "conv_shortcut",
    "time_emb_proj",
    "time_embedding",
    "add_embedding",
    "linear_1",
    "linear_2",
    "text_model",
    "encoder",
    "layers",
    "self_attn",
    "q_proj",
    "k_proj",
    "v_proj",
    "out_proj",
    "mlp",
    "fc1",
    "fc2",
    "layer_norm1",
    "layer_norm2",
    "final_layer_norm",
    "embeddings",
    "token_embedding",
    "position_embedding",
    "text_projection",
    "input_blocks",
    "middle_block",
    "output_blocks",
    "in_layers",
    "out_layers",
    "emb_layers",
    "skip_connection",
    "op",
    "time_embed",
    "label_emb",
    "out",
]
_WORD = re.compile("({})(?:_|$)".format("|".join([*sorted(_WORDS, key=len, reverse=True), r"\d+"])))

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_EDGES = {
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_RESNET_BACK = {name: original for original, name in _RESNET.items()}
_EDGES_BACK = {name: original for original, name in _EDGES.items()}
_PLACE = re.compile(r"(input_blocks|middle_block|output_blocks)\.(\d+)(?:\.(\d+))?\.(.+)")
_BLOCK = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(attentions|resnets|downsamplers|upsamplers)\.(\d+)\.(.+)")


class Layer(NamedTuple):
    """A layer of a base model: `part` of a diffusers pipeline, and the layer's dotted name there."""

    part: str
    path: str

    def __str__(self) -> str:
        return f"{self.part}.{self.path}"


@lru_cache(8192)
def layer(kohya: str) -> Layer | None:
    """The layer with this name in kohya's naming (`lora_unet_mid_block_attentions_0_proj_in`); None where it is none.

    Names by the original layout, as SDXL's have it, are told as diffusers'.
    """
    prefix = next((prefix for prefix in PARTS if kohya.startswith(prefix)), "")
    path = dotted(kohya.removeprefix(prefix)) if prefix else ""
    return _layer(PARTS[prefix], path) if path else None


def _layer(part: str, path: str) -> Layer | None:
    if part != "unet":
        return Layer(part, path) if path.startswith("text_model.") or path == "text_projection" else None
    if path.startswith(("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")):
        path = from_original(path)
    known = _BLOCK.fullmatch(path) or path in _EDGES_BACK
    return Layer(part, path) if known else None


def dotted(name: str) -> str:
    """Dots in place of the underscores between words: `mid_block_resnets_0_conv1` → `mid_block.resnets.0.conv1`.

    Empty where a word is none that these models' layers have.
    """
    words, at = [], 0
    while at < len(name):
        word = _WORD.match(name, at)
        if not word:
            return ""
        words.append(word[1])
        at = word.end()
    return "" if name.endswith("_") else ".".join(words)


def from_original(path: str) -> str:
    """diffusers' name of a U-Net layer that has this original name; empty where there is none."""
    if path in _EDGES:
        return _EDGES[path]
    if not (place := _PLACE.fullmatch(path)):
        return ""
    where, number, index, rest = place[1], int(place[2]), place[3], place[4]
    if where == "middle_block":
        rest = f"{index}.{rest}" if index else rest
        kind = "attentions.0" if number == 1 else f"resnets.{number // 2}"
        return f"mid_block.{kind}.{_inner(kind, rest)}" if _inner(kind, rest) else ""
    way, stage, i = ("down", *divmod(number - 1, 3)) if where == "input_blocks" else ("up", *divmod(number, 3))
    if rest in ("op", "conv"):
        return f"{way}_blocks.{stage}.{way}samplers.0.conv"
    kind = f"attentions.{i}" if index == "1" else f"resnets.{i}"
    return f"{way}_blocks.{stage}.{kind}.{_inner(kind, rest)}" if _inner(kind, rest) else ""


def _inner(kind: str, rest: str) -> str:
    return rest if kind.startswith("attentions") else _RESNET.get(rest, "")


def to_original(path: str, attends: bool = True) -> str:
    """The original name of a U-Net layer that diffusers names `path`.

    `attends`: whether the layer's block has transformers, which an upsampler comes behind.
    """
    if path in _EDGES_BACK:
        return _EDGES_BACK[path]
    place = _BLOCK.fullmatch(path)
    assert place, path
    way, stage, kind, index, rest = place[1], int(place[2] or 0), place[3], int(place[4]), place[5]
    if way is None:
        return f"middle_block.1.{rest}" if kind == "attentions" else f"middle_block.{2 * index}.{_RESNET_BACK[rest]}"
    if kind == "downsamplers":
        return f"input_blocks.{3 * stage + 3}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{3 * stage + 2}.{2 if attends else 1}.conv"
    block = f"input_blocks.{3 * stage + index + 1}" if way == "down" else f"output_blocks.{3 * stage + index}"
    return f"{block}.1.{rest}" if kind == "attentions" else f"{block}.0.{_RESNET_BACK[rest]}"


def kohya(layer: Layer, family: str, attends: bool = True) -> str:
    """The layer's name in kohya's naming, as sd-scripts writes it for a model of the family.

    `family`: "" where the file does not tell. `attends`: as for `to_original`, which names SDXL's layers.
    """
    facts = FAMILIES[family] if family else UNCLAIMED
    if layer.part == "unet":
        path = to_original(layer.path, attends) if facts.original_names else layer.path
        return "lora_unet_" + path.replace(".", "_")
    key = next(encoder.key for encoder in facts.encoders if encoder.part == layer.part)
    return f"lora_{key}_" + layer.path.replace(".", "_")


# Names that older versions of diffusers gave to the text encoder's projections.
_OLDER_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def diffusers_layer(name: str) -> Layer | None:
    """The layer that a file of diffusers or PEFT names so (its role cut off); None where it is none.

    Met are: `unet.` and the text encoders' prefixes or (the U-Net's only) none, PEFT's `base_model.model.`,
    attention processors of older diffusers, text encoders of transformers 5, that lack `text_model.`.
    """
    name = name.removeprefix("base_model.model.").replace(".processor.", ".")
    part, dot, path = name.partition(".")
    if part not in ("unet", "text_encoder", "text_encoder_2") or not dot:
        part, path = ("text_encoder" if name.startswith(("text_model.", "encoder.layers.")) else "unet"), name
    if part == "unet":
        path = re.sub(r"\.to_out$", ".to_out.0", path)
        return _layer(part, path) if dotted(path.replace(".", "_")) == path else None
    path = path if path.startswith("text_model.") or path == "text_projection" else f"text_model.{path}"
    start, _, last = path.rpartition(".")
    path = f"{start}.{_OLDER_TEXT.get(last, last)}" if start else path
    return _layer(part, path) if dotted(path.replace(".", "_")) == path else None
