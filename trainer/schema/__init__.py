"""Every parameter, declared once. Importable without torch.

`Config` is the typed, frozen form of the settings; `PARAMETERS` describes each field for the
form, presets, the command line and the docs; `parse` turns a preset's flat dict into a Config
or tells everything that is wrong with it.

To add a parameter: declare a field in the group that it belongs to, and read it where it acts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.errors import ConfigError, Problem
from trainer.schema import algorithms
from trainer.schema.blocks import Blocks
from trainer.schema.data import Captions, Data
from trainer.schema.declare import Group, Parameter, Section, describe
from trainer.schema.model import Folders, Model, Saving
from trainer.schema.network import Network
from trainer.schema.objective import Objective
from trainer.schema.optim import Optim
from trainer.schema.overrides import with_additional
from trainer.schema.rules import claimed_family, conflicts, idle
from trainer.schema.samples import Samples
from trainer.schema.tracking import Tracking
from trainer.schema.training import Training

__all__ = [
    "PARAMETERS",
    "Config",
    "Parameter",
    "Section",
    "defaults",
    "parse",
    "problem_with",
    "read",
    "shown",
    "without_effect",
]


class Config(BaseModel):
    """All settings of one run, by the part of the trainer that reads them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Model = Field(default_factory=Model)
    folders: Folders = Field(default_factory=Folders)
    network: Network = Field(default_factory=Network)
    blocks: Blocks = Field(default_factory=Blocks)
    training: Training = Field(default_factory=Training)
    saving: Saving = Field(default_factory=Saving)
    captions: Captions = Field(default_factory=Captions)
    data: Data = Field(default_factory=Data)
    optim: Optim = Field(default_factory=Optim)
    objective: Objective = Field(default_factory=Objective)
    samples: Samples = Field(default_factory=Samples)
    tracking: Tracking = Field(default_factory=Tracking)


def _groups() -> dict[str, type[Group]]:
    return {name: field.annotation for name, field in Config.model_fields.items()}  # type: ignore[misc]


def _in_order_of_the_form() -> dict[str, Parameter]:
    declared = [
        describe(group, name, field) for group, kind in _groups().items() for name, field in kind.model_fields.items()
    ]
    order = list(Section)
    return {p.key: _by_type(p) for p in sorted(declared, key=lambda p: order.index(p.section))}


def _by_type(parameter: Parameter) -> Parameter:
    """A parameter that only some LoRA types use applies to those."""
    types = algorithms.types_using(parameter.key)
    return replace(parameter, when={"LoRA_type": types, **parameter.when}) if types else parameter


PARAMETERS: Mapping[str, Parameter] = _in_order_of_the_form()


SAME_AS_UNSET: Mapping[str, tuple[float, ...]] = {
    "lr_scheduler_num_cycles": (1,),
    "lr_scheduler_power": (1,),
    "max_bucket_reso": (1024, 2048),
    "multires_noise_discount": (0.3,),
}
"""What presets of kohya_ss hold where nobody touched a control, beside its default here."""


def defaults() -> dict[str, Any]:
    """The flat preset of a form that nobody has touched: key → value, as JSON."""
    return {key: "" if p.default is None else p.default for key, p in PARAMETERS.items()}


def shown(key: str, values: Mapping[str, Any]) -> bool:
    """Whether a control applies, given the others' values."""
    when = PARAMETERS[key].when
    return all(values.get(other, PARAMETERS[other].default) in allowed for other, allowed in when.items())


def parse(values: Mapping[str, Any]) -> Config:
    """The typed settings for a flat dict of kohya_ss keys; a missing key has its default.

    Raises ConfigError with every problem, each naming its control, the value and what is allowed.
    """
    config, problems = read(values)
    problems = problems or [p for p in conflicts(config) if p.severity == "error"]
    if problems:
        raise ConfigError(problems)
    return config


def read(values: Mapping[str, Any]) -> tuple[Config, list[Problem]]:
    """The settings with the default in place of each value that is not allowed, and why it is not."""
    config, problems = _typed(values)
    return _with_the_familys_defaults(_with_what_the_type_uses(config)), problems


