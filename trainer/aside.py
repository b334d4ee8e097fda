"""Files that give way to a later one of their name, and how they are found again. Needs no torch."""

from __future__ import annotations

import glob
import os
import time
from pathlib import Path


def set_aside(path: Path) -> Path | None:
    """Keep a file that is in the way, under a name with the time it was written. Returns that name."""
    try:
        written = time.localtime(path.stat().st_mtime)
    except FileNotFoundError:
        return None
    stamp = time.strftime("%Y%m%d-%H%M%S", written)
    for attempt in range(1, 1000):
        number = f"-{attempt}" if attempt > 1 else ""
        kept = path.with_name(f"{path.stem}-of-{stamp}{number}{path.suffix}")
        if not kept.exists():
            path.rename(kept)
            return kept
    raise FileExistsError(f"no free name to keep {path}")


def found_again(path: Path, written: int) -> Path | None:
    """The file that was written to `path` at that time (`written_at`), there or set aside; None where it is gone.

    With 0, where the time is not known, whatever has the name.
    """
    aside = f"{glob.escape(path.stem)}-of-*{glob.escape(path.suffix)}"
    if not written or written_at(path) == written:
        return path if path.is_file() else None
    return next((other for other in sorted(path.parent.glob(aside)) if written_at(other) == written), None)


def written_at(path: Path) -> int:
    """When a file was written, as its file system tells it (nanoseconds); 0 where there is none."""
    try:
        return os.stat(path).st_mtime_ns  # noqa: PTH116
    except OSError:
        return 0
