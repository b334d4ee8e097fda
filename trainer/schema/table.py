"""The table of all parameters, for the docs and the command line."""

from __future__ import annotations

from itertools import groupby

from trainer.schema import PARAMETERS, Parameter


def markdown() -> str:
    """Every parameter by tab and section: label, preset key, default, what is allowed, what it does."""
    parts = [
        "# Parameters",
        "",
        "Made from the schema by `python -m trainer parameters > docs/parameters.md`; a test fails when it is stale.",
        "The key is the parameter's name in a preset (kohya_ss's own) and on the command line (`--key value`).",
    ]
    for section, group in groupby(PARAMETERS.values(), key=lambda p: p.section):
        parts += ["", f"## {section.tab}: {section.heading}", ""]
        parts += ["| label | key | default | allowed | what it does |", "|---|---|---|---|---|"]
        parts += [_row(parameter) for parameter in group]
    return "\n".join(parts) + "\n"


def _row(parameter: Parameter) -> str:
    default = {True: "on", False: "off", None: "empty", "": "empty"}.get(parameter.default, parameter.default)
    if parameter.kind in ("integer", "number") and parameter.default is not None:
        default = f"{parameter.default:g}"
    cells = (parameter.label, f"`{parameter.key}`", str(default), parameter.allowed, parameter.help)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
