"""Sample prompts: one a line, with flags at its end, as sd-scripts reads them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from trainer.errors import ConfigError, Problem
from trainer.schema import PARAMETERS

_FLAG = re.compile(r"(?:^|\s)--(\S+)")


@dataclass(frozen=True)
class Prompt:
    """What to draw. Sides are pixels, None: the training resolution; seed None: the run's own.

    `line` is where it stands in the settings, counted from 1.
    """

    prompt: str
    negative: str = ""
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    cfg_scale: float = 7.5
    steps: int = 30
    line: int = 1

    @property
    def texts(self) -> list[str]:
        """What the model is asked with: the negative prompt first, where guidance weighs it against the other."""
        return [self.negative, self.prompt] if self.cfg_scale != 1.0 else [self.prompt]


@dataclass(frozen=True)
class _Flag:
    field: str
    kind: type
    least: float = 0
    most: float = math.inf
    step: int = 0

    def read(self, text: str) -> Any:
        """The flag's value. Raises ValueError saying what is allowed."""
        if self.kind is str:
            if not text:
                raise ValueError("needs a text behind it")
            return text
        noun = "a whole number" if self.kind is int else "a number"
        bounds = f" from {self.least:g} to {self.most:g}" if self.most < 2**63 - 1 else f", {self.least:g} or more"
        multiple = f", a multiple of {self.step}" if self.step else ""
        try:
            value = self.kind(text)
            fits = self.least <= value <= self.most and not (self.step and value % self.step)
        except (ValueError, OverflowError):
            fits = False
        if not fits:
            raise ValueError(f'is "{text}"; it must be {noun}{bounds}{multiple}')
        return value


FLAGS = {
    "n": _Flag("negative", str),
    "w": _Flag("width", int, 64, 4096, 8),
    "h": _Flag("height", int, 64, 4096, 8),
    "d": _Flag("seed", int, 0, 2**63 - 1),
    "l": _Flag("cfg_scale", float, 0, 100),
    "s": _Flag("steps", int, 1, 1000),
}


def parse(text: str) -> list[Prompt]:
    """The prompts of a text, in order; empty lines and those that begin with # are passed over.

    Raises ConfigError with every bad flag, each naming its line.
    """
    prompts: list[Prompt] = []
    problems: list[Problem] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            prompts.append(_prompt(line, number, problems))
    if problems:
        raise ConfigError(problems)
    return prompts


def _prompt(line: str, number: int, problems: list[Problem]) -> Prompt:
    def wrong(what: str) -> None:
        problems.append(Problem("sample_prompts", PARAMETERS["sample_prompts"].label, f"line {number}: {what}."))

    words, *flags = _FLAG.split(line)
    values: dict[str, Any] = {}
    for name, value in zip(flags[::2], flags[1::2], strict=True):
        flag = FLAGS.get(name.lower())
        if flag is None:
            wrong(f'"--{name}" is not a flag; there are {", ".join(f"--{f}" for f in FLAGS)}')
            continue
        if flag.field in values:
            wrong(f"--{name} stands there twice")
        try:
            values[flag.field] = flag.read(value.strip())
        except ValueError as error:
            wrong(f"--{name} {error}")
    return Prompt(words.strip(), line=number, **values)
