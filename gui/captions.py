"""Editing caption files: one, or many at once, each time with a backup first that can be taken back.

Images are only ever looked at. Of a caption file the first line is edited, which is what is trained
with; whatever stands below it stays.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gui.files import Roots
from trainer.check import settings
from trainer.data import folders
from trainer.data.edits import Edit, new_record, text_of, with_first, write_down
from trainer.data.folders import CAPTION_SUFFIXES, Picture, first_line
from trainer.errors import DataError, LorawrightError
from trainer.paths import DEMO, resolve, shown

LONGEST = 10_000
DONE = {
    "write": "what was typed",
    "replace": "text replaced",
    "add": "tags added",
    "remove": "tags removed",
    "prefix": "text put before",
    "suffix": "text put behind",
    "name": "captions from file names",
    "folder": "captions from folder names",
}
"""What each order has done, as Undo names it."""
MOST_EXAMPLES = 5


class RefusedError(Exception):
    """An edit that is not made; the message says why."""


class Captions:
    """Edits of the captions in the folders that a form names, inside the roots; backups lie in `backups`."""

    def __init__(self, roots: Roots, backups: Path) -> None:
        self.roots = roots
        self.backups = backups
        self._lock = threading.Lock()

    def edit(self, values: Mapping[str, Any], order: Mapping[str, Any]) -> dict[str, Any]:
        """What an order would change, and with `sure` the change: how many files, some before and after, where backups lie.

        "write": the caption of the image `path` becomes `text`. For all training images: "replace" `find` by
        `by`, "add" the tags in `text` in front or at the `end`, "remove" them, put `text` before ("prefix") or
        behind ("suffix") the caption, or take the caption from the file's "name" or its "folder": where there
        is no caption file, or for `all`. Raises RefusedError.
        """
        with self._lock:
            edits = self._edits(values, order)
            if order.get("sure") is True and edits:
                write_down(new_record(self.backups), DONE[str(order["how"])], edits)
                for edit in edits:
                    edit.write()
        examples = [[e.file.name, first_line(e.before or ""), first_line(e.after)] for e in edits[:MOST_EXAMPLES]]
        return {"count": len(edits), "examples": examples, "backups": str(self.backups)}

    def undoable(self) -> str:
        """What undo would take back, in words; "" for nothing."""
        newest = self._newest()
        return str(json.loads(newest.read_text(encoding="utf-8"))["what"]) if newest else ""

    def undo(self) -> dict[str, Any]:
        """Take the last edit back. Files that were changed since by others stay as they are, and are named."""
        with self._lock:
            newest = self._newest()
            if newest is None:
                raise RefusedError("There is nothing to take back.")
            record = json.loads(newest.read_text(encoding="utf-8"))
            left, count = [], 0
            for name, before, after in record["files"]:
                file = Path(name)
                if not self._ours(file) or _read(file) != after:
                    left.append(file.name)
                elif before is None:
                    file.unlink()
                    count += 1
                else:
                    Edit(file, after, before).write()
                    count += 1
            newest.rename(newest.with_suffix(".undone"))
        return {"count": count, "left": left}

    def locked(self, values: Mapping[str, Any]) -> str:
        """Why no caption of the form's image folder can be edited; "" where some can."""
        try:
            folder = resolve(str(values.get("train_data_dir") or "").strip() or ".")
            return "" if self._ours(folder / f"any{CAPTION_SUFFIXES[0]}") else self._not_ours(folder)
        except (LorawrightError, OSError, ValueError):  # a path that is none has no captions
            return ""

    def _newest(self) -> Path | None:
        return max(self.backups.glob("*.json"), default=None)

    def _ours(self, file: Path) -> bool:
        """Whether a file is one that may be written: a caption by its ending, no link, inside the roots."""
        shipped = DEMO.resolve() in file.resolve().parents  # the pictures of first-steps are part of the program
        allowed = file.suffix.lower() in CAPTION_SUFFIXES and not file.is_symlink() and self.roots.holds(file)
        return allowed and not shipped

    def _not_ours(self, file: Path) -> str:
        if DEMO.resolve() in file.resolve().parents:
            return (
                f'"{shown(file)}" is part of this program. Copy the images into a folder of your own, and enter that.'
            )
        if file.is_symlink():
            return f'"{file}" is a link. Edit the file that it leads to.'
        return f'"{file}" is outside the folders that this page may change (start it with --root FOLDER for each that it may).'

    def _edits(self, values: Mapping[str, Any], order: Mapping[str, Any]) -> list[Edit]:
        config, _ = settings(values)
        suffix = folders.caption_suffix(config.captions)
        if suffix.lower() not in CAPTION_SUFFIXES:
            raise RefusedError(f'Captions are edited in files ending in {", ".join(CAPTION_SUFFIXES)}, not "{suffix}".')
        pictures = folders.survey(config.folders, config.captions, decode=False).dataset.pictures
        if order["how"] == "write":
            chosen = [p for p in pictures if str(p.path) == order.get("path")]
            if not chosen:
                raise RefusedError("This image is not in the folders of the form.")
        else:
            chosen = [p for p in pictures if not p.regularisation]
        change = _change(order)
        edits: dict[Path, Edit] = {}  # two images whose names differ in their ending share one
        for picture in chosen:
            file = picture.caption_file or picture.path.with_name(picture.path.stem + suffix)
            if not self._ours(file):
                raise RefusedError(self._not_ours(file))
            before = _read(file)
            after = change(picture, before)
            created = before is None and after is not None
            if after is not None and (created or after != first_line(before or "")):
                edits[file] = Edit(file, before, with_first(before or "", after))
        return list(edits.values())


