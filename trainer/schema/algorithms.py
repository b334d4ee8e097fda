"""Which controls each LoRA type uses, as its own file under trainer/networks says.

The files are read, not imported: they need torch, and the schema must not.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

NETWORKS = Path(__file__).parent.parent / "networks"


def read() -> dict[str, tuple[str, frozenset[str]]]:
    """A LoRA type's label → its module's name and the preset keys that it uses, by its LABEL and USES."""
    found = {}
    for path in sorted(NETWORKS.glob("*.py")):
        said = {
            target.id: ast.literal_eval(node.value)
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name) and target.id in ("LABEL", "USES")
        }
        if said:
            found[said["LABEL"]] = path.stem, frozenset(said["USES"])
    return found


_FOUND = read()
MODULES: Mapping[str, str] = {label: module for label, (module, _) in _FOUND.items()}
USES: Mapping[str, frozenset[str]] = {label: keys for label, (_, keys) in _FOUND.items()}


def types_using(key: str) -> tuple[str, ...]:
    """The LoRA types that a control matters to; empty when it has nothing to do with the type."""
    using = tuple(label for label, keys in USES.items() if key in keys)
    return () if len(using) == len(USES) else using
