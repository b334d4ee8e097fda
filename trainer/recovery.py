"""What a training does when it cannot take the next step as planned: go back to a state, or on with less memory."""

from __future__ import annotations

import gc
import json
import logging
import traceback
from collections.abc import Callable
from dataclasses import replace

import torch

from trainer import compiling, kohya, memory, optim, state
from trainer.data import texts
from trainer.errors import LorawrightError, TrainingError
from trainer.events import Phase, Warned
from trainer.models import recompute
from trainer.prepare import Session
from trainer.schema.memory import full, is_memory, states_can_be_cached

log = logging.getLogger(__name__)
MOST_RETURNS = 3


def go_on(s: Session, step: int, error: Exception, keep: Callable[[Session, int], None]) -> int:
    """Put a training right that failed behind `step`. Returns the step to go on behind.

    Raises the error where the settings allow nothing, or nothing helps; before that, `keep` saves the state behind
    the step, where there is a whole one.
    """
    if s.compiled and s.whole and not isinstance(error, LorawrightError) and not is_memory(error):
        return _go_on_uncompiled(s, step, error)
    not_a_number = isinstance(error, TrainingError) and error.kind == "not_a_number"
    traceback.clear_frames(error.__traceback__)  # they hold all that the step took of the memory
    behind = None
    if not_a_number:
        behind = _go_back(s, str(error.args[0]))
    elif is_memory(error):
        behind = _go_on_with_less(s, step, str(error))
    if behind is not None:
        return behind
    past = newest_state(s)
    if s.team.leads and s.whole and not not_a_number and step >= s.first_step and (past is None or past.step < step):
        keep(s, step)
    if is_memory(error):
        log.info("where memory ended:", exc_info=error)
        raise TrainingError("out_of_memory", *full(error, s.config)) from error
    raise error


def _go_on_uncompiled(s: Session, step: int, error: Exception) -> int:
    """The step again as it is written: what was not the compiler's fault fails once more, and is told then."""
    compiling.end(s.model)
    s.compiled = False
    s.optimizer.zero_grad(set_to_none=True)
    log.info("where the compiled blocks failed:", exc_info=error)
    reason = str(getattr(error, "inner_exception", error)).strip().splitlines()
    s.emit(
        Warned(
            f"The U-Net's blocks could not be compiled ({reason[0] if reason else type(error).__name__}). Training goes "
            "on without, and is slower.",
            "Set Dynamo backend (dynamo_backend) to no, and nothing is tried.",
        )
    )
    return step


def newest_state(s: Session) -> state.State | None:
    """The last state that this training wrote or went on from, if nobody has taken it away."""
    return state.read(s.newest_state) if s.newest_state and state.is_state(s.newest_state) else None


def _go_back(s: Session, message: str) -> int | None:
    """To the newest state, with half the rates and other noise: the same step again would end the same."""
    past = newest_state(s)
    if not s.config.optim.goes_back or len(s.returns) == MOST_RETURNS or past is None:
        return None
    s.returns.append(past.step)
    optim.scale_rates(s.scheduler, 1 / 2)
    past.restore(s.network, s.optimizer, s.scheduler, s.accelerator.scaler)
    for group in s.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    s.optimizer.zero_grad(set_to_none=True)
    s.whole = True
    _note(s, {"ss_rates_halved_after_steps": json.dumps(s.returns)})
    s.emit(
        Warned(
            f"{message} Training goes back to step {past.step}, with half the learning rate and other noise from "
            f"there ({len(s.returns)} of at most {MOST_RETURNS} times).",
            "If it comes back, lower the learning rate or look at these images.",
        )
    )
    s.emit(Phase("training", past.step, s.length.total_steps))
    return past.step


def _go_on_with_less(s: Session, step: int, message: str) -> int | None:
    """The step again, in the next way that takes less memory and gives the same LoRA but for rounding."""
    if not s.config.training.goes_on_with_less or not s.whole:
        return None
    s.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    memory.give_back()
    if s.accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    for lighten in (_recompute, _split, _cache_states):
        if what := lighten(s):
            first = message.splitlines()[0] if message else "out of memory"
            s.emit(Warned(f"The memory is full at step {step + 1} ({first}). The step is taken again with {what}."))
            return step
    return None


def _recompute(s: Session) -> str:
    if s.config.training.checkpointing:
        return ""
    recompute(s.model)
    _set(s, "training", "checkpointing", "gradient_checkpointing")
    _note(s, {"ss_gradient_checkpointing": "True"})
    return "Gradient checkpointing (gradient_checkpointing)"


def _split(s: Session) -> str:
    if s.parts >= s.config.training.batch_size:
        return ""
    s.parts = min(2 * s.parts, s.config.training.batch_size)
    _note(s, {"ss_batch_parts": str(s.parts)})
    return (
        f"each batch of {s.config.training.batch_size} in {s.parts} parts, whose gradients add up to the batch's but "
        "for rounding and dropout"
    )


def _cache_states(s: Session) -> str:
    if s.captions or not states_can_be_cached(s.config):
        return ""
    s.captions = texts.encode_captions(s.feed.pictures, s.model, s.config.captions, lambda done, total: None)
    s.prompt_texts = texts.of_prompts(s.model, s.prompts)
    for encoder in s.model.text_encoders.values():
        encoder.to("meta")
    _set(s, "captions", "cache_states", "sdxl_cache_text_encoder_outputs")
    return "Cache text encoder outputs (sdxl_cache_text_encoder_outputs)"


def _set(s: Session, group: str, name: str, key: str) -> None:
    """Switch a setting on, here and in the run's own settings."""
    changed = getattr(s.config, group).model_copy(update={name: True})
    s.config = s.config.model_copy(update={group: changed})
    preset = kohya.load(s.run.config)
    kohya.save(s.run.config, preset.values | {key: True}, preset.kept)


def _note(s: Session, entries: dict[str, str]) -> None:
    """Write into all files from here on what is otherwise than the settings say."""
    s.description = replace(s.description, fixed={**s.description.fixed, **entries})
