"""What a folder of pictures to choose a checkpoint by holds; the page reads it, too. Needs no torch.

grid.json     rows: LoRA files; at: strengths; prompts with their seeds and sizes, and the lines that they
              were read from; pictures: names by row, strength and prompt
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.run import write_whole

INDEX = "grid.json"


def read(folder: Path) -> dict[str, Any] | None:
    """What the pictures in a folder show; None where there are none, or the file of that name is another's."""
    try:
        found = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and {"rows", "at", "pictures"} <= set(found) else None


def write(folder: Path, index: Mapping[str, Any]) -> None:
    """Say what the pictures will show, and take away those of the last grid that are no part of this one."""
    for name in names(read(folder)) - names(index):
        (folder / name).unlink(missing_ok=True)
    write_whole(folder / INDEX, json.dumps(index).encode())


def names(index: Mapping[str, Any] | None) -> set[str]:
    """The pictures' file names."""
    return {Path(name).name for row in (index or {}).get("pictures", ()) for cell in row for name in cell}
