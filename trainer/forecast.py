"""How long the rest of a training takes: its steps, and the pauses between them for files and pictures."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

MEASURED_STEPS = 8
"""Fewer say too little."""


class Forecast:
    """`due`: for each kind of pause the steps behind which it comes, in order."""

    def __init__(self, due: Mapping[str, Sequence[int]]) -> None:
        self.due = due
        self._took: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        self._steps: int | None = None
        self._seconds = 0.0

    def stepped(self, steps: int, seconds: float) -> None:
        """Take in a measurement. The first is passed over: it holds the first step, which is slow."""
        if self._steps is None:
            self._steps = 0
        else:
            self._steps += steps
            self._seconds += seconds

    @contextmanager
    def pause(self, kind: str, step: int) -> Iterator[None]:
        """Measure a pause, or one part of it."""
        began = time.monotonic()
        yield
        self._took[kind][step] += time.monotonic() - began

    def seconds_left(self, step: int, total: int) -> float | None:
        """From a step's end to that of the last; None while too little is known. Pauses never seen count as 0."""
        if not self._steps or self._steps < MEASURED_STEPS:
            return None
        left = (total - step) * self._seconds / self._steps
        for kind, took in self._took.items():
            due = self.due.get(kind, ())
            left += (len(due) - bisect_right(due, step)) * sum(took.values()) / len(took)
        return left
