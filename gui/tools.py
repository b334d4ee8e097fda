"""The Tools tab: forms made of the tools' declarations, and one tool at a time as a process of its own.

What becomes of it stands in a folder, as with a run, so that a reloaded page or a restarted server
finds it again.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from gui import history, runs
from gui.files import Roots
from gui.form import shown
from trainer import events
from trainer.errors import LorawrightError, Problem
from trainer.paths import EMBEDDED, resolve
from trainer.run import EXIT_STOPPED, Run, write_whole
from trainer.schema.declare import Parameter
from trainer.tools.commands import TOOLS, Tool, problems_of

MOST_LORAS = 200
ENDING_S = 5.0
"""How long a tool that has told its end may take to be gone before another is refused."""

DOCTOR = {
    "name": "doctor",
    "label": "Check this machine",
    "group": "This machine",
    "summary": "Try out whether this machine and this installation can train: versions, graphics card, libraries, room, "
    "and a short training of the model that comes along. Takes about a minute.",
    "inputs": (),
    "fields": [],
}
"""A tool without options, which works on no file: `python -m trainer doctor`."""

PATHS = ("file", "folder", "model")
BACKUPS = "backups"
"""An option that the page sets itself."""


class Tools:
    """The tools that the page offers, and the one that runs or ran last."""

    def __init__(self, found: runs.Runs, roots: Roots) -> None:
        self.runs = found
        self.roots = roots
        self.job = Run(found.folder / "tools")
        self._lock = threading.Lock()

    def offer(self) -> dict[str, Any]:
        """Every tool's form, and LoRA files to choose from: of runs, the newest first, then of folders called models."""
        outputs = islice((path for run_id in self.runs.ids() for path in self._saved(run_id)), MOST_LORAS)
        loras = dict.fromkeys([*map(str, outputs), *self.roots.models()])
        return {"tools": [*map(_form, TOOLS.values()), DOCTOR], "loras": list(loras)[:MOST_LORAS]}

    def _saved(self, run_id: str) -> Iterator[Path]:
        """The LoRA files of a run that are still there, newest first, wherever its settings put them."""
        for one in reversed(history.checkpoints(Run(self.runs.folder / run_id))):
            if self.roots.holds(path := Path(one["path"])):
                yield path

    def start(self, name: str, entries: Mapping[str, Any]) -> list[Problem]:
        """Start a tool. Returns what stands in the way; empty when it runs."""
        if name == DOCTOR["name"]:
            return self._launch(name, {}, ["doctor", f"--runs={self.runs.folder}", f"--events={self.job.events}"])
        if name not in TOOLS:
            return [Problem("", "Tool", f'there is no tool "{name}"')]
        tool = TOOLS[name]
        values, problems = self._inside(tool, {key: entries.get(key, "") for key in tool.parameters if key != BACKUPS})
        if BACKUPS in tool.parameters:
            values[BACKUPS] = str(self.runs.folder / "captions")  # where the Dataset tab looks for what can be undone
        return problems or self.begin(name, values)

    def begin(self, name: str, values: Mapping[str, Any]) -> list[Problem]:
        """Start a tool on values whose paths are allowed. Returns what stands in the way; empty when it runs."""
        words = TOOLS[name].words({**values, "events": str(self.job.events)})
        return list(problems_of(name, values)) or self._launch(name, values, words)

    def _launch(self, name: str, entries: Mapping[str, Any], words: Sequence[str]) -> list[Problem]:
        with self._lock:
            if not self._is_free():
                return [Problem("", "A tool is running", "Stop it first, or wait for its end.")]
            self.job.folder.mkdir(parents=True, exist_ok=True)
            for file in (self.job.events, self.job.log, self.job.exit, self.job.pid):
                file.unlink(missing_ok=True)
            write_whole(self.job.config, json.dumps({"tool": name, "entries": dict(entries)}).encode())
            runs.launch(self.job, [*self.runs.trainer, *words], self.runs.root)
        return []

    def _is_free(self) -> bool:
        """Whether no tool runs. One that has told its end is waited for: its process takes a moment to be gone."""
        patience = time.monotonic() + ENDING_S
        while self.job.process() is not None:
            if not self._has_told_its_end() or time.monotonic() > patience:
                return False
            time.sleep(0.05)
        runs.exit_code(self.job)  # is being written for a moment after the end
        return True

    def _has_told_its_end(self) -> bool:
        if not self.job.events.exists():
            return False
        return any(event["type"] in ("report", "failed") for event, _ in events.read(self.job.events))

    def stop(self) -> None:
        """Ask the tool to end; it removes what it has not finished."""
        process = self.job.process()
        if process is not None:
            process.send_signal(signal.SIGINT if os.name != "nt" else signal.SIGTERM)

    def poll(self, offset: int) -> dict[str, Any]:
        """What the tool is doing, and what it said behind a byte offset of its events.

        `state`: none, running, done, failed or stopped. `findings`: all new ones of the doctor's. An offset that is no longer there starts anew.
        """
        if not self.job.config.exists():
            return {"state": "none"}
        # Asked before the events are read, which are complete once the process is gone.
        running = self.job.process() is not None
        answer: dict[str, Any] = {**json.loads(self.job.config.read_text()), "state": "running", "offset": 0}
        if self.job.events.exists():
            offset = offset if offset <= self.job.events.stat().st_size else 0
            answer["offset"] = offset
            for event, behind in events.read(self.job.events, offset):
                if event["type"] == "finding":
                    answer.setdefault("findings", []).append(event)
                answer[str(event["type"])] = event
                answer["offset"] = behind
        if "report" in answer:
            answer["state"] = "done"
        elif "failed" in answer:
            answer["state"] = "stopped" if answer["failed"]["kind"] == "stopped" else "failed"
        elif not running:
            cause = runs.cause(self.job, None)
            stopped = runs.exit_code(self.job) == EXIT_STOPPED
            answer["state"] = "stopped" if stopped else "failed"
            answer["failed"] = {"message": f"{cause.title}. {cause.message}", "hint": cause.hint}
        answer["picture"] = self._picture(answer.get("report", {}).get("report", {}).get("path", ""))
        return answer

    def _picture(self, path: str) -> str:
        """The path again where a tool has drawn a picture there, which the page shows; else ""."""
        found = self.runs.root / path
        drawn = path.endswith(".png") and self.roots.holds(found) and found.is_file()
        return str(found) if drawn else ""

    def captioning(self, text: str) -> dict[str, str]:
        """What kind of captioning model a folder holds, or in `told` why none can be used; "" for no folder."""
        from trainer.tools.captioning import kind_of  # late: it imports what works on images

        try:
            folder = self.runs.root / resolve(text.strip())
            if not text.strip() or not self.roots.holds(folder):
                return {"kind": "", "told": ""}
            return {"kind": kind_of(folder), "told": ""}
        except LorawrightError as error:
            return {"kind": "", "told": str(error)}

    def _inside(self, tool: Tool, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
        """The values with whole paths, and a problem for each path that leads outside the allowed folders."""
        found, problems = dict(values), []
        for key, p in tool.parameters.items():
            if key in values and (p.kind in PATHS or key in tool.inputs):
                lines = []
                for line in filter(str.strip, str(values[key]).splitlines()):
                    try:
                        path = self.runs.root / resolve(line)
                    except LorawrightError as error:
                        problems.append(Problem(key, p.label, str(error)))
                        continue
                    # What is embedded may be read by all, and is nobody's to write.
                    is_embedded = line.strip().startswith(EMBEDDED) and key != "output"
                    if not is_embedded and not self.roots.holds(path):
                        problems.append(
                            Problem(
                                key,
                                p.label,
                                f'"{line}" is outside the folders that this page may use (start it with --root FOLDER for each that it may).',
                            )
                        )
                    lines.append(str(path))
                found[key] = "\n".join(lines)
        return found, problems


def _form(tool: Tool) -> dict[str, Any]:
    fields = [_field(p) for p in tool.parameters.values() if p.key != BACKUPS]
    named = ("name", "label", "group", "summary", "inputs")
    return {**{name: getattr(tool, name) for name in named}, "fields": fields}


def _field(p: Parameter) -> dict[str, Any]:
    named = ("key", "label", "kind", "help", "allowed", "blank", "choices")
    return {
        **{name: value for name, value in asdict(p).items() if name in named},
        "allowed": p.allowed,
        "default": shown(p, p.default) if p.kind != "switch" else p.default,
        "when": {other: list(values) for other, values in p.when.items()},
    }
