"""What the live panel asks for once a second: a run's state, and whatever is new since last time.

The page sends byte offsets and gets back what lies behind them, so that an answer stays small
however long a run is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gui import history, runs
from gui.files import MODEL_ENDINGS, inside
from trainer import events, kohya
from trainer.aside import found_again
from trainer.errors import LorawrightError
from trainer.paths import resolve
from trainer.run import Run
from trainer.schema import PARAMETERS
from trainer.schema.overrides import with_additional

LOG_BYTES = 65536
MOST_POINTS = 1000
MOST_EVENTS = 4000


def poll(found: runs.Runs, ask: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to {"run": the one shown, "follow": the one wanted, "events": offset, "log": offset}.

    "follow": "" wants the newest. An offset of 0 starts anew; the log then starts with its last
    64 kB. When `run` in the answer is another than the one shown, the offsets were taken as 0.
    """
    run = found.find(str(ask.get("follow") or "")) or found.find("")
    if run is None:
        return {"run": None, "now": time.time()}
    same = run.folder.name == ask.get("run")
    answer: dict[str, Any] = {"run": run.folder.name, "now": time.time()}
    # Before the news: a run that shows as ended has told of the files that it saved.
    tail = events.last(run.events)
    answer["state"] = runs.state(run, tail)
    answer.update(_news(run, int(ask.get("events") or 0) if same else 0))
    answer.update(log_from(run.log, int(ask.get("log") or 0) if same else 0))
    answer["stop_asked"] = runs.stop_asked(run)
    answer["last_event"] = tail[-1]["time"] if tail else runs.began(run)
    if answer["state"] in ("stopped", "crashed"):
        answer["resumable"] = history.has_state(run)
    if answer["state"] == "crashed":
        failed = next((event for event in reversed(tail) if event["type"] == "failed"), None)
        answer["cause"] = asdict(runs.cause(run, failed))
    return answer


def _news(run: Run, offset: int) -> dict[str, Any]:
    """What happened behind a byte offset: points of the loss as (step, loss, average, U-Net's rate, text encoder's)."""
    lists: dict[str, Any] = {key: [] for key in ("points", "samples", "saved", "verified", "warnings")}
    news = {"from": offset, "more": False, **lists}
    try:
        if offset > run.events.stat().st_size:
            news["from"] = offset = 0
        for count, (event, behind) in enumerate(events.read(run.events, offset), 1):
            _sort_in(event, news, run)
            offset = behind
            if len(news["points"]) >= MOST_POINTS or count >= MOST_EVENTS:
                news["more"] = True
                break
    except FileNotFoundError:
        news["from"] = offset = 0
    news["events"] = offset
    return news


def _sort_in(event: Mapping[str, Any], news: dict[str, Any], run: Run) -> None:
    kind = event["type"]
    if kind == "step":
        keys = ("step", "loss", "average_loss", "unet_lr", "text_encoder_lr")
        news["points"].append([event.get(key) for key in keys])
        news["step"] = event
    elif kind == "sample":
        path = run.folder / event["path"]
        if inside(path, [run.samples]):
            news["samples"].append({**event, "path": str(path)})
    elif kind == "saved":
        path = run.folder / event["path"]
        there = found_again(path, event.get("written", 0)) if event["what"] != "state" else path
        news["saved"].append({**event, "path": str(there or path)})
    elif kind in ("verified", "warning"):
        news["verified" if kind == "verified" else "warnings"].append(event)
    elif kind in ("started", "phase", "failed", "ended"):
        news[kind] = event
        if kind == "started" and not news["points"]:
            news["points"], news["samples"] = _before(run)


def _before(run: Run) -> tuple[list[Any], list[Any]]:
    """Points of the loss and samples from before a resumed run, of the runs that it goes on from."""
    if (origin := history.origin(run)) is None:
        return [], []
    earlier, last = origin
    points, samples = _before(earlier)
    news: dict[str, Any] = {"points": points, "samples": samples}
    for event, _ in events.read(earlier.events):
        if event["type"] in ("step", "sample") and event["step"] <= last:
            _sort_in(event, news, earlier)
    gap = -(-len(points) // history.MOST_POINTS) or 1
    return points[::-1][::gap][::-1], samples


def log_from(path: Path, offset: int) -> dict[str, Any]:
    """At most 64 kB of the log behind a byte offset, cut where neither a line nor a character breaks in two."""
    try:
        size = path.stat().st_size
        fresh = offset <= 0 or offset > size
        if fresh:
            offset = max(0, size - LOG_BYTES)
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(LOG_BYTES)
    except FileNotFoundError:
        return {"log": 0, "text": "", "log_from": 0, "log_size": 0}
    if fresh and offset > 0:
        cut = data.find(b"\n") + 1
        data, offset = data[cut:], offset + cut
    whole = len(data) - _broken_tail(data)
    return {
        "log": offset + whole,
        "text": data[:whole].decode("utf-8", "replace"),
        "log_from": offset,
        "log_size": size,
    }


def _broken_tail(data: bytes) -> int:
    """How many bytes at the end belong to a character that is not yet whole."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte < 0x80:
            return 0
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back if back < length else 0
    return 0


def downloads(run: Run, root: Path, allowed: Sequence[Path] = ()) -> dict[str, Path]:
    """What of a run may be fetched, by name: its log, its settings and the LoRA files that it saved.

    They lie in its folder, in the output folder that its settings name (a relative one is `root`'s), or in an
    `allowed` one, wherever an event says that they are.
    """
    files = {"log.txt": run.log, "config.json": run.config}
    if there := history.checkpoints(run):
        places = [run.folder, *allowed, *_output(run, root)]
        paths = (Path(one["path"]) for one in there)
        files |= {path.name: path for path in paths if path.suffix in MODEL_ENDINGS and inside(path, places)}
    return {name: path for name, path in files.items() if path.is_file() and os.access(path, os.R_OK)}


def _output(run: Run, root: Path) -> list[Path]:
    try:
        values, _ = with_additional(kohya.load(run.config).values, PARAMETERS)
        text = str(values.get("output_dir") or "").strip()
        return [root / resolve(text)] if text else []
    except LorawrightError:
        return []
