"""What is told of the steps: events, log, trackers; and of the ones that are left out."""

from __future__ import annotations

import logging
import math
import time

import torch

from trainer.errors import TrainingError
from trainer.events import Step, Warned
from trainer.forecast import Forecast
from trainer.paths import shown
from trainer.prepare import Session, memory_bytes

log = logging.getLogger(__name__)
EVENTS_EVERY_S = 0.5


class Reporter:
    """Turns steps into events without making the device wait in each: losses are fetched together.

    Speed is that of the training alone, since the start or the last pause for other work. The average
    loss is over about the last tenth of the steps, at least 10 and at most 200, also of those before a resume.
    """

    def __init__(self, session: Session, forecast: Forecast) -> None:
        self.s = session
        self.forecast = forecast
        self._waiting: list[tuple[int, torch.Tensor, dict[str, float]]] = []
        self._flushed = self._since = time.monotonic()
        self._steps = 0
        self._skipped = 0

    def add(self, step: int, loss: torch.Tensor, rates: dict[str, float]) -> None:
        """Take a step's result. Its event is written at most half a second after the step that follows."""
        if not self.s.team.leads:
            return
        self._waiting.append((step, loss, rates))
        if time.monotonic() - self._flushed > EVENTS_EVERY_S:
            self.flush()

    def forget(self) -> None:
        """Leave out what was not written yet: training goes on elsewhere."""
        self._waiting.clear()
        self._skipped = 0
        self.resume()

    def resume(self) -> None:
        """Time is measured anew from here."""
        self._flushed = self._since = time.monotonic()
        self._steps = 0

    def flush(self) -> None:
        """Write the events of all steps so far. Raises TrainingError at a loss that is not a number."""
        if not self._waiting:
            return
        losses = torch.stack([loss for _, loss, _ in self._waiting]).tolist()
        now = time.monotonic()
        self.forecast.stepped(len(losses), now - self._flushed)
        self._flushed = now
        self._steps += len(losses)
        speed = self._steps / max(1e-9, self._flushed - self._since)
        memory = memory_bytes(self.s.accelerator.device)
        for (step, _, rates), loss in zip(self._waiting, losses, strict=True):
            self._write(step, loss, rates, speed, memory)
        self._waiting.clear()

    def _write(self, step: int, loss: float, rates: dict[str, float], speed: float, memory: int) -> None:
        if not math.isfinite(loss):
            return self._skip(step, loss)
        self._skipped = 0
        average, seen = self.s.average
        seen += 1
        average += (loss - average) / min(seen, 200, max(10, seen / 10))
        self.s.average = average, seen
        length, epoch = self.s.length, self.s.length.epoch_of(step)
        left = self.forecast.seconds_left(step, length.total_steps)
        event = Step(
            step=step,
            total=length.total_steps,
            epoch=epoch,
            epochs=length.epochs,
            loss=loss,
            average_loss=average,
            unet_lr=rates.get("d*lr/unet", rates.get("unet")),
            text_encoder_lr=rates.get("d*lr/text_encoder", rates.get("text_encoder")),
            steps_per_s=round(speed, 4),
            seconds_left=None if left is None else round(left, 1),
            memory_bytes=memory,
        )
        self.s.emit(event)
        self.s.trackers.log({"loss/current": loss} | {f"lr/{name}": rate for name, rate in rates.items()}, step=step)
        log.info("step %d/%d  epoch %d  loss %.4f  %.2f steps/s", step, length.total_steps, epoch, loss, speed)

    def _skip(self, step: int, loss: float) -> None:
        """Tell of a step that was left out. Raises TrainingError when it was not, or was one too many."""
        s = self.s
        names = dict.fromkeys(shown(path) for n in s.length.batches_of(step) for path in s.feed.files(n))
        noun = "A weight behind" if math.isinf(loss) else "The loss or the gradient of"
        what = f"{noun} step {step} is not a number; its images: {', '.join(names)}."
        self._skipped += 1
        if self._skipped <= s.config.optim.most_skipped and not math.isinf(loss):
            s.emit(Warned(f"{what} It is left out.", "Look at these images; lower the learning rate if it comes back."))
            return
        raise TrainingError(
            "not_a_number",
            what + (f" {self._skipped} such steps in a row are too many." if self._skipped > 1 else ""),
            "Nothing of it was saved. Lower the learning rate, or set Mixed precision (mixed_precision) to bf16 or no, and "
            "go on from the last state or file. A single odd image: remove it, or raise Max skipped steps "
            "(max_skipped_steps).",
        )
