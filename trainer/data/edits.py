"""Changes to caption files, written down before they are made, so that they can be taken back."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import DataError
from trainer.paths import shown
from trainer.run import write_whole


@dataclass(frozen=True)
class Edit:
    """One caption file, and its text before (None: there is no file) and after."""

    file: Path
    before: str | None
    after: str

    def write(self) -> None:
        write_whole(self.file, self.after.encode("utf-8"))


def new_record(folder: Path) -> Path:
    """Where the next changes are written down; by their names the newest is the last."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns()}.json"


def write_down(record: Path, what: str, edits: Sequence[Edit]) -> None:
    """Keep what the files were, under words that say what was done."""
    count = f"{len(edits)} caption file{'' if len(edits) == 1 else 's'}"
    files = [[str(edit.file), edit.before, edit.after] for edit in edits]
    write_whole(record, json.dumps({"what": f"{what} in {count}", "files": files}, ensure_ascii=False).encode())


def text_of(file: Path) -> str | None:
    """A caption file's text; None where there is none. Raises DataError when it is no text."""
    try:
        return file.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise DataError(f'"{shown(file)}" is not UTF-8 text.', "Save it as such first.") from error


def with_first(text: str, caption: str) -> str:
    """A file's text with another caption; what stands below it stays."""
    first, *below = text.removeprefix("\ufeff").lstrip().splitlines(keepends=True) or [""]
    return caption + first[len(first.rstrip("\r\n")) :] + "".join(below)
