"""Makes optimizers (the rows are in trainer/schema/optimizers.py) and schedulers."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from trainer.errors import ConfigError, Problem
from trainer.schema.optim import Optim
from trainer.schema.optimizers import Row

log = logging.getLogger(__name__)


def load(row: Row) -> Callable[..., torch.optim.Optimizer]:
    """A row's class. Raises ConfigError where its package is not installed."""
    try:
        return getattr(importlib.import_module(row.module), row.name)  # type: ignore[no-any-return]
    except ImportError as error:
        raise ConfigError([Problem("optimizer", "Optimizer", f"{row.name} cannot be loaded: {error}.")]) from error


def signature(row: Row) -> set[str]:
    """All arguments that a row's class itself knows, beside weights and rate."""
    names = inspect.signature(load(row).__init__).parameters.items()  # type: ignore[misc]
    return {n for n, p in names if n not in ("self", "params", "lr") and p.kind is not p.VAR_KEYWORD}


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
    given = {
        row.older.get(name, name) if name not in row.arguments.split() else name: value
        for name, value in settings.arguments.items()
    }
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
        optimizer = load(row)(groups, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        message = f"{settings.optimizer} refuses them: {error}."
        raise ConfigError([Problem("optimizer_args", "Optimizer extra arguments", message)]) from error
    if row.schedule_free:
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


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

    warmup = warmup_steps(settings, total_steps)
    extra = settings.scheduler_arguments
    if settings.row.schedule_free:
        log.info("LR Scheduler and warmup are not used: %s needs none", settings.optimizer)
        return optimization.get_constant_schedule(optimizer)
    name = "adafactor" if settings.relative_step else settings.scheduler
    cycles = settings.cycles or 1
    makers: dict[str, Callable[[], LRScheduler]] = {
        "adafactor": lambda: AdafactorRates(optimizer, settings.learning_rate),
        "constant": lambda: optimization.get_constant_schedule(optimizer),
        "constant_with_warmup": lambda: optimization.get_constant_schedule_with_warmup(optimizer, warmup),
        "cosine": lambda: optimization.get_cosine_schedule_with_warmup(optimizer, warmup, total_steps),
        "cosine_with_restarts": lambda: optimization.get_cosine_with_hard_restarts_schedule_with_warmup(
            optimizer, warmup, total_steps, **{"num_cycles": cycles, **extra}
        ),
        "linear": lambda: optimization.get_linear_schedule_with_warmup(optimizer, warmup, total_steps),
        "polynomial": lambda: optimization.get_polynomial_decay_schedule_with_warmup(
            optimizer, warmup, total_steps, **{"power": settings.power or 1, **extra}
        ),
        "cosine_with_min_lr": lambda: _from_transformers("get_cosine_with_min_lr_schedule_with_warmup")(
            optimizer, warmup, total_steps, **{"num_cycles": cycles / 2, **extra}
        ),
        "piecewise_constant": lambda: _piecewise_constant(optimizer, warmup, **extra),
        "warmup_stable_decay": lambda: _from_transformers("get_wsd_schedule")(
            optimizer,
            warmup,
            num_training_steps=total_steps,
            **{"num_cycles": cycles / 2, **extra, "num_decay_steps": _steps(extra["num_decay_steps"], total_steps)},
        ),
        "inverse_sqrt": lambda: _from_transformers("get_inverse_sqrt_schedule")(optimizer, warmup, **extra),
    }
    try:
        return makers[name]()
    except (TypeError, ValueError) as error:
        problem = Problem("lr_scheduler_args", "LR scheduler extra arguments", f"{name} refuses them: {error}.")
        raise ConfigError([problem]) from error


def scale_rates(scheduler: LRScheduler, factor: float) -> None:
    """Multiply what all rates start from, as of the next time the schedule is set to a step."""
    scheduler.base_lrs = [base * factor for base in scheduler.base_lrs]


def warmup_steps(settings: Optim, total_steps: int) -> int:
    """Steps over which the rate climbs from 0."""
    return settings.warmup_steps or int(total_steps * settings.warmup_percent / 100)


def _steps(number: float, total_steps: int) -> int:
    """A number of steps, which may be given as a share of all."""
    return int(number * total_steps) if isinstance(number, float) and number < 1 else int(number)


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


def _piecewise_constant(optimizer: torch.optim.Optimizer, warmup: int, step_rules: str) -> LambdaLR:
    from diffusers.optimization import get_piecewise_constant_schedule

    rule = get_piecewise_constant_schedule(optimizer, str(step_rules)).lr_lambdas[0]
    return LambdaLR(optimizer, lambda step: rule(step) * (min(1.0, step / warmup) if warmup else 1.0))


def rates(optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> dict[str, float]:
    """The rate that each part of the model uses now, by the groups' name: without a block's or LoRA+'s factor.

    Beside it, under "d*lr/" + name, what an optimizer that finds its own rate makes of it.
    """
    found = {}
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        found[group["name"]] = float(rate) / group.get("rate_factor", 1.0)
        if "d" in group:
            found[f"d*lr/{group['name']}"] = found[group["name"]] * float(group["d"])
    return found
