"""The training loop: what happens in a step, and what is due after it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Literal

import torch

from trainer import checkpoint, objective, optim
from trainer.data.feed import Batch
from trainer.errors import Stopped, TrainingError
from trainer.events import Ended, Phase, Saved, Step
from trainer.pictures import draw_samples
from trainer.prepare import Session, memory_bytes
from trainer.randomness import set_torch_to

log = logging.getLogger(__name__)
EVENTS_EVERY_S = 0.5


def train(s: Session, requests: Callable[[], set[str]]) -> Ended:
    """Train to the end, or until a stop is asked for. Every finished step is in the events.

    `requests` returns what was asked for since its last call: stop, save, sample.
    """
    began = time.monotonic()
    s.network.attach()
    if s.prompts and (s.config.samples.every_n_steps or s.config.samples.every_n_epochs):
        draw_samples(s, 0)
    s.emit(Phase("training", 0, s.length.total_steps))
    report = Reporter(s)
    batches = s.feed.batches(range(s.length.total_batches))
    step, path = 0, ""
    for step in range(1, s.length.total_steps + 1):
        loss, rates = take_step(s, step, batches)
        report.add(step, loss, rates)
        asked = requests()
        files, pictures = files_due(s, step, asked), samples_due(s, step, asked)
        if files or pictures:
            report.flush()
            for name in files:
                path = save(s, step, name)
            if pictures:
                with suppress(Stopped):  # asked for while drawing; the next step finds it again
                    draw_samples(s, step)
            report.resume()
        if "stop" in asked:
            break
    report.flush()
    s.network.detach()
    s.accelerator.end_training()
    status: Literal["done", "stopped"] = "done" if step == s.length.total_steps else "stopped"
    return Ended(status, step, path, round(time.monotonic() - began, 1))


def files_due(s: Session, step: int, asked: set[str]) -> list[str]:
    """The names of the files to write after a step."""
    saving = s.config.saving
    if step == s.length.total_steps:
        return [checkpoint.file_name(saving.name)]
    names = []
    epoch = epoch_ended(s, step)
    if epoch and divides(saving.every_n_epochs, epoch):
        names.append(checkpoint.file_name(saving.name, epoch=epoch))
    if asked & {"save", "stop"} or divides(saving.every_n_steps, step):
        names.append(checkpoint.file_name(saving.name, step=step))
    return names


def samples_due(s: Session, step: int, asked: set[str]) -> bool:
    """Whether pictures are to be drawn after a step; a stop does not wait for them."""
    settings, epoch = s.config.samples, epoch_ended(s, step)
    due = divides(settings.every_n_steps, step) or (epoch and divides(settings.every_n_epochs, epoch))
    return bool(s.prompts) and "stop" not in asked and bool(due or "sample" in asked)


def epoch_ended(s: Session, step: int) -> int:
    """The epoch that a step completed, counted from 1; 0 if none."""
    done = s.length.epochs_done(step)
    return done if done > s.length.epochs_done(step - 1) else 0


def divides(every: int, number: int) -> bool:
    """Whether something that is due every so often (0: never) is due now."""
    return every > 0 and number % every == 0


def take_step(s: Session, step: int, batches: Iterator[Batch]) -> tuple[torch.Tensor, dict[str, float]]:
    """One optimizer step over `accumulation` batches. Returns its mean loss and the rates it used."""
    if stops_text_encoder(s, step):
        for parameter in s.network.parameters_of("text_encoder"):
            parameter.requires_grad_(False)
    numbers = s.length.batches_of(step)
    total = torch.zeros((), device=s.accelerator.device)
    for number in numbers:
        batch = next(batches)
        set_torch_to(s.seed, "noise", number)
        loss = batch_loss(s, batch) / len(numbers)
        s.accelerator.backward(loss)
        total += loss.detach()
    if s.config.optim.max_grad_norm:
        s.accelerator.clip_grad_norm_(s.network.parameters(), s.config.optim.max_grad_norm)
    rates = optim.rates(s.optimizer, s.scheduler)
    s.optimizer.step()
    s.scheduler.step()
    s.optimizer.zero_grad(set_to_none=True)
    return total, rates


def batch_loss(s: Session, batch: Batch) -> torch.Tensor:
    """The mean loss of a batch under torch's present random state."""
    device, settings, schedule = s.accelerator.device, s.config.objective, s.model.schedule
    if batch.latents is not None:
        latents = batch.latents.to(device)
    else:
        assert batch.pixels is not None
        latents = s.model.encode(batch.pixels)
    with nullcontext() if any(p.requires_grad for p in s.network.parameters_of("text_encoder")) else torch.no_grad():
        states = s.model.text_states(s.model.tokens(batch.captions))
    noise = objective.noise_like(latents, settings)
    timesteps = objective.draw_timesteps(len(latents), schedule)
    noisy = schedule.add_noise(latents, noise, timesteps)
    prediction = s.model.predict(noisy, timesteps, states)
    wanted = objective.target(latents, noise, timesteps, schedule)
    weights = batch.weights.to(device)
    return objective.loss_per_image(prediction, wanted, timesteps, weights, schedule, settings).mean()


