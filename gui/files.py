"""The one gate for paths: what of the machine the page may list, show, write and hand out.

Every path that comes from the browser, or from a file that a run wrote, goes through `inside`, which follows
links first. Where it must lie:

- what is listed, what a tool reads or writes, a caption that is edited: in the roots (`Roots`);
- a thumbnail: in an image folder that the form names. The form may name folders and models anywhere, as a
  training reads them with the rights of who started the page; shown of them are names, captions, small pictures;
- what the browser fetches: a run's samples in its folder, its log and settings, and the LoRA files that it saved
  there or in its output folder; a picture that a tool drew inside the roots.

Presets and runs are asked for by name, which holds no path.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MOST = 500
MODEL_ENDINGS = (".safetensors", ".ckpt", ".pt")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
DIFFUSERS = "model_index.json"


def inside(path: Path, folders: Iterable[Path]) -> bool:
    """Whether a path, with its links followed, is one of the folders or lies in one."""
    try:
        real = path.resolve()
        return any(real == folder or folder in real.parents for folder in (each.resolve() for each in folders))
    except (OSError, ValueError, RuntimeError):  # NUL, a name too long, links in a circle
        return False


@dataclass(frozen=True)
class Entry:
    """One line of a listing. `what` is folder, model (a file, or a folder in diffusers' layout) or file."""

    name: str
    path: str
    what: str


class Roots:
    """The folders that the page may look into, and nothing outside them, whatever a link points to."""

    def __init__(self, folders: Sequence[Path]) -> None:
        found = dict.fromkeys(folder.expanduser().resolve() for folder in folders)
        self.folders = [folder for folder in found if folder.is_dir()]

    def holds(self, path: Path) -> bool:
        """Whether the path, with its links followed, lies in one of the roots."""
        return inside(path, self.folders)

    def listing(self, text: str, files: bool) -> dict[str, Any]:
        """A folder's content: folders first, at most 500 lines; the roots for "".

        `text` may name a file or something that does not exist: the nearest folder above is listed.
        Outside the roots the list of roots is given, and `refused` says so.
        """
        path = Path(os.path.abspath(os.path.expanduser(text))) if text.strip() else None  # noqa: PTH100, PTH111  links stay links
        while path is not None and not path.is_dir():
            path = path.parent if path != path.parent else None
        if path is None or not self.holds(path):
            entries = [Entry(str(root), str(root), "folder") for root in self.folders]
            refused = (
                ""
                if path is None
                else f'"{path}" is outside the folders that this page may show (start it with --root FOLDER for each that it may).'
            )
            return {
                "path": "",
                "parent": None,
                "entries": [asdict(e) for e in entries],
                "more": 0,
                "images": 0,
                "refused": refused,
            }
        try:
            entries, images = _entries(path, files)
        except OSError as error:
            return {
                "path": str(path),
                "parent": str(path.parent) if self.holds(path.parent) else "",
                "entries": [],
                "more": 0,
                "images": 0,
                "refused": f'"{path}" cannot be read: {error.strerror}.',
            }
        return {
            "path": str(path),
            "parent": str(path.parent) if self.holds(path.parent) else "",
            "entries": [asdict(e) for e in entries[:MOST]],
            "more": max(0, len(entries) - MOST),
            "images": images,
            "refused": "",
        }

    def models(self) -> list[str]:
        """Base models in a folder called `models` in a root, two levels deep."""
        found = dict.fromkeys(
            str(path) for root in self.folders for path in _models(root / "models", depth=2) if self.holds(path)
        )
        return sorted(found)[:MOST]


def _entries(folder: Path, files: bool) -> tuple[list[Entry], int]:
    entries: list[Entry] = []
    images = 0
    with os.scandir(folder) as found:
        for item in found:
            images += item.name.lower().endswith(IMAGE_ENDINGS)
            if item.name.startswith("."):
                continue
            if item.is_dir():
                model = (folder / item.name / DIFFUSERS).is_file()
                entries.append(Entry(item.name, item.path, "model" if model and files else "folder"))
            elif files and item.name.lower().endswith(MODEL_ENDINGS):
                entries.append(Entry(item.name, item.path, "file"))
    rank = {"folder": 0, "model": 1, "file": 2}
    entries.sort(key=lambda e: (rank[e.what], e.name.casefold()))
    return entries, images


def _models(folder: Path, depth: int) -> Iterator[Path]:
    try:
        items = sorted(folder.iterdir())
    except OSError:
        return
    for item in items:
        if item.is_dir():
            if (item / DIFFUSERS).is_file():
                yield item
            elif depth > 1:
                yield from _models(item, depth - 1)
        elif item.suffix.lower() in MODEL_ENDINGS:
            yield item
