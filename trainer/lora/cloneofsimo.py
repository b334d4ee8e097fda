"""The files of cloneofsimo's `lora`: pairs of matrices without names, in the order of the model's layers.

`unet:0:up`, `unet:0:down`, `unet:1:up`, … and `text_encoder:0:up`, …; the metadata has, for each part,
a JSON list of the classes whose layers were trained. The order is that of the modules of diffusers and
transformers at the time (https://github.com/cloneofsimo/lora, 2022 and 2023): the U-Net's middle comes
last, the feed-forward's first layer between the two attentions (behind them in later files), the text
encoder's keys before its values and queries. The scale is in the up matrices.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import ModelError
from trainer.lora.names import Layer
from trainer.lora.recognise import DOWN, EMBEDDING, UP, Place
from trainer.paths import shown
from trainer.tensorfile import Header

UNET_CLASSES = {"CrossAttention", "Attention", "GEGLU"}
TEXT_CLASSES = {"CLIPAttention"}
# The blocks of SD 1.x's and 2.x's U-Nets that have transformers, and how many.
ATTENDING = [*(f"down_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2))]
ATTENDING += [*(f"up_blocks.{i}.attentions.{j}" for i in range(1, 4) for j in range(3)), "mid_block.attentions.0"]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def places(path: Path, head: Header) -> tuple[dict[str, Place], list[str]]:
    """Where each tensor belongs, and what is to be said of the file.

    Raises ModelError where other classes were trained, or the layers are not as many as those models have.
    """
    words = [name for name in head.tensors if head.metadata.get(name) == EMBEDDING]
    found: dict[str, Place] = {}
    for part, classes, expected in (
        ("unet", UNET_CLASSES, list(_unet_layers(feed_forward_last=_feed_forward_last(head)))),
        ("text_encoder", TEXT_CLASSES, None),
    ):
        count = sum(name.startswith(f"{part}:") and name.endswith(":down") for name in head.tensors)
        if not count:
            continue
        trained = _classes(path, head.metadata.get(part, ""))
        layers = list(_text_layers(count // 4)) if expected is None else expected
        if not trained or trained - classes or count != len(layers):
            raise ModelError(
                f'"{shown(path)}" is a LoRA of cloneofsimo\'s with {count} layers of {part} '
                f"({', '.join(sorted(trained)) or 'classes not told'}); read are those with {len(layers)} of "
                f"{', '.join(sorted(classes))}.",
                "Convert it with that program (lora_add, or its merge into a checkpoint).",
            )
        for i, place in enumerate(layers):
            found[f"{part}:{i}:up"] = Place(Layer(part, place), UP)
            found[f"{part}:{i}:down"] = Place(Layer(part, place), DOWN)
    odd = sorted(set(head.tensors) ^ (set(found) | set(words)))
    if odd:
        raise ModelError(
            f'"{shown(path)}" is an incomplete LoRA of cloneofsimo\'s: {odd[0]} is missing or out of place.',
            "Fetch it again.",
        )
    notes = ["The layers are told by their order (cloneofsimo's files name none)."]
    if words:
        notes.append(f"The embeddings of new words ({', '.join(words)}) have no place in a LoRA file and are left out.")
    return found, notes


def _classes(path: Path, text: str) -> set[str]:
    """The classes that the metadata lists. Raises ModelError where it is no list of names."""
    try:
        return {str(name) for name in json.loads(text or "[]")}
    except (ValueError, TypeError) as error:
        raise ModelError(f'"{shown(path)}" is damaged: its list of classes is not JSON.', "Fetch it again.") from error


def _feed_forward_last(head: Header) -> bool:
    """Whether the feed-forward comes behind both attentions, as in diffusers since 2023: its first layer is the wide one."""
    fifth, ninth = (head.tensors.get(f"unet:{i}:up") for i in (4, 8))
    return bool(fifth and ninth and fifth.shape[:1] < ninth.shape[:1])


def _unet_layers(feed_forward_last: bool) -> Iterator[str]:
    for place in ATTENDING:
        block = f"{place}.transformer_blocks.0"
        first, second = ([f"{block}.{attention}.{name}" for name in ATTENTION] for attention in ("attn1", "attn2"))
        wide = f"{block}.ff.net.0.proj"
        yield from [*first, *second, wide] if feed_forward_last else [*first, wide, *second]


def _text_layers(count: int) -> Iterator[str]:
    for i in range(count):
        block = f"text_model.encoder.layers.{i}.self_attn"
        yield from (f"{block}.{name}" for name in ("k_proj", "v_proj", "q_proj", "out_proj"))
