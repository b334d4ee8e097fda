"""Starting the trainer, stopping it, and finding runs again, from their folders alone.

A trainer is a process of its own that outlives the page. All that the page knows of a run it reads
from the run's folder, so that a second page or a restarted server knows as much.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

import psutil

from gui import history
from trainer import events, kohya
from trainer.errors import Problem
from trainer.run import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, Run, new_run, write_whole

State = Literal["queued", "starting", "running", "stopping", "stopped", "done", "crashed"]
ALIVE = ("starting", "running", "stopping")

ANSWER_TIMEOUT_S = 180
TRIAL_TIMEOUT_S = 900
TRIAL = "--trial"
LEAST_MEMORY_KEYS = ("train_batch_size", "max_resolution", "gradient_checkpointing", "cache_latents")

if os.name == "nt":
    import msvcrt

    def _hold(file: IO[bytes]) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)

else:
    import fcntl

    def _hold(file: IO[bytes]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX)


_ID = re.compile(r"\d{8}-\d{6}-[\w.-]+")


class BusyError(Exception):
    """This cannot be done with a run as it stands: mostly because one is going on. The message says which."""


@dataclass(frozen=True)
class Cause:
    """Why a run ended early, in plain words; `keys` are the controls that may help."""

    title: str
    message: str
    hint: str
    keys: tuple[str, ...] = ()


class Runs:
    """The runs in one folder.

    `root` is where the trainer works, so that a preset's paths may be relative to it; `trainer` is
    its command, to which `check` and `train` are added.
    """

    def __init__(self, folder: Path, root: Path, trainer: Sequence[str]) -> None:
        self.folder = folder
        self.root = root
        self.trainer = tuple(trainer)
        self._trials: list[subprocess.Popen[bytes]] = []

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside a with block no other thread, and no other server of this folder, starts, queues or deletes a run.

        The system lets go of the lock when its holder dies.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "ab") as file:
            _hold(file)
            yield

    def ids(self) -> list[str]:
        """Newest first."""
        found = []
        try:
            for entry in os.scandir(self.folder):
                if _ID.fullmatch(entry.name) and entry.is_dir():
                    with suppress(FileNotFoundError):  # the queue gives a run that begins another name
                        found.append((entry.name[:15], entry.stat().st_mtime, entry.name))
        except FileNotFoundError:
            return []
        return [name for _, _, name in sorted(found, reverse=True)]

    def find(self, run_id: str) -> Run | None:
        """The run of that id; the newest that was started for ""; None if there is none."""
        if not run_id:
            run_id = next((name for name in self.ids() if _was_started(Run(self.folder / name))), "")
        return Run(self.folder / run_id) if _ID.fullmatch(run_id) and (self.folder / run_id).is_dir() else None

    def active(self) -> Run | None:
        """The run that is going on."""
        runs = (Run(self.folder / run_id) for run_id in self.ids())
        return next((run for run in runs if not run.exit.exists() and state(run) in ALIVE), None)

    def only_idle(self) -> None:
        """Raises BusyError while a run goes on."""
        if active := self.active():
            raise BusyError(f"{active.folder.name} is still going on. Stop it first, or wait for its end.")

    def trial(self, values: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
        """What `check` tells, and under "trial" what three steps and a picture took where nothing is wrong.

        Raises BusyError while a run goes on, beside which memory and time would be others.
        """
        if active := self.active():
            raise BusyError(f"{active.folder.name} is still going on, and would be measured too. Wait for its end.")
        return self.check(values, kept, TRIAL)

    def end_trials(self) -> None:
        """End what `trial` waits for; it answers with no problem and no measurement then."""
        for process in list(self._trials):
            process.terminate()

    def check(self, values: Mapping[str, Any], kept: Mapping[str, Any], *options: str) -> dict[str, Any]:
        """What the trainer finds wrong with the settings: {"problems": […], "notes": […], "summary": {…}}."""
        return {"notes": [], "summary": {}, **self.told("check", values, kept, *options)}

    def told(self, command: str, values: Mapping[str, Any], kept: Mapping[str, Any], *options: str) -> dict[str, Any]:
        """What a command of the trainer answers to the settings in JSON; that it could not is among its `problems`."""
        with tempfile.TemporaryDirectory(prefix="lorawright-") as folder:
            preset = Path(folder) / "preset.json"
            kohya.save(preset, values, kept)
            words = [*self.trainer, command, str(preset), "--json", *options]
            timeout = TRIAL_TIMEOUT_S if TRIAL in options else ANSWER_TIMEOUT_S
            pipe = subprocess.PIPE
            process = subprocess.Popen(words, cwd=self.root, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)  # noqa: S603
            if TRIAL in options:
                self._trials.append(process)
            try:
                stdout, stderr = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                return _broken(command, f"It took more than {timeout} s and was ended.")
            finally:
                if TRIAL in options:
                    self._trials.remove(process)
        if TRIAL in options and process.returncode == -signal.SIGTERM:
            return {"problems": []}
        try:
            found = json.loads(stdout)
            found["problems"] = list(found["problems"])
        except (ValueError, TypeError, KeyError):
            found = None
        if process.returncode == -signal.SIGKILL:
            return _broken(command, "The system ended it, most likely because memory was full.")
        if found is None or process.returncode not in (EXIT_DONE, EXIT_CONFIG, EXIT_FAILED):
            lines = stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit code {process.returncode}"]
            return _broken(command, f"It failed itself: {lines[-1]}")
        return dict(found)

    def start(self, values: Mapping[str, Any], kept: Mapping[str, Any]) -> Run:
        """Start a trainer of its own on these settings. Raises BusyError while another run goes on."""
        with self.alone():
            self.only_idle()
            run = self.folder_for(values, kept)
            self.launch(run, str(values.get("wandb_api_key") or ""))
        return run

    def go_on(self) -> Run | None:
        """Start the newest run again where the machine was taken away under it; None where it was not.

        It goes on from its newest sound state; a run that has none does as its own settings say.
        """
        run = self.find("")
        if run is None or not interrupted(run) or self.active() is not None:
            return None
        preset = kohya.load(run.config)
        newest = history.newest_state(run)
        return self.start(preset.values | ({"resume": str(newest)} if newest else {}), preset.kept)

    def save_before_the_end(self) -> None:
        """Tell the run that goes on that the machine is taken away, and wait until it has saved and ended."""
        with self.alone():  # so that the queue starts nothing behind it
            active = self.active()
            process = active.process() if active else None
            if active is None or process is None:
                return
            process.terminate()
            if not _written_down(active, patience_s=None):
                psutil.wait_procs([process])

    def folder_for(self, values: Mapping[str, Any], kept: Mapping[str, Any]) -> Run:
        """A new run's folder, with its settings and nothing else."""
        run = new_run(self.folder, str(values.get("output_name") or "lora"))
        kohya.save(run.config, values, kept)
        return run

    def launch(self, run: Run, wandb_key: str) -> None:
        """Start a run's trainer, whose settings are in its folder. A trial gives way to it: a page that was left may have begun it."""
        self.end_trials()
        # The key is in no file: the trainer finds it where the wandb package looks for it.
        secrets = {"WANDB_API_KEY": wandb_key} if wandb_key else {}
        launch(run, [*self.trainer, "train", str(run.config), "--run", str(run.folder)], self.root, secrets)

    def delete(self, run: Run) -> history.Rest:
        """Delete what a run wrote into its folder. Raises BusyError while it lives, or where a link leads elsewhere."""
        if run.folder.is_symlink():
            raise BusyError(f"{run.folder.name} is a link to a folder elsewhere, where nothing is deleted from here.")
        with self.alone():
            if state(run) in (*ALIVE, "queued") or run.process() is not None:
                raise BusyError(f"{run.folder.name} is not over. Stop it first.")
            exit_code(run)  # is being written for a moment after the end
            return history.delete(run)

    def summary(self, run_id: str) -> dict[str, Any]:
        """One line of the list of runs."""
        run = Run(self.folder / run_id)
        tail = events.last(run.events)
        step = next((e for e in reversed(tail) if e["type"] == "step"), None)
        now = state(run, tail)
        return {
            "id": run_id,
            "state": now,
            "name": run_id[16:],
            "began": began(run),
            "step": step["step"] if step else 0,
            "total": step["total"] if step else 0,
            "loss": step.get("average_loss") if step else None,
            "sweep": run.sweep.read_text() if run.sweep.exists() else "",
            "files": sum(one.what != "state" for one in history.saved(run)),
            "origin": origin[0].folder.name if (origin := history.origin(run)) else "",
            "stranded": history.stranded(run) if now in ("stopped", "crashed") else None,
        }


