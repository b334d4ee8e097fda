"""How a parameter is declared, and what the rest of the program can ask about it."""

from __future__ import annotations

import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo

Kind = Literal["text", "lines", "secret", "file", "folder", "model", "integer", "number", "switch", "choice"]

LARGEST = 2**63 - 1
"""Of the whole numbers: those of JSON's readers, and of PyTorch, end there."""


class Section(Enum):
    """The form's sections: (tab, heading), in the order in which they stand on the page."""

    BASE_MODEL = ("Source model", "Base model")
    TRAINED_MODEL = ("Source model", "Trained model")
    FOLDERS = ("Folders", "Folders")
    LORA = ("Basic", "LoRA")
    LENGTH = ("Basic", "Length of training")
    MACHINE = ("Basic", "Precision, seed and caching")
    LEARNING = ("Basic", "Learning rate and optimizer")
    RANK = ("Basic", "Network size")
    RESOLUTION = ("Basic", "Resolution and buckets")
    BLOCKS = ("Advanced", "Blocks of the U-Net")
    CAPTIONS = ("Advanced", "Captions and tokens")
    STEP = ("Advanced", "Training step")
    LOSS = ("Advanced", "Loss")
    NOISE = ("Advanced", "Noise")
    IMAGES = ("Advanced", "Images and buckets")
    SAVING = ("Advanced", "Saving and resuming")
    LOGGING = ("Advanced", "Logging")
    SAMPLES = ("Samples", "Sample images")

    @property
    def tab(self) -> str:
        return self.value[0]

    @property
    def heading(self) -> str:
        return self.value[1]


@dataclass(frozen=True)
class Parameter:
    """One declared parameter, as the form, presets, the command line and the docs see it.

    `when` maps another control's key to the values at which this one applies; elsewhere the
    form hides it. `blank` says what an empty box means, and is None where it means nothing.
    """

    key: str
    group: str
    name: str
    label: str
    section: Section
    help: str
    kind: Kind
    default: Any
    minimum: float | None
    maximum: float | None
    above: float | None
    choices: tuple[str, ...]
    when: Mapping[str, tuple[Any, ...]]
    blank: str | None
    placeholder: str

    @property
    def allowed(self) -> str:
        """What may be entered, in words."""
        if self.kind == "choice":
            return "one of " + ", ".join(choice or "empty" for choice in self.choices)
        if self.kind == "switch":
            return "on or off"
        if self.kind in ("integer", "number"):
            noun = "a whole number" if self.kind == "integer" else "a number"
            if self.above is not None:
                noun += f" above {_number(self.above)}"
            if self.minimum is not None and self.maximum is not None:
                noun += f" from {_number(self.minimum)} to {_number(self.maximum)}"
            elif self.minimum is not None:
                noun += f", {_number(self.minimum)} or more"
            return noun + (f"; empty: {self.blank}" if self.blank else "")
        return "text"


def _number(value: float) -> str:
    if isinstance(value, int):  # a float cannot hold all of a large one
        return f"{value:,}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def parameter(
    key: str,
    default: Any,
    label: str,
    section: Section,
    help: str,
    *,
    kind: Kind | None = None,
    when: Mapping[str, Any] | None = None,
    blank: str | None = None,
    placeholder: str = "",
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
) -> Any:
    """Declare a field: `key` is its name in a kohya_ss preset, the attribute its name in code."""
    shown = {k: v if isinstance(v, tuple) else (v,) for k, v in (when or {}).items()}
    extra: dict[str, Any] = {
        "label": label,
        "section": section,
        "help": help,
        "kind": kind,
        "when": shown,
        "blank": blank,
        "placeholder": placeholder,
        "minimum": ge,
        "maximum": le,
        "above": gt,
    }
    return Field(default, alias=key, ge=ge, gt=gt, le=le, json_schema_extra=extra)


class Group(BaseModel):
    """A frozen group of parameters. Values are coerced the way presets in the wild need it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_by_name=True,
        validate_by_alias=True,
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
        validate_default=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _coerce(cls, value: Any, info: Any) -> Any:
        field = cls.model_fields[info.field_name]
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("holds bytes or characters that are not text in UTF-8")
        kind = kind_of(field)
        coerced = coerce(value, kind, field)
        if kind in ("file", "folder", "model") and any(character < " " for character in str(coerced)):
            raise ValueError(
                "holds a line break, a tab or the like, which no path does. In JSON, a backslash is written twice, as in C:\\\\models"
            )
        unbounded = field.json_schema_extra["maximum"] is None  # type: ignore[index]
        if isinstance(coerced, int) and abs(coerced) > LARGEST and unbounded:
            raise ValueError(f"is further from 0 than {LARGEST}; lower it")
        return coerced


def coerce(value: Any, kind: Kind, field: FieldInfo) -> Any:
    """The typed form of what a preset holds: "8", 8 and 8.0 are one number, "" is not set."""
    if isinstance(value, str):
        value = value.strip() if kind != "lines" else value
    if kind == "choice" and isinstance(field.default, int):
        kind = "integer"
    if kind in ("integer", "number") and (value == "" or value is None):
        return None if _optional(field) else field.default
    if value is None and kind not in ("integer", "number"):
        return field.default if kind in ("switch", "choice") else ""
    if kind == "switch":
        if value == "":
            return False
        if isinstance(value, float):
            return bool(value)
    if kind == "integer" and isinstance(value, bool):
        return int(value)
    if kind == "integer" and isinstance(value, str):
        with suppress(ValueError):
            return int(value)
        try:
            number = float(value)
        except ValueError:
            return value
        return int(number) if number.is_integer() else value
    return value


def _optional(field: FieldInfo) -> bool:
    return type(None) in get_args(field.annotation)


def _plain(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        return next(a for a in get_args(annotation) if a is not type(None))
    return annotation


def kind_of(field: FieldInfo) -> Kind:
    """Which control shows this field, read off its type unless the declaration says."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    if extra["kind"]:
        return extra["kind"]  # type: ignore[return-value]
    plain = _plain(field.annotation)
    if get_origin(plain) is Literal:
        return "choice"
    if isinstance(plain, type) and issubclass(plain, bool):
        return "switch"
    if isinstance(plain, type) and issubclass(plain, int):
        return "integer"
    if isinstance(plain, type) and issubclass(plain, float):
        return "number"
    return "text"


def describe(group: str, name: str, field: FieldInfo) -> Parameter:
    """The declaration of one field as data."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict) and field.alias
    kind = kind_of(field)
    plain = _plain(field.annotation)
    return Parameter(
        key=field.alias,
        group=group,
        name=name,
        label=extra["label"],  # type: ignore[arg-type]
        section=extra["section"],  # type: ignore[arg-type]
        help=" ".join(str(extra["help"]).split()),
        kind=kind,
        default=field.default,
        minimum=extra["minimum"],  # type: ignore[arg-type]
        maximum=extra["maximum"],  # type: ignore[arg-type]
        above=extra["above"],  # type: ignore[arg-type]
        choices=tuple(map(str, get_args(plain))) if kind == "choice" else (),
        when=extra["when"],  # type: ignore[arg-type]
        blank=extra["blank"],  # type: ignore[arg-type]
        placeholder=extra["placeholder"],  # type: ignore[arg-type]
    )
