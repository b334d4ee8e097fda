"""Whether a LoRA file is what it should be, and which programs can load it."""

from __future__ import annotations

from trainer.errors import ModelError
from trainer.lora.verifying import verify
from trainer.paths import resolve
from trainer.tools import Report, Tell
from trainer.tools.commands import Read


def run(options: Read, tell: Tell) -> Report:
    """Verify. Raises ModelError with all that is wrong with the file."""
    tell("reading the file back", 0, 0)
    found = verify(resolve(options.lora))
    if found.problems:
        raise ModelError("\n".join(found.problems))
    loads = [("loads in", program, "") for program in found.loads_in]
    misses = [("not in", program, why) for program, why in found.passed_over.items()]
    rows = [*(("proved", check, "") for check in found.checks), *loads, *misses]
    return Report(["The file is sound."], columns=("", "What", "Why"), rows=rows, warnings=found.warnings)