def launch(run: Run, command: Sequence[str], folder: Path, secrets: Mapping[str, str] | None = None) -> None:
    """Start a process of its own that outlives the page; what it prints, its id and its end go to the run's folder."""
    with run.log.open("ab") as log:
        process = subprocess.Popen(  # noqa: S603
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", **(secrets or {})},
        )
    _write_pid(run, process.pid)
    waiter = threading.Thread(target=_await_exit, args=(run, process), name=f"exit of {run.folder.name}", daemon=True)
    _waiters[run.folder] = waiter
    waiter.start()


def _was_started(run: Run) -> bool:
    """Whether a run was; not while its folder is being made, or it waits in the queue."""
    return any(file.exists() for file in (run.pid, run.events, run.exit))


def began(run: Run) -> float:
    """When the run was started (Unix seconds)."""
    return (run.config if run.config.exists() else run.folder).stat().st_mtime


def _broken(command: str, message: str) -> dict[str, Any]:
    return {"problems": [asdict(Problem("", f"trainer {command}", message))]}


def _write_pid(run: Run, pid: int) -> None:
    try:
        started = psutil.Process(pid).create_time()
    except psutil.Error:
        return
    write_whole(run.pid, json.dumps({"pid": pid, "started": started}).encode())


_waiters: dict[Path, threading.Thread] = {}
"""By the folder of a run that this server started: who writes down how it ended, a moment after it has."""


