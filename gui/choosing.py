"""Choosing among a run's saved files by pictures: the tool "grid" in the run's own folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gui import history
from gui.tools import Tools
from trainer import kohya
from trainer.errors import ConfigError, Problem
from trainer.run import Run
from trainer.tools import contact

TOOL = "grid"


def offer(run: Run) -> dict[str, Any]:
    """What may be drawn: the files that are still there, oldest first, and the run's own prompts."""
    try:
        prompts = str(kohya.load(run.config).values.get("sample_prompts") or "")
    except ConfigError:
        prompts = ""  # they can be typed in; what is wrong with the settings is told when they are drawn with
    return {"files": history.checkpoints(run), "prompts": prompts}


def start(tools: Tools, run: Run, names: Sequence[str], given: Mapping[str, Any]) -> list[Problem]:
    """Draw the run's files of these names. Returns what stands in the way; empty when it is being drawn."""
    paths = [str(file["path"]) for file in history.checkpoints(run) if file["name"] in names]
    entries = {"loras": "\n".join(paths), "at": str(given["at"]), "prompts": str(given["prompts"])}
    return tools.begin(TOOL, {**entries, "settings": str(run.config), "output": str(run.grid)})


def poll(tools: Tools, run: Run) -> dict[str, Any]:
    """The run's grid and how far it is: `state` as a tool's, or none; `there`: the pictures that are drawn."""
    job = tools.poll(0)
    if job.get("tool") != TOOL or job["entries"].get("output") != str(run.grid):
        job = {"state": "none"}
    index = contact.read(run.grid)
    there = sorted(name for name in contact.names(index) if (run.grid / name).is_file())
    rows = [Path(row).name for row in index["rows"]] if index else []
    return {**job, "grid": index and {**index, "rows": rows}, "there": there, "folder": str(run.grid)}
