"""Batches for the training step: any batch of a run can be made from its number alone."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from trainer.data import captions
from trainer.data.batches import Batch as Indices
from trainer.data.batches import batches_per_epoch, epoch_batches
from trainer.data.buckets import Placement
from trainer.data.cache import Latents, to_tensor
from trainer.data.folders import Picture
from trainer.data.images import opacity, pixels, with_hue
from trainer.errors import LorawrightError
from trainer.processes import ALONE, Place
from trainer.randomness import generator_at
from trainer.schema import Config

HUE_LIMIT = 8 / 180
"""The furthest that a hue is moved, as a share of the colour circle (sd-scripts' bound)."""


@dataclass
class Batch:
    """What one step sees. Either `latents` [B,4,h,w] or `pixels` [B,3,H,W] in −1…1 is there.

    `sizes` [B,6]: each image's height and width as it was found, top and left of its crop, height
    and width that are trained, in pixels. SDXL is told of them. `places`: which of the batch's
    images these are: all, or one process's share. `all_captions`: those of all of them.
    """

    latents: torch.Tensor | None
    pixels: torch.Tensor | None
    all_captions: list[str]
    weights: torch.Tensor
    masks: torch.Tensor | None
    sizes: torch.Tensor
    names: list[str]
    places: list[int]

    def only(self, some: torch.Tensor) -> Batch:
        """Those of its images that are at these places."""
        tensors = {name: getattr(self, name) for name in ("latents", "pixels", "weights", "masks", "sizes")}
        return Batch(
            **{name: None if tensor is None else tensor[some] for name, tensor in tensors.items()},
            all_captions=self.all_captions,
            names=[self.names[i] for i in some],
            places=[self.places[i] for i in some],
        )

    @property
    def captions(self) -> list[str]:
        return [self.all_captions[place] for place in self.places]

    @property
    def images(self) -> int:
        """How many the batch has, be they here or another process's share."""
        return len(self.all_captions)

    @property
    def is_whole(self) -> bool:
        """Whether all of its images are here, and not one process's share."""
        return len(self.places) == self.images


@dataclass(frozen=True)
class Read:
    """How one image is read this time: with which caption, where it is cut, how far its hues move, mirrored or not."""

    item: int
    flip: bool
    caption: str
    placement: Placement
    hue: float


class Feed(Dataset[Batch]):
    """The batches of a run, by number from 0 over all epochs."""

    def __init__(
        self,
        pictures: Sequence[Picture],
        placements: Sequence[Placement],
        config: Config,
        seed: int,
        latents: Sequence[Latents] | None = None,
        place: Place = ALONE,
    ) -> None:
        self.pictures, self.placements, self.latents = pictures, placements, latents
        self.config, self.seed, self.place = config, seed, place
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

    def __getitem__(self, number: int) -> Batch:
        """This process's share of a batch. Where it has none, the batch's first image stands in and counts for nothing."""
        every = self.reads(number)
        share = self.place.share(len(every))
        places = list(share) or [0]
        reads = [every[i] for i in places]
        read_from = [self.pictures[read.item] for read in reads]
        prior = self.config.training.prior_loss_weight
        return Batch(
            latents=self._cached(reads) if self.latents is not None else None,
            pixels=to_tensor([self.image(read) for read in reads]) if self.latents is None else None,
            all_captions=[read.caption for read in every],
            masks=torch.stack([self.mask(read) for read in reads]) if self.config.objective.masked else None,
            weights=torch.tensor([prior if picture.regularisation else 1.0 for picture in read_from]) * bool(share),
            sizes=torch.tensor([self._sizes(read) for read in reads], dtype=torch.float32),
            names=[picture.path.name for picture in read_from],
            places=places,
        )

    def _varied(self, placement: Placement, rng: random.Random) -> tuple[Placement, float]:
        """Where this read cuts the image, and how far it moves the hues."""
        data = self.config.data
        if data.random_crop:
            spare = (placement.resized[0] - placement.bucket[0], placement.resized[1] - placement.bucket[1])
            placement = replace(placement, crop=(rng.randint(0, spare[0]), rng.randint(0, spare[1])))
        return placement, rng.uniform(-HUE_LIMIT, HUE_LIMIT) if data.color else 0.0

    def _sizes(self, read: Read) -> tuple[int, ...]:
        width, height = size = self.pictures[read.item].size
        left, top = read.placement.told_crop(size, flipped=read.flip)
        return height, width, top, left, read.placement.bucket[1], read.placement.bucket[0]

    def _cached(self, reads: Sequence[Read]) -> torch.Tensor:
        assert self.latents is not None
        chosen = []
        for read in reads:
            entry = self.latents[read.item]
            chosen.append(entry.flipped if read.flip and entry.flipped is not None else entry.plain)
        return torch.stack(chosen).float()

    def image(self, read: Read) -> np.ndarray:
        """The pixels that are trained, uint8 RGB [height, width, 3]."""
        image = pixels(self.pictures[read.item].path, read.placement, matted=not self.config.objective.masked)
        if read.hue:
            image = with_hue(image, read.hue)
        return np.ascontiguousarray(image[:, ::-1]) if read.flip else image

    def workers(self) -> int:
        """How many processes read images: as many as are set, at most one for each of the machine's threads."""
        return min(self.config.data.workers, os.cpu_count() or 1) if self.latents is None else 0

    def _spans(self, numbers: range) -> list[range]:
        """The stretches that one set of worker processes serves: all, or one epoch each."""
        if self.config.data.persistent_workers or not numbers:
            return [numbers]
        borders = range(numbers[0] // self.per_epoch, numbers[-1] // self.per_epoch + 1)
        return [
            range(max(numbers.start, e * self.per_epoch), min(numbers.stop, (e + 1) * self.per_epoch)) for e in borders
        ]

    def mask(self, read: Read) -> torch.Tensor:
        """How much each place of the image counts, [h,w]."""
        cached = self.latents[read.item].mask if self.latents is not None else None
        if cached is None:
            cached = torch.from_numpy(opacity(self.pictures[read.item].path, read.placement))
        return cached.flip(-1) if read.flip else cached

    def batches(self, numbers: range) -> Iterator[Batch]:
        """The batches with these numbers, made ahead: by worker processes, or one ahead by a thread."""
        workers = self.workers()
        if workers:
            for span in self._spans(numbers):
                for answer in DataLoader(_Answers(self), batch_size=None, sampler=span, num_workers=workers):
                    if isinstance(answer, LorawrightError):
                        raise answer
                    yield answer
            return
        with ThreadPoolExecutor(1) as pool:
            waiting = None
            for number in numbers:
                coming = pool.submit(self.__getitem__, number)
                if waiting is not None:
                    yield waiting.result()
                waiting = coming
            if waiting is not None:
                yield waiting.result()


class _Answers(Dataset["Batch | LorawrightError"]):
    """A feed for worker processes: torch would bring an error home as one text with a traceback in it."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed

    def __getitem__(self, number: int) -> Batch | LorawrightError:
        try:
            return self.feed[number]
        except LorawrightError as error:
            return error
