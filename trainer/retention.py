"""Deleting old files of a run, and never anything that the run did not write."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trainer import state
from trainer.schema.model import Saving

log = logging.getLogger(__name__)
Series = Literal["epoch", "step"]
Stamp = tuple[int, int]


@dataclass(frozen=True)
class Due:
    """A LoRA file to write. `series` and its number there are set where files are written regularly."""

    name: str
    series: Series | None = None
    number: int = 0


@dataclass(frozen=True)
class _Entry:
    series: Series
    number: int
    path: Path
    is_state: bool
    stamp: Stamp


@dataclass
class Retention:
    """What was written regularly, and which of it is too old.

    As in sd-scripts: at step S, what is more than N steps old goes (from before S − N); at epoch E,
    what is N savings old. States follow the files' numbers where they have none of their own.
    """

    saving: Saving
    _written: list[_Entry] = field(default_factory=list)

    def wrote(self, due: Due, path: Path, *, is_state: bool = False) -> None:
        """Remember a file or state folder as it is now, and delete those that are too old beside it."""
        if due.series:
            self._written.append(_Entry(due.series, due.number, path, is_state, _stamp(path)))
            self.tidy(due.series, due.number)

    def tidy(self, series: Series, number: int) -> None:
        """Delete what is too old, now that `number` was written or would have been.

        What was changed or moved meanwhile is left where it is.
        """
        for entry in list(self._written):
            if entry.series != series or entry.number > self._newest_to_go(series, number, entry.is_state):
                continue
            self._written.remove(entry)
            if _stamp(entry.path) != entry.stamp:
                log.info("%s is not the one that was written; it is kept", entry.path)
                continue
            if entry.is_state:
                state.remove(entry.path)
            else:
                entry.path.unlink()
            log.info("deleted %s", entry.path)

    def _newest_to_go(self, series: Series, number: int, of_states: bool) -> int:
        saving = self.saving
        if series == "step":
            last = (of_states and saving.last_n_steps_state) or saving.last_n_steps
            return number - last - 1 if last else -1
        last = (of_states and saving.last_n_epochs_state) or saving.last_n_epochs
        return number - saving.every_n_epochs * last if last else -1


def _stamp(path: Path) -> Stamp:
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError:
        return 0, 0
    return found.st_ino, found.st_mtime_ns
