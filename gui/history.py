"""What ended runs are good for: going on where they stopped, being compared, and being deleted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gui.files import inside
from trainer import events
from trainer.aside import found_again, written_at
from trainer.errors import StateError
from trainer.run import Run

MOST_POINTS = 400
"""Of one run's curve in a comparison: as many as a chart has pixels to show."""

REPLACED_AFTER_S = 60


class Written(NamedTuple):
    """A LoRA file or state that a run wrote. `told`: when that was told (Unix seconds); `written`: see `events.Saved`."""

    path: Path
    what: str
    step: int
    epoch: int
    told: float
    written: int


def saved(run: Run) -> tuple[Written, ...]:
    """All that a run wrote into its output folder, oldest first."""
    try:
        return _saved(run, run.events.stat().st_size)
    except FileNotFoundError:
        return ()


@lru_cache(256)
def _saved(run: Run, size: int) -> tuple[Written, ...]:
    # The size is there for the cache: events are only ever appended.
    found: list[dict[str, Any]] = [event for event, _ in events.read(run.events) if event["type"] == "saved"]
    return tuple(
        Written(run.folder / e["path"], e["what"], e["step"], e["epoch"], e["time"], e.get("written", 0)) for e in found
    )


def origin(run: Run) -> tuple[Run, int] | None:
    """The run beside this one whose state it went on from, and behind which step; None where there is none (any more)."""
    try:
        started = _started(run, run.events.stat().st_size)
    except FileNotFoundError:
        return None
    if not started or not started.get("resumed"):
        return None
    state, wrote = Path(str(started["resumed"])).resolve(), {}
    for folder in run.folder.parent.glob(f"*/{run.events.name}"):
        other = Run(folder.parent)
        for one in saved(other) if other.folder != run.folder else ():
            if one.what == "state" and one.told <= started["time"] and one.path.resolve() == state:
                wrote[one.told] = other
    return (wrote[max(wrote)], int(started["first_step"]) - 1) if wrote else None


@lru_cache(256)
def _started(run: Run, size: int) -> dict[str, Any] | None:
    return next((event for event, _ in events.read(run.events) if event["type"] == "started"), None)


def checkpoints(run: Run) -> list[dict[str, Any]]:
    """The LoRA files of a run that are still there, oldest first: name, path, step, epoch.

    One that a later run put aside has another name than when it was written.
    """
    found: dict[str, dict[str, Any]] = {}
    for one in saved(run):
        if one.what != "state" and (path := found_again(one.path, one.written)):
            found.pop(path.name, None)
            found[path.name] = {"name": path.name, "path": str(path), "step": one.step, "epoch": one.epoch}
    return list(found.values())


def has_state(run: Run) -> bool:
    """Whether a state of the run is still there, which need not be sound."""
    return next(_states(run), None) is not None


def newest_state(run: Run) -> Path | None:
    """The newest state that the run wrote and that is whole to the last byte; None if there is none."""
    from trainer import state  # late: it brings what reads images

    try:
        return state.newest(list(_states(run)), run.folder)[0].folder
    except StateError:
        return None


def stranded(run: Run) -> Literal["", "gone", "none"]:
    """Why an ended run cannot go on: its states are gone, or it saved none; "" when it can."""
    if has_state(run):
        return ""
    return "gone" if any(one.what == "state" for one in saved(run)) else "none"


def _states(run: Run) -> Iterator[Path]:
    from trainer.state import HEADER

    for one in reversed(saved(run)):
        header = one.path / HEADER
        if one.what == "state" and header.is_file() and _is_the_one(header, one):
            yield one.path


def _is_the_one(header: Path, told: Written) -> bool:
    """Whether a state's header is the one that was told of. Runs from before that was told exactly are given a minute."""
    if told.written:
        return written_at(header) == told.written
    return header.stat().st_mtime < told.told + REPLACED_AFTER_S


def curve(run: Run) -> list[list[float]]:
    """The averaged loss as at most 400 points (step, loss), the last among them; a resumed run's from its origin on."""
    found = list(_losses(run))
    gap = -(-len(found) // MOST_POINTS) or 1
    return [[step, loss] for step, loss, _ in found[::-1][::gap][::-1]]


def _losses(run: Run) -> Iterator[tuple[int, float, int]]:
    """Step, averaged loss and steps in all, those of the runs that it goes on from first."""
    if before := origin(run):
        earlier, last = before
        yield from (one for one in _losses(earlier) if one[0] <= last)
    try:
        for e, _ in events.read(run.events):
            if e["type"] == "step":
                yield e["step"], e["loss"] if e.get("average_loss") is None else e["average_loss"], e["total"]
    except FileNotFoundError:
        return


def samples(run: Run) -> list[dict[str, Any]]:
    """The pictures that are still there, as they were drawn, those without the LoRA aside."""
    found: list[dict[str, Any]] = []
    try:
        for event, _ in events.read(run.events):
            if event["type"] == "sample" and event.get("strength") != 0:
                path = run.folder / str(event["path"])
                if inside(path, [run.samples]) and path.is_file():
                    found.append({**event, "path": str(path)})
    except FileNotFoundError:
        return []
    return found


def outcome(run: Run) -> dict[str, Any]:
    """What came of a run: last and lowest average loss with their steps, seconds from its start, its newest file.

    The lowest is looked for behind the first tenth of the steps, where the average is not one of so many yet, and
    before a resume too. None for what there is not.
    """
    last: list[Any] | None = None
    lowest: list[Any] | None = None
    first = end = None
    for step, loss, total in _losses(run):
        last = [step, loss]
        if step >= total / 10 and (lowest is None or loss < lowest[1]):
            lowest = last
    if run.events.exists():
        for event, _ in events.read(run.events):
            first, end = first or event["time"], event["time"]
    files = checkpoints(run)
    return {
        "last": last,
        "lowest": lowest,
        "seconds": end - first if first and end else None,
        "file": files[-1]["name"] if files else None,
    }


@dataclass(frozen=True)
class Rest:
    """What deleting a run takes away, and what of its folder it leaves: not the trainer's to delete."""

    goes: tuple[Path, ...]
    stays: tuple[Path, ...]


def rest(run: Run) -> Rest:
    """What the run itself wrote inside its own folder, and whatever else lies there.

    Files in an output folder elsewhere are no part of it. A link is taken away, never what it leads to.
    """
    own = {run.config, run.pid, run.log, run.events, run.control, run.exit, run.killed, run.queued, run.sweep}
    written = {one.path for one in saved(run)}
    if run.events.exists():
        written |= {run.folder / str(e["path"]) for e, _ in events.read(run.events) if e["type"] == "sample"}
    goes, stays = [], []
    for path in sorted(run.folder.iterdir()):
        if path in own or path in (run.logs, run.grid) or path.name.endswith(".tmp"):
            goes.append(path)
        elif path in (run.samples, run.output) and path.is_dir() and not path.is_symlink():
            for inner in sorted(path.iterdir()):
                (goes if inner in written else stays).append(inner)
        else:
            stays.append(path)
    return Rest(tuple(goes), tuple(stays))


def delete(run: Run) -> Rest:
    """Delete what `rest` names; the folder too when nothing stays in it. Returns what went and what stayed."""
    found = rest(run)
    # The settings go last, so that what is left after an error is still a run that can be deleted.
    for path in sorted(found.goes, key=lambda path: path == run.config):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for folder in (run.samples, run.output, run.folder):
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()
    return found
