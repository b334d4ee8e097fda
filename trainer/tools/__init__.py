"""Work on finished LoRA files and checkpoints, one file a tool.

`commands` declares each tool once: its options, its words, its example. The command line and the
page's Tools tab follow from that, and it imports no torch. A tool is a function

    run(options, tell) -> Report        tell(phase, done, total) is called as it goes on
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Report:
    """What a tool did or found: sentences, a table, and the file that it wrote.

    `warnings` are what the user should know before relying on the result. `preset`, in the form of a
    preset file, is what a LoRA says it was trained with.
    """

    lines: Sequence[str]
    path: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    warnings: Sequence[str] = ()
    preset: Mapping[str, Any] | None = None
