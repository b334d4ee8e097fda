"""What each batch of a run reads, from its number alone: which images, where they are cut, with which captions.

Without PyTorch, whose import takes longer than a look at what the trainer sees.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from trainer.data import captions
from trainer.data.batches import Batch as Indices
from trainer.data.batches import batches_per_epoch, epoch_batches
from trainer.data.buckets import Placement
from trainer.data.folders import Picture
from trainer.data.images import opacity, pixels, with_hue
from trainer.randomness import generator_at
from trainer.schema import Config

HUE_LIMIT = 8 / 180
"""The furthest that a hue is moved, as a share of the colour circle (sd-scripts' bound)."""


@dataclass(frozen=True)
class Read:
    """How one image is read this time: with which caption, where it is cut, how far its hues move, mirrored or not."""

    item: int
    flip: bool
    caption: str
    placement: Placement
    hue: float


class Reads:
    """The reads of a run, by the number of their batch from 0 over all epochs. `len`: the batches of an epoch."""

    def __init__(self, pictures: Sequence[Picture], placements: Sequence[Placement], config: Config, seed: int) -> None:
        self.pictures, self.placements, self.config, self.seed = pictures, placements, config, seed
        self.per_epoch = batches_per_epoch(self._buckets(), self._repeats(), config.training.batch_of_all)
        self._order = lru_cache(maxsize=2)(self._order_of)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_order"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._order = lru_cache(maxsize=2)(self._order_of)

    def __len__(self) -> int:
        return self.per_epoch

    def _buckets(self) -> list[tuple[int, int]]:
        return [placement.bucket for placement in self.placements]

    def _repeats(self) -> list[int]:
        return [picture.repeats for picture in self.pictures]

    def _order_of(self, epoch: int) -> list[Indices]:
        return epoch_batches(self._buckets(), self._repeats(), self.config.training.batch_of_all, self.seed, epoch)

    def files(self, number: int) -> list[Path]:
        """The images of a batch."""
        epoch, place = divmod(number, self.per_epoch)
        return [self.pictures[item].path for item in self._order(epoch)[place]]

    def reads(self, number: int) -> list[Read]:
        """What is drawn for each image of a batch."""
        epoch, place = divmod(number, self.per_epoch)
        found = []
        for slot, item in enumerate(self._order(epoch)[place]):
            rng = generator_at(self.seed, "item", number, slot)
            flip = self.config.data.flip and rng.random() < 0.5
            caption = captions.draw(self.pictures[item].caption, self.config.captions, rng, epoch + 1)
            found.append(Read(item, flip, caption, *self._varied(self.placements[item], rng)))
        return found

    def _varied(self, placement: Placement, rng: random.Random) -> tuple[Placement, float]:
        """Where this read cuts the image, and how far it moves the hues."""
        data = self.config.data
        if data.random_crop:
            spare = (placement.resized[0] - placement.bucket[0], placement.resized[1] - placement.bucket[1])
            placement = replace(placement, crop=(rng.randint(0, spare[0]), rng.randint(0, spare[1])))
        return placement, rng.uniform(-HUE_LIMIT, HUE_LIMIT) if data.color else 0.0

    def image(self, read: Read) -> np.ndarray:
        """The pixels that are trained, uint8 RGB [height, width, 3]. Raises DataError."""
        image = pixels(self.pictures[read.item].path, read.placement, matted=not self.config.objective.masked)
        if read.hue:
            image = with_hue(image, read.hue)
        return np.ascontiguousarray(image[:, ::-1]) if read.flip else image

    def opacity(self, read: Read) -> np.ndarray:
        """How much each place of the image counts under masked loss, 0…1 [height/8, width/8]. Raises DataError."""
        found = opacity(self.pictures[read.item].path, read.placement)
        return np.ascontiguousarray(found[:, ::-1]) if read.flip else found
