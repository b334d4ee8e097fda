"""Paths as people enter them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from trainer.errors import LorawrightError

EMBEDDED = "embedded:"
DEMO = Path(__file__).parent / "demo"
EMBEDDED_MODEL = EMBEDDED + "base.safetensors"


def resolve(text: str) -> Path:
    """The path that `text` means: `~` is the home folder, `embedded:name` a part of this package.

    Relative paths count from the current folder. Raises LorawrightError for an `embedded:` path
    that would leave the package.
    """
    text = text.strip().strip('"')
    if not text.startswith(EMBEDDED):
        return Path(os.path.expanduser(text))  # noqa: PTH111  unlike pathlib's, it leaves "~nobody" alone
    name = text.removeprefix(EMBEDDED).strip("/\\")
    path = Path(os.path.normpath(DEMO / name))
    if not path.is_relative_to(DEMO):
        raise LorawrightError(
            f'"{text}" leaves the folder of embedded files.', "After embedded: comes a name inside it."
        )
    return path


def base_model(text: str) -> Path:
    """The base model that `text` means; an empty one means the embedded model."""
    return resolve(text.strip() or EMBEDDED_MODEL)


def shown(path: Path | str) -> str:
    """A path for a message; what cannot be printed (bytes that are not UTF-8, line breaks, a terminal's orders) stands escaped."""
    text = str(path).replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[\x01-\x1f\x7f-\x9f]", lambda found: found[0].encode("unicode_escape").decode(), text)


def of_windows(text: str) -> bool:
    """Whether a path is one of a Windows machine, and this is none: it would name a file "C:…" in the current folder."""
    return os.name != "nt" and bool(re.match(r"[A-Za-z]:[\\/]|\\\\", text.strip().strip('"')))


def absent(text: str, noun: str) -> str:
    """The message for a path that leads nowhere: what exists of it, and what may be wrong."""
    if of_windows(text):
        return f'"{text}" is a path of a Windows machine. Enter where the {noun} is on this machine.'
    parent = resolve(text).absolute()
    while not os.path.isdir(parent) and parent != parent.parent:  # noqa: PTH112  answers False where pathlib raises
        parent = parent.parent
    return f'there is no {noun} "{shown(text)}"; of its path, "{shown(parent)}" exists. Correct the path.'
