"""What a LoRA was trained on and with, and the preset to train again."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.lora.inspecting import inspect
from trainer.tools import Report, Tell
from trainer.tools.commands import Read

MOST_TAGS = 20  # of a folder


def run(options: Read, tell: Tell) -> Report:
    """Inspect. Raises ModelError when the file is no LoRA."""
    tell("reading the file", 0, 0)
    found = inspect(options.lora)
    tags = [
        (f"Tags in {folder}", ", ".join(f"{tag} ({count})" for tag, count in _most(counts)))
        for folder, counts in found.tags.items()
    ]
    defaults = [("Not told: as by default", ", ".join(found.defaults))] if found.defaults else []
    return Report(
        found.about.notes,
        columns=("What", "Value"),
        rows=[*found.facts, *tags, *defaults],
        warnings=found.unsaid,
        preset=found.preset,
    )


def _most(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """The tags seen most."""
    return sorted(counts.items(), key=lambda pair: -pair[1])[:MOST_TAGS]
