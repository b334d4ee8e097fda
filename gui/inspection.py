"""What only a look at the pixels tells of a data set: damage, transparency, turned pictures, near-duplicates."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from trainer.check import settings
from trainer.data import folders, images
from trainer.data.buckets import Placement
from trainer.errors import DataError, Problem
from trainer.schema import problem_with

PATIENCE_S = 2.0
SMALL = Placement((9, 8), (9, 8), (0, 0))
MOST_BITS = 4
"""Of 64: two pictures whose differences between neighbours (dHash) differ in no more are alike."""

MOST_DIFFERENCE = 12.0
"""Of 255, the mean over the small pictures: tells flat pictures of different colours apart."""


@dataclass(frozen=True)
class Look:
    """What one image showed; `small` is it at 9×8, uint8 RGB [8, 9, 3], None where it is damaged."""

    damage: str
    turned: bool
    transparent: bool
    small: np.ndarray | None


def inspect(values: Mapping[str, Any], patience_s: float = PATIENCE_S) -> dict[str, Any]:
    """Look at the images for a while: how many of how many are done, and when all are, what is wrong.

    What was seen is remembered, so that asking again goes on where it stopped.
    """
    config, _ = settings(values)
    survey = folders.survey(config.folders, config.captions, decode=False)
    pictures, unreadable = survey.dataset.pictures, survey.unreadable
    total = len(pictures) + len(unreadable)
    until = time.monotonic() + patience_s
    looks: dict[str, Look] = {}
    for picture in pictures:
        if looks and time.monotonic() > until:
            return {"done": len(looks), "total": total, "problems": []}
        stat = picture.path.stat()
        looks[f"{picture.folder}/{picture.path.name}"] = _look(picture.path, stat.st_mtime_ns, stat.st_size)
    found = _problems(looks, unreadable, config.objective.masked)
    return {"done": total, "total": total, "problems": [asdict(problem) for problem in found]}


@lru_cache(20_000)
def _look(path: Path, changed_ns: int, size: int) -> Look:
    # The two numbers are there for the cache: a file that was changed is looked at anew.
    try:
        return Look("", images.turned(path), images.has_transparency(path), images.pixels(path, SMALL))
    except DataError as error:
        return Look(error.message.rstrip("."), False, False, None)


def _problems(looks: Mapping[str, Look], unreadable: Sequence[str], masked: bool) -> list[Problem]:
    found = []

    def tell(names: Sequence[str], message: str, severity: str = "warning") -> None:
        if names:
            listed = _listed(names, 5, ", ")
            found.append(problem_with("train_data_dir", message.format(len(names), listed), severity))

    damaged = [*unreadable, *(look.damage for look in looks.values() if look.damage)]
    tell(damaged, "Damaged ({}): {}. Replace or remove them.", "error")
    tell(
        [name for name, look in looks.items() if look.transparent and not masked],
        "Transparent in parts, which become white ({}): {}. Lay them on a background of your choice, or "
        "leave those parts out of the loss with Masked loss (masked_loss).",
    )
    tell(
        [name for name, look in looks.items() if look.turned],
        "Lying on their side, and set upright by their EXIF mark ({}): {}. If one looks wrong here, save it upright.",
    )
    groups = alike(looks)
    several = f"{sum(map(len, groups)):,} images in {len(groups):,} group{'' if len(groups) == 1 else 's'}"
    tell(
        [_listed(group, 3, " ~ ") for group in groups],
        f"Nearly the same ({several}): {{1}}. Keep one of each group, or it is learned as often as it is there.",
    )
    return found


def _listed(names: Sequence[str], most: int, between: str) -> str:
    return between.join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def alike(looks: Mapping[str, Look]) -> list[list[str]]:
    """The groups of names whose pictures are nearly the same as the group's first, by dHash and by their colours at 9×8."""
    names = [name for name, look in looks.items() if look.small is not None]
    if len(names) < 2:
        return []
    small = np.stack([looks[name].small for name in names]).astype(np.float32)  # type: ignore[misc]  [N, 8, 9, 3]
    grey = small.mean(-1)
    hashes = np.packbits((grey[:, :, 1:] > grey[:, :, :-1]).reshape(len(names), 64), axis=1).view(np.uint64)[:, 0]
    flat = small.reshape(len(names), -1)
    groups, left = [], np.arange(len(names))
    while len(left) > 1:
        first, others = left[0], left[1:]
        near = np.bitwise_count(hashes[others] ^ hashes[first]) <= MOST_BITS
        near[near] = np.abs(flat[others[near]] - flat[first]).mean(1) <= MOST_DIFFERENCE
        if near.any():
            groups.append([names[i] for i in (first, *others[near])])
        left = others[~near]
    return groups
