"""The stream of events a run writes: frozen records, one JSON line each, in `events.jsonl`.

`type` and `time` (Unix seconds) come first in every line. The page reads the file by byte
offset; a line is written with one call, so a reader never sees half of one that is ended by
a newline.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import TypeAdapter


@dataclass(frozen=True)
class Event:
    type: ClassVar[str]


@dataclass(frozen=True)
class Started(Event):
    """The settings were accepted and the work begins."""

    type: ClassVar[str] = "started"
    name: str
    family: str
    device: str
    precision: str
    images: int
    batches_per_epoch: int
    epochs: int
    total_steps: int
    first_step: int
    seed: int
    resumed: str = ""
    """The folder of the state that it goes on from."""


@dataclass(frozen=True)
class Phase(Event):
    """What is being done outside the steps: `done` of `total`; total 0 means uncounted."""

    type: ClassVar[str] = "phase"
    name: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Step(Event):
    """One optimizer step. `loss` is its mean, `average_loss` that of the last steps; rates are those
    that the step used, also where the optimizer finds them itself. `seconds_left` counts what is
    still to be saved and drawn; None while too little was measured."""

    type: ClassVar[str] = "step"
    step: int
    total: int
    epoch: int
    epochs: int
    loss: float
    average_loss: float
    unet_lr: float | None
    text_encoder_lr: float | None
    steps_per_s: float
    seconds_left: float | None
    memory_bytes: int


@dataclass(frozen=True)
class Sample(Event):
    """A picture in the run's folder. `index` is the prompt's line among the prompts, `strength` 0 without the LoRA."""

    type: ClassVar[str] = "sample"
    path: str
    prompt: str
    index: int
    seed: int
    step: int
    strength: float = 1.0


@dataclass(frozen=True)
class Saved(Event):
    """A file or state folder stands complete under `path`.

    `written`: when the file was, or the state's header, as the file system tells it (nanoseconds), by which it is known
    from a later one of its name.
    """

    type: ClassVar[str] = "saved"
    path: str
    step: int
    epoch: int
    what: Literal["intermediate", "final", "state"]
    written: int = 0


@dataclass(frozen=True)
class Verified(Event):
    """A LoRA file was read back from the disk.

    `checks`: what was proved, in words; `problems`: what is wrong; `warnings`: what to know. `loads_in`:
    the programs that load all of it; `passed_over`: why each of the others does not.
    """

    type: ClassVar[str] = "verified"
    path: str
    checks: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    loads_in: tuple[str, ...] = ()
    passed_over: Mapping[str, str] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return not self.problems

    @property
    def summary(self) -> str:
        """What is wrong with the file; if nothing, who loads it."""
        if self.problems:
            return "; ".join(self.problems)
        if self.loads_in:
            return f"loads in {', '.join(self.loads_in)}"
        return "whole, but no other program is known to load it"


@dataclass(frozen=True)
class Warned(Event):
    type: ClassVar[str] = "warning"
    message: str
    hint: str = ""


@dataclass(frozen=True)
class Failed(Event):
    """Training cannot go on: a word for the kind, the cause in plain words, what to change."""

    type: ClassVar[str] = "failed"
    kind: str
    message: str
    hint: str = ""


@dataclass(frozen=True)
class Ended(Event):
    """The run is over. `done`: all steps were made. `stopped`: asked to stop; all is saved.

    `by`: the signal that asked, SIGTERM where the system ends the machine."""

    type: ClassVar[str] = "ended"
    status: Literal["done", "stopped"]
    step: int
    path: str
    seconds: float
    by: str = ""


class EventLog:
    """Appends events to a file, each with one write."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if _ends_within_a_line(path):
            os.write(self._file, b"\n")

    def emit(self, event: Event) -> None:
        record = {"type": event.type, "time": round(time.time(), 3), **asdict(event)}
        os.write(self._file, json.dumps(record, allow_nan=False, ensure_ascii=False).encode() + b"\n")

    def close(self) -> None:
        os.close(self._file)


def _ends_within_a_line(path: Path) -> bool:
    """Whether the last line was cut off: the disk was full when it was written."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() not in (b"", b"\n")


def last(path: Path, most_bytes: int = 16384) -> list[dict[str, object]]:
    """The events in the last part of the stream, oldest first; none where there is no file."""
    try:
        # What is left of a line that the part begins in is no JSON.
        return [event for event, _ in read(path, max(0, path.stat().st_size - most_bytes))]
    except FileNotFoundError:
        return []


def read(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, object], int]]:
    """The events from a byte offset on, each with the offset behind it.

    A last line without its newline is left for the next read. What no trainer wrote is passed over: a line
    that is not JSON (the disk was full when it was written), or that lacks what its type must have.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                record = json.loads(line, parse_float=_finite, parse_constant=_finite)
                if _sound(record, line):
                    yield record, offset
            except (ValueError, RecursionError):
                continue


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number that can be shown")
    return number


def _sound(record: object, line: bytes) -> bool:
    """Whether a line is an event. Raises ValueError where its type is one of these and it lacks a field."""
    if not isinstance(record, dict) or type(record.get("time")) not in (int, float):
        return False
    kind = record.get("type")
    if kind in _kinds():
        _kinds()[kind].validate_json(line, strict=True)
    return isinstance(kind, str)


@cache
def _kinds() -> dict[object, TypeAdapter[Any]]:
    kinds: list[type[Event]] = [Started, Phase, Step, Sample, Saved, Verified, Warned, Failed, Ended]
    return {kind.type: TypeAdapter(kind) for kind in kinds}