def without_effect(values: Mapping[str, Any], asked: Collection[str] = ()) -> dict[str, str]:
    """What is set and changes nothing, by key, with the value and the reason in words; of those `asked` for, defaults too."""
    config, _ = _typed(values)
    entered, _ = with_additional(values, PARAMETERS)
    reasons = dict(idle(_with_what_the_type_uses(config)))
    reasons |= {p.key: why for p in PARAMETERS.values() if (why := _unmet(p, config)) and p.kind != "secret"}
    found = {}
    for key, reason in reasons.items():
        if key in asked or _is_set(key, config):
            found[key] = f"{_spoken(entered.get(key, _value(config, key)))} has no effect: {reason}."
    return found


def _unmet(parameter: Parameter, config: Config) -> str:
    """The first of a control's conditions that the settings do not meet, in words; "" where they meet all."""
    for other, allowed in parameter.when.items():
        if (value := _value(config, other)) not in allowed:
            told = f"{PARAMETERS[other].label} ({other})"
            return f"{told} {value} does not use it" if other == "LoRA_type" else f"{told} is {_spoken(value)}"
    return ""


def _is_set(key: str, config: Config) -> bool:
    """Whether a control says anything: it is neither off nor as it was before somebody touched it."""
    value = _value(config, key)
    same = {"learning_rate": (config.optim.unet_lr,), **SAME_AS_UNSET}.get(key, ())
    return bool(value) and value != _value(Config(), key) and value not in same


def _value(config: Config, key: str) -> Any:
    return getattr(getattr(config, PARAMETERS[key].group), PARAMETERS[key].name)


def _spoken(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _typed(values: Mapping[str, Any]) -> tuple[Config, list[Problem]]:
    parts: dict[str, Group] = {}
    values, problems = with_additional(values, PARAMETERS)
    problems += [
        Problem(key, "", f"unknown parameter; the value was {values[key]!r}") for key in values if key not in PARAMETERS
    ]
    for group, kind in _groups().items():
        given = {key: values[key] for key, p in PARAMETERS.items() if p.group == group and key in values}
        try:
            parts[group] = kind.model_validate(given)
        except ValidationError as error:
            found = [_not_allowed(e, given) for e in error.errors()]
            wrong = {p.key for p in found}
            parts[group] = kind.model_validate({key: value for key, value in given.items() if key not in wrong})
            problems += found
    return Config(**parts), problems  # type: ignore[arg-type]


def _with_what_the_type_uses(config: Config) -> Config:
    """The settings with the default for every control that the LoRA type does not use, as if it were not there."""
    for p in _unused(config):
        group = getattr(config, p.group)
        unset = getattr(type(group)(), p.name)
        config = config.model_copy(update={p.group: group.model_copy(update={p.name: unset})})
    return config


def _unused(config: Config) -> list[Parameter]:
    """The controls that the LoRA type does not use."""
    type = config.network.type
    return [p for p in PARAMETERS.values() if type not in p.when.get("LoRA_type", (type,))]


def _with_the_familys_defaults(config: Config) -> Config:
    """The settings with the family's own value where an empty one leaves it to that."""
    largest = config.data.max_bucket_side or 2 * claimed_family(config).resolution
    return config.model_copy(update={"data": config.data.model_copy(update={"max_bucket_side": largest})})


def problem_with(key: str, message: object, severity: Literal["error", "warning"] = "error") -> Problem:
    """Something wrong with a control, under the label that it has in the form."""
    return Problem(key, PARAMETERS[key].label, str(message), severity)


def _not_allowed(error: Any, given: Mapping[str, Any]) -> Problem:
    key = str(error["loc"][0])
    if error["type"] == "value_error":
        return problem_with(key, error["ctx"]["error"])
    value = given.get(key, PARAMETERS[key].default)
    return problem_with(key, f'"{value}" is not allowed; it must be {PARAMETERS[key].allowed}')
