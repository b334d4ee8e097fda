"""A small sweep: one run for every combination of values of one or two parameters, all checked before any is queued."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from gui import form
from gui.waiting import Queue
from trainer import kohya
from trainer.errors import Problem
from trainer.run import Run
from trainer.schema import PARAMETERS, Parameter, shown, without_effect
from trainer.schema.overrides import with_additional

MOST = 24
SWITCHES = dict.fromkeys(("on", "true", "yes", "1"), True) | dict.fromkeys(("off", "false", "no", "0"), False)
MOST_SEED = 2**32
LONGEST_WORD = 30


@dataclass(frozen=True)
class Combination:
    """One run of a sweep: its settings, and in words what it has of the swept parameters."""

    words: str
    values: Mapping[str, Any]
    swept: Sequence[str] = ()


def plan(values: Mapping[str, Any], fields: Sequence[Sequence[str]]) -> tuple[list[Combination], list[Problem]]:
    """The combinations of `fields`, pairs of a key and its values with commas between, on top of the settings.

    Values that hold commas themselves have semicolons between them. Nothing is planned where there are errors;
    warnings tell what else was decided: values left out, the seed of all.
    """
    chosen = [(key, words) for key, *texts in filter(None, fields) if key and (words := _words("".join(texts)))]
    remarks: list[Problem] = []
    problems = [problem for key, _ in chosen if (problem := _refusal(key))]
    if not chosen:
        problems = [Problem("", "Sweep", "Choose a parameter and enter its values with commas between, at least two.")]
    elif len({key for key, _ in chosen}) < len(chosen):
        problems = [Problem(chosen[0][0], "Sweep", "both parameters are the same one; choose another for the second")]
    if not problems:
        firsts = [_firsts(PARAMETERS[key], words) for key, words in chosen]
        remarks = [
            problem for (key, _), first in zip(chosen, firsts, strict=True) if (problem := _repeated(key, first))
        ]
        chosen = [(key, list(dict.fromkeys(first.values()))) for (key, _), first in zip(chosen, firsts, strict=True)]
    combined = list(product(*(words for _, words in chosen)))
    if not problems and not 2 <= len(combined) <= MOST:
        problems = [Problem("", "Sweep", f"These make {len(combined)} runs; there must be 2 to {MOST}.")]
    if problems:
        return [], [*problems, *remarks]
    common = dict(values)
    if _draws_a_seed(values) and "seed" not in dict(chosen):
        common["seed"] = secrets.randbelow(MOST_SEED)
        message = (
            f"all runs have {common['seed']}, drawn since Seed is empty: with one each, chance would be compared too"
        )
        remarks.append(Problem("seed", PARAMETERS["seed"].label, f"{message}.", "warning"))
    found: list[Combination] = []
    names: set[str] = set()
    for words in combined:
        settings = dict(common)
        name = str(values.get("output_name") or PARAMETERS["output_name"].default)
        for (key, _), word in zip(chosen, words, strict=True):
            settings[key] = _held(PARAMETERS[key], word)
            name += f"-{key}-{_slug(word)}"
        unique, count = name, 1
        while unique in names:
            count += 1
            unique = f"{name}-{count}"
        names.add(unique)
        settings["output_name"] = unique
        spoken = ", ".join(f"{PARAMETERS[key].label} {word}" for (key, _), word in zip(chosen, words, strict=True))
        found.append(Combination(spoken, settings, [key for key, _ in chosen]))
    return found, remarks


def check(combinations: Sequence[Combination]) -> list[Problem]:
    """What stands in the way of any combination, each problem once, naming the first that has it."""
    from trainer.check import problems  # late: what reads images takes a while to import

    found: dict[tuple[str, str], Problem] = {}
    for one in combinations:
        for problem in problems(kohya.Preset(dict(one.values), {}), decode=False, ask=False).errors:
            told = Problem(problem.key, problem.label, f"with {one.words}: {problem.message}")
            found.setdefault((problem.key, problem.message), told)
        idle = {key: message for key, message in without_effect(one.values, one.swept).items() if key in one.swept}
        hidden = {key: "does not apply with the other settings" for key in one.swept if not shown(key, one.values)}
        for key, message in (hidden | idle).items():
            told = Problem(key, PARAMETERS[key].label, f"with {one.words}: {message}")
            found.setdefault((key, ""), told)
    return list(found.values())


def enqueue(queue: Queue, combinations: Sequence[Combination], kept: Mapping[str, Any]) -> None:
    """Queue all of them; none that still waits stays where the disk refuses one."""
    added: list[Run] = []
    sweep = secrets.token_hex(6)
    try:
        for one in combinations:
            added.append(queue.add(one.values, kept, sweep))
    except OSError:
        for run in added:
            queue.remove(run)
        raise


def _words(text: str) -> list[str]:
    words = (word.strip() for word in text.split(";" if ";" in text else ","))
    return [word for word in words if word]


def _firsts(p: Parameter, words: Sequence[str]) -> dict[str, str]:
    """Each word → the first that means the same value."""
    by_value: dict[Any, str] = {}
    return {word: by_value.setdefault(_held(p, word), word) for word in words}


def _repeated(key: str, firsts: Mapping[str, str]) -> Problem | None:
    """That words are left out which mean the same as one before them."""
    again = [f"{word} (as {first})" for word, first in firsts.items() if word != first]
    message = f"left out as the same value: {', '.join(again)}."
    return Problem(key, PARAMETERS[key].label, message, "warning") if again else None


def _draws_a_seed(values: Mapping[str, Any]) -> bool:
    """Whether each run would draw a seed of its own: it has none, and none comes with a state to go on from."""
    named, _ = with_additional(values, PARAMETERS)
    return all(named.get(key) in (None, "") for key in ("seed", "resume"))


def _refusal(key: str) -> Problem | None:
    p = PARAMETERS.get(key)
    if p is None:
        return Problem("", "Sweep", f'there is no parameter "{key}"; choose one of the list.')
    if key == "output_name" or p.kind in ("secret", "lines"):
        return Problem(key, p.label, "cannot be swept; choose another parameter")
    return None


def _slug(word: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", word).strip("-.")[-LONGEST_WORD:]


def _held(p: Parameter, word: str) -> Any:
    return SWITCHES.get(word.lower(), word) if p.kind == "switch" else form.held(p, word)
