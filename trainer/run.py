"""A run is a folder. This is its layout, and how a page and a trainer meet in it.

    config.json     the flat preset that the run was started with
    pid             the trainer's process id and its start time, as JSON
    log.txt         everything the trainer printed
    events.jsonl    the stream of trainer.events
    control         requests, one word a line, appended by anyone
    samples/        pictures
    logs/           curves, unless the preset names another folder
    grid/           pictures to choose a checkpoint by
    output/         the LoRA files, unless the preset names another folder
    exit            how the process ended, as JSON, written by the page that started it
    killed          empty; there when the page ended the trainer by force
    sweep           the id of the sweep that the run is part of
    queued          there while the run waits for its turn: its place, as a number

Needs no torch, so that the page can use it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

log = logging.getLogger(__name__)
REQUESTS = ("stop", "sample", "save")
LONGEST_SLUG = 60
"""Letters of a folder's name after the time; file systems allow 255 bytes, of which a letter may take four."""

# What the trainer's process answers; the page and scripts rely on it.
EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_STOPPED = 3


@dataclass(frozen=True)
class Run:
    """The folder of one run."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config.json"

    @property
    def pid(self) -> Path:
        return self.folder / "pid"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def events(self) -> Path:
        return self.folder / "events.jsonl"

    @property
    def control(self) -> Path:
        return self.folder / "control"

    @property
    def samples(self) -> Path:
        return self.folder / "samples"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def grid(self) -> Path:
        return self.folder / "grid"

    @property
    def exit(self) -> Path:
        return self.folder / "exit"

    @property
    def killed(self) -> Path:
        return self.folder / "killed"

    @property
    def sweep(self) -> Path:
        return self.folder / "sweep"

    @property
    def queued(self) -> Path:
        return self.folder / "queued"

    def claim(self) -> None:
        """Write down that this process is the run's trainer.

        Whoever started this process may have written it down already. Raises FileExistsError
        while another living process holds the run.
        """
        holder = self.process()
        if holder is not None and holder.pid != os.getpid():
            raise FileExistsError(f"a trainer is already working in {self.folder}")
        me = psutil.Process()
        write_whole(self.pid, json.dumps({"pid": me.pid, "started": me.create_time()}).encode())

    def process(self) -> psutil.Process | None:
        """The living trainer of this run; None if it ended, or if its number went to another."""
        try:
            record = json.loads(self.pid.read_text())
            process = psutil.Process(int(record["pid"]))
            alive = process.status() != psutil.STATUS_ZOMBIE
            return process if alive and abs(process.create_time() - record["started"]) < 1.5 else None
        except (OSError, ValueError, KeyError, TypeError, psutil.Error):
            return None

    def request(self, word: str) -> None:
        """Ask the trainer for something; it acts after the step it is in."""
        if word not in REQUESTS:
            raise ValueError(f'"{word}" is not a request; there are {", ".join(REQUESTS)}')
        with open(self.control, "ab") as file:
            file.write(word.encode() + b"\n")

    def requests(self, offset: int) -> tuple[list[str], int]:
        """The requests written since a byte offset, and the offset behind them."""
        try:
            if self.control.stat().st_size <= offset:
                return [], offset
            with open(self.control, "rb") as file:
                file.seek(offset)
                data = file.read(4096)
        except FileNotFoundError:
            return [], 0
        whole = data[: data.rfind(b"\n") + 1]
        words = [w for w in whole.decode("ascii", "replace").split() if w in REQUESTS]
        return words, offset + len(whole)


def all_runs(parent: Path) -> list[Run]:
    """The runs in a folder, in no order."""
    try:
        return [Run(path) for path in parent.iterdir() if (path / "config.json").is_file()]
    except FileNotFoundError:
        return []


def new_run(parent: Path, name: str) -> Run:
    """Make a folder for a new run: the time, then the output name; never one that exists."""
    slug = re.sub(r"[^\w.-]+", "-", name, flags=re.UNICODE).strip("-.")[:LONGEST_SLUG].strip("-.") or "run"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1, 1000):
        folder = parent / (f"{stamp}-{slug}" + (f"-{attempt}" if attempt > 1 else ""))
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return Run(folder)
    raise FileExistsError(f"no free name for a run in {parent}")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader finds either the old content or the new, never a part."""
    with unfinished(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file or folder under; it becomes `path` at the with block's end.

    When the block is left otherwise (an error, Ctrl-C), nothing remains.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
        raise


_UNFINISHED = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.(?P<kind>tmp|old)")


def sweep(folder: Path) -> None:
    """Clear up after processes that were killed while they wrote in `folder`.

    What is half written (`.NAME.PID.tmp`) goes. What stood aside for a successor (`.NAME.PID.old`) gets its
    name back where the successor never took it. What a living process writes is left alone.
    """
    try:
        found = [(path, match) for path in folder.iterdir() if (match := _UNFINISHED.fullmatch(path.name))]
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("%s cannot be looked through: %s", folder, error)
        return
    for path, match in found:
        try:
            if _writes(int(match["pid"]), path):
                continue
            name = path.with_name(match["name"])
            if match["kind"] == "old" and not name.exists():
                path.rename(name)
                log.info("%s is back: a killed trainer was replacing it", name)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError as error:
            log.warning("%s, which a killed trainer left, cannot be removed: %s", path, error)


def _writes(pid: int, path: Path) -> bool:
    """Whether the process that a name tells of lives, and is not another that got its number since."""
    try:
        return bool(psutil.Process(pid).create_time() <= path.stat().st_mtime)
    except psutil.Error:
        return False
