"""Presets on the shelf: those that come with the program, and the user's own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer import kohya
from trainer.errors import ConfigError, Problem

SHIPPED, OWN = "shipped", "own"
_NAME = re.compile(r"[\w(][\w .()+,-]{0,79}")


class Presets:
    """`shipped` is only read; `own` is where presets are saved. An id is "shipped/NAME" or "own/NAME"."""

    def __init__(self, shipped: Path, own: Path) -> None:
        self.folders = {SHIPPED: shipped, OWN: own}

    def ids(self) -> list[str]:
        """The user's own first, each shelf by name."""
        return [
            f"{shelf}/{path.stem}"
            for shelf in (OWN, SHIPPED)
            for path in sorted(self.folders[shelf].glob("*.json"), key=lambda path: path.stem.casefold())
            if _NAME.fullmatch(path.stem)
        ]

    def misnamed(self) -> list[str]:
        """The user's files that cannot be listed, since their names cannot be a preset's."""
        found = (path for path in self.folders[OWN].glob("*.json") if not _NAME.fullmatch(path.stem))
        return sorted(path.name.encode(errors="replace").decode() for path in found)  # a name may be no text

    def path(self, preset_id: str) -> Path:
        """The file of a preset. Raises ConfigError for a name that cannot be one."""
        shelf, _, name = preset_id.partition("/")
        if shelf not in self.folders or not _NAME.fullmatch(name):
            raise _no_name(name)
        return self.folders[shelf] / f"{name}.json"

    def load(self, preset_id: str) -> kohya.Preset:
        """Raises ConfigError when the file is missing or is no preset."""
        return kohya.load(self.path(preset_id))

    def taken(self, name: str) -> bool:
        return self.path(f"{OWN}/{name}").exists()

    def save(self, name: str, values: Mapping[str, Any], kept: Mapping[str, Any]) -> str:
        """Write one of the user's own presets. Returns its id.

        Raises ConfigError for a name that cannot be a file's, or when it cannot be written.
        """
        name = name.strip().removesuffix(".json")
        if not _NAME.fullmatch(name):
            raise _no_name(name)
        path = self.path(f"{OWN}/{name}")
        try:
            kohya.save(path, values, kept)
        except OSError as error:
            raise ConfigError(
                [Problem("preset", "Preset", f'"{path}" cannot be written: {error.strerror}.')]
            ) from error
        return f"{OWN}/{name}"

    def delete(self, preset_id: str) -> None:
        """Delete one of the user's own presets. Raises ConfigError for any other, or when it cannot be deleted."""
        path = self.path(preset_id)
        if not preset_id.startswith(f"{OWN}/"):
            message = f'"{path.stem}" comes with the program and stays; only presets of your own can be deleted.'
            raise ConfigError([Problem("preset", "Preset", message)])
        try:
            path.unlink()
        except OSError as error:
            raise ConfigError(
                [Problem("preset", "Preset", f'"{path}" cannot be deleted: {error.strerror}.')]
            ) from error


def _no_name(name: str) -> ConfigError:
    message = f'"{name}" cannot be a name; use letters, digits, blanks and . - _ + ( ), at most 80.'
    return ConfigError([Problem("preset", "Preset", message)])