def stops_text_encoder(s: Session, step: int) -> bool:
    """Whether the text encoder's share of the steps is over before this one."""
    percent = s.config.optim.stop_text_encoder_percent
    return bool(percent) and step > s.length.total_steps * percent / 100


def save(s: Session, step: int, name: str) -> str:
    """Write the LoRA as it is now. Returns its path."""
    s.emit(Phase(f"saving {name}"))
    path, epoch = s.output / name, s.length.epoch_of(step)
    described = s.description.at(step, epoch, name.removesuffix(".safetensors"))
    checkpoint.save_lora(path, s.network, s.config.saving.precision, described)
    log.info("saved %s", path)
    s.emit(Saved(str(path), step, epoch, "final" if step == s.length.total_steps else "intermediate"))
    s.emit(Phase("training", step, s.length.total_steps))
    return str(path)


class Reporter:
    """Turns steps into events without making the device wait in each: losses are fetched together.

    Speed is that of the training alone, since the start or the last pause for other work.
    """

    def __init__(self, session: Session) -> None:
        self.s = session
        self._waiting: list[tuple[int, torch.Tensor, dict[str, float]]] = []
        self._flushed = self._since = time.monotonic()
        self._steps = 0

    def add(self, step: int, loss: torch.Tensor, rates: dict[str, float]) -> None:
        """Take a step's result. Its event is written at most half a second after the step that follows."""
        self._waiting.append((step, loss, rates))
        if time.monotonic() - self._flushed > EVENTS_EVERY_S:
            self.flush()

    def resume(self) -> None:
        """Time is measured anew from here."""
        self._flushed = self._since = time.monotonic()
        self._steps = 0

    def flush(self) -> None:
        """Write the events of all steps so far. Raises TrainingError at a loss that is not a number."""
        if not self._waiting:
            return
        losses = torch.stack([loss for _, loss, _ in self._waiting]).tolist()
        self._flushed = time.monotonic()
        self._steps += len(losses)
        speed = self._steps / max(1e-9, self._flushed - self._since)
        memory = memory_bytes(self.s.accelerator.device)
        for (step, _, rates), loss in zip(self._waiting, losses, strict=True):
            self._write(step, loss, rates, speed, memory)
        self._waiting.clear()

    def _write(self, step: int, loss: float, rates: dict[str, float], speed: float, memory: int) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                "not_a_number",
                f"The loss of step {step} is {loss}, so the weights are ruined from there on.",
                "Lower the learning rate, or set Mixed precision to bf16 or no; then start from the last good file.",
            )
        length, epoch = self.s.length, self.s.length.epoch_of(step)
        event = Step(
            step=step,
            total=length.total_steps,
            epoch=epoch,
            epochs=length.epochs,
            loss=loss,
            unet_lr=rates.get("unet"),
            text_encoder_lr=rates.get("text_encoder"),
            steps_per_s=round(speed, 4),
            memory_bytes=memory,
        )
        self.s.emit(event)
        self.s.accelerator.log({"loss/current": loss} | {f"lr/{name}": rate for name, rate in rates.items()}, step=step)
        log.info("step %d/%d  epoch %d  loss %.4f  %.2f steps/s", step, length.total_steps, epoch, loss, speed)
