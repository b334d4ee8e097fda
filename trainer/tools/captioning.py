"""Models that write captions, from a folder on disk: nothing is downloaded, and no code out of the folder is run."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.errors import ModelError
from trainer.paths import absent, resolve, shown
from trainer.tools.commands import BLIP, FLORENCE, TAGGER, Caption

Captioner = Callable[[Sequence[Image.Image]], list[str]]
"""RGB images → a caption for each."""

TASKS = {"short": "<CAPTION>", "detailed": "<DETAILED_CAPTION>", "long": "<MORE_DETAILED_CAPTION>"}
KINDS = {"blip": BLIP, "florence2": FLORENCE}
"""By the type that a config.json names."""
BEAMS = 3
ONNX, TAGS = "model.onnx", "selected_tags.csv"
GENERAL, CHARACTER = "0", "4"
"""Categories in a WD14 tagger's list of tags; what rates a picture has another."""

SHORTEST_WITH_BLANKS = 4
"""Shorter tags with underscores are faces, like ^_^."""


def kind_of(folder: Path) -> str:
    """BLIP, FLORENCE or TAGGER, by the folder's own files. Raises ModelError where it is none that can be used."""
    if (folder / ONNX).is_file() or (folder / TAGS).is_file():
        return TAGGER
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("model_type", "")
    except (OSError, ValueError, AttributeError) as error:
        raise _unknown(folder, "it holds no config.json that can be read") from error
    if kind not in KINDS:
        raise _unknown(folder, f'its config.json names the type "{kind}"')
    if "auto_map" in config:
        raise ModelError(
            f'"{shown(folder)}" is a Florence-2 in its first layout, which needs program code out of its folder.',
            "Such code is never run here. Use the same model in transformers' own layout (florence-community/Florence-2-…).",
        )
    return KINDS[kind]


def load(options: Caption) -> Captioner:
    """The model in the folder. Raises ModelError for one that is not known, or damaged, or needs a missing package."""
    folder = resolve(options.model)
    kind = kind_of(folder)
    if kind == TAGGER:
        return tagger(folder, options.threshold, options.character_threshold)
    try:
        return (blip if kind == BLIP else florence)(folder, options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ModelError(
            f'The captioning model in "{shown(folder)}" cannot be loaded: {str(error).splitlines()[0]}',
            "Download all of its files anew.",
        ) from error


def _unknown(folder: Path, why: str) -> ModelError:
    if not folder.is_dir():
        return ModelError(absent(str(folder), "folder"))
    known = f"BLIP and Florence-2 in transformers' layout, and WD14 taggers ({ONNX} and {TAGS})"
    return ModelError(f'No captioning model is known in "{shown(folder)}": {why}.', f"Known are {known}.")


def _parts(kind: str, folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """Model, processor, and what the inputs are brought to."""
    import torch
    import transformers

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    quiet = {"local_files_only": True, "trust_remote_code": False}
    model = getattr(transformers, kind).from_pretrained(folder, dtype=dtype, **quiet)
    processor = transformers.AutoProcessor.from_pretrained(folder, **quiet)
    return model.to(device).eval(), processor, {"device": device, "dtype": dtype}


def _most(model: Any, options: Caption) -> int:
    """The tokens asked for, or fewer where the model has no more places, of which begin and end take two."""
    return min(options.max_tokens, int(model.config.text_config.max_position_embeddings) - 2)


def blip(folder: Path, options: Caption) -> Captioner:
    """BLIP (Li et al. 2022): one short sentence."""
    import torch

    model, processor, place = _parts("BlipForConditionalGeneration", folder)
    begin = model.config.text_config.bos_token_id

    @torch.inference_mode()
    def describe(images: Sequence[Image.Image]) -> list[str]:
        inputs = processor(images=list(images), return_tensors="pt").to(**place)
        rows = model.generate(**inputs, max_new_tokens=_most(model, options), num_beams=BEAMS, do_sample=False)
        rows = [[token for token in row if token != begin] for row in rows.tolist()]
        return [text.strip() for text in processor.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    return describe


def florence(folder: Path, options: Caption) -> Captioner:
    """Florence-2 (Xiao et al. 2023): a sentence or several."""
    import torch

    model, processor, place = _parts("Florence2ForConditionalGeneration", folder)
    task = TASKS[options.detail]

    @torch.inference_mode()
    def describe(images: Sequence[Image.Image]) -> list[str]:
        inputs = processor(images=list(images), text=[task] * len(images), return_tensors="pt").to(**place)
        rows = model.generate(**inputs, max_new_tokens=_most(model, options), num_beams=BEAMS, do_sample=False)
        return [text.strip() for text in processor.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    return describe


def tagger(folder: Path, threshold: float, character_threshold: float) -> Captioner:
    """A WD14 tagger: tags with commas between, the surest first, characters in front."""
    if find_spec("onnxruntime") is None:
        raise ModelError(
            f'"{shown(folder)}" is a tagger in ONNX form, which needs the package onnxruntime.',
            "Install it (pip install onnxruntime), or use a BLIP or Florence-2.",
        )
    import onnxruntime

    tags = _tags(folder / TAGS)
    try:
        session = onnxruntime.InferenceSession(str(folder / ONNX), providers=onnxruntime.get_available_providers())
    except Exception as error:  # its own classes, of several kinds
        raise ModelError(
            f'"{shown(folder / ONNX)}" cannot be loaded: {str(error).splitlines()[0]}', "Download it anew."
        ) from error
    (given,) = session.get_inputs()
    side = given.shape[1] if isinstance(given.shape[1], int) else 448
    least = np.array([{GENERAL: threshold, CHARACTER: character_threshold}.get(kind, 2.0) for _, kind in tags])
    characters = np.array([kind == CHARACTER for _, kind in tags])

    def describe(images: Sequence[Image.Image]) -> list[str]:
        (found,) = session.run(None, {given.name: np.stack([squared(image, side) for image in images])})
        if found.shape[1] != len(tags):
            raise ModelError(
                f"The tagger knows {found.shape[1]} tags, and {TAGS} names {len(tags)}.", "Take both from one model."
            )
        return [_joined(row, least, characters, [name for name, _ in tags]) for row in found]

    return describe


def squared(image: Image.Image, side: int) -> np.ndarray:
    """The whole image on a white square, float32 BGR 0…255 [side, side, 3], as the taggers were trained."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), "white")
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    small = square.resize((side, side), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(small, np.float32)[:, :, ::-1])


def _tags(path: Path) -> list[tuple[str, str]]:
    """Each tag's name, and its category."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [(row["name"], row["category"]) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f'"{shown(path)}" is no list of tags.', "It lies beside the tagger's model.onnx.") from error
    return [(name if len(name) < SHORTEST_WITH_BLANKS else name.replace("_", " "), kind) for name, kind in rows]


def _joined(chances: np.ndarray, least: np.ndarray, characters: np.ndarray, names: Sequence[str]) -> str:
    order = sorted(np.flatnonzero(chances >= least), key=lambda i: (not characters[i], -chances[i]))
    return ", ".join(names[i] for i in order)
