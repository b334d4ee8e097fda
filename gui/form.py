"""The form: one widget a parameter, and the way between what a widget shows and what a preset holds.

A widget shows text, or on/off. A preset holds JSON: numbers as numbers wherever the text is one,
and as the text where it is not, so that the schema can say what is wrong with it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from pydantic import BaseModel, ValidationError

from gui.gradio_import import gr
from trainer.errors import ConfigError, Problem
from trainer.schema import PARAMETERS, Config, Parameter, Section, parse
from trainer.schema.declare import LARGEST

Shown = str | bool

QUICK_PICK = "model_list"
CUSTOM = "custom"
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def shown(parameter: Parameter, value: Any) -> Shown:
    """What the widget shows for a preset's value. A switch that cannot read it shows its default.

    The value is read for itself: what it means beside other settings is the check's to say.
    """
    if parameter.kind == "switch":
        try:
            return bool(getattr(group(parameter).model_validate({parameter.key: value}), parameter.name))
        except ValidationError:
            return bool(parameter.default)
    if value is None:
        return ""
    if isinstance(value, float) and not math.isnan(value):
        if value.is_integer() and abs(value) < 1e15:
            return str(int(value))
        return repr(value).replace("e-0", "e-").replace("e+0", "e")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def group(parameter: Parameter) -> type[BaseModel]:
    """The part of the settings that a parameter belongs to."""
    annotation = Config.model_fields[parameter.group].annotation
    assert isinstance(annotation, type)
    return annotation


def held(parameter: Parameter, entry: Any) -> Any:
    """What a preset holds for what the widget shows."""
    numeric = parameter.kind in ("integer", "number") or (
        parameter.kind == "choice" and isinstance(parameter.default, int)
    )
    if not numeric or not isinstance(entry, str):
        return entry
    text = entry.strip()
    if not NUMBER.fullmatch(text):
        return text
    number = float(text)
    if not math.isfinite(number):
        return text
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text) if abs(int(text)) <= LARGEST else text  # of a larger one no JSON can be made
    return int(number) if parameter.kind == "integer" and number.is_integer() else number


def fill(values: Mapping[str, Any]) -> dict[str, Shown]:
    """What every widget shows for a preset. What the preset does not name has its default."""
    return {key: shown(p, values.get(key, p.default)) for key, p in PARAMETERS.items()}


OWN = (
    *("pretrained_model_name_or_path", "model_list", "vae"),
    *("train_data_dir", "reg_data_dir", "output_dir", "logging_dir", "output_name", "caption_extension"),
    *("training_comment", "metadata_title", "metadata_author", "metadata_description", "metadata_license"),
    *("metadata_tags", "sample_prompts"),
)
"""What is trained on what, and under which name: a preset that says only how to train does not take it away."""


def entered(entries: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """What the widgets show of the user's own: not the defaults, nor what the preset `source` has put there."""
    given, blank = fill(source), fill({})
    return {key: entries[key] for key in OWN if key in entries and entries[key] not in (given[key], blank[key])}


def read(entries: Mapping[str, Any]) -> dict[str, Any]:
    """A preset's values for what the widgets show. Names that are no parameter's are passed over."""
    return {key: held(p, entries[key]) for key, p in PARAMETERS.items() if key in entries}


def problems(values: Mapping[str, Any]) -> list[Problem]:
    """What the schema finds wrong with the values: types, bounds, combinations."""
    try:
        parse(values)
    except ConfigError as error:
        return list(error.problems)
    return []


def table() -> list[dict[str, Any]]:
    """All that the page's script needs to know of each parameter, in the form's order."""
    return [
        {
            "key": p.key,
            "label": p.label,
            "tab": p.section.tab,
            "section": p.section.heading,
            "kind": "choice" if p.key == QUICK_PICK else p.kind,
            "default": shown(p, p.default),
            "help": p.help,
            "allowed": p.allowed,
            "blank": p.blank,
            "when": {other: list(values) for other, values in p.when.items()},
        }
        for p in PARAMETERS.values()
    ]


def tab_id(tab: str) -> str:
    """The element id of a tab: "Source model" → "tab-source-model"."""
    return "tab-" + tab.lower().replace(" ", "-")


def field_id(key: str) -> str:
    """The element id of a parameter's widget."""
    return f"field-{key}"


def widgets(tab: str) -> Iterator[tuple[str, gr.components.Component]]:
    """Build a tab's sections here and now; yields (key, widget) in the form's order."""
    for section, members in groupby(PARAMETERS.values(), key=lambda p: p.section):
        if section.tab == tab:
            yield from _section(section, list(members))


def _section(section: Section, members: list[Parameter]) -> Iterator[tuple[str, gr.components.Component]]:
    with gr.Column(elem_classes="section"):
        gr.HTML(f"<h3>{section.heading}</h3>", apply_default_css=False)
        for parameter in members:
            yield parameter.key, _widget(parameter)


def _widget(parameter: Parameter) -> gr.components.Component:
    value = shown(parameter, parameter.default)
    common: dict[str, Any] = {
        "label": parameter.label,
        "elem_id": field_id(parameter.key),
        "elem_classes": ["field", f"kind-{parameter.kind}"],
        "show_label": True,
        "min_width": 0,
    }
    if parameter.kind == "switch":
        return gr.Checkbox(value=bool(value), **common)
    if parameter.kind == "choice" or parameter.key == QUICK_PICK:
        # A value that is not among the choices must stay visible, so that a check can name it.
        choices = [CUSTOM] if parameter.key == QUICK_PICK else list(parameter.choices)
        return gr.Dropdown(choices, value=str(value), allow_custom_value=True, **common)
    if parameter.kind == "secret":
        return gr.Textbox(value="", type="password", placeholder=_hint(parameter), **common)
    lines = 5 if parameter.kind == "lines" else 1
    return gr.Textbox(
        value=str(value), lines=lines, max_lines=4 * lines if lines > 1 else 1, placeholder=_hint(parameter), **common
    )


def _hint(parameter: Parameter) -> str:
    """What stands in an empty box."""
    if parameter.placeholder:
        return parameter.placeholder
    if parameter.blank:
        return f"empty: {parameter.blank}"
    if parameter.kind in ("integer", "number"):
        return f"empty: {shown(parameter, parameter.default)}"
    return ""