def _await_exit(run: Run, process: subprocess.Popen[bytes]) -> None:
    try:
        write_whole(run.exit, json.dumps({"code": process.wait()}).encode())
    except FileNotFoundError:
        if run.folder.exists():  # else the run was deleted while its process ended
            raise
    finally:
        if _waiters.get(run.folder) is threading.current_thread():
            del _waiters[run.folder]


def _written_down(run: Run, patience_s: float | None) -> bool:
    """Wait until the exit of a run that this server started is in its folder. False for another server's run."""
    waiter = _waiters.get(run.folder)
    if waiter:
        waiter.join(patience_s)
    return waiter is not None


def exit_code(run: Run) -> int | None:
    """An ended trainer's exit code, negative for a signal; None when no page was there to see it."""
    _written_down(run, patience_s=1)
    try:
        return int(json.loads(run.exit.read_text())["code"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def kill(run: Run) -> None:
    """End a trainer that does not stop, and what it started. Nothing is saved."""
    process = run.process()
    if process is None:
        return
    try:
        family = [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return
    write_whole(run.killed, b"")
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    # Whoever waits for a child takes its exit code away from all others, and it is to be written down.
    if _written_down(run, patience_s=10):
        family.remove(process)
    psutil.wait_procs(family, timeout=10)


def stop_asked(run: Run) -> float | None:
    """When the run was asked to stop (Unix seconds); None if it was not."""
    try:
        if b"stop" in run.control.read_bytes().split():
            return run.control.stat().st_mtime
    except FileNotFoundError:
        pass
    return None


def state(run: Run, tail: Sequence[Mapping[str, Any]] | None = None) -> State:
    """What a run is doing, by its events, its process and what was asked of it."""
    if tail is None:
        tail = events.last(run.events)
    for event in reversed(tail):
        if event["type"] == "ended":
            return "stopped" if event["status"] == "stopped" else "done"
        if event["type"] == "failed":
            return "crashed"
    if run.queued.exists() and not run.pid.exists():
        return "queued"
    if run.process() is None:
        return "stopped" if exit_code(run) == EXIT_STOPPED else "crashed"
    if stop_asked(run) is not None:
        return "stopping"
    return "running" if any(event["type"] == "step" for event in tail) else "starting"


def interrupted(run: Run) -> bool:
    """Whether a run was ended by the system (SIGTERM), or vanished together with whoever started it."""
    tail = events.last(run.events)
    ended = next((event for event in reversed(tail) if event["type"] in ("ended", "failed")), None)
    if ended is not None:
        return ended.get("by") == "SIGTERM"
    gone = state(run, tail) == "crashed" and not run.killed.exists()
    return gone and exit_code(run) in (None, -signal.SIGTERM)


def cause(run: Run, failed: Mapping[str, Any] | None) -> Cause:
    """Why a crashed run ended: its own word for it, else its exit code or signal."""
    if failed is not None:
        kind = str(failed["kind"])
        title = "Unexpected error" if kind == "crash" else kind.replace("_", " ").capitalize()
        keys = LEAST_MEMORY_KEYS if kind == "out_of_memory" else ()
        return Cause(title, str(failed["message"]), str(failed["hint"]), keys)
    if run.killed.exists():
        return Cause("Killed", "The trainer was killed from this page; the step it was in is not saved.", "")
    code = exit_code(run)
    if code is None:
        return Cause(
            "Ended without a word",
            "The trainer's process is gone and left no reason: the machine was restarted, or it ran out of memory.",
            "If it happens again at the same place, try settings that need less memory.",
            LEAST_MEMORY_KEYS,
        )
    if code < 0:
        return _by_signal(-code)
    if code == EXIT_CONFIG:
        return Cause("Settings refused", _last_line(run), "Check names every control that is wrong.")
    return Cause(
        f"Exit code {code}", _last_line(run) or "The trainer ended without a word.", "The log has the details."
    )


def _by_signal(number: int) -> Cause:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "unknown"
    title = f"Signal {number} ({name})"
    if name == "SIGKILL":
        return Cause(
            title,
            "Something outside ended the trainer at once: most often the system, because memory ran out.",
            "Try settings that need less memory.",
            LEAST_MEMORY_KEYS,
        )
    if name in ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE"):
        return Cause(
            title,
            "A native library crashed (a driver, PyTorch or an attention kernel).",
            'Set CrossAttention to "sdpa" and try again; the log may name the library.',
            ("xformers",),
        )
    return Cause(title, "The trainer was ended from outside before it could save.", "Start it again.")


def _last_line(run: Run) -> str:
    try:
        with run.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
    except FileNotFoundError:
        return ""
    return lines[-1].strip() if lines else ""
