"""What becomes of a caption each time it is read, and which tags a data set holds."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from trainer.schema.data import Captions

if TYPE_CHECKING:
    from trainer.data.folders import Dataset


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
    parts = [part.strip() for part in caption.split(",")]
    kept, rest = parts[: settings.keep_tokens], parts[settings.keep_tokens :]
    rng.shuffle(rest)
    return ", ".join(kept + rest)


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
