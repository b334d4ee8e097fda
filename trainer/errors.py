"""Every error that a user can cause.

LorawrightError
├── ConfigError     settings that cannot work; holds every problem found
├── ModelError      a base model, VAE or LoRA file that cannot be used
├── DataError       images or captions that cannot be used
├── StateError      a saved training state that cannot be resumed
└── TrainingError   training cannot go on (not a number, out of memory, disk full)

Each carries `hint`, the next thing to do; `kind` names it in events and on the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


class LorawrightError(Exception):
    """Base of all errors with a message for the user. `hint` says what to do about it."""

    kind = "error"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class ModelError(LorawrightError):
    kind = "model"


class DataError(LorawrightError):
    kind = "data"


class StateError(LorawrightError):
    kind = "state"


class TrainingError(LorawrightError):
    """`kind` is set per case: not_a_number, disk_full."""

    def __init__(self, kind: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.kind = kind


class Stopped(Exception):  # noqa: N818  no error: a wish
    """The user asked for a stop while there was nothing to save yet."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the settings: the control's key and label, and what to do."""

    key: str
    label: str
    message: str
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        where = f"{self.label} ({self.key}): " if self.key else ""
        return f"{where}{self.message}"


class ConfigError(LorawrightError):
    """The settings cannot work. `problems` lists all that is wrong, not only the first."""

    kind = "config"

    def __init__(self, problems: Sequence[Problem]) -> None:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"The settings have {len(problems)} problem(s):\n{lines}")
        self.problems = tuple(problems)
