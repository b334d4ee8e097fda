"""What is due after a step: files, states, pictures."""

from __future__ import annotations

from collections.abc import Iterable

from trainer import checkpoint
from trainer.prepare import Session
from trainer.retention import Due


def files_due(s: Session, step: int, asked: set[str]) -> list[Due]:
    """The files to write after a step."""
    saving = s.config.saving
    if not s.team.leads:
        return []
    if step == s.length.total_steps:
        return [Due(checkpoint.file_name(saving.name))]
    files = []
    if epoch := epoch_due(s, step, saving.every_n_epochs):
        files.append(Due(checkpoint.file_name(saving.name, epoch=epoch), "epoch", epoch))
    if divides(saving.every_n_steps, step):
        files.append(Due(checkpoint.file_name(saving.name, step=step), "step", step))
    elif asked & {"save", "stop"}:
        files.append(Due(checkpoint.file_name(saving.name, step=step)))
    return files


def forecast_files(s: Session) -> list[int]:
    """The steps behind which files are written without being asked for, in order."""
    saving = s.config.saving
    return (
        _all_due(s, saving.every_n_steps, saving.every_n_epochs, also=(s.length.total_steps,)) if s.team.leads else []
    )


def forecast_samples(s: Session) -> list[int]:
    """The steps behind which pictures are drawn without being asked for, in order."""
    settings = s.config.samples
    return _all_due(s, settings.every_n_steps, settings.every_n_epochs) if s.team.leads and s.prompts else []


def _all_due(s: Session, every_steps: int, every_epochs: int, also: Iterable[int] = ()) -> list[int]:
    """What `divides` and `epoch_due` say of every step from the first on, without asking for each of millions."""
    length = s.length
    steps = set(also)
    if every_steps:
        steps.update(range(every_steps, length.total_steps + 1, every_steps))
    if every_epochs:
        whole = length.epochs_done(length.total_steps)
        steps.update(
            -(-e * length.batches_per_epoch // length.accumulation)
            for e in range(every_epochs, whole + 1, every_epochs)
        )
    return sorted(step for step in steps if step >= s.first_step)


def state_due(s: Session, step: int, asked: set[str]) -> bool:
    """Whether a state is written beside a step's files."""
    ends = step == s.length.total_steps or "stop" in asked
    return s.config.saving.state or (s.config.saving.state_at_end and ends)


def draws_samples(s: Session) -> bool:
    """Whether pictures are drawn in this training without being asked for."""
    return s.team.leads and bool(s.prompts) and bool(s.config.samples.every_n_steps or s.config.samples.every_n_epochs)


def samples_due(s: Session, step: int, asked: set[str]) -> bool:
    """Whether pictures are to be drawn after a step; a stop does not wait for them."""
    settings = s.config.samples
    due = divides(settings.every_n_steps, step) or epoch_due(s, step, settings.every_n_epochs)
    return s.team.leads and bool(s.prompts) and "stop" not in asked and bool(due or "sample" in asked)


def epoch_due(s: Session, step: int, every: int) -> int:
    """The last epoch with something due (every so many, 0: never) of those that a step completed; 0 if none.

    They are counted from 1. A step that accumulates more batches than an epoch has completes several.
    """
    last = s.length.epochs_done(step) // every * every if every else 0
    return last if last > s.length.epochs_done(step - 1) else 0


def divides(every: int, number: int) -> bool:
    """Whether something that is due every so often (0: never) is due now."""
    return every > 0 and number % every == 0
