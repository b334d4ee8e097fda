"""Batches for the training step: any batch of a run can be made from its number alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from trainer.data.buckets import Placement
from trainer.data.cache import Latents, to_tensor
from trainer.data.folders import Picture
from trainer.data.reads import Read, Reads
from trainer.errors import LorawrightError
from trainer.processes import ALONE, Place
from trainer.schema import Config


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


class Feed(Reads, Dataset[Batch]):
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
        super().__init__(pictures, placements, config, seed)
        self.latents, self.place = latents, place

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
            masks=torch.stack([self._mask(read) for read in reads]) if self.config.objective.masked else None,
            weights=torch.tensor([prior if picture.regularisation else 1.0 for picture in read_from]) * bool(share),
            sizes=torch.tensor([self._sizes(read) for read in reads], dtype=torch.float32),
            names=[picture.path.name for picture in read_from],
            places=places,
        )

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

    def _mask(self, read: Read) -> torch.Tensor:
        cached = self.latents[read.item].mask if self.latents is not None else None
        if cached is None:
            return torch.from_numpy(self.opacity(read))
        return cached.flip(-1) if read.flip else cached

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
