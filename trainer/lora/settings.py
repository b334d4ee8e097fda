"""The entry of a LoRA file in which this program keeps every setting that the weights depend on, by preset key.

It repeats what the `ss_*` entries of sd-scripts say, and adds what those have no name for. Needs no torch.
"""

from __future__ import annotations

import json
import shlex
from functools import cache
from typing import Any

from trainer.schema import PARAMETERS, Config
from trainer.state import settings_of

ENTRY = "ss_lorawright_settings"
_PLACES = ("file", "folder", "model")  # of the machine that trained, which is nobody's business


@cache
def keys() -> frozenset[str]:
    """The settings that are kept."""
    kept = {key for key in settings_of(Config()) if PARAMETERS[key].kind not in _PLACES}
    return frozenset(kept - {"dim_from_weights"})  # without the file there are no ranks to take from it


def written(config: Config) -> str:
    """The settings as the entry's text, in the form that a preset has them in.

    Where ranks come from a file, the controls that it overrules are left out.
    """
    values = settings_of(config)
    by_file = {key for key, p in PARAMETERS.items() if "dim_from_weights" in p.when}
    kept = keys() - by_file if config.network.dim_from_weights else keys()
    told = {key: _entered(values[key]) for key in sorted(kept)}
    return json.dumps(told, ensure_ascii=False)


def read(text: str) -> dict[str, Any]:
    """What the entry says; nothing of keys that are not kept there, nor of text that is damaged."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    found = found if isinstance(found, dict) else {}
    return {key: value for key, value in found.items() if key in keys() and isinstance(value, str | int | float)}


def _entered(value: Any) -> Any:
    """A setting as it is entered: lists with commas, arguments as name=value, nothing for what is not set."""
    if isinstance(value, dict):
        return " ".join(
            shlex.quote(f"{name}={'None' if one is None else _entered(one)}") for name, one in value.items()
        )
    if isinstance(value, list):
        return ",".join(str(one) for one in value)
    return "" if value is None else value
