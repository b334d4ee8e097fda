"""What may be asked of the page's functions: the shape of each question, checked before the function sees it.

The page's own script always asks in these shapes; anything else was made by hand or by another program, and is
answered with status 422 and what is wrong with it. Whether a value makes sense (a run that exists, a folder
inside the roots) is for the function to say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from starlette.exceptions import HTTPException

from trainer.errors import LorawrightError

DEEPEST = 50
"""Levels of lists and objects inside each other: no preset has more than three."""

Entry = str | bool | int | float | None
Entries = dict[str, Entry]
Shape = Mapping[str, Any]

FORM: Shape = {"entries": Entries, "kept": dict[str, Any]}
RUN: Shape = {"run": str}
SHAPES: dict[str, Shape] = {
    "hello": {},
    "draft": FORM,
    "load": {"id": str, "entries?": Entries, "source?": str},
    "parse": {"text": str},
    "flat": FORM,
    "save": {**FORM, "name": str},
    "preset_delete": {"id": str},
    "check": FORM,
    "trial": FORM,
    "trial_stop": {},
    "outlook": {"entries": Entries},
    "dataset": {"entries": Entries, "find?": str, "tag?": str},
    "draws": {"entries": Entries, "batch": int},
    "thumbnails": {"entries": Entries, "paths": list[str]},
    "captions": {"how": str, "entries?": Entries},
    "inspect": {"entries": Entries},
    "upload": {"step": str, "name?": str, "id?": str, "target?": str, "size?": int, "offset?": int, "data?": str},
    "start": FORM,
    "enqueue": FORM,
    "sweep": {**FORM, "fields": list[list[str]]},
    "turn": {**RUN, "word": str},
    "resume": RUN,
    "files": RUN,
    "delete": RUN,
    "compare": {"runs": list[str]},
    "poll": {"run": str | None, "follow": str, "events": int, "log": int, "page?": str},
    "left": {"page": str},
    "control": {**RUN, "word": str},
    "runs": {},
    "settings": RUN,
    "download": {**RUN, "name": str},
    "checkpoints": RUN,
    "grid_start": {**RUN, "names": list[str], "at": str, "prompts": str},
    "grid": RUN,
    "listing": {"path": str, "files": bool},
    "tools": {},
    "tool_start": {"tool": str, "entries": Entries},
    "tool_stop": {},
    "tool_poll": {"offset": int},
    "captioner": {"path": str},
}
"""By the function's name what must be there; with "?" what may. What else is asked for with it is the function's to look at."""


def asked(name: str, function: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """The function, behind a look at its question. Raises HTTPException: 422 for a wrong shape, 400 for an error
    that a value caused."""
    shape = _model(name)

    # Gradio takes the name from the function and sets attributes on it, which a method refuses.
    def call(ask: Any) -> dict[str, Any]:
        try:
            _writable(ask)
            shape.model_validate(ask)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or name
            raise HTTPException(422, f"{where}: {first['msg']}.") from error
        except (ValueError, RecursionError) as error:
            raise HTTPException(422, f"{name} was asked with what is no JSON text: {error}.") from error
        try:
            return function(ask)
        except LorawrightError as error:
            raise HTTPException(400, str(error)) from error

    call.__name__ = name
    return call


def _model(name: str) -> type[BaseModel]:
    fields: dict[str, Any] = {
        key.removesuffix("?"): (kind, {} if key.endswith("?") else ...) for key, kind in SHAPES.get(name, {}).items()
    }
    return create_model(name, __config__=ConfigDict(strict=True, extra="ignore"), **fields)


def _writable(ask: Any) -> None:
    """Raises ValueError or RecursionError where a question could not be written into a file as it stands."""
    json.dumps(ask, allow_nan=False, ensure_ascii=False).encode()
    _shallow(ask, DEEPEST)


def _shallow(value: Any, levels: int) -> None:
    if levels == 0:
        raise ValueError(f"it has more than {DEEPEST} levels")
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _shallow(inner, levels - 1)