def _change(order: Mapping[str, Any]) -> Callable[[Picture, str | None], str | None]:
    """A picture and its file's text → its new caption; None leaves it alone."""
    how, text = order["how"], " ".join(str(order.get("text") or "").split())
    find, by = str(order.get("find") or ""), " ".join(str(order.get("by") or "").splitlines())
    if max(len(text), len(find), len(by)) > LONGEST:
        raise RefusedError(f"This is longer than {LONGEST} characters.")
    if how == "write":
        return lambda picture, before: text
    if how in ("name", "folder"):

        def take(picture: Picture, before: str | None) -> str | None:
            words = words_of(picture.path.stem) if how == "name" else picture.class_tokens or words_of(picture.folder)
            return words if words and (before is None or order.get("all")) else None

        return take
    if how == "replace" and find:
        return lambda picture, before: None if before is None else first_line(before).replace(find, by).strip()
    tags = tags_of(text)
    if how == "remove" and tags:
        return lambda picture, before: (
            None
            if before is None or not set(tags) & set(tags_of(before))
            else _joined(tag for tag in tags_of(before) if tag not in tags)
        )
    if (how == "add" and tags) or (how in ("prefix", "suffix") and text):

        def add(picture: Picture, before: str | None) -> str | None:
            # Where there is no file, the folder's name is the caption, and shall stay part of it.
            caption = first_line(before) if before is not None else picture.caption or ""
            return (
                _with_tags(caption, tags, bool(order.get("end"))) if how == "add" else _with_words(caption, text, how)
            )

        return add
    raise RefusedError("Enter what is to be found, or the tag.")


def words_of(name: str) -> str:
    """What a file's name says: blue_cat-03 → blue cat; "" where it is only a number."""
    words = re.sub(r"[\s_-]+", " ", name).strip()
    return re.sub(r"^(\d+( |$))+|( \d+| ?\(\d+\))+$", "", words).strip()


def _with_tags(caption: str, wanted: Sequence[str], at_end: bool) -> str | None:
    """A caption with those of the wanted tags that it lacks; None where it has them all."""
    tags = tags_of(caption)
    lacking = [tag for tag in dict.fromkeys(wanted) if tag not in tags]
    if not lacking:
        return None
    return _joined([*tags, *lacking] if at_end else [*lacking, *tags])


def _with_words(caption: str, words: str, how: str) -> str | None:
    """A caption with words before or behind it, a blank between where there is no comma; None where they are there."""
    if how == "prefix":
        return None if caption.startswith(words) else f"{words} {caption}".strip()
    blank = "" if words[0] in ",.;:!?" else " "
    return None if caption.endswith(words) else f"{caption}{blank}{words}".strip()


def tags_of(text: str) -> list[str]:
    """What stands between the commas of a caption."""
    return [tag.strip() for tag in first_line(text).split(",") if tag.strip()]


def _joined(tags: Any) -> str:
    return ", ".join(tags)


def _read(file: Path) -> str | None:
    """A caption file's text; None where there is none. Raises RefusedError when it cannot be read."""
    try:
        return text_of(file)
    except DataError as error:
        raise RefusedError(str(error)) from error
