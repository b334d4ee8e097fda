"""Which images form a batch, and in what order an epoch goes through them."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Hashable, Sequence

Batch = tuple[int, ...]
"""Indices of items; all of one bucket."""


def epoch_batches(
    buckets: Sequence[Hashable], repeats: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[Batch]:
    """The batches of one epoch: every item as often as it repeats, each batch of one bucket.

    The order depends on `seed` and `epoch` alone, so any epoch can be rebuilt without those
    before it; the number of batches is the same in all.
    """
    order = random.Random(f"batches/{seed}/{epoch}")  # noqa: S311  not for secrets
    members: dict[Hashable, list[int]] = {}
    for item, (bucket, count) in enumerate(zip(buckets, repeats, strict=True)):
        members.setdefault(bucket, []).extend([item] * count)
    batches: list[Batch] = []
    for items in members.values():
        order.shuffle(items)
        batches += [tuple(items[i : i + batch_size]) for i in range(0, len(items), batch_size)]
    order.shuffle(batches)
    return batches


def batches_per_epoch(buckets: Sequence[Hashable], repeats: Sequence[int], batch_size: int) -> int:
    """How many batches `epoch_batches` returns."""
    counts: Counter[Hashable] = Counter()
    for bucket, count in zip(buckets, repeats, strict=True):
        counts[bucket] += count
    return sum(math.ceil(count / batch_size) for count in counts.values())


def balance(repeats: Sequence[int], wanted: int) -> list[int]:
    """Repeats of regularisation images such that exactly `wanted` of them are seen in an epoch.

    As in sd-scripts: in order, each with its own repeats, until there are enough (the rest get 0);
    if they are too few, each gets one more, round after round. Raises ValueError if none repeats.
    """
    found, left = [], wanted
    for count in repeats:
        found.append(min(count, left))
        left -= found[-1]
    if left and not any(found):
        raise ValueError("no regularisation image is repeated at all")
    while left:
        for i, count in enumerate(found):
            if left and count:
                found[i] += 1
                left -= 1
    return found
