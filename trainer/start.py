"""`python -m trainer train`: the run's folder, its log, its signals, and how it ends."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from trainer import kohya, processes, state
from trainer.check import problems
from trainer.errors import ConfigError, LorawrightError, Problem, StateError, Stopped
from trainer.events import Ended, Event, EventLog, Failed, Phase, Started, Warned
from trainer.run import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, Run, new_run
from trainer.schema import Config, parse
from trainer.schema.memory import full, is_memory

log = logging.getLogger("trainer")


class Requests:
    """What is asked of the trainer, by the control file or by a signal."""

    def __init__(self, run: Run, *, listens: bool = True) -> None:
        self.run = run
        self._listens = listens
        self._offset = run.control.stat().st_size if run.control.exists() else 0
        self._waiting: set[str] = set()
        self.signal = ""
        """That asked for the stop, by name."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        log.info("%s: stopping after this step", signal.Signals(number).name)
        if "stop" in self._waiting and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._waiting.add("stop")
        self.signal = signal.Signals(number).name

    def _read(self) -> None:
        if not self._listens:  # another process does
            return
        words, self._offset = self.run.requests(self._offset)
        self._waiting.update(words)

    def take(self) -> set[str]:
        """What was asked since the last look; a stop stays asked for."""
        self._read()
        taken = set(self._waiting)
        self._waiting &= {"stop"}
        return taken

    def check(self) -> None:
        """Raise Stopped if a stop was asked for: called wherever work outside the steps takes long."""
        self._read()
        if "stop" in self._waiting:
            raise Stopped


def train(preset: kohya.Preset, folder: Path | None) -> int:
    """Train in `folder` (default: a new one in runs/). Returns the process's exit code.

    Whatever happens ends in an event: `ended`, or `failed` with the cause and what to change.
    """
    place = processes.here()
    if place.count > 1:  # started by a launcher, which knows how many there are
        preset = kohya.overridden(preset, ["--num_processes", str(place.count)])
        if folder is None:
            print("Several processes need the run's folder, the same for all: --run FOLDER.", file=sys.stderr)
            return EXIT_CONFIG
        if place.rank:
            return follow(preset, Run(folder.resolve()), place)
    checked = problems(preset, decode=False, runs=folder.resolve().parent if folder else Path("runs"))
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
    kohya.save(run.config, preset.values, preset.kept)  # also over those of a former start in this folder
    events = EventLog(run.events)
    requests = Requests(run)
    training = checked.config.training

    def lost(failed: Failed | None) -> None:
        log.critical("%s", failed)
        events.emit(failed or Failed("process_lost", "One of the processes ended."))
        os._exit(EXIT_FAILED)

    with (
        _logging_to(run),
        processes.followed(run, training.processes, training.gpus, preset.values, lost) as followers,
    ):
        log.info("run: %s", run.folder)
        if training.additional:
            log.info("additional parameters: %s", training.additional)
        for note in checked.notes:
            log.info("preset: %s", note)
        try:
            for problem in checked.problems:
                events.emit(Warned(str(problem)))
                log.warning("%s", problem)
            if checked.ended:
                final = checked.ended.folder.with_name(f"{checked.config.saving.name}.safetensors")
                events.emit(Ended("done", checked.ended.step, str(final) if final.exists() else "", 0.0))
                return EXIT_DONE
            return _train(checked.config, run, events, requests)
        except Stopped:
            step = _resumed_step(checked.config, run)
            what = f"stopped behind step {step}, where it went on from" if step else "stopped before the first step"
            log.info("%s; there is nothing new to save", what)
            events.emit(Ended("stopped", step, "", 0.0, requests.signal))
            return EXIT_STOPPED
        except BaseException as error:
            others = followers.cause() if isinstance(error, RuntimeError) and not is_memory(error) else None
            failed = others or explain(error, checked.config)
            trace = not others and not isinstance(error, LorawrightError)
            log.critical("%s %s", failed.message, failed.hint, exc_info=trace)
            try:
                events.emit(failed)
            except OSError as full:  # the page then tells of the log's last line and the exit code
                print(f"This could not be written to {run.events}: {full}", file=sys.stderr)
            return EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED


