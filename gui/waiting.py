"""The queue: runs that wait for their turn, and the thread that starts them one after the other.

What waits is a run's folder with its settings and a marker, so that a restarted server goes on with it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from gui import history
from gui.runs import Runs
from trainer.run import Run, new_run, write_whole

LOOK_AGAIN_S = 2.0


class Queue:
    """The runs that wait, in the order in which they will start."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.trouble = ""
        self._added = threading.Event()
        self._keys: dict[str, str] = {}
        """The wandb keys of what waits, which are in no file: a restarted server knows them no more."""

    def serve(self) -> None:
        """Start what waits whenever nothing runs, in a thread of its own, for as long as the server lives."""
        threading.Thread(target=self._serve, name="queue", daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                self.start_next()
                self.trouble = ""
            except OSError as error:  # told by the list of runs, and tried again
                self.trouble = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
            self._added.clear()
            # Nobody tells that a run has ended; where nothing waits for it, nobody asks.
            self._added.wait(LOOK_AGAIN_S if self.waiting() else None)

    def waiting(self) -> list[Run]:
        found = [Run(self.runs.folder / run_id) for run_id in self.runs.ids()]
        return sorted((run for run in found if _waits(run)), key=lambda run: (_place(run), run.folder.name))

    def add(self, values: Mapping[str, Any], kept: Mapping[str, Any], sweep: str = "") -> Run:
        """A new run at the end of the queue; `sweep`: the id of the sweep that it is part of."""
        with self.runs.alone():
            run = self.runs.folder_for(values, kept)
            if sweep:
                write_whole(run.sweep, sweep.encode())
            self._put(run, max([time.time(), *(_place(other) + 1 for other in self.waiting())]))
        if key := str(values.get("wandb_api_key") or ""):
            self._keys[run.folder.name] = key
        self._added.set()
        return run

    def earlier(self, run: Run) -> bool:
        """Let a run change places with the one before it. False when it does not wait or is the first."""
        with self.runs.alone():
            for before, this in pairwise(self.waiting()):
                if this == run:
                    places = _place(before), _place(this)
                    self._put(this, places[0])
                    self._put(before, places[1])
                    return True
        return False

    def remove(self, run: Run) -> bool:
        """Take a run out of the queue, with its folder. False when it does not wait."""
        with self.runs.alone():
            if not _waits(run):
                return False
            history.delete(run)
        return True

    def start_next(self) -> Run | None:
        """Start the run whose turn it is; None while another goes on, or when none waits.

        It gets a folder named after this moment, since runs are known by when they began.
        """
        with self.runs.alone():
            waiting = self.waiting()
            if not waiting or self.runs.active() is not None:
                return None
            queued = waiting[0]
            run = self._renamed(queued)
            try:
                self.runs.launch(run, self._keys.get(queued.folder.name, ""))
            except OSError:
                run.folder.rename(queued.folder)
                raise
            self._keys.pop(queued.folder.name, None)
            run.queued.unlink()
        return run

    def _renamed(self, queued: Run) -> Run:
        if queued.folder.name.startswith(time.strftime("%Y%m%d-%H%M%S")):
            return queued
        run = new_run(self.runs.folder, queued.folder.name[16:])
        run.folder.rmdir()
        queued.folder.rename(run.folder)
        run.config.touch()
        return run

    def _put(self, run: Run, place: float) -> None:
        write_whole(run.queued, repr(place).encode())


def _waits(run: Run) -> bool:
    # One that has a process was started, even where the server died before it took the marker away.
    return run.queued.exists() and not run.pid.exists()


def _place(run: Run) -> float:
    try:
        return float(run.queued.read_text())
    except (OSError, ValueError):
        return 0.0
