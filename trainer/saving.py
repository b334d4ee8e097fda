"""Writing LoRAs and states while training goes on: when which is due is said in `due.py`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from trainer import checkpoint, state
from trainer.aside import set_aside, written_at
from trainer.due import divides
from trainer.errors import ModelError, TrainingError
from trainer.events import Phase, Saved, Warned
from trainer.lora.verifying import Expected, verify
from trainer.prepare import Session
from trainer.retention import Due
from trainer.schema.memory import is_memory
from trainer.tensorfile import header

log = logging.getLogger(__name__)
OF_ITS_HOUR = ("ss_session_id", "ss_training_started_at", "ss_training_finished_at", "modelspec.date")
"""What a file tells that is another each time it is written."""


def save(s: Session, step: int, due: Due) -> str:
    """Write the LoRA as it is now. Returns its path."""
    s.emit(Phase(f"saving {due.name}"))
    path, epoch = s.output / due.name, s.length.epoch_of(step)
    described = s.description.at(step, epoch, due.name.removesuffix(".safetensors"))
    again = path in s.written or repeats(s, path, described)
    if not again and (kept := set_aside(path)):
        s.emit(Warned(f'"{path}" was there already and is now "{kept.name}".'))
    s.written.add(path)
    checkpoint.save_lora(path, s.network, s.config.saving.precision, described)
    log.info("saved %s", path)
    is_last = step == s.length.total_steps
    s.emit(Saved(str(path), step, epoch, "final" if is_last else "intermediate", written_at(path)))
    prove(s, path, step)
    s.retention.wrote(due, path)
    if is_last and divides(s.config.saving.every_n_steps, step):
        s.retention.tidy("step", step)
    s.emit(Phase("training", step, s.length.total_steps))
    return str(path)


def repeats(s: Session, path: Path, described: Mapping[str, str]) -> bool:
    """Whether a file is what this training wrote behind the same step before it was killed, and went back to a state.

    Another training's differs in its seed or in one of the settings, which the file tells.
    """
    if s.resumed is None or written_at(path) <= written_at(s.resumed.folder / state.HEADER):
        return False
    try:
        found = header(path).metadata
    except ModelError:
        return False
    return all(found.get(key) == text for key, text in described.items() if key not in OF_ITS_HOUR)


def prove(s: Session, path: Path, step: int) -> None:
    """Read a file that was just written, and tell whether it holds what was trained and who can load it."""
    trained = Expected(s.network.tensors(), s.config.saving.precision, s.model.family.name, step)
    try:
        verified = verify(path, trained)
    except Exception as error:
        if not is_memory(error):
            raise
        hint = "The file is whole and training goes on. Check it later under Tools, Verify."
        s.emit(Warned(f'"{path.name}" was not read back, because the memory is full.', hint))
        return
    s.emit(verified)
    if verified.problems:
        hint = "Training goes on; do not rely on this file."
        s.emit(Warned(f'"{path.name}" was read back: {" ".join(verified.problems)}', hint))
    log.info("verified %s: %s", path.name, verified.summary)


def save_stopgap(s: Session, step: int) -> None:
    """Write a state that nobody asked for, so that a stopped or failed training can go on."""
    try:
        save_state(s, step, Due(checkpoint.file_name(s.config.saving.name, step=step)), stopgap=True)
    except (OSError, TrainingError) as error:
        s.emit(Warned(f"No state could be saved, so this run cannot go on later: {error}"))


def save_state(s: Session, step: int, due: Due, *, stopgap: bool = False) -> None:
    """Write the folder from which training goes on behind this step."""
    name = due.name.removesuffix(".safetensors") + "-state"
    s.emit(Phase(f"saving {name}"))
    checkpoint.sound(s.network.state_dict(), name)
    parts = state.parts_of(s.network, s.optimizer, s.scheduler, s.accelerator.scaler)
    path = checkpoint.on_disk(
        s.output / name,
        lambda folder: state.write(
            folder,
            step,
            s.seed,
            s.length.batches_per_epoch,
            s.config,
            parts,
            s.pictures,
            stopgap=stopgap,
            returns=s.returns,
            average=s.average,
            written=s.retention.rows(due),
        ),
    )
    s.newest_state = path
    if s.resumed and s.resumed.folder != path:
        state.supersede(s.resumed)
    log.info("saved %s", path)
    s.emit(Saved(str(path), step, s.length.epoch_of(step), "state", written_at(path / state.HEADER)))
    s.retention.wrote(due, path, is_state=True)
    s.emit(Phase("training", step, s.length.total_steps))
