"""Settings given as words: `--name value`, on the command line and in Additional parameters."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from trainer.errors import ConfigError, Problem
from trainer.schema import older
from trainer.schema.declare import Parameter

KEY = "additional_parameters"
SECRET = ("wandb_api_key", "huggingface_token")
"""Keys whose values are written nowhere, so they must not hide in a text that is."""

SD_SCRIPTS = {"network_train_unet_only": ("text_encoder_lr", "0"), "network_train_text_encoder_only": ("unet_lr", "0")}
"""Switches of sd-scripts for what a parameter says here."""
PAIRS = ("optimizer_args", "lr_scheduler_args")
"""Keys whose value may be several words, as sd-scripts takes them: name=value name=value …"""


def overrides(words: Sequence[str], parameters: Mapping[str, Parameter]) -> tuple[dict[str, str], list[str]]:
    """`--name value` and `--name=value` as preset keys and values, and what is wrong with the rest.

    A switch alone is on. A value may begin with one dash, as negative numbers do. Older names are read, too.
    """
    found: dict[str, str] = {}
    wrong: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        has_value = bool(equals)
        if not equals and left and (name == KEY or not left[0].startswith("--")):
            value, has_value = left.pop(0), True
        if name in PAIRS:
            further = list(takewhile(lambda word: not word.startswith("--"), left))
            del left[: len(further)]
            value = " ".join([value, *map(shlex.quote, further)])
        if name in SD_SCRIPTS and not has_value:
            name, value = SD_SCRIPTS[name]
            has_value = True
        if not word.startswith("--"):
            wrong.append(f'"{word}" does not belong to a parameter; write --name value, with quotes around blanks.')
            continue
        name = older.KEYS.get(name, name)
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, 1)
            wrong.append(f'"--{name}" is not a parameter' + (f"; did you mean --{near[0]}?" if near else "."))
            continue
        value = older.newer_value(parameters[name], value if has_value else "true")
        if has_value or parameters[name].kind == "switch" or value != "true":
            found[name] = value
        else:
            wrong.append(f"--{name} needs a value behind it.")
    return found, wrong


def with_additional(
    values: Mapping[str, Any], parameters: Mapping[str, Parameter]
) -> tuple[dict[str, Any], list[Problem]]:
    """A preset's values with those that its Additional parameters name in place of its own.

    The text is split as a shell would, and never given to one.
    """
    text = values.get(KEY)
    if not isinstance(text, str) or not text.strip():
        return dict(values), []
    try:
        found, wrong = overrides(shlex.split(text), parameters)
    except ValueError as error:
        found, wrong = {}, [f"cannot be split into words: {str(error).lower()}."]
    for key in {*SECRET, KEY} & set(found):
        del found[key]
        wrong.append(f"--{key} cannot stand here, where it would be stored; it has a box of its own.")
    return {**values, **found}, [Problem(KEY, parameters[KEY].label, message) for message in wrong]


def from_command_line(words: Sequence[str], parameters: Mapping[str, Parameter]) -> dict[str, str]:
    """The settings named behind a command. Raises ConfigError with all that is wrong."""
    found, wrong = overrides(words, parameters)
    if wrong:
        raise ConfigError([Problem("", "", message) for message in wrong])
    return found
