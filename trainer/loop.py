"""The training loop: what happens in a step, and what is due after it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch

from trainer import checkpoint, objective, optim
from trainer.data.feed import Batch
from trainer.errors import TrainingError
from trainer.events import Ended, Phase, Saved, Step
from trainer.prepare import Session, memory_bytes
from trainer.pictures import draw_samples
from trainer.randomness import set_torch_to

log = logging.getLogger(__name__)
EVENTS_EVERY_S = 0.5


def train(s: Session, requests: Callable[[], set[str]]) -> Ended:
    """Train to the end, or until a stop is requested. Every finished step is in the events."""
    began = time.monotonic()
    samples, saving = s.config.samples, s.config.saving
    sampling = bool(s.prompts) and bool(samples.every_n_steps or samples.every_n_epochs)
    s.network.attach()
    report = Reporter(s)
    if sampling:
        draw_samples(s, 0)
    s.emit(Phase("training", 0, s.length.total_steps))
    batches = s.feed.batches(range(s.length.total_batches))
    step, path = 0, None
    for step in range(1, s.length.total_steps + 1):
        epoch, epochs_done = s.length.epoch_of(step), s.length.epochs_done(step)
        loss, rates = take_step(s, step, batches)
        report.add(step, epoch, loss, rates)

        last = step == s.length.total_steps
        epoch_ended = epochs_done > s.length.epochs_done(step - 1)
        asked = requests()
        if not last and epoch_ended and saving.every_n_epochs and epochs_done % saving.every_n_epochs == 0:
            report.flush()
            save(s, step, epoch, checkpoint.file_name(saving.name, epoch=epochs_done))
        if not last and (asked & {"save", "stop"} or (saving.every_n_steps and step % saving.every_n_steps == 0)):
            report.flush()
            path = save(s, step, epoch, checkpoint.file_name(saving.name, step=step))
        due = (samples.every_n_steps and step % samples.every_n_steps == 0) or (
            epoch_ended and samples.every_n_epochs and epochs_done % samples.every_n_epochs == 0
        )
        if s.prompts and ("sample" in asked or due):
            report.flush()
            draw_samples(s, step)
            report.resume()
        if "stop" in asked:
            break

    report.flush()
    done = step == s.length.total_steps
    if done:
        path = save(s, step, s.length.epoch_of(step), checkpoint.file_name(saving.name), final=True)
    s.network.detach()
    s.accelerator.end_training()
    return Ended("done" if done else "stopped", step, str(path), round(time.monotonic() - began, 1))


def take_step(s: Session, step: int, batches: Iterator[Batch]) -> tuple[torch.Tensor, dict[str, float]]:
    """One optimizer step over `accumulation` batches. Returns its mean loss and the rates it used."""
    if stops_text_encoder(s, step):
        for parameter in s.network.parameters_of("text_encoder"):
            parameter.requires_grad_(False)
    numbers = s.length.batches_of(step)
    total = torch.zeros((), device=s.accelerator.device)
    for number in numbers:
        set_torch_to(s.seed, "noise", number)
        loss = batch_loss(s, next(batches)) / len(numbers)
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


def save(s: Session, step: int, epoch: int, name: str, *, final: bool = False) -> str:
    """Write the LoRA as it is now. Returns its path."""
    s.emit(Phase(f"saving {name}"))
    path = s.output / name
    title = name.removesuffix(".safetensors")
    checkpoint.save_lora(path, s.network, s.config.saving.precision, s.description.at(step, epoch, title))
    log.info("saved %s", path)
    s.emit(Saved(str(path), step, epoch, "final" if final else "intermediate"))
    s.emit(Phase("training", step, s.length.total_steps))
    return str(path)


class Reporter:
    """Turns steps into events without making the device wait in each: losses are fetched together.

    Raises TrainingError at the first loss that is not a number.
    """

    def __init__(self, session: Session) -> None:
        self.s = session
        self._waiting: list[tuple[int, int, torch.Tensor, dict[str, float]]] = []
        self._flushed = self._since = time.monotonic()
        self._steps = 0

    def add(self, step: int, epoch: int, loss: torch.Tensor, rates: dict[str, float]) -> None:
        self._waiting.append((step, epoch, loss, rates))
        if time.monotonic() - self._flushed > EVENTS_EVERY_S:
            self.flush()

    def resume(self) -> None:
        """Time spent on pictures does not count as training time."""
        self._since, self._steps = time.monotonic(), 0

    def flush(self) -> None:
        """Emit the events of all steps that were made."""
        if not self._waiting:
            return
        losses = torch.stack([loss for _, _, loss, _ in self._waiting]).tolist()
        now = time.monotonic()
        self._steps += len(losses)
        speed = self._steps / max(1e-9, now - self._since)
        memory = memory_bytes(self.s.accelerator.device)
        for (step, epoch, _, rates), loss in zip(self._waiting, losses, strict=True):
            if loss != loss or abs(loss) == float("inf"):
                raise TrainingError(
                    "not_a_number",
                    f"The loss of step {step} is {loss}, so the weights are ruined from there on.",
                    "Lower the learning rate, or set Mixed precision to bf16 or no; then start from the last good file.",
                )
            self.s.emit(
                Step(
                    step=step,
                    total=self.s.length.total_steps,
                    epoch=epoch,
                    epochs=self.s.length.epochs,
                    loss=loss,
                    unet_lr=rates.get("unet"),
                    text_encoder_lr=rates.get("text_encoder"),
                    steps_per_s=round(speed, 4),
                    memory_bytes=memory,
                )
            )
            values = {"loss/current": loss} | {f"lr/{name}": rate for name, rate in rates.items()}
            self.s.accelerator.log(values, step=step)
            log.info("step %d/%d  epoch %d  loss %.4f  %.2f steps/s", step, self.s.length.total_steps, epoch, loss, speed)
        self._waiting.clear()
        self._flushed = now
