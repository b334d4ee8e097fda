"""`python -m trainer train`: the run's folder, its log, its signals, and how it ends."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from trainer import kohya
from trainer.check import problems
from trainer.errors import ConfigError, LorawrightError, TrainingError
from trainer.events import Event, EventLog, Failed, Phase, Started, Warned
from trainer.run import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, Run, new_run

log = logging.getLogger("trainer")


class Requests:
    """What was asked of the trainer since the last look: by the control file, or by a signal."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._offset = run.control.stat().st_size if run.control.exists() else 0
        self._stop = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        log.info("%s: stopping after this step", signal.Signals(number).name)
        if self._stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._stop = True

    def __call__(self) -> set[str]:
        words, self._offset = self.run.requests(self._offset)
        self._stop = self._stop or "stop" in words
        return set(words) | ({"stop"} if self._stop else set())

    def stopping(self) -> bool:
        """Whether a stop was asked for; other requests made meanwhile are dropped."""
        return "stop" in self()


def train(preset: kohya.Preset, folder: Path | None) -> int:
    """Train in `folder` (default: a new one in runs/). Returns the process's exit code.

    Whatever happens ends in an event: `ended`, or `failed` with the cause and what to change.
    """
    checked = problems(preset, decode=False)
    if checked.config is None:
        print(ConfigError([p for p in checked.problems if p.severity == "error"]), file=sys.stderr)
        if folder is not None and folder.is_dir():
            EventLog(Run(folder).events).emit(_refused(checked.problems))
        return EXIT_CONFIG
    run = Run(folder.resolve()) if folder else new_run(Path("runs").resolve(), checked.config.saving.name)
    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        run.claim()
    except FileExistsError as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    _log_to(run)
    if not run.config.exists():
        kohya.save(run.config, preset.values, preset.kept)
    events = EventLog(run.events)
    log.info("run: %s", run.folder)
    for note in preset.notes:
        log.info("preset: %s", note)
    for problem in checked.problems:
        events.emit(Warned(str(problem)))
        log.warning("%s", problem)
    try:
        return _train(checked.config, run, events)
    except BaseException as error:
        failed = explain(error)
        log.critical("%s %s", failed.message, failed.hint, exc_info=not isinstance(error, LorawrightError))
        events.emit(failed)
        return EXIT_FAILED


def _train(config: object, run: Run, events: EventLog) -> int:
    requests = Requests(run)

    def emit(event: Event) -> None:
        events.emit(event)
        if isinstance(event, Warned):
            log.warning("%s %s", event.message, event.hint)
        elif isinstance(event, Phase) and event.name != "training" and event.done in (0, event.total):
            log.info("%s%s", event.name, f" {event.done}/{event.total}" if event.total else "")

    emit(Phase("loading PyTorch"))
    from trainer.loop import train as loop
    from trainer.prepare import prepare

    session = prepare(config, run, emit, requests.stopping)  # type: ignore[arg-type]
    length, pictures = session.length, session.feed.pictures
    emit(
        Started(
            name=session.config.saving.name,
            family=session.model.family,
            device=str(session.accelerator.device),
            precision=session.precision,
            images=len(pictures),
            batches_per_epoch=length.batches_per_epoch,
            epochs=length.epochs,
            total_steps=length.total_steps,
            first_step=1,
            seed=session.seed,
        )
    )
    log.info(
        "%d images, %d batches an epoch, %d epochs, %d steps in all",
        len(pictures),
        length.batches_per_epoch,
        length.epochs,
        length.total_steps,
    )
    ended = loop(session, requests)
    events.emit(ended)
    log.info("%s after step %d: %s", ended.status, ended.step, ended.path)
    return EXIT_DONE if ended.status == "done" else EXIT_STOPPED


def _refused(found: object) -> Failed:
    text = "; ".join(str(p) for p in found if p.severity == "error")  # type: ignore[attr-defined]
    return Failed("config", text, "Correct the settings and start again.")


def explain(error: BaseException) -> Failed:
    """The cause of a failure in plain words, and what to change."""
    if isinstance(error, TrainingError | LorawrightError):
        return Failed(error.kind, error.message, error.hint)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Failed(
            "out_of_memory",
            f"The memory is full ({str(error).splitlines()[0] if str(error) else 'out of memory'}).",
            "Lower Train batch size or Max resolution, or switch on Gradient checkpointing and Cache latents.",
        )
    if isinstance(error, KeyboardInterrupt):
        return Failed("interrupted", "Training was interrupted twice and ended without saving.", "Start it again.")
    if isinstance(error, OSError) and error.filename:
        return Failed(
            "file", f'"{error.filename}": {error.strerror}.', "Check the path, its permissions and the free space."
        )
    text = str(error).splitlines()
    return Failed(
        "crash",
        f"{type(error).__name__}: {text[0] if text else 'no message'}",
        "This is a defect of the program; the log has the whole trace.",
    )


def _log_to(run: Run) -> None:
    """Log to standard output, and into the run's log unless that is where standard output goes."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    here = os.fstat(sys.stdout.fileno())
    if not (run.log.exists() and os.path.samestat(here, run.log.stat())):
        handlers.append(logging.FileHandler(run.log, encoding="utf-8"))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S", handlers=handlers)
    logging.getLogger("httpx").setLevel(logging.WARNING)
