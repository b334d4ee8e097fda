"""A LoRA under another program's tensor names."""

from __future__ import annotations

from trainer.lora.converting import convert
from trainer.paths import resolve
from trainer.tools import Report, Tell
from trainer.tools.commands import Convert
from trainer.tools.lora_file import written
from trainer.tools.stream import finish


def run(options: Convert, tell: Tell) -> Report:
    """Convert. Raises ModelError for what the other naming cannot hold."""
    source = resolve(options.lora)
    out = written(options.output, [source])
    tell("converting", 0, 0)
    alphas = "rank" if options.alpha == "rank" else ""
    made, told_of_file = finish(out, lambda temporary: convert(source, temporary, options.names, alphas))
    lines = [f"{made.layers} layers: their names were {made.naming}, and are {options.names} now.", told_of_file]
    return Report(lines, path=str(out), warnings=made.notes)