def follow(preset: kohya.Preset, run: Run, place: processes.Place) -> int:
    """Be one of a training's processes but the first, which alone writes and tells. Returns the exit code."""
    logging.basicConfig(format=f"process {place.rank + 1}: %(message)s", level=logging.ERROR, stream=sys.stdout)
    requests = Requests(run, listens=False)
    config = Config()
    try:
        config = parse(preset.values)
        if config.training.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = config.training.gpus
        from trainer.loop import train as loop
        from trainer.prepare import prepare

        loop(prepare(config, run, lambda event: None), requests.take)
    except BaseException as error:
        time.sleep(1)  # where the error is that the first process is gone, this one ends meanwhile
        failed = explain(error, config)
        processes.write_down(run, place.rank, failed)
        log.critical("%s", failed.message, exc_info=not isinstance(error, LorawrightError))
        return EXIT_FAILED
    finally:
        processes.leave()
    return EXIT_DONE


def _train(config: Config, run: Run, events: EventLog, requests: Requests) -> int:
    def emit(event: Event) -> None:
        events.emit(event)
        if isinstance(event, Warned):
            log.warning("%s %s", event.message, event.hint)
        elif isinstance(event, Phase) and event.name != "training" and event.done in (0, event.total):
            log.info("%s%s", event.name, f" {event.done}/{event.total}" if event.total else "")

    emit(Phase("loading PyTorch"))
    from trainer.loop import train as loop
    from trainer.prepare import prepare

    session = prepare(config, run, emit, requests.check)
    length, pictures = session.length, session.feed.pictures
    emit(
        Started(
            name=session.config.saving.name,
            family=session.model.family.name,
            device=str(session.accelerator.device),
            precision=session.precision,
            images=len(pictures),
            batches_per_epoch=length.batches_per_epoch,
            epochs=length.epochs,
            total_steps=length.total_steps,
            first_step=session.first_step,
            seed=session.seed,
            resumed=str(session.resumed.folder.absolute()) if session.resumed else "",
        )
    )
    log.info(
        "images: %d, batches an epoch: %d, epochs: %d, steps in all: %d",
        len(pictures),
        length.batches_per_epoch,
        length.epochs,
        length.total_steps,
    )
    ended = loop(session, requests.take)
    if ended.status == "stopped":
        ended = replace(ended, by=requests.signal)
    events.emit(ended)
    log.info("%s after step %d: %s", ended.status, ended.step, ended.path)
    return EXIT_DONE if ended.status == "done" else EXIT_STOPPED


def _resumed_step(config: Config, run: Run) -> int:
    """The step of the state that the run began from; 0 without one."""
    try:
        past = state.resumed(config, run.folder.parent)
    except StateError as error:
        log.warning("%s", error)
        return 0
    return past[0].step if past else 0


def _refused(found: Sequence[Problem]) -> Failed:
    text = "; ".join(str(p) for p in found if p.severity == "error")
    return Failed("config", text, "Correct the settings and start again.")


def explain(error: BaseException, config: Config) -> Failed:
    """The cause of a failure in plain words, and what to change of the settings."""
    if isinstance(error, LorawrightError):
        return Failed(error.kind, error.message, error.hint)
    if is_memory(error):
        return Failed("out_of_memory", *full(error, config))
    if isinstance(error, KeyboardInterrupt):
        return Failed("interrupted", "Training was interrupted twice and ended without saving.", "Start it again.")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f' for "{error.filename}"' if error.filename else ""
        return Failed("disk_full", f"There is no room on the disk{where}.", "Free some space and start again.")
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


@contextmanager
def _logging_to(run: Run) -> Iterator[None]:
    """Log to standard output, and to the run's log unless that is where standard output goes."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if not _is_standard_output(run.log):
        handlers.append(logging.FileHandler(run.log, encoding="utf-8"))
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", datefmt="%H:%M:%S"))
        root.addHandler(handler)
    try:
        yield
    finally:
        root.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


def _is_standard_output(path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(sys.stdout.fileno()), path.stat())
    except (OSError, ValueError):
        return False
