"""Deleting old files of a run, and never anything that the run did not write."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainer import state
from trainer.schema.model import Saving

log = logging.getLogger(__name__)
Series = Literal["epoch", "step"]
Stamp = tuple[int, int]
GONE: Stamp = (0, 0)


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

    @classmethod
    def after(cls, resumed: state.State | None, saving: Saving, output: Path) -> Retention:
        """Of a training that goes on from a state: with what it wrote regularly before, if that is where it writes."""
        if resumed is None or resumed.folder.parent != output:
            return cls(saving)
        entries = []
        for series, number, name, is_state, stamp in resumed.written:
            path = output / name if stamp else resumed.folder
            entries.append(_Entry(series, number, path, is_state, tuple(stamp or _stamp(path))))
        return cls(saving, entries)

    def rows(self, due: Due) -> list[list[Any]]:
        """What a state must know of this for `after`, as JSON; nothing where all files stay.

        Series, number, name, whether it is a state, and the stamp, which that very state does not have yet.
        """
        saving = self.saving
        if not any((saving.last_n_steps, saving.last_n_steps_state, saving.last_n_epochs, saving.last_n_epochs_state)):
            return []
        own = [[due.series, due.number, "", True, None]] if due.series else []
        return [[e.series, e.number, e.path.name, e.is_state, e.stamp] for e in self._written] + own

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
            found = _stamp(entry.path)
            if found == GONE:
                continue
            if found != entry.stamp:
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
        return GONE
    return found.st_ino, found.st_mtime_ns
