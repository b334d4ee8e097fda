"""Loss, rates and samples for TensorBoard and Weights & Biases.

A tracker is a guest: one that fails is reported and left out, and training goes on.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
from PIL.Image import Image

from trainer.events import Event, Warned
from trainer.paths import resolve
from trainer.run import Run
from trainer.schema import PARAMETERS, Config

log = logging.getLogger(__name__)
PROJECT = "lorawright"
WANDB_TIMEOUT_S = 30
HANGS_AFTER_S = 60.0


@dataclass(frozen=True)
class Shown:
    """A sample picture; `index` is its prompt's place among the prompts, from 0."""

    index: int
    prompt: str
    image: Image


class Tracker(Protocol):
    name: str

    def log(self, values: Mapping[str, float], step: int) -> None: ...
    def show(self, pictures: Sequence[Shown], step: int) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in a folder. The prompt is part of a picture's tag."""

    name = "TensorBoard"

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._writer = SummaryWriter(str(folder), flush_secs=10)
        if settings:
            self._writer.add_text("settings", "```\n" + json.dumps(dict(settings), indent=2) + "\n```")

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def show(self, pictures: Sequence[Shown], step: int) -> None:
        for picture in pictures:
            tag = f"sample_{picture.index + 1}/{picture.prompt[:200]}"
            self._writer.add_image(tag, np.asarray(picture.image), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run at wandb.ai, or the same in a folder. The prompt is a picture's caption.

    Nothing of the machine is told but its load: no command line, no paths, no source, no log.
    """

    name = "Weights & Biases"

    def __init__(self, config: Config, folder: Path, settings: Mapping[str, Any], online: bool) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        tracking = config.tracking
        self._run = wandb.init(
            project=tracking.project or PROJECT,
            name=tracking.wandb_run or config.saving.name,
            dir=str(folder),
            config=dict(settings),
            mode="online" if online else "offline",
            settings=wandb.Settings(
                # wandb.login would write the key to ~/.netrc.
                api_key=tracking.wandb_key or None,
                console="off",
                disable_git=True,
                save_code=False,
                silent=True,
                x_disable_meta=True,
                x_save_requirements=False,
                init_timeout=WANDB_TIMEOUT_S,
            ),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def show(self, pictures: Sequence[Shown], step: int) -> None:
        import wandb

        named = {f"sample_{p.index + 1}": wandb.Image(p.image, caption=p.prompt) for p in pictures}
        self._run.log(named, step=step)

    def close(self) -> None:
        self._run.finish()


def _silent() -> TimeoutError:
    return TimeoutError(f"it did not answer for {HANGS_AFTER_S:g} s")


class _Caller:
    """A tracker in a thread of its own, which makes its calls in order, so that one that hangs holds up nothing."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.error: Exception | None = None
        self._tracker: Tracker | None = None
        self._calls: SimpleQueue[tuple[Callable[[], None], threading.Event]] = SimpleQueue()
        self._since: float | None = None
        # As a daemon it does not keep the process from its end.
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def make(self, make: Callable[[], Tracker]) -> None:
        def made() -> None:
            self._tracker = make()

        self._await(self._call(made))

    def call(self, act: Callable[[Tracker], None], *, wait: bool = False) -> None:
        def acted() -> None:
            assert self._tracker is not None
            act(self._tracker)

        done = self._call(acted)
        if wait:
            self._await(done)

    def _call(self, act: Callable[[], None]) -> threading.Event:
        done = threading.Event()
        self._calls.put((act, done))
        return done

    def _await(self, done: threading.Event) -> None:
        if not done.wait(HANGS_AFTER_S) and self.error is None:
            self.error = _silent()

    def trouble(self) -> Exception | None:
        """Why it is of no use any more, if it is not."""
        if self.error is None and self._since is not None and time.monotonic() - self._since >= HANGS_AFTER_S:
            return _silent()
        return self.error

    def _work(self) -> None:
        while True:
            act, done = self._calls.get()
            if self.error is None:
                self._since = time.monotonic()
                try:
                    act()
                except Exception as error:  # whatever a tracker does, training is not its business
                    self.error = error
                self._since = None
            done.set()


class Trackers:
    """Those that were asked for and work."""

    def __init__(self, emit: Callable[[Event], None], secret: str = "") -> None:
        self._emit, self._secret = emit, secret
        self._working: list[_Caller] = []

    def start(self, name: str, make: Callable[[], Tracker]) -> bool:
        """Take a tracker in. Returns whether it works."""
        caller = _Caller(name)
        caller.make(make)
        if trouble := caller.trouble():
            self._report(name, trouble)
            return False
        self._working.append(caller)
        return True

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers under their names."""
        self._each(lambda tracker: tracker.log(values, step))

    def show(self, pictures: Sequence[Shown], step: int) -> None:
        """Write sample pictures with their prompts."""
        self._each(lambda tracker: tracker.show(pictures, step))

    def close(self) -> None:
        """Finish the files and uploads; one that takes too long is left to itself."""
        self._each(lambda tracker: tracker.close(), wait=True)
        self._working.clear()

    def _each(self, act: Callable[[Tracker], None], *, wait: bool = False) -> None:
        for caller in list(self._working):
            if not caller.trouble():
                caller.call(act, wait=wait)
            if trouble := caller.trouble():
                self._working.remove(caller)
                self._report(caller.name, trouble)

    def _report(self, name: str, error: Exception) -> None:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        text = text.replace(self._secret, "…") if self._secret else text
        self._emit(Warned(f"{name} does not work: {text}", "Training goes on without it."))


def start(config: Config, run: Run, emit: Callable[[Event], None]) -> Trackers:
    """The trackers that the settings name, each with its folder."""
    tracking, logging_dir = config.tracking, config.folders.logging
    folder = resolve(logging_dir) if logging_dir else run.logs
    trackers = Trackers(emit, tracking.wandb_key)
    settings = _settings(config) if tracking.with_settings else {}
    if tracking.trackers in ("tensorboard", "all") or (logging_dir and not tracking.trackers):
        board = folder / (tracking.project or PROJECT) / run.folder.name
        trackers.start(TensorBoard.name, lambda: TensorBoard(board, settings))
    if tracking.trackers in ("wandb", "all"):
        _start_wandb(trackers, config, folder, settings, emit)
    return trackers


def _start_wandb(
    trackers: Trackers, config: Config, folder: Path, settings: Mapping[str, Any], emit: Callable[[Event], None]
) -> None:
    """Online where there is a key and the server answers; else in a folder."""

    def made(online: bool) -> WeightsAndBiases:
        return WeightsAndBiases(config, folder, settings, online)

    offline = os.environ.get("WANDB_MODE") == "offline" or not _has_key(config)
    if not offline and trackers.start(WeightsAndBiases.name, lambda: made(online=True)):
        return
    if trackers.start(WeightsAndBiases.name, lambda: made(online=False)):
        why = "is offline" if offline else "cannot be reached"
        emit(
            Warned(
                f"Weights & Biases {why}; the run is kept in {folder / 'wandb'}.",
                "`wandb sync` uploads it. To upload while training, enter WANDB API Key (wandb_api_key).",
            )
        )


def _has_key(config: Config) -> bool:
    """Whether a key is in the form, in the environment, or where `wandb login` left it."""
    if config.tracking.wandb_key or os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    return bool(wandb.login(prompt=False, verify=False))


def _settings(config: Config) -> dict[str, Any]:
    """All settings by their preset keys, as JSON, without secrets."""
    return {
        key: json.loads(json.dumps(getattr(getattr(config, p.group), p.name), default=str))
        for key, p in PARAMETERS.items()
        if p.kind != "secret"
    }
