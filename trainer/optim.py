"""Optimizers and schedulers, one row each."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from trainer.errors import ConfigError, Problem
from trainer.schema.optim import Optim


@dataclass(frozen=True)
class Row:
    """Where an optimizer comes from, and the arguments it gets unless the user names others."""

    module: str
    name: str
    defaults: dict[str, Any] = field(default_factory=dict)

    def load(self) -> type[torch.optim.Optimizer]:
        return getattr(importlib.import_module(self.module), self.name)  # type: ignore[no-any-return]


OPTIMIZERS = {
    "AdamW": Row("torch.optim", "AdamW"),
    "AdamW8bit": Row("bitsandbytes.optim", "AdamW8bit"),
    "Adafactor": Row("transformers.optimization", "Adafactor", {"relative_step": True}),
    "Lion": Row("pytorch_optimizer", "Lion"),
}


def valid_arguments(optimizer: str) -> list[str]:
    """The names that Optimizer extra arguments may hold for this optimizer."""
    names = inspect.signature(OPTIMIZERS[optimizer].load().__init__).parameters
    return [n for n, p in names.items() if n not in ("self", "params", "lr") and p.kind is not p.VAR_KEYWORD]


def chooses_its_own_rate(settings: Optim) -> bool:
    """Adafactor with relative steps takes no rate from outside."""
    return settings.optimizer == "Adafactor" and bool(settings.arguments.get("relative_step", True))


def make_optimizer(groups: list[dict[str, Any]], settings: Optim) -> torch.optim.Optimizer:
    """The chosen optimizer over parameter groups {"params", "lr", "name"}.

    Raises ConfigError naming an argument that the optimizer does not know, or cannot use.
    """
    row = OPTIMIZERS[settings.optimizer]
    valid = valid_arguments(settings.optimizer)
    unknown = [name for name in settings.arguments if name not in valid]
    if unknown:
        raise _refused(f"{settings.optimizer} has no argument {', '.join(unknown)}; it knows {', '.join(valid)}.")
    arguments = {**row.defaults, **settings.arguments}
    if chooses_its_own_rate(settings):
        groups = [{k: v for k, v in group.items() if k != "lr"} for group in groups]
        arguments["lr"] = None
    elif settings.optimizer == "Adafactor":
        arguments.setdefault("warmup_init", False)
    try:
        return row.load()(groups, **arguments)  # type: ignore[call-arg]
    except (TypeError, ValueError, AssertionError) as error:
        raise _refused(f"{settings.optimizer} refuses them: {error}.") from error


def _refused(message: str) -> ConfigError:
    return ConfigError([Problem("optimizer_args", "Optimizer extra arguments", message)])


def make_scheduler(optimizer: torch.optim.Optimizer, settings: Optim, total_steps: int) -> LRScheduler:
    """The rate of each step as a multiple of the groups' rates; step k (from 0) uses multiple(k).

    The multiples are transformers' and diffusers' own. Raises ConfigError for arguments that the
    scheduler does not know.
    """
    from transformers import optimization

    warmup = warmup_steps(settings, total_steps)
    extra = settings.scheduler_arguments
    name = "adafactor" if chooses_its_own_rate(settings) else settings.scheduler
    makers: dict[str, Callable[[], LRScheduler]] = {
        "adafactor": lambda: optimization.AdafactorSchedule(optimizer, **extra),
        "constant": lambda: optimization.get_constant_schedule(optimizer),
        "constant_with_warmup": lambda: optimization.get_constant_schedule_with_warmup(optimizer, warmup),
        "cosine": lambda: optimization.get_cosine_schedule_with_warmup(optimizer, warmup, total_steps, **extra),
        "cosine_with_restarts": lambda: optimization.get_cosine_with_hard_restarts_schedule_with_warmup(
            optimizer, warmup, total_steps, **{"num_cycles": settings.cycles or 1, **extra}
        ),
        "linear": lambda: optimization.get_linear_schedule_with_warmup(optimizer, warmup, total_steps),
        "polynomial": lambda: optimization.get_polynomial_decay_schedule_with_warmup(
            optimizer, warmup, total_steps, **{"power": settings.power or 1, **extra}
        ),
        "piecewise_constant": lambda: _piecewise_constant(optimizer, warmup, **extra),
        "warmup_stable_decay": lambda: optimization.get_wsd_schedule(
            optimizer, warmup, num_training_steps=total_steps, **extra
        ),
        "inverse_sqrt": lambda: optimization.get_inverse_sqrt_schedule(optimizer, warmup, **extra),
    }
    try:
        return makers[name]()
    except (TypeError, ValueError) as error:
        problem = Problem("lr_scheduler_args", "LR scheduler extra arguments", f"{name} refuses them: {error}.")
        raise ConfigError([problem]) from error


def warmup_steps(settings: Optim, total_steps: int) -> int:
    """Steps over which the rate climbs from 0."""
    return settings.warmup_steps or int(total_steps * settings.warmup_percent / 100)


def _piecewise_constant(optimizer: torch.optim.Optimizer, warmup: int, step_rules: str) -> LambdaLR:
    from diffusers.optimization import get_piecewise_constant_schedule

    rule = get_piecewise_constant_schedule(optimizer, str(step_rules)).lr_lambdas[0]
    return LambdaLR(optimizer, lambda step: rule(step) * min(1.0, step / max(1, warmup)))


def rates(optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> dict[str, float]:
    """The rate that each group uses now, by the group's name."""
    now = scheduler.get_last_lr()
    return {group["name"]: float(rate) for group, rate in zip(optimizer.param_groups, now, strict=False)}
