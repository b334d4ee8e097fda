"""What becomes of a caption each time it is read, what its brackets weigh, and which tags a data set holds."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

from trainer.schema.data import Captions

if TYPE_CHECKING:
    from trainer.data.folders import Dataset

# What a weighted caption is made of: an escaped character, a backslash alone, an opening bracket,
# a closing one with or without a weight, and text. A number that is none (1.2.3) stays text.
_PIECE = re.compile(
    r"\\[\\()\[\]]|\\|[(\[]|:\s*(?P<weight>[+-]?(?:\d{1,6}(?:\.\d*)?|\.\d+))\s*\)|[)\]]|[^\\()\[\]:]+|:"
)
_STEP = {"(": 1.1, "[": 1 / 1.1}


def draw(caption: str | None, settings: Captions, rng: random.Random, epoch: int) -> str:
    """The text to train with at one read: shuffled, or dropped (""), as the settings say.

    `epoch` counts from 1. The same state of `rng` gives the same text.
    """
    every = settings.dropout_every_n_epochs
    dropped = settings.dropout_rate > 0 and rng.random() < settings.dropout_rate
    if not caption or dropped or (every and epoch % every == 0):
        return ""
    if not settings.shuffle:
        return caption
    whole = split_outside_brackets(caption) if settings.weighted else caption.split(",")
    parts = [part.strip() for part in whole]
    kept, rest = parts[: settings.keep_tokens], parts[settings.keep_tokens :]
    rng.shuffle(rest)
    return ", ".join(kept + rest)


def weigh(text: str) -> list[tuple[str, float]]:
    """The runs of a text with the weight that its brackets give each, as the WebUI reads them.

    (x) weighs 1.1, (x:1.5) 1.5, [x] 1/1.1; nested weights multiply. A backslash makes a bracket
    plain text. A bracket that is never closed reaches to the end; one that was never opened is text.
    """
    runs: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, factor: float) -> None:
        runs[start:] = [(run, weight * factor) for run, weight in runs[start:]]

    for piece in _PIECE.finditer(text):
        found, weight = piece.group(), piece.group("weight")
        if found in opened:
            opened[found].append(len(runs))
        elif found.endswith((")", "]")) and found[0] != "\\" and opened[kind := "(" if found[-1] == ")" else "["]:
            multiply(opened[kind].pop(), float(weight) if weight else _STEP[kind])
        else:
            runs.append((found.removeprefix("\\"), 1.0))
    for kind, starts in opened.items():
        for start in starts:
            multiply(start, _STEP[kind])
    return _joined(runs)


def _joined(runs: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Neighbours of one weight as one run; there is always one."""
    joined: list[tuple[str, float]] = []
    for text, weight in runs:
        if joined and joined[-1][1] == weight:
            joined[-1] = joined[-1][0] + text, weight
        else:
            joined.append((text, weight))
    return joined or [("", 1.0)]


def split_outside_brackets(text: str) -> list[str]:
    """The parts between commas, where commas inside weighting brackets do not count."""
    parts, depth = [""], {"(": 0, "[": 0}
    for piece in _PIECE.finditer(text):
        found = piece.group()
        if found in depth:
            depth[found] += 1
        elif found.endswith((")", "]")) and found[0] != "\\":
            kind = "(" if found[-1] == ")" else "["
            depth[kind] = max(0, depth[kind] - 1)
        if any(depth.values()):
            parts[-1] += found
        else:
            first, *rest = found.split(",")
            parts[-1] += first
            parts += rest
    return parts


def tag_frequency(dataset: Dataset) -> dict[str, dict[str, int]]:
    """Folder → tag → number of its images whose caption has the tag, for the file's metadata.

    Tags are lower-case, counted once for each time they stand in a caption; repeats do not count.
    """
    found: dict[str, dict[str, int]] = {}
    for picture in dataset.pictures:
        counts = found.setdefault(picture.folder, {})
        for tag in (picture.caption or "").lower().split(","):
            tag = tag.strip()
            if tag:
                counts[tag] = counts.get(tag, 0) + 1
    return found
