"""Batches for the training step: any batch of a run can be made from its number alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from trainer.data import captions
from trainer.data.batches import Batch as Indices
from trainer.data.batches import batches_per_epoch, epoch_batches
from trainer.data.buckets import Placement
from trainer.data.cache import Latents, to_tensor
from trainer.data.folders import Picture
from trainer.data.images import pixels
from trainer.randomness import generator_at
from trainer.schema import Config


@dataclass
class Batch:
    """What one step sees. Either `latents` [B,4,h,w] or `pixels` [B,3,H,W] in −1…1 is there."""

    latents: torch.Tensor | None
    pixels: torch.Tensor | None
    captions: list[str]
    weights: torch.Tensor
    names: list[str]


class Feed(Dataset[Batch]):
    """The batches of a run, by number from 0 over all epochs."""

    def __init__(
        self,
        pictures: Sequence[Picture],
        placements: Sequence[Placement],
        config: Config,
        seed: int,
        latents: Sequence[Latents] | None = None,
    ) -> None:
        self.pictures, self.placements, self.latents = pictures, placements, latents
        self.config, self.seed = config, seed
        self.per_epoch = batches_per_epoch(self._buckets(), self._repeats(), config.training.batch_size)
        self._order = lru_cache(maxsize=2)(self._order_of)

    def __len__(self) -> int:
        return self.per_epoch

    def _buckets(self) -> list[tuple[int, int]]:
        return [placement.bucket for placement in self.placements]

    def _repeats(self) -> list[int]:
        return [picture.repeats for picture in self.pictures]

    def _order_of(self, epoch: int) -> list[Indices]:
        return epoch_batches(self._buckets(), self._repeats(), self.config.training.batch_size, self.seed, epoch)

    def __getitem__(self, number: int) -> Batch:
        epoch, place = divmod(number, self.per_epoch)
        items = self._order(epoch)[place]
        texts, flips = [], []
        for slot, item in enumerate(items):
            rng = generator_at(self.seed, "item", number, slot)
            flips.append(self.config.data.flip and rng.random() < 0.5)
            texts.append(captions.draw(self.pictures[item].caption, self.config.captions, rng, epoch + 1))
        prior = self.config.training.prior_loss_weight
        return Batch(
            latents=self._cached(items, flips) if self.latents is not None else None,
            pixels=self._decoded(items, flips) if self.latents is None else None,
            captions=texts,
            weights=torch.tensor([prior if self.pictures[i].regularisation else 1.0 for i in items]),
            names=[self.pictures[i].path.name for i in items],
        )

    def _cached(self, items: Indices, flips: list[bool]) -> torch.Tensor:
        assert self.latents is not None
        chosen = []
        for item, flip in zip(items, flips, strict=True):
            entry = self.latents[item]
            chosen.append(entry.flipped if flip and entry.flipped is not None else entry.plain)
        return torch.stack(chosen).float()

    def _decoded(self, items: Indices, flips: list[bool]) -> torch.Tensor:
        images = [pixels(self.pictures[i].path, self.placements[i]) for i in items]
        turned = [
            np.ascontiguousarray(image[:, ::-1]) if flip else image for image, flip in zip(images, flips, strict=True)
        ]
        return to_tensor(turned)

    def batches(self, numbers: range) -> Iterator[Batch]:
        """The batches with these numbers, made ahead: by worker processes, or one ahead by a thread."""
        workers = min(self.config.data.workers, os.cpu_count() or 1)
        if workers and self.latents is None:
            loader = DataLoader(self, batch_size=None, sampler=numbers, num_workers=workers)  # type: ignore[arg-type]
            yield from loader
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
