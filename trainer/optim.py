"""Makes optimizers (the rows are in trainer/schema/optimizers.py) and schedulers."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from trainer.errors import ConfigError
from trainer.schema import problem_with
from trainer.schema.optim import Optim, is_number, steps_of
from trainer.schema.optimizers import Row

log = logging.getLogger(__name__)


def load(row: Row) -> Callable[..., torch.optim.Optimizer]:
    """A row's class. Raises ConfigError where its package is not installed."""
    try:
        return getattr(importlib.import_module(row.module), row.name)  # type: ignore[no-any-return]
    except ImportError as error:
        raise _refusal("optimizer", f"{row.name} cannot be loaded: {error}.") from error


def signature(row: Row) -> set[str]:
    """All arguments that a row's class itself knows, beside weights and rate."""
    names = inspect.signature(load(row).__init__).parameters.items()  # type: ignore[misc]
    return {n for n, p in names if n not in ("self", "params", "lr") and p.kind is not p.VAR_KEYWORD}


def unfit(arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """What is wrong with the arguments whose value is of another kind than their default, in words.

    Python would take most of them and mean something else: a word where a switch belongs is on, whatever it says.
    """
    wrong = []
    for name, value in arguments.items():
        default, wanted = defaults.get(name), ""
        if isinstance(default, bool):
            wanted = "" if isinstance(value, bool) else "True or False"
        elif isinstance(default, int | float):
            wanted = "" if is_number(value) or value is None else "a number"
        elif isinstance(default, tuple):
            fits = isinstance(value, tuple | list) and len(value) == len(default)
            example = ",".join(f"{number:g}" for number in default)
            wanted = "" if fits else f"{len(default)} numbers separated by commas, for instance {example}"
        elif default is None and name in defaults and isinstance(value, str):
            wanted = "a number, True, False or None"
        if wanted:
            wrong.append(f'{name} "{value}" is not allowed; it must be {wanted}.')
    return wrong


def defaults_of(call: Callable[..., Any]) -> dict[str, Any]:
    """The defaults of what a class or function takes, where there are any."""
    found = inspect.signature(call).parameters.items()
    return {name: p.default for name, p in found if p.default is not p.empty}


WAYS = {"fused", "foreach", "capturable", "differentiable"}
"""In which PyTorch's own optimizers can compute; fused is the fastest, a pass over the weights for all of a step.

SGD's fused way is not offered: it fails where a tensor has its first gradient in a later step than others, as module
dropout and DyLoRA's units have it.
"""


def make_optimizer(groups: list[dict[str, Any]], settings: Optim, *, fused: bool = False) -> torch.optim.Optimizer:
    """The chosen optimizer over parameter groups {"params", "lr", "name"}, ready for its first step.

    `fused`: whether it may be, where the settings do not choose a way; not under a gradient scaler, which would hand
    it the overflowed steps as well. Adafactor with relative steps ignores their rates; optimizers with one rate use the first's.
    Raises ConfigError for arguments that the optimizer does not know, or cannot use.
    """
    row = settings.row
    newer = {name: name if name in row.arguments.split() else row.older.get(name, name) for name in settings.arguments}
    given = {newer[name]: value for name, value in settings.arguments.items()}
    make = load(row)
    defaults = defaults_of(make)
    if wrong := unfit(settings.arguments, {name: defaults[new] for name, new in newer.items() if new in defaults}):
        raise _refusal("optimizer_args", " ".join(wrong))
    # Some schedulers take this for the rate that theirs are shares of.
    first = settings.learning_rate or groups[0]["lr"]
    arguments = {"lr": first, **row.defaults, **given, **row.fixed}
    if fused and "fused" in row.arguments.split() and not WAYS & set(given):
        arguments["fused"] = True
    if settings.relative_step:
        groups = [{k: v for k, v in group.items() if k != "lr"} for group in groups]
        arguments |= {"lr": None, "relative_step": True}
    elif row.one_rate:
        rate = groups[0]["lr"] / groups[0].get("rate_factor", 1.0)
        groups = [{**group, "lr": rate, "rate_factor": 1.0} for group in groups]
    try:
        optimizer = make(groups, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise _refusal("optimizer_args", f"{settings.optimizer} refuses them: {error}.") from error
    if row.schedule_free:
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def _refusal(key: str, message: str) -> ConfigError:
    return ConfigError([problem_with(key, message)])


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Where a schedule-free optimizer's weights are those to save and to draw with, not to train with.

    They are averages of the ones that are trained (Defazio et al. 2024, "The road less scheduled"),
    which come back bit for bit. Other optimizers have one kind only.
    """
    # accelerate's wrapper has the method whatever it wraps.
    wrapped = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    if not hasattr(wrapped, "eval"):
        yield
        return
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    trained = [weight.detach().clone() for weight in weights]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        for weight, own in zip(weights, trained, strict=True):
            weight.data.copy_(own)


def make_scheduler(optimizer: torch.optim.Optimizer, settings: Optim, total_steps: int) -> LRScheduler:
    """The rate of each step as a multiple of the groups' rates; step k (from 0) uses multiple(k).

    The multiples are diffusers' and transformers' own. Raises ConfigError for arguments that the
    scheduler does not know.
    """
    from diffusers import optimization

    warmup = settings.warmup_of(total_steps)
    extra = settings.scheduler_arguments
    if settings.row.schedule_free:
        log.info("LR Scheduler and warmup are not used: %s needs none", settings.optimizer)
        return optimization.get_constant_schedule(optimizer)
    name = "adafactor" if settings.relative_step else settings.scheduler
    cycles = settings.cycles or 1
    warmed = {"num_warmup_steps": warmup}
    whole = {**warmed, "num_training_steps": total_steps}

    def made(make: Callable[..., LRScheduler], **own: Any) -> LRScheduler:
        if wrong := unfit(extra, {"num_decay_steps": 0, **defaults_of(make)}):
            raise _refusal("lr_scheduler_args", " ".join(wrong))
        given = {**own, **extra}
        if "num_decay_steps" in given:
            given["num_decay_steps"] = steps_of(given["num_decay_steps"], total_steps)
        return make(optimizer, **given)

    makers: dict[str, Callable[[], LRScheduler]] = {
        "adafactor": lambda: AdafactorRates(optimizer, settings.learning_rate),
        "constant": lambda: made(optimization.get_constant_schedule),
        "constant_with_warmup": lambda: made(optimization.get_constant_schedule_with_warmup, **warmed),
        "cosine": lambda: made(optimization.get_cosine_schedule_with_warmup, **whole),
        "cosine_with_restarts": lambda: made(
            optimization.get_cosine_with_hard_restarts_schedule_with_warmup, **whole, num_cycles=cycles
        ),
        "linear": lambda: made(optimization.get_linear_schedule_with_warmup, **whole),
        "polynomial": lambda: made(
            optimization.get_polynomial_decay_schedule_with_warmup, **whole, power=settings.power or 1
        ),
        "cosine_with_min_lr": lambda: made(
            _from_transformers("get_cosine_with_min_lr_schedule_with_warmup"), **whole, num_cycles=cycles / 2
        ),
        "piecewise_constant": lambda: made(_piecewise_constant, **warmed),
        "warmup_stable_decay": lambda: made(_from_transformers("get_wsd_schedule"), **whole, num_cycles=cycles / 2),
        "inverse_sqrt": lambda: made(_from_transformers("get_inverse_sqrt_schedule"), **warmed),
    }
    try:
        return makers[name]()
    except (TypeError, ValueError) as error:
        raise _refusal("lr_scheduler_args", f"{name} refuses them: {error}.") from error


def scale_rates(scheduler: LRScheduler, factor: float) -> None:
    """Multiply what all rates start from, as of the next time the schedule is set to a step."""
    scheduler.base_lrs = [base * factor for base in scheduler.base_lrs]


def _from_transformers(name: str) -> Callable[..., LambdaLR]:
    """A scheduler that diffusers lacks. Seconds to import: transformers' optimizers come with its own trainer."""
    from transformers import optimization

    return getattr(optimization, name)  # type: ignore[no-any-return]


class AdafactorRates(LRScheduler):
    """The rates that Adafactor chose in the last step, of groups that rest too; before it, the first rate."""

    def __init__(self, optimizer: torch.optim.Optimizer, first: float):
        for group in optimizer.param_groups:
            group["initial_lr"] = first
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        optimizer = self.optimizer
        states = [(group, optimizer.state[group["params"][0]]) for group in optimizer.param_groups]
        known = zip(states, self.base_lrs, strict=True)
        return [float(optimizer._get_lr(*of)) if "step" in of[1] else first for of, first in known]


def _piecewise_constant(optimizer: torch.optim.Optimizer, num_warmup_steps: int, step_rules: str) -> LambdaLR:
    from diffusers.optimization import get_piecewise_constant_schedule

    rule = get_piecewise_constant_schedule(optimizer, str(step_rules)).lr_lambdas[0]
    climb = num_warmup_steps
    return LambdaLR(optimizer, lambda step: rule(step) * (min(1.0, step / climb) if climb else 1.0))


def rates(optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> dict[str, float]:
    """The rate that each part of the model uses now, by the groups' name: without a block's or LoRA+'s factor.

    It is 0 where the part is not trained any more.
    Beside it, under "d*lr/" + name, what an optimizer that finds its own rate makes of it.
    """
    found = {}
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        trained = any(weight.requires_grad for weight in group["params"])
        found[group["name"]] = float(rate) / group.get("rate_factor", 1.0) if trained else 0.0
        if "d" in group:
            found[f"d*lr/{group['name']}"] = found[group["name"]] * float(group["d"])
    return found
