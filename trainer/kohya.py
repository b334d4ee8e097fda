"""Presets: flat JSON with kohya_ss's keys ↔ values that the schema knows.

Nothing is dropped: a key that no field knows is kept and written back, and every change of
spelling is reported. Values are handed on as they stand; the schema gives them their types.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from trainer import jsontext
from trainer.errors import ConfigError, Problem
from trainer.run import write_whole
from trainer.schema import PARAMETERS, older, without_effect
from trainer.schema.overrides import KEY, SECRET, from_command_line, with_additional

DESCRIPTION = "description"
MOST_NOTES = 5
"""Of settings without effect; more would hide what else is told."""

# Known to kohya_ss and not supported (yet); beside each the values at which it changes nothing.
PENDING: dict[str, tuple[Any, ...]] = {
    "dynamo_mode": ("default",),
    "dynamo_use_dynamic": (),
    "dynamo_use_fullgraph": (),
    "log_tracker_config": (),
    "lr_scheduler_type": (),
    "main_process_port": (),
    "multi_gpu": (True,),
    "num_machines": (1, "1"),
}
_OFF: tuple[Any, ...] = (False, 0, "", None, "0", "0.0", "False")


@dataclass(frozen=True)
class Note:
    """What became of one key of a preset."""

    what: Literal["converted", "not supported", "unknown", "without effect"]
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


@dataclass(frozen=True)
class Preset:
    """`values` for the schema's keys as the file holds them; `kept` is everything else."""

    values: dict[str, Any]
    kept: dict[str, Any] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()

    @property
    def description(self) -> str:
        return str(self.kept.get(DESCRIPTION, ""))


def read(flat: Mapping[str, Any]) -> Preset:
    """Sort a preset's keys into those the schema knows and the rest, older spellings mapped."""
    values: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    notes: list[Note] = []
    for key, value in flat.items():
        known = older.KEYS.get(key, key)
        if known not in PARAMETERS:
            kept[key] = value
            note = _note(key, value, flat)
            if note:
                notes.append(note)
            continue
        if known != key:
            if known in flat:
                kept[key] = value
                notes.append(Note("converted", key, f"left aside, since its newer name {known} is there too"))
                continue
            notes.append(Note("converted", key, f"is now called {known}"))
        newer = older.newer_value(PARAMETERS[known], value)
        if newer is not value:
            notes.append(Note("converted", key, f"{value!r} is read as {newer!r}"))
        values[known] = newer
    if flat.get("use_8bit_adam") in (True, "true", "True") and "optimizer" not in flat:
        values["optimizer"] = "AdamW8bit"
        notes.append(Note("converted", "use_8bit_adam", "is now optimizer AdamW8bit"))
    return Preset(values, kept, tuple(notes))


def unused(values: Mapping[str, Any]) -> list[Note]:
    """What is set and has no effect with the other settings; one note for all where they are many."""
    found = without_effect(values)
    if len(found) > MOST_NOTES:
        labels = ", ".join(f"{PARAMETERS[key].label} ({key})" for key in found)
        return [Note("without effect", "", f"{len(found)} settings change nothing with the others: {labels}.")]
    return [Note("without effect", key, message) for key, message in found.items()]


def overridden(preset: Preset, words: Sequence[str]) -> Preset:
    """The preset with the settings of a command line (`--key value`) in place of its own.

    They go before its Additional parameters too, which are worked into the values then. Raises
    ConfigError with everything that is wrong with the words.
    """
    given = from_command_line(words, PARAMETERS)
    if not given:
        return preset
    values, problems = with_additional(preset.values, PARAMETERS)
    if problems:
        raise ConfigError(problems)
    return replace(preset, values={**values, KEY: "", **given})


def _note(key: str, value: Any, flat: Mapping[str, Any]) -> Note | None:
    if key in (DESCRIPTION, "use_8bit_adam"):
        return None
    if key in PENDING:
        if value in _OFF or value in PENDING[key]:
            return None
        return Note("not supported", key, "is not supported yet; the value is kept and has no effect")
    near = difflib.get_close_matches(key, PARAMETERS.keys() - flat.keys(), 1, cutoff=0.8)
    asks = f" (did you mean {near[0]}?)" if near else ""
    return Note("unknown", key, f"is not a parameter of LoRA training here{asks}; it is kept and has no effect")


def load(path: Path) -> Preset:
    """Read a preset file. Raises ConfigError when it is missing, is no JSON object, or has a key twice."""
    try:
        flat = jsontext.read(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([_file_problem(f'"{path}" cannot be read: {error.strerror}.')]) from error
    except json.JSONDecodeError as error:
        raise ConfigError([_file_problem(f'"{path}", line {error.lineno}: {error.msg}.')]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([_file_problem(f'"{path}" is no text in UTF-8. Save it as UTF-8.')]) from error
    if not isinstance(flat, dict):
        raise ConfigError([_file_problem(f'"{path}" holds a {type(flat).__name__}, not an object {{"key": value}}.')])
    return read(flat)


def _file_problem(message: str) -> Problem:
    return Problem("preset", "Preset file", message)


def save(path: Path, values: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
    """Write a preset whole or not at all. Secrets are left out."""
    flat = {k: v for k, v in {**kept, **values}.items() if k not in SECRET}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(flat, indent=2, ensure_ascii=False) + "\n").encode())
